"""One thread that ends model runs which take too long, whichever thread they are in."""

from __future__ import annotations

import threading
import time
from typing import Any

__all__ = ["Watchdog"]

_TICK_SECONDS = 0.01
# Ticks without a run before the thread sleeps until it is woken: waking it for each run would cost more than the run.
_IDLE_TICKS = 200


class Watchdog:
    """Ends runs through their `onnxruntime.RunOptions`.

    ONNX Runtime looks at `terminate` between the nodes of a graph, so that a run ends soon after its time, not at it.
    """

    def __init__(self) -> None:
        self._runs: dict[int, tuple[float, Any]] = {}
        self._wake = threading.Event()
        self._asleep = True
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, options: Any, seconds: float) -> None:
        """Set `options.terminate` in `seconds`, unless `forget` comes first, as it always must."""
        self._runs[id(options)] = (time.monotonic() + seconds, options)
        if self._asleep:
            self._awake()

    def forget(self, options: Any) -> None:
        """The run is over."""
        del self._runs[id(options)]

    def _awake(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
                self._thread.start()
            self._asleep = False
            self._wake.set()

    def _run(self) -> None:
        idle = 0
        while True:
            now = time.monotonic()
            # A copy: other threads add and remove runs meanwhile.
            for end, options in list(self._runs.values()):
                if now >= end:
                    options.terminate = True
            idle = 0 if self._runs else idle + 1
            if idle < _IDLE_TICKS:
                time.sleep(_TICK_SECONDS)
                continue
            self._wake.clear()
            self._asleep = True
            # A run that began between the last look and this line saw `_asleep` unset and did not wake anybody.
            if not self._runs:
                self._wake.wait()
            self._asleep = False
            idle = 0
