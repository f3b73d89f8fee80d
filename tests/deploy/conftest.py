"""Tools of the Debian packages `prometheus` and `prometheus-alertmanager`, and a server that has all series."""

import os
import shutil
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """The path of a program. Without it a test is skipped here, and fails in CI."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            message = f"{name} is not installed: apt-get install prometheus prometheus-alertmanager"
            if os.environ.get("CI", "").lower() in ("1", "true"):
                pytest.fail(message)
            pytest.skip(message)
        return path

    return find
