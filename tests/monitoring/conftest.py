"""Fixtures of the judgement tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from monitoring.ledger import Ledger
from tests.monitoring.judgement import World


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """An empty ledger."""
    made = Ledger(tmp_path / "ledger.db", busy_timeout=0.5)
    yield made
    made.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A ledger, a controller and a gateway worker with a made-up clock."""
    made = World(tmp_path / "ledger.db")
    yield made
    made.ledger.close()
