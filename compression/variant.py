"""Variants in the BentoML model store: written once, named by their manifest's hash, verified on reading.

BENTOML_HOME says where the store is; BentoML reads it when it is first imported, so it is imported late here.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from compression.coding import decode
from compression.errors import CodingError, CompressionError, VariantCorrupted, VariantNotFound
from compression.gate import GateResult
from compression.scorecard import Scorecard

if TYPE_CHECKING:
    from bentoml import Model

FULL = "full"
"""Name of the full-precision variant of every workload."""
MANIFEST, MODEL, CODED = "manifest.json", "model.onnx", "model.onnx.coded"
SCORECARD, GATE = "scorecard.json", "gate.json"
PROGRAM, REFERENCE = "program.pt2", "reference.parquet"

_STAGING = ".trimtab-"
_ABANDONED_S = 86_400.0
"""Age at which a staged model is one that a killed process left."""

# What the INT8 kernels of ONNX Runtime choose by: the same file can answer differently on other flags.
_FLAGS = (
    "sse4_1",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimddp",
    "i8mm",
)


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Frozen):
    """An input or output of the ONNX graph; a dimension is a number or the name of a dynamic one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class FileEntry(_Frozen):
    """What a file of the variant must hash and measure to."""

    sha256: str
    bytes: int


class Cpu(_Frozen):
    """The processor that a variant was measured and accepted on."""

    model: str
    flags: tuple[str, ...]


class ReferenceGroup(_Frozen):
    """Rows of one group in the reference, and the share of them that full precision calls positive."""

    rows: int
    positive_rate: float


class ReferenceColumn(_Frozen):
    """A field of the reference's records in bins.

    Attributes:
        edges: of a field of numbers, where a bin ends and the next one begins.
        values: of any other field, the values that have a bin of their own; one bin more is for all others.
        shares: of the rows in each bin, the last one for missing values.
    """

    name: str
    edges: tuple[float, ...]
    values: tuple[str, ...]
    shares: tuple[float, ...]


class Reference(_Frozen):
    """Summary of `reference.parquet`; groups are keyed `DIS=1`.

    Attributes:
        labels, answers: share of each true class, and of each among full precision's answers.
        calibration: points (confidence, share of right answers) of a rising curve.
        runner_up: where full precision is wrong, how often its second choice is right.
        columns: the records' fields; texts and lists are left out.
    """

    rows: int
    groups: dict[str, ReferenceGroup]
    labels: tuple[float, ...] = ()
    answers: tuple[float, ...] = ()
    calibration: tuple[tuple[float, float], ...] = ()
    runner_up: float = 1.0
    columns: tuple[ReferenceColumn, ...] = ()


class Manifest(_Frozen):
    """Where a variant comes from and what belongs to it.

    Attributes:
        parent: tag of the full-precision variant it was made from; None for full precision itself.
        files: path in the variant -> hash and size, of every file but the manifest.
        source_hash: hash of the workload's code, data and settings that made the full-precision model.
        calibration_sha256: hash of the rows that calibrated the quantization, if any did.
        export_max_error: largest absolute difference between torch and ONNX Runtime outputs at export.
        warnings: what the steps had to say about their parameters.
        created_at: seconds since the epoch, UTC.
        decoded: hash and size of the ONNX file that comes out of `model.onnx.coded`, for a variant that keeps it so.
        build_key: hash of all that the model and its verdict were made from: the recipe, full precision, the code, the
            libraries and the processor; None for full precision.
    """

    format: int = 1
    workload: str
    name: str
    recipe: dict[str, object]
    recipe_hash: str
    parent: str | None
    classes: tuple[str, ...]
    positive: int
    sensitive: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: dict[str, FileEntry] = {}
    parameters: int
    macs: int
    seed: int
    versions: dict[str, str]
    cpu: Cpu
    source_hash: str
    calibration_sha256: str | None
    export_max_error: float | None
    warnings: tuple[str, ...] = ()
    created_at: float
    reference: Reference | None = None
    decoded: FileEntry | None = None
    build_key: str | None = None


@dataclass(frozen=True)
class Variant:
    """A variant on disk. `tag` is `<workload>-<name>:<version>`, `path` its folder."""

    tag: str
    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The variant's name within its workload, for example `int8-dynamic`."""
        return self.manifest.name

    @property
    def workload(self) -> str:
        """The name of the workload it belongs to."""
        return self.manifest.workload

    def onnx_bytes(self) -> bytes:
        """The ONNX file, checked against its sha256; decoded first where it is kept coded.

        Raises:
            VariantCorrupted: it is missing or altered.
        """
        expected = self.manifest.decoded
        if expected is None:
            return self._read(MODEL)
        try:
            content = decode(self._read(CODED), expected.bytes)
        except CodingError as error:
            raise VariantCorrupted(f"{self.tag}: {CODED}: {error}; make the variant again") from None
        if file_entry(content) != expected:
            raise VariantCorrupted(f"{self.tag}: {CODED} holds another model; make the variant again")
        return content

    def asset(self, name: str) -> Path:
        """The path of a file of this variant, after checking its contents.

        Raises:
            VariantNotFound: the variant has no such file.
            VariantCorrupted: the file is missing or altered.
        """
        self._read(name)
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether a file belongs to this variant."""
        return name in self.manifest.files

    def scorecard(self) -> Scorecard | None:
        """What was measured, or None for a variant that was saved without a scorecard."""
        return Scorecard.model_validate_json(self._read(SCORECARD)) if self.has(SCORECARD) else None

    def gate(self) -> GateResult | None:
        """The verdict at the time of saving, or None."""
        return GateResult.model_validate_json(self._read(GATE)) if self.has(GATE) else None

    def _read(self, name: str) -> bytes:
        entry = self.manifest.files.get(name)
        if entry is None:
            raise VariantNotFound(f"{self.tag} has no file {name}")
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise VariantCorrupted(
                f"{self.tag}: {name} cannot be read ({error.strerror}); make it again"
            ) from None
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise VariantCorrupted(f"{self.tag}: {name} does not match its sha256; make the variant again")
        return data


def file_entry(data: bytes) -> FileEntry:
    """The entry of a file with these contents."""
    return FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def tag_name(workload: str, variant: str) -> str:
    """The name of a variant in the model store."""
    return f"{workload}-{variant}"


def save_variant(manifest: Manifest, files: Mapping[str, bytes]) -> Variant:
    """Write a variant: all of it appears in the store, or nothing.

    Args:
        manifest: complete but for `files`, which is filled in here.
        files: file name -> contents; `model.onnx` must be among them, or `model.onnx.coded` if the manifest says what
            comes out of it.

    Raises:
        CompressionError: the name is taken by a variant of another workload.
    """
    import bentoml

    needed = MODEL if manifest.decoded is None else CODED
    if needed not in files:
        raise CompressionError(f"a variant needs {needed}")
    entries = {name: file_entry(data) for name, data in sorted(files.items())}
    manifest = manifest.model_copy(update={"files": entries})
    text = manifest.model_dump_json(indent=1).encode()
    name, version = tag_name(manifest.workload, manifest.name), hashlib.sha256(text).hexdigest()[:12]
    # "a-b" + "c" and "a" + "b-c" would share a name, and so their newest version.
    for other in bentoml.models.list():
        if other.tag.name == name and other.info.labels.get("workload") != manifest.workload:
            raise CompressionError(
                f"{name} already names a variant of workload {other.info.labels['workload']}: rename one"
            )
    labels = {"workload": manifest.workload, "variant": manifest.name}
    with _staged() as (staging, store):
        with bentoml.models.create(f"{name}:{version}", labels=labels, _model_store=staging) as model:
            for path, data in files.items():
                Path(model.path_of(path)).write_bytes(data)
            Path(model.path_of(MANIFEST)).write_bytes(text)
        _publish(Path(staging._path) / name / version, store / name / version)
    return load_variant(f"{name}:{version}")


@contextmanager
def _staged() -> Iterator[tuple[Any, Path]]:
    """A model store of its own beside the real one, and the folder of that.

    BentoML copies a model's files into its store one by one. A process that dies meanwhile would leave half a model,
    and then nothing of the store can be listed any more.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.models import ModelStore

    store = Path(BentoMLContainer.model_store.get()._path)
    for left in store.parent.glob(f"{_STAGING}*"):
        with suppress(FileNotFoundError):  # another process has just finished with it
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
    # On the store's own file system, so that it can be renamed into place.
    folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=store.parent))
    try:
        yield ModelStore(folder), store
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(staged: Path, final: Path) -> None:
    """Move a whole model into the store, and make it the newest of its name."""
    final.parent.mkdir(parents=True, exist_ok=True)
    latest = final.parent / "latest"
    latest.unlink(missing_ok=True)  # BentoML finds the newest by its date while this file is missing
    staged.rename(final)
    pointer = staged.parent / "latest"
    pointer.write_text(final.name, encoding="utf-8")
    pointer.replace(latest)


def load_variant(tag: str) -> Variant:
    """Load `name` (the newest) or `name:version`, name being `<workload>-<variant>`.

    Raises:
        VariantNotFound: the store has none of that tag.
        VariantCorrupted: its manifest is missing or altered.
    """
    import bentoml
    from bentoml.exceptions import BentoMLException

    try:
        return _open(bentoml.models.get(tag))
    except (BentoMLException, ValueError):  # ValueError: no tag could look like this
        raise VariantNotFound(
            f"no variant {tag} in the model store: make it with `trimtab compress`"
        ) from None


def list_variants(workload: str) -> list[Variant]:
    """The newest variant of each name of a workload: full precision first, then by name."""
    import bentoml

    newest: dict[str, Variant] = {}
    for model in bentoml.models.list():
        if model.info.labels.get("workload") != workload or "variant" not in model.info.labels:
            continue
        variant = _open(model)
        known = newest.get(variant.name)
        if known is None or known.manifest.created_at < variant.manifest.created_at:
            newest[variant.name] = variant
    return sorted(newest.values(), key=lambda variant: (variant.name != FULL, variant.name))


def this_cpu() -> Cpu:
    """The processor of this machine and those of its flags that INT8 results depend on."""
    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        pass  # not Linux: the model's name is all there is
    return Cpu(model=model, flags=tuple(flag for flag in _FLAGS if flag in flags))


def _open(model: Model) -> Variant:
    tag = str(model.tag)
    try:
        text = Path(model.path_of(MANIFEST)).read_bytes()
        manifest = Manifest.model_validate_json(text)
    except (OSError, ValidationError):
        raise VariantCorrupted(
            f"{tag}: {MANIFEST} is missing or unreadable; make the variant again"
        ) from None
    if hashlib.sha256(text).hexdigest()[:12] != model.tag.version:
        raise VariantCorrupted(f"{tag}: {MANIFEST} does not match its version; make the variant again")
    return Variant(tag=tag, path=Path(model.path), manifest=manifest)
