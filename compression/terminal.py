"""Where the commands of this package write, and where they keep things."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def home() -> Path:
    """Where everything that was made is kept."""
    return Path(os.environ.get("TRIMTAB_HOME", ".trimtab"))


def console(stderr: bool = False) -> Console:
    """A terminal, or 140 columns where the output goes to a file or a pipe."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 140
    return made
