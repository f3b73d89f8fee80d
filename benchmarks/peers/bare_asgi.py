"""The floor: a raw ASGI application under uvicorn with the same decoding as ours and nothing else.

No assignment, no metrics, no checks but what decoding needs. What a request costs above this is what Trimtab costs.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnxruntime
import orjson

_options = onnxruntime.SessionOptions()
_options.intra_op_num_threads = _options.inter_op_num_threads = 1
_session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], _options)


def _answer(body: bytes, header_length: bytes | None) -> tuple[bytes, bytes | None]:
    """An Open Inference v2 request to its reply: (body, length of the JSON header of a binary one)."""
    binary = header_length is not None
    end = int(header_length) if header_length is not None else len(body)
    tensor = orjson.loads(memoryview(body)[:end])["inputs"][0]
    if binary:
        x = np.frombuffer(body, np.dtype("<f4"), offset=end).reshape(tensor["shape"])
    else:
        x = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
    logits = _session.run(None, {"x": x})[0]
    output = {"name": "logits", "datatype": "FP32", "shape": logits.shape}
    reply = {"model_name": "mlp", "outputs": [output]}
    if not binary:
        output["data"] = logits.ravel()
        return orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY), None
    output["parameters"] = {"binary_data_size": logits.nbytes}
    header = orjson.dumps(reply)
    return header + logits.tobytes(), str(len(header)).encode()


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers every POST as a request for the model."""
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    length = next(
        (value for name, value in scope["headers"] if name == b"inference-header-content-length"), None
    )
    reply, reply_length = _answer(body, length)
    kind = b"application/json" if reply_length is None else b"application/octet-stream"
    headers = [(b"content-type", kind), (b"content-length", str(len(reply)).encode())]
    if reply_length is not None:
        headers.append((b"inference-header-content-length", reply_length))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": reply})
