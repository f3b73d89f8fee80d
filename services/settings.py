"""What the environment says: one place that reads it, with every limit of the serving side."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from services.errors import ServingError

__all__ = ["Settings", "SettingsError"]

DEFAULT_WORKLOAD = "examples/employment"
# In a bento and in a checkout alike, the sources lie one folder above this file.
_ROOT = Path(__file__).resolve().parent.parent


class SettingsError(ServingError):
    """An environment variable has a value that cannot be used."""


def _number(name: str, default: float, low: float, high: float) -> float:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise SettingsError(f"{name}={text!r} is not a number from {_plain(low)} to {_plain(high)}")
    return value


def _plain(bound: float) -> str:
    return f"{bound:.0f}" if bound == int(bound) else f"{bound:g}"


def _api_key() -> str | None:
    """None only where the variable is not there: one that is empty is a secret that did not arrive."""
    key = os.environ.get("TRIMTAB_API_KEY")
    if key is not None and (not key or not key.isascii() or any(letter <= " " for letter in key)):
        raise SettingsError(
            "TRIMTAB_API_KEY is empty or has characters that no header can carry: unset it, or set it to a key"
        )
    return key


def _default_home() -> Path:
    """Beside BentoML's own state. BentoML serves a bento from inside its store, so that a folder relative to the
    working directory would be lost with the next build; the `trimtab` command always sets TRIMTAB_HOME."""
    return Path(os.environ.get("BENTOML_HOME") or Path.home() / "bentoml") / "trimtab"


@dataclass(frozen=True)
class Settings:
    """Settings of one server, read from `TRIMTAB_*` variables. Times in seconds, sizes in bytes.

    The treatment's deadline leaves control time to answer within the request's, and that one is shorter than the
    5 s after which BentoML would answer.
    """

    home: Path
    workload: str
    workers: int
    data_host: str
    data_port: int
    tls_certificate: str | None
    tls_key: str | None
    api_key: str | None
    max_body_bytes: int
    max_in_flight: int
    max_connections: int
    max_queue_s: float
    model_threads: int
    request_deadline: float
    treatment_deadline: float
    mirror_queue: int
    mirror_cpu: float
    core_price: float
    core_watts: float
    poll_interval: float
    flush_interval: float
    control_interval: float
    report_interval: float

    def ledger_path(self, workload: str) -> Path:
        """The ledger of a workload. Each has its own: a rollout must never route another workload's traffic."""
        return self.home / f"{workload}.ledger.db"

    @property
    def reports(self) -> Path:
        return self.home / "reports"

    @property
    def workspace(self) -> Path:
        """The Evidently workspace that `trimtab ui` shows."""
        return self.reports / "workspace"

    @classmethod
    def from_env(cls) -> Settings:
        """Read the environment. Raises SettingsError with the variable's name."""
        workload = os.environ.get("TRIMTAB_WORKLOAD", DEFAULT_WORKLOAD)
        if ":" not in workload and not Path(workload).is_dir() and (_ROOT / workload).is_dir():
            workload = str(_ROOT / workload)
        workers = int(_number("TRIMTAB_WORKERS", 1, 1, 64))
        certificate, key = (
            os.environ.get("TRIMTAB_TLS_CERT") or None,
            os.environ.get("TRIMTAB_TLS_KEY") or None,
        )
        if (certificate is None) != (key is None):
            raise SettingsError("TRIMTAB_TLS_CERT and TRIMTAB_TLS_KEY belong together: set both or neither")
        return cls(
            home=Path(os.environ.get("TRIMTAB_HOME") or _default_home()).absolute(),
            workload=workload,
            workers=workers,
            data_host=os.environ.get("TRIMTAB_DATA_HOST") or "127.0.0.1",
            data_port=int(_number("TRIMTAB_DATA_PORT", 3001, 0, 65535)),
            tls_certificate=certificate,
            tls_key=key,
            api_key=_api_key(),
            max_body_bytes=int(_number("TRIMTAB_MAX_BODY_BYTES", 1 << 20, 1024, 1 << 30)),
            max_in_flight=int(_number("TRIMTAB_MAX_IN_FLIGHT", 256, 1, 100_000)),
            max_connections=int(_number("TRIMTAB_MAX_CONNECTIONS", 1024, 1, 100_000)),
            max_queue_s=_number("TRIMTAB_MAX_QUEUE_S", 1.0, 0.001, 4.0),
            model_threads=int(
                _number("TRIMTAB_MODEL_THREADS", max(1, (os.cpu_count() or 1) // workers), 1, 256)
            ),
            request_deadline=_number("TRIMTAB_REQUEST_DEADLINE_S", 4.0, 0.01, 4.5),
            treatment_deadline=_number("TRIMTAB_TREATMENT_DEADLINE_S", 1.0, 0.001, 3.0),
            mirror_queue=int(_number("TRIMTAB_MIRROR_QUEUE", 2048, 1, 1_000_000)),
            mirror_cpu=_number("TRIMTAB_MIRROR_CPU", 0.5, 0.01, 64.0),
            core_price=_number("TRIMTAB_CORE_PRICE_PER_HOUR", 0.05, 0.0, 1e6),
            core_watts=_number("TRIMTAB_WATTS_PER_CORE", 10.0, 0.0, 1e4),
            poll_interval=_number("TRIMTAB_POLL_S", 0.2, 0.01, 60.0),
            flush_interval=_number("TRIMTAB_FLUSH_S", 0.5, 0.05, 60.0),
            control_interval=_number("TRIMTAB_CONTROL_S", 0.25, 0.01, 60.0),
            report_interval=_number("TRIMTAB_REPORT_S", 120.0, 1.0, 86_400.0),
        )
