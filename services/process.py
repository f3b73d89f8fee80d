"""Resident memory and CPU seconds of this process, for the metrics."""

from __future__ import annotations

import threading

__all__ = ["ProcessSampler"]

_INTERVAL_SECONDS = 5.0


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
            meter.update()
            if self._stop.wait(_INTERVAL_SECONDS):
                return
