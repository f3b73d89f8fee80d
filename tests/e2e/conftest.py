from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import ROOT, Server


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with full precision and all variants of the points workload."""
    store = tmp_path_factory.mktemp("store") / "bentoml"
    code = "from tests import models; models.save_variants()"
    environment = {**os.environ, "BENTOML_HOME": str(store)}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
    return store


@pytest.fixture
def server(_server: Server) -> Iterator[Server]:
    """The module's own `_server`, with no rollout under way before and after the test."""
    _server.clear()
    yield _server
    _server.clear()
