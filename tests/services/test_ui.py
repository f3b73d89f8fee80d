"""`trimtab ui`: what it starts, and what it says when it cannot."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from services import cli
from services.serve import ServeError
from services.settings import Settings

app = typer.Typer()
cli.register(app)


@pytest.fixture
def workspace(settings: Settings) -> Path:
    folder = settings.workspace / "some-project"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    return settings.workspace


def test_evidently_is_started_on_the_workspace_on_loopback_and_tells_nobody(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(
        os, "execve", lambda path, command, environment: started.append((command, environment))
    )
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    result = CliRunner().invoke(app, ["ui", "--port", "3399"])
    assert result.exit_code == 0, result.output
    [(command, environment)] = started
    where = ["--workspace", str(workspace), "--host", "127.0.0.1", "--port", "3399"]
    assert command == [sys.executable, "-m", "evidently.cli", "ui", *where]
    assert environment["DO_NOT_TRACK"] == "1"


def test_without_a_report_it_says_who_makes_them(settings: Settings) -> None:
    error = CliRunner().invoke(app, ["ui"]).exception
    assert isinstance(error, ServeError)
    assert "there is no report at" in str(error)
    assert "`trimtab report`" in str(error)


def test_a_port_that_is_taken_is_a_one_line_error(workspace: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = CliRunner().invoke(app, ["ui", "--port", str(port)]).exception
    assert isinstance(error, ServeError)
    assert "pass another --port" in str(error)
