"""Measurements on disk, kept as they come, and files that are never seen half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import JsonValue, ValidationError

from compression.analysis.types import Effect
from compression.cache import key_of
from compression.files import write_atomically

MEASUREMENTS = "measurements.json"
"""Name of the file in which measurements are kept between runs."""

E = TypeVar("E", bound=Effect)


def folder(home: Path, workload: str) -> Path:
    """Where the files of a workload's analysis are."""
    return home / workload / "analysis"


class Kept:
    """Measurements of earlier runs on the same model, data, sources, libraries and processor, in a file."""

    def __init__(self, path: Path, base: str, *, fresh: bool) -> None:
        self.path = path
        self.base = base
        self.entries: dict[str, Any] = {}
        if fresh:
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["base"] == base:
                self.entries = dict(content["entries"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # there is none, or it is damaged: all is measured anew

    def get(self, identity: dict[str, JsonValue], kind: type[E]) -> E | None:
        """What was measured under this identity, if it was."""
        entry = self.entries.get(key_of(identity))
        try:
            return None if entry is None else kind.model_validate(entry)
        except ValidationError:
            return None

    def put(self, identity: dict[str, JsonValue], found: Effect) -> None:
        """Keep a measurement; it is in the file when this returns."""
        self.entries[key_of(identity)] = found.model_dump(mode="json")
        write_atomically(self.path, json.dumps({"base": self.base, "entries": self.entries}).encode())
