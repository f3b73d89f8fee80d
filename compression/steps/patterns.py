"""Shell-style patterns of names of layers, parameters and nodes."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def select(names: Iterable[str], pattern: str) -> list[str]:
    """The names that a pattern means, in their order; none if it matches nothing.

    `*`, `?` and `[...]` are those of the shell, and capitals count. Names from ONNX may have brackets of their own, as
    `layers[0]/MatMul`: brackets are plain characters if any name matches that way, and a choice of characters
    otherwise.
    """
    names = list(names)
    plain = pattern.replace("[", "[[]")
    return [name for name in names if fnmatchcase(name, plain)] or [
        name for name in names if fnmatchcase(name, pattern)
    ]
