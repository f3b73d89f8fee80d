"""The documents say what is true: their links lead somewhere, and their commands exist with the options shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.main import get_command

import trimtab

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    if ".trimtab" not in path.parts
)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
BLOCK = re.compile(r"```(?:sh|bash|console)?\n(.*?)```", re.S)


def _commands(program: str) -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        for block in BLOCK.findall(path.read_text()):
            for raw in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", raw.strip().removeprefix("$ "))
                line = line.removeprefix(".venv/bin/")
                if line.startswith(program + " "):
                    found.append((str(path.relative_to(ROOT)), line.split("  #")[0]))
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(path: Path) -> None:
    links = [
        link
        for link in LINK.findall(path.read_text())
        if "://" not in link and not link.startswith("mailto:")
    ]
    missing = [link for link in links if not (path.parent / link).exists()]
    assert missing == []


def test_the_readme_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize(("document", "line"), _commands("make"))
def test_every_make_target_in_the_documents_exists(document: str, line: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    words = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
    assert set(words) <= targets, document


@pytest.mark.parametrize(("document", "line"), _commands("trimtab"))
def test_every_trimtab_command_in_the_documents_parses(document: str, line: str) -> None:
    app = typer.Typer()
    trimtab.compose(app)
    command = get_command(app)
    words = shlex.split(re.sub(r"\[[^\]]*\]", "", line), comments=True)[1:]
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts}
    used = {word.split("=")[0] for word in words if word.startswith("-") and not re.fullmatch(r"-?\d+", word)}
    assert used <= options | {"--help"}, document
    assert not hasattr(command, "commands") or "--help" in used, f"{document}: no such command: {line}"
