"""Reports in an Evidently workspace, a folder that `evidently ui` shows: one project for each workload.

Importing this is light; `add_snapshot` imports Evidently, and only a report calls it, in a process of its own. It works
through Evidently's `LocalState`, because a `Workspace` reads every snapshot that is there before it takes another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

__all__ = ["add_snapshot", "project_id"]

STALE_SECONDS = 3600
_OURS = uuid.UUID("6e3a86f0-5a57-5b7f-9d6a-0d7c1f0a4b11")


def project_id(workload: str) -> uuid.UUID:
    """The id of a workload's project: made of its name, so that every process and every start finds the same one."""
    return uuid.uuid5(_OURS, workload)


def add_snapshot(folder: Path, workload: str, snapshot: Any, *, keep: int) -> None:
    """Add a report's snapshot to the project of a workload, and delete the project's oldest ones beyond `keep`.

    The folder is made if it is not there, for its owner alone: snapshots hold what reports hold. A reader sees a whole
    snapshot or none.

    Args:
        snapshot: what `evidently.Report.run` returned.
        keep: at least 1.

    Raises:
        Exception: the folder cannot be written, or Evidently fails; its errors have no base of their own.
    """
    from evidently.legacy.core import new_id
    from evidently.legacy.utils import NumpyEncoder
    from evidently.sdk.models import ProjectModel
    from evidently.ui.storage.local.base import LocalState

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state, this = LocalState(str(folder)), project_id(workload)
    try:
        state.read_project(this)
    except (FileNotFoundError, ValueError):  # there is none, or its file was left half written
        about = "Reports of Trimtab: the candidate beside full precision, on the newest pairs"
        state.write_project(ProjectModel(id=this, name=workload, description=about))
    snapshots = folder / str(this) / "snapshots"
    snapshots.mkdir(exist_ok=True)
    _write(snapshots / f"{new_id()}.json", json.dumps(snapshot.to_snapshot_model().dict(), cls=NumpyEncoder))
    newest_last = sorted(state.list_snapshots(this))  # UUIDs of version 7, which begin with the time
    for old in newest_last[: max(0, len(newest_last) - max(1, keep))]:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            state.delete_snapshot(this, old)
    for left in snapshots.glob(".*.tmp"):  # of a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink()


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
