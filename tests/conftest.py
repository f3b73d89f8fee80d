"""Fixes the environment before anything imports BentoML, which reads its folder only once."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for _name in [name for name in os.environ if name.startswith("TRIMTAB_")]:
    del os.environ[_name]  # what the developer's shell says must not change a result
STATE = Path(tempfile.mkdtemp(prefix="trimtab-tests-"))
os.environ |= {
    "TRIMTAB_HOME": str(STATE),
    "BENTOML_HOME": str(STATE / "bentoml"),
    "BENTOML_DO_NOT_TRACK": "True",
    "DO_NOT_TRACK": "1",
    "OTEL_SDK_DISABLED": "true",
    "MPLBACKEND": "Agg",
}
os.environ.setdefault("OMP_NUM_THREADS", "2")


def pytest_sessionfinish() -> None:
    shutil.rmtree(STATE, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def loopback_only() -> Iterator[None]:
    """No test may reach beyond this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            assert host in ("localhost", "::1") or host.startswith("127."), f"a test connects to {host}"
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield
