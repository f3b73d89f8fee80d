"""What a process does for itself: its memory and CPU seconds as metrics, and its place behind the others."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["ProcessSampler", "give_way", "speak"]

log = logging.getLogger("trimtab.process")

_INTERVAL_SECONDS = 5.0
_NICE = 10


class ProcessSampler:
    """A thread that sets the process gauges every few seconds."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="process-sampler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        from monitoring.metrics import ProcessMeter

        meter = ProcessMeter(self._service)
        while True:
            _forget_the_dead()
            meter.update()
            if self._stop.wait(_INTERVAL_SECONDS):
                return


def _forget_the_dead() -> None:
    """Take what killed processes left out of the sums over live ones; nothing else does."""
    from prometheus_client import multiprocess

    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    for path in Path(folder).glob("gauge_live*_*.db") if folder else ():
        pid = path.stem.rpartition("_")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            with suppress(FileNotFoundError):  # another process was faster
                multiprocess.mark_process_dead(int(pid), folder)


def speak() -> None:
    """Have what this process does shown in the server's log; BentoML shows other people's warnings only."""
    logging.getLogger("trimtab").setLevel(logging.INFO)


def give_way() -> None:
    """Let the machine's other processes go first: those that users wait for.

    Call it before threads are started: a thread has the priority of the one that started it.
    """
    try:
        log.info("at niceness %d: whatever else runs goes first", os.nice(_NICE))
    except OSError as error:  # Then the machine's scheduler treats all alike.
        log.warning("not allowed to lower this process's priority: %s", error)
