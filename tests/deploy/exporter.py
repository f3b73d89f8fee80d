"""A server with every one of Trimtab's series moving, and one of BentoML's: `python exporter.py PORT`."""

import itertools
import sys
import time

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, start_http_server

from monitoring import metrics
from monitoring.rollout import STATES

VALUES = {
    "arm": metrics.ARMS,
    "variant": ("employment-int8",),
    "state": STATES,
    "guardrail": ("accuracy_drop", "group_harm"),
    "group": ("", "DIS=1"),
    "column": ("AGEP", "prediction"),
    "metric": ("accuracy_gap", "worst_group_accuracy"),
    "attribute": ("DIS",),
    "quantile": ("0.5", "0.95"),
    "service": ("gateway", "shadow", "monitor"),
    "process": ("1",),
    "status": ("413",),
    "outcome": tuple(
        sorted(
            {
                *metrics.REQUEST_OUTCOMES,
                *metrics.FALLBACK_OUTCOMES,
                *metrics.PAIR_OUTCOMES,
                *metrics.FEEDBACK_OUTCOMES,
                *metrics.SHED_OUTCOMES,
                *metrics.ALERT_OUTCOMES,
                *metrics.CACHE_OUTCOMES,
                *metrics.CASCADE_OUTCOMES,
            }
        )
    ),
}


def main(port: int) -> None:
    families = [m for m in vars(metrics).values() if isinstance(m, (Counter, Gauge, Histogram))]
    paths = Counter(
        "bentoml_service_request_total", "BentoML's own, by raw path", ["endpoint"], registry=REGISTRY
    )
    start_http_server(port, "127.0.0.1")
    while True:
        paths.labels(f"/{time.time()}").inc()
        for family in families:
            names = family._labelnames
            for labels in itertools.product(*(VALUES[name] for name in names)):
                child = family.labels(*labels) if names else family
                if isinstance(child, Histogram):
                    child.observe(0.02)
                elif isinstance(child, Counter):
                    child.inc()
                else:
                    child.set(1)
        time.sleep(0.2)


if __name__ == "__main__":
    main(int(sys.argv[1]))
