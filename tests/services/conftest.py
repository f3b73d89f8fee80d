from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from compression.variant import Variant
from compression.workload import Workload, load_workload
from monitoring.ledger import Ledger
from services.settings import Settings
from tests import models

with warnings.catch_warnings():
    # BentoML warns about itself while it is imported; everything after that is ours, and is an error.
    warnings.simplefilter("ignore")
    import services.gateway  # noqa: F401


@pytest.fixture(scope="session")
def variants() -> dict[str, Variant]:
    return models.save_variants()


@pytest.fixture(scope="session")
def workload() -> Workload:
    return load_workload(models.WORKLOAD)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a server of this test's own, with short intervals."""
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRIMTAB_WORKLOAD", str(models.WORKLOAD))
    monkeypatch.setenv("TRIMTAB_POLL_S", "0.01")
    monkeypatch.setenv("TRIMTAB_FLUSH_S", "0.05")
    return Settings.from_env()


@pytest.fixture
def ledger(settings: Settings) -> Ledger:
    return Ledger(settings.ledger_path("points"), busy_timeout=0.2)
