"""MLServer with a runtime that runs the ONNX session, called with Open Inference v2 JSON."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import onnxruntime
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput
from mlserver.utils import install_uvloop_event_loop


class OnnxModel(MLModel):
    """One ONNX Runtime session."""

    async def load(self) -> bool:
        """Make the session."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri, options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Run it."""
        tensor = payload.inputs[0]
        x = np.array(tensor.data.root, np.float32).reshape(tensor.shape)
        logits = self.session.run(None, {"x": x})[0]
        output = ResponseOutput(
            name="logits", datatype="FP32", shape=list(logits.shape), data=logits.ravel().tolist()
        )
        return InferenceResponse(model_name=self.name, outputs=[output])


async def _serve() -> None:
    port = int(os.environ["BENCH_PORT"])
    settings = Settings(
        host="127.0.0.1",
        http_port=port,
        grpc_port=int(os.environ["BENCH_PORT_2"]),
        metrics_endpoint=None,
        debug=False,  # no access log
        # The model in the process that answers, as with all others here but LitServe and Ray.
        parallel_workers=0,
        gzip_enabled=False,
        cors_settings=None,
    )
    model = ModelSettings(
        name="mlp", implementation=OnnxModel, parameters=ModelParameters(uri=os.environ["BENCH_MODEL"])
    )
    await MLServer(settings).start([model])


if __name__ == "__main__":
    install_uvloop_event_loop()
    asyncio.run(_serve())
