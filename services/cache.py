"""Answers to inputs that were seen before, kept for a while and up to so many bytes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b

import numpy as np
from cachetools import TTLCache

__all__ = ["AnswerCache"]

Outputs = tuple[np.ndarray, ...]

# What Python keeps beside the numbers, key and bookkeeping included: rounded up from what tracemalloc shows.
_ENTRY_BYTES = 500
_ARRAY_BYTES = 150
_LARGEST_SHARE = 10
# Kinds of dtypes whose bytes are their values: bool, integers, floats, complex, fixed-length strings, times.
_PLAIN = frozenset("biufcSUmM")


class AnswerCache:
    """A model's outputs by its exact inputs; the least recently used goes first. For one thread.

    Args:
        max_bytes: limit of the memory of all answers, with what Python adds. An answer of more than a tenth of it
            is not kept.
        ttl_s: how long an answer is kept.
        clock: seconds that never go back.
    """

    def __init__(self, max_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._answers: TTLCache[tuple[str, bytes], Outputs, float] = TTLCache(max_bytes, ttl_s, clock, _size)

    @staticmethod
    def key(inputs: Mapping[str, np.ndarray]) -> bytes:
        """16 bytes that stand for the names, dtypes, shapes and values of all inputs, in any order.

        Raises:
            TypeError: an input holds other objects than str.
        """
        digest = blake2b(digest_size=16)
        for name in sorted(inputs):
            for part in _parts(name, inputs[name]):
                # No two lists of parts are the same bytes, as each part says where it ends.
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        return digest.digest()

    def get(self, variant_tag: str, key: bytes) -> Outputs | None:
        """The variant's answer, as read-only arrays, or None."""
        return self._answers.get((variant_tag, key))

    def put(self, variant_tag: str, key: bytes, outputs: Outputs) -> None:
        """Keep a copy of the variant's answer, unless it is too large."""
        if _size(outputs) * _LARGEST_SHARE > self._max_bytes:
            return
        copies = tuple(np.array(output) for output in outputs)
        for copy in copies:
            copy.setflags(write=False)
        self._answers[variant_tag, key] = copies

    def clear(self) -> None:
        """Forget every answer."""
        self._answers.clear()

    @property
    def bytes(self) -> int:
        """Memory of the answers that are kept."""
        return int(self._answers.currsize)

    @property
    def entries(self) -> int:
        """Number of answers that are kept."""
        return len(self._answers)


def _parts(name: str, value: np.ndarray) -> Iterator[bytes]:
    yield _utf8(name)
    yield value.dtype.str.encode()
    yield np.array(value.shape, np.int64).tobytes()
    if value.dtype.kind in _PLAIN:
        yield value.tobytes()
    elif value.dtype == object and all(isinstance(item, str) for item in value.flat):
        yield from map(_utf8, value.flat)
    else:
        raise TypeError(f"input {name!r} holds neither numbers nor text")


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _size(outputs: Outputs) -> int:
    total = _ENTRY_BYTES + _ARRAY_BYTES * len(outputs)
    for output in outputs:
        total += output.nbytes
        if output.dtype == object:
            total += sum(sys.getsizeof(item) for item in output.flat)
    return total
