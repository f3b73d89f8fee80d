"""`trimtab ui`: Evidently's own user interface on the workspace that reports go to."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from services.serve import ServeError, check_port
from services.settings import Settings

__all__ = ["command_and_environment", "ui"]


def ui(
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Whoever reaches it can read and delete reports.")
    ] = "127.0.0.1",
) -> None:
    """Show the reports of all workloads in Evidently's user interface. Ctrl-C stops it."""
    command, environment = command_and_environment(Settings.from_env().workspace, host, port)
    check_port(host, port)
    print(f"loading Evidently (some 10 s), then on http://{host}:{port} (Ctrl-C stops)", flush=True)
    os.execve(command[0], command, environment)  # noqa: S606  # no shell; signals reach Evidently directly


def command_and_environment(workspace: Path, host: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The `evidently ui` command, and the environment in which it tells nobody that it runs.

    Raises:
        ServeError: no report has been added to the workspace.
    """
    if not any(workspace.glob("*/metadata.json")):
        raise ServeError(
            f"there is no report at {workspace} yet: the Monitor makes them while `trimtab serve` runs, and "
            "`trimtab report` does"
        )
    command = [sys.executable, "-m", "evidently.cli", "ui", "--workspace", str(workspace)]
    command += ["--host", host, "--port", str(port)]
    return command, dict(os.environ) | {"DO_NOT_TRACK": "1"}
