from __future__ import annotations

from pathlib import Path

import pytest

from services.settings import Settings, SettingsError

NUMBERS = [
    "TRIMTAB_WORKERS",
    "TRIMTAB_MAX_BODY_BYTES",
    "TRIMTAB_MAX_IN_FLIGHT",
    "TRIMTAB_TREATMENT_DEADLINE_S",
    "TRIMTAB_MIRROR_QUEUE",
    "TRIMTAB_POLL_S",
    "TRIMTAB_FLUSH_S",
    "TRIMTAB_CONTROL_S",
    "TRIMTAB_REPORT_S",
]


def test_without_any_variable_the_defaults_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMTAB_HOME")
    monkeypatch.delenv("BENTOML_HOME")
    settings = Settings.from_env()
    assert settings.home == Path.home() / "bentoml" / "trimtab"
    assert settings.ledger_path("points") == settings.home / "points.ledger.db"
    assert settings.workers == 1
    # A rollback has to be in effect within a second: deciding and polling both come out of it.
    assert settings.poll_interval + settings.control_interval < 1.0


def test_the_default_workload_is_found_from_any_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (Path(Settings.from_env().workload) / "workload.yaml").is_file()


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["", "many", "nan", "inf", "-inf", "-1", "1e99", "0x10"])
def test_a_value_that_cannot_be_used_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"^{name}=.* is not a number from "):
        Settings.from_env()


def test_variables_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    monkeypatch.setenv("TRIMTAB_WORKLOAD", "package.module:Points")
    monkeypatch.setenv("TRIMTAB_WORKERS", "4")
    monkeypatch.setenv("TRIMTAB_TREATMENT_DEADLINE_S", "0.25")
    settings = Settings.from_env()
    assert (settings.home, settings.workload) == (tmp_path, "package.module:Points")
    assert (settings.workers, settings.treatment_deadline) == (4, 0.25)
