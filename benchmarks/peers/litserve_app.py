"""LitServe with one API process and one model process, its production flags on."""

import os
from typing import Any

import litserve
import numpy as np


class Api(litserve.LitAPI):
    """One ONNX Runtime session."""

    def setup(self, device: str) -> None:  # noqa: ARG002  # LitServe's signature
        """Make the session, in the model's process."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options)

    # Not annotated: LitServe would read a type here as that of a query parameter.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        """JSON to the model's input."""
        return np.array([request["data"]], np.float32)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Run the model."""
        return self.session.run(None, {"x": x})[0]

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        """The model's output to JSON."""
        return {"logits": output[0].tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=int(os.environ["BENCH_PORT"]),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
