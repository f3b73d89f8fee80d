"""The Evidently workspace: one project for each workload, bounded, and readable by Evidently itself."""

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

with warnings.catch_warnings():
    # Evidently and what it is made of warn about themselves while they are imported.
    warnings.simplefilter("ignore")
    from evidently import Report
    from evidently.metrics import RowCount
    from evidently.ui.workspace import Workspace

from monitoring.workspace import STALE_SECONDS, add_snapshot, project_id


@pytest.fixture(scope="module")
def snapshot() -> Any:
    return Report([RowCount()]).run(pd.DataFrame({"x": [1, 2, 3]}), None)


def snapshots(folder: Path, workload: str = "employment") -> list[Path]:
    return sorted((folder / str(project_id(workload)) / "snapshots").iterdir())


def test_evidently_finds_the_project_by_its_name_with_its_snapshots(tmp_path: Path, snapshot: Any) -> None:
    for _ in range(2):
        add_snapshot(tmp_path / "workspace", "employment", snapshot, keep=5)
    workspace = Workspace(str(tmp_path / "workspace"))
    [project] = workspace.search_project("employment")
    runs = workspace.list_runs(project.id)
    assert len(runs) == 2
    assert workspace.get_run(project.id, runs[0]).dict()["metric_results"]


def test_workloads_have_projects_of_their_own(tmp_path: Path, snapshot: Any) -> None:
    for workload in ("employment", "sentiment", "employment"):
        add_snapshot(tmp_path, workload, snapshot, keep=5)
    assert sorted(p.name for p in Workspace(str(tmp_path)).list_projects()) == ["employment", "sentiment"]


def test_only_the_newest_snapshots_of_a_project_are_kept(tmp_path: Path, snapshot: Any) -> None:
    add_snapshot(tmp_path, "sentiment", snapshot, keep=2)
    made: list[Path] = []
    for _ in range(4):
        add_snapshot(tmp_path, "employment", snapshot, keep=2)
        made += [path for path in snapshots(tmp_path) if path not in made]
    assert len(made) == 4
    assert snapshots(tmp_path) == made[-2:]
    assert len(snapshots(tmp_path, "sentiment")) == 1


def test_a_project_whose_file_was_left_half_written_is_made_again(tmp_path: Path, snapshot: Any) -> None:
    add_snapshot(tmp_path, "employment", snapshot, keep=5)
    metadata = tmp_path / str(project_id("employment")) / "metadata.json"
    metadata.write_text(metadata.read_text()[:20])
    add_snapshot(tmp_path, "employment", snapshot, keep=5)
    assert json.loads(metadata.read_text())["name"] == "employment"
    assert len(snapshots(tmp_path)) == 2


def test_the_folder_is_its_owners_alone(tmp_path: Path, snapshot: Any) -> None:
    add_snapshot(tmp_path / "workspace", "employment", snapshot, keep=5)
    assert (tmp_path / "workspace").stat().st_mode & 0o777 == 0o700


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path, snapshot: Any) -> None:
    add_snapshot(tmp_path, "employment", snapshot, keep=5)
    folder = snapshots(tmp_path)[0].parent
    old, young = folder / ".old.tmp", folder / ".young.tmp"
    for left in (old, young):
        left.write_text("half")
    long_ago = time.time() - STALE_SECONDS - 1
    os.utime(old, (long_ago, long_ago))
    add_snapshot(tmp_path, "employment", snapshot, keep=5)
    assert not old.exists()
    assert young.exists()
