"""The front door: the `trimtab` command, composed of each package's `cli.py`."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["compose", "main", "prepare_environment"]


def prepare_environment() -> Path:
    """Fix where state lives, before anything imports BentoML, which reads its folder only once."""
    home = Path(os.environ.get("TRIMTAB_HOME", ".trimtab")).absolute()
    os.environ["TRIMTAB_HOME"] = str(home)
    os.environ.setdefault("BENTOML_HOME", str(home / "bentoml"))
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("OTEL_SDK_DISABLED", "true")
    return home


def compose(app: typer.Typer) -> None:
    """Add every package's commands to the app."""
    from compression import cli as compression_cli
    from monitoring import cli as monitoring_cli
    from services import cli as services_cli

    compression_cli.register(app)
    services_cli.register(app)
    monitoring_cli.register(app, services_cli.report_context)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"trimtab {metadata.version('trimtab')}")
        raise typer.Exit


def _options(
    version: Annotated[  # the callback does it
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Ship compressed models without fear: prove, serve beside a shadow, watch, promote or roll back."""


def main() -> None:
    """Run the command line. Every error that is ours is one line on stderr and exit code 2."""
    prepare_environment()
    app = typer.Typer(
        name="trimtab",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    compose(app)
    from compression.errors import CompressionError
    from monitoring.errors import TrimtabError
    from services.errors import ServingError

    try:
        app()
    except (CompressionError, TrimtabError, ServingError, OSError) as error:
        print(f"trimtab: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("trimtab: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
