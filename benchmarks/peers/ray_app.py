"""Ray Serve with one replica."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=1, max_ongoing_requests=100, ray_actor_options={"num_cpus": 1})
class Mlp:
    """One ONNX Runtime session."""

    def __init__(self, path: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options)

    async def __call__(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        logits = self.session.run(None, {"x": np.array([body["data"]], np.float32)})[0]
        return {"logits": logits[0].tolist()}


def main() -> None:
    """Serve until told to stop."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=os.environ["TMPDIR"])
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["BENCH_PORT"])})
    serve.run(Mlp.bind(os.environ["BENCH_MODEL"]), logging_config={"enable_access_log": False})
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
