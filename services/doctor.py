"""What a machine needs to run Trimtab, checked one by one."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from services.settings import Settings

__all__ = ["Check", "checks"]


@dataclass(frozen=True)
class Check:
    """One finding. `fix` is a command or a sentence; empty when all is well."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def checks(settings: Settings) -> list[Check]:
    """Run every check; none of them changes anything but for a probe file in TRIMTAB_HOME."""
    return [_python(), *_packages(), _pandas(), _home(settings.home), _disk(settings.home), _models()]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = (3, 11) <= sys.version_info[:2] < (3, 14)
    return Check("python", ok, version, "" if ok else "use Python 3.11, 3.12 or 3.13 (make setup)")


def _packages() -> list[Check]:
    found = []
    for name in ("torch", "onnxruntime", "onnx", "bentoml", "prometheus_client", "aiohttp"):
        try:
            importlib.import_module(name)
            found.append(Check(name, True, metadata.version(name)))
        except Exception as error:  # noqa: BLE001  # a broken package may raise anything on import
            found.append(Check(name, False, f"does not import: {error}", "make setup"))
    return found


def _pandas() -> Check:
    version = metadata.version("pandas")
    ok = tuple(map(int, version.split(".")[:2])) < (3, 1)
    fix = "" if ok else "pip install 'pandas<3.1': evidently 0.7.23 does not import with a newer one"
    return Check("pandas", ok, version, fix)


def _home(home: Path) -> Check:
    probe = home / ".doctor"
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe.write_text("ok")
        probe.unlink()
    except OSError as error:
        return Check(
            "state folder", False, f"{home}: {error.strerror}", "set TRIMTAB_HOME to a writable folder"
        )
    return Check("state folder", True, str(home))


def _disk(home: Path) -> Check:
    free = shutil.disk_usage(home if home.exists() else home.parent).free / 1e9
    return Check("disk", free > 1.0, f"{free:.1f} GB free", "" if free > 1.0 else "free at least 1 GB")


def _models() -> Check:
    import bentoml

    number = sum("variant" in model.info.labels for model in bentoml.models.list())
    fix = "" if number else "trimtab compress examples/employment"
    return Check("variants", bool(number), f"{number} in the model store", fix)
