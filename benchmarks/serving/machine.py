"""What the figures were measured on, and whether it was idle."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from compression.variant import this_cpu

__all__ = ["IDLE_PERCENT", "describe"]

IDLE_PERCENT = 10.0
"""A machine that is busier than this before anything was started will show it in the figures."""
_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("onnxruntime", "numpy", "bentoml", "orjson", "httptools", "uvloop")


def describe() -> dict[str, Any]:
    """The machine as it is now; looks at its load for two seconds."""
    busy = psutil.cpu_percent(interval=2.0)
    return {
        "cpu": this_cpu().model,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "wrk": _said("wrk", "-v"),
        "commit": _said("git", "-C", str(_ROOT), "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "busy_percent": busy,
        "idle": busy <= IDLE_PERCENT,
    }


def _said(*command: str) -> str | None:
    """The first line that a command prints, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if lines else None
