"""A page of the docs with results in it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_between_marks"]

_BEGIN, _END = "<!-- results: begin -->", "<!-- results: end -->"


def write_between_marks(page: Path, text: str) -> None:
    """Put text between the page's two marks. Raises ValueError if it has none."""
    before, begin, rest = page.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{page} has no {_BEGIN} and {_END}")
    page.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}")
