"""The step cache: results of steps, kept between runs, so that the same beginning of a recipe is worked out once.

A result is found by what it was made from. Its key is the sha256 of the key of what came before, of the step with its
parameters, and of the recipe's seed. The first key stands for the full-precision variant, the workload's sources and
data, the sources of this package, the versions of the libraries that compute, and the processor. So there is nothing
to invalidate: what is made from something else has another key.

An entry is one file, numbers little-endian:

    8 bytes   TRIMTABS
    32 bytes  sha256 of all that follows
    4 bytes   length of the header
    header    JSON, see `_Header`
    parts     one after the other, in the header's order

Between torch steps the entry holds the whole network as `torch.save` pickles it, since the next step needs its layers
and not a traced program. Reading a pickle runs code, which is acceptable for this one use: the folder is the user's own
and closed to others, each file must belong to the user and be writable by nobody else, it never leaves the machine,
serving never reads it, and the workload's own code, which the pickle names, runs in the same process anyway.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import platform
import stat
import struct
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from compression.errors import CompressionError
from compression.variant import this_cpu

if TYPE_CHECKING:
    from compression.data import Data
    from compression.steps import Step
    from compression.variant import Variant

DEFAULT_BYTES = 4 << 30
"""Size of all entries together, unless TRIMTAB_CACHE_BYTES says otherwise."""

_MAGIC = b"TRIMTABS"
_FORMAT = 1
_LENGTH = struct.Struct("<I")
_START = len(_MAGIC) + hashlib.sha256().digest_size
_TEMPORARY = ".tmp-"
_ABANDONED_S = 3600.0
"""Age at which a half-written file is one that a killed process left."""

_LIBRARIES = (
    "constriction",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "scikit-learn",
    "scipy",
    "tensorly",
    "torch",
    "torch-pruning",
)
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
)
"""What the order of a sum, and with it the last bit of a weight, can depend on."""


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = _FORMAT
    parts: tuple[tuple[str, int], ...]
    facts: dict[str, JsonValue] = {}


@dataclass(frozen=True)
class Entry:
    """What is kept of a result.

    Attributes:
        parts: contents by name.
        facts: small values that belong to them, as JSON has them.
    """

    parts: Mapping[str, bytes]
    facts: Mapping[str, JsonValue] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file of this entry."""
        header = _Header(
            parts=tuple((name, len(content)) for name, content in self.parts.items()), facts=dict(self.facts)
        )
        text = header.model_dump_json().encode()
        body = b"".join((_LENGTH.pack(len(text)), text, *self.parts.values()))
        return _MAGIC + hashlib.sha256(body).digest() + body

    @classmethod
    def from_bytes(cls, content: bytes) -> Entry | None:
        """Read a file back; None for one that is damaged or of another version."""
        body = memoryview(content)[_START:]
        if not content.startswith(_MAGIC) or hashlib.sha256(body).digest() != content[len(_MAGIC) : _START]:
            return None
        try:
            (length,) = _LENGTH.unpack_from(body)
            at = _LENGTH.size + length
            header = _Header.model_validate_json(bytes(body[_LENGTH.size : at]))
        except (struct.error, ValidationError):
            return None
        parts = {}
        for name, size in header.parts:
            parts[name] = bytes(body[at : at + size])
            at += size
        return cls(parts, header.facts) if header.format == _FORMAT and at == len(body) else None


@dataclass(frozen=True)
class StepCache:
    """Results of steps in a folder; several processes may share it.

    Whatever is wrong with the cache costs the cache alone: what cannot be read is a miss, and what cannot be written is
    not kept.

    Attributes:
        folder: holds one file for each entry.
        limit: bytes of all entries together; those that were not used for longest go first. 0 keeps none.
        reads: whether entries are looked up; those that are made are kept in any case.
        problem: why the cache is not used at all, with what mends it; None for one that is.
    """

    folder: Path
    limit: int = DEFAULT_BYTES
    reads: bool = True
    problem: str | None = None

    @classmethod
    def open(cls, home: Path | None = None) -> StepCache:
        """The cache in `cache/steps` of a folder; TRIMTAB_HOME, or else `.trimtab`, when none is given.

        The folder is made if it is missing. One that another user owns or may write to is not used: see `problem`.

        Raises:
            CompressionError: TRIMTAB_CACHE_BYTES is no number of bytes.
        """
        folder = (home or Path(os.environ.get("TRIMTAB_HOME") or ".trimtab")).absolute() / "cache" / "steps"
        asked = os.environ.get("TRIMTAB_CACHE_BYTES") or str(DEFAULT_BYTES)
        if not asked.isascii() or not asked.isdigit():
            raise CompressionError(
                f"TRIMTAB_CACHE_BYTES must be a whole number of bytes, 0 or more (not {asked!r})"
            )
        return cls(folder, int(asked), problem=_prepare(folder))

    def fresh(self) -> StepCache:
        """The same cache, of which nothing is read: everything is worked out anew, and kept."""
        return replace(self, reads=False)

    def get(self, key: str) -> Entry | None:
        """The entry of a key, which counts as used now; None where there is none that is whole."""
        if self.problem or not self.reads:
            return None
        path = self.folder / key
        try:
            # Whoever could put another folder in this one's place could still not make a file that is ours.
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                if not _private(os.fstat(file.fileno())):
                    return None
                content = file.read()
            os.utime(path)
            return Entry.from_bytes(content)
        except (OSError, MemoryError):
            return None

    def put(self, key: str, entry: Entry) -> str | None:
        """Keep an entry: all of it is there afterwards, or nothing, wherever the process or the machine stops.

        Returns:
            Why it was not kept; None if it was, or if nothing is meant to be.
        """
        if self.problem or not self.limit:
            return None
        try:
            content = entry.to_bytes()
            if len(content) > self.limit:
                return f"larger than TRIMTAB_CACHE_BYTES ({len(content)} of {self.limit} bytes)"
            self._write(key, content)
            self._make_room()
        except OSError as error:
            return error.strerror or str(error)
        except MemoryError:
            return "out of memory"
        return None

    def _write(self, key: str, content: bytes) -> None:
        handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=self.folder)  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self.folder / key)
        except BaseException:  # an interrupt as well
            Path(name).unlink(missing_ok=True)
            raise
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _make_room(self) -> None:
        """Remove what a killed process left half-written, and the entries that are too many."""
        entries = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                seen = path.stat()
                if not path.name.startswith(_TEMPORARY):
                    entries.append((seen.st_mtime_ns, seen.st_size, path))
                elif time.time() - seen.st_mtime > _ABANDONED_S:
                    path.unlink()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size


def root_key(full: Variant, data: Data) -> str:
    """The key of full precision, from which every recipe starts."""
    return key_of("full", full.tag, full.manifest.model_dump(mode="json"), source_key(data))


def source_key(data: Data) -> str:
    """The key of what a workload's models are made from: its code, data and settings, and all that computes."""
    if data not in _SOURCES:
        from compression.full import source_hash

        _SOURCES[data] = source_hash(data.workload)
    return key_of("source", _SOURCES[data], _environment())


_SOURCES: weakref.WeakKeyDictionary[Data, str] = weakref.WeakKeyDictionary()
"""Data is read once in a run, and so is its hash."""


def step_key(before: str, step: Step | None, seed: int) -> str:
    """The key of what a step makes of what came before; without a step, that of the export to ONNX."""
    if step is None:
        return key_of("export", before)
    return key_of("step", before, step.name, step.model_dump(mode="json"), seed, list(_code_of(step)))


def key_of(*parts: JsonValue) -> str:
    """sha256 of values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@functools.cache
def _environment() -> str:
    """The key of what computes: this package's sources, the libraries, the processor and its threads."""
    package = Path(__file__).parent
    sources = {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in package.rglob("*.py")
        if "templates" not in path.relative_to(package).parts
    }
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return key_of(
        dict(sources),
        dict(versions),
        platform.python_version(),
        list(this_cpu().flags),
        list(_all_flags()),
        {name: os.environ.get(name) for name in _THREADS},
        cpus,
    )


def _all_flags() -> Sequence[str]:
    """Every flag of the processor: those of bfloat16, for one, are none that a variant is accepted on."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return sorted(value.split())
    return []


def _code_of(step: Step) -> Iterator[str]:
    """Hashes of the files that a step, and the steps among its parameters, are written in; not of this package's."""
    from compression.recipe import StepSpec
    from compression.steps import build

    for cls in type(step).__mro__:
        if cls.__module__.partition(".")[0] not in _KNOWN:
            yield _file_hash(cls)
    for _, value in step:
        for spec in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(spec, StepSpec):
                yield from _code_of(build(spec))


_KNOWN = frozenset({__package__, "abc", "builtins", "pydantic"})
"""Packages whose sources or versions are in every key, and what every class is made of."""


@functools.cache
def _file_hash(cls: type) -> str:
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    except (OSError, TypeError):  # typed in at a prompt
        return cls.__qualname__


def _prepare(folder: Path) -> str | None:
    """Make the folder, and say what is wrong with it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        seen = folder.lstat()
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror}): set TRIMTAB_HOME to a writable folder"
    if not stat.S_ISDIR(seen.st_mode):
        return f"{folder} is no folder: remove it"
    if not _private(seen):
        return f"{folder} is another user's, or others may write to it: remove it, or make it yours with mode 700"
    return None


def _private(seen: os.stat_result) -> bool:
    return seen.st_uid == os.geteuid() and not seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
