"""Virtual environments for what cannot or should not be installed beside Trimtab, one a peer, under .bench/."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.serving.processes import BenchmarkError, run

__all__ = ["PEERS", "describe", "prepare"]

PEERS = Path(__file__).parent / "peers"
"""Folder of their requirements, `<name>.txt`, and of what runs in them."""


def prepare(name: str, cache: Path, say: Callable[[str], None]) -> Path:
    """Make the environment of a peer, unless it is there with these very requirements; returns its `bin`.

    Raises:
        BenchmarkError: it does not install on this machine.
    """
    requirements = PEERS / f"{name}.txt"
    folder = cache / "venvs" / name
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    mark = folder / ".installed"
    if not (mark.exists() and mark.read_text() == wanted):
        say(f"installing {name} into {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        log = cache / "logs" / f"{name}-pip.log"
        try:
            run([sys.executable, "-m", "venv", str(folder)], log)
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            run([*pip, "--disable-pip-version-check", "--no-deps", "-r", str(requirements)], log)
        except BenchmarkError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        mark.write_text(wanted)
    return folder / "bin"


def describe(name: str, package: str, cache: Path) -> dict[str, Any]:
    """The pinned version of a peer's package and what its environment takes on disk."""
    pins = (PEERS / f"{name}.txt").read_text().splitlines()
    version = next((pin for pin in pins if pin.lower().startswith(package + "==")), package)
    files = (path for path in (cache / "venvs" / name).rglob("*") if path.is_file() and not path.is_symlink())
    return {"version": version, "disk_mb": round(sum(path.stat().st_size for path in files) / 1e6)}
