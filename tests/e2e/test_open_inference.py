"""Triton's own client, as it comes, against both ports of a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.e2e.server import ROOT, Server
from tests.typed import echo

pytestmark = pytest.mark.e2e

VALUES: dict[str, np.ndarray] = {
    "x": np.array([[0.1, -3.4e38], [1e-45, 2]], np.float32),
    "half": np.array([[0.1, 65504], [-0.0, 6e-8]], np.float16),
    "small": np.array([[-128, 0, 127], [1, 2, 3]], np.int8),
    "large": np.array([[-(2**63), 2**63 - 1], [0, 1]], np.int64),
    "flags": np.array([[True, False], [False, True]]),
    "text": np.array([["", "é"], ["\U0001f600", "a\0b"]], object),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the workload in tests/typed."""
    home = tmp_path_factory.mktemp("typed")
    environment = {**os.environ, "BENTOML_HOME": str(home / "bentoml")}
    code = "from tests.typed import echo; echo.save_full()"
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
    server = Server(home, workload="typed")
    serve = [sys.executable, "-m", "trimtab", "serve", str(echo.WORKLOAD), "--workers", "1"]
    server._command = [*serve, "--data-port", str(server.data_port)]
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(params=["BentoML's port", "the data plane's port"])
def url(request: pytest.FixtureRequest, server: Server) -> str:
    return server.url if request.param == "BentoML's port" else server.data_url


@pytest.fixture
def client(url: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(url.removeprefix("http://"), concurrency=4) as client:
        yield client


def inputs(binary: bool = True, **changed: np.ndarray) -> list[triton.InferInput]:
    found = []
    for name, values in {**VALUES, **changed}.items():
        tensor = triton.InferInput(name, list(values.shape), echo.INPUTS[name][3])
        found.append(tensor.set_data_from_numpy(values, binary_data=binary))
    return found


def outputs(binary: bool) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(echo.output(name), binary_data=binary) for name in VALUES]


def assert_echoed(result: triton.InferResult) -> None:
    """Everything that was sent came back, to the last bit."""
    for name, want in VALUES.items():
        got = result.as_numpy(echo.output(name))
        assert got.shape == want.shape
        if name == "text":
            # The client gives binary strings as bytes, and those in JSON as text.
            texts = [item.decode() if isinstance(item, bytes) else item for item in got.ravel().tolist()]
            assert texts == want.ravel().tolist()
        else:
            assert got.dtype == want.dtype
            assert got.tobytes() == want.tobytes()


def refusal(client: triton.InferenceServerClient, *args: Any, **options: Any) -> tuple[str, str]:
    """Status and message of an infer request that is refused."""
    with pytest.raises(InferenceServerException) as caught:
        client.infer(*args, **options)
    return str(caught.value.status()), str(caught.value.message())


def test_the_server_and_its_model_are_live_and_ready(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("typed")
    assert client.is_model_ready("typed", "full")
    assert not client.is_model_ready("typed", "fp8")
    assert not client.is_model_ready("other")


def test_metadata_and_configuration_say_what_the_model_takes(client: triton.InferenceServerClient) -> None:
    assert client.get_server_metadata()["name"] == "trimtab"
    for version in ("", "full"):
        metadata = client.get_model_metadata("typed", version)
        assert metadata["versions"] == ["full"]
        assert {one["name"]: one["datatype"] for one in metadata["inputs"]} == {
            name: datatype for name, (_, _, _, datatype) in echo.INPUTS.items()
        }
        config = client.get_model_config("typed", version)
        assert config["max_batch_size"] == 16
        assert [one["dims"] for one in config["input"]] == [[2], [2], [3], [2], [2], [2]]


def test_the_repository_has_the_variant_and_leaves_loading_to_rollouts(
    client: triton.InferenceServerClient,
) -> None:
    assert client.get_model_repository_index() == [
        {"name": "typed", "version": "full", "state": "READY", "reason": ""}
    ]
    for verb in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="rollouts load and unload"):
            verb("typed")


def test_extensions_that_are_not_there_say_so(client: triton.InferenceServerClient) -> None:
    for ask in (client.get_log_settings, client.get_trace_settings, client.get_system_shared_memory_status):
        with pytest.raises(InferenceServerException, match="this server has no"):
            ask()


@pytest.mark.parametrize("given", [True, False], ids=["binary inputs", "json inputs"])
@pytest.mark.parametrize(
    "asked", [None, True, False], ids=["default outputs", "binary outputs", "json outputs"]
)
@pytest.mark.parametrize("version", ["", "full"])
def test_every_datatype_comes_back_as_it_was_sent(
    client: triton.InferenceServerClient, given: bool, asked: bool | None, version: str
) -> None:
    wanted = None if asked is None else outputs(asked)
    result = client.infer("typed", inputs(given), version, outputs=wanted)
    assert_echoed(result)
    assert result.get_response()["model_version"] == "full"


def test_only_the_outputs_asked_for_come_back(client: triton.InferenceServerClient) -> None:
    wanted = [
        triton.InferRequestedOutput("text_out", binary_data=False),
        triton.InferRequestedOutput("logits", binary_data=True),
    ]
    result = client.infer("typed", inputs(), outputs=wanted)
    assert [one["name"] for one in result.get_response()["outputs"]] == ["text_out", "logits"]
    assert result.as_numpy("logits").tobytes() == VALUES["x"].tobytes()
    assert result.as_numpy("half_out") is None


def test_requests_under_way_at_the_same_time_get_their_own_answers(
    client: triton.InferenceServerClient,
) -> None:
    calls = {}
    for number in range(12):
        sent = np.full((1, 2), number, np.float32)
        rest = {name: values[:1] for name, values in VALUES.items() if name != "x"}
        calls[number] = client.async_infer("typed", inputs(number % 2 == 0, x=sent, **rest))
    for number, call in calls.items():
        assert call.get_result(timeout=30).as_numpy("logits").tolist() == [[number, number]]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_compressed_requests_are_read(
    client: triton.InferenceServerClient, algorithm: str, binary: bool
) -> None:
    result = client.infer(
        "typed",
        inputs(binary),
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert_echoed(result)


def test_the_request_id_comes_back_as_it_was_and_signed(
    client: triton.InferenceServerClient, url: str
) -> None:
    result = client.infer("typed", inputs(), request_id="mine-7")
    assert result.get_response()["id"] == "mine-7"
    signed = result.get_response()["parameters"]["request_id"]
    assert signed.startswith("mine-7.")
    assert "~" in signed
    # Known to this installation, and so good for feedback.
    again = client.infer("typed", inputs(), request_id=signed)
    assert again.get_response()["parameters"]["request_id"] == signed


def test_a_client_may_say_how_long_it_waits_and_whom_it_is_about(
    client: triton.InferenceServerClient,
) -> None:
    result = client.infer(
        "typed", inputs(), timeout=30_000_000, priority=1, parameters={"groups": "TEAM=A;TEAM=B"}
    )
    assert_echoed(result)
    assert refusal(client, "typed", inputs(), timeout=-1) == (
        "400",
        "parameter timeout must be a whole number of microseconds",
    )
    status, message = refusal(client, "typed", inputs(), parameters={"groups": "SEX=1"})
    assert (status, message) == (
        "400",
        "parameter groups: no sensitive attribute 'SEX'; this workload has TEAM",
    )


def test_a_request_that_does_not_fit_is_refused_with_the_reason(client: triton.InferenceServerClient) -> None:
    assert refusal(client, "other", inputs()) == ("404", "no such model: 'other'; this server has 'typed'")
    loaded = "no variant 'fp8' of 'typed' is loaded; there are: full"
    assert refusal(client, "typed", inputs(), "fp8") == ("404", loaded)
    assert refusal(client, "typed", inputs(x=np.zeros((2, 3), np.float32))) == (
        "400",
        "input 'x' has shape [2, 3], not [any, 2]",
    )
    assert refusal(client, "typed", inputs(x=np.full((2, 2), np.nan, np.float32))) == (
        "400",
        "input 'x' has NaN or infinite values",
    )
    assert refusal(client, "typed", inputs()[:-1]) == ("400", "input 'text' is missing")
    assert refusal(client, "typed", inputs(), sequence_id=7)[0] == "400"


def test_statistics_count_what_was_answered(client: triton.InferenceServerClient) -> None:
    def counted() -> dict[str, Any]:
        (one,) = client.get_inference_statistics("typed", "full")["model_stats"]
        assert client.get_inference_statistics("typed")["model_stats"][0]["version"] == "full"
        assert client.get_inference_statistics()["model_stats"][0]["name"] == "typed"
        return dict(one)

    before = counted()
    client.infer("typed", inputs())
    after = counted()
    assert after["inference_count"] == before["inference_count"] + 2
    assert after["execution_count"] == before["execution_count"] + 1
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    assert after["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]


def test_the_description_is_served(url: str) -> None:
    described = httpx.get(f"{url}/v2/openapi.json").json()
    assert "/v2/models/{model}/infer" in described["paths"]


def test_a_reply_says_in_its_headers_who_answered(url: str) -> None:
    tensors = [
        {"name": name, "shape": list(values.shape), "datatype": echo.INPUTS[name][3], "data": values.tolist()}
        for name, values in VALUES.items()
    ]
    reply = httpx.post(f"{url}/v2/models/typed/infer", json={"inputs": tensors, "id": "mine"})
    assert reply.status_code == 200
    assert reply.headers["X-Request-Id"] == reply.json()["parameters"]["request_id"]
    assert reply.headers["X-Trimtab-Variant"] == "full"
    assert reply.headers["X-Trimtab-Arm"] == "control"


def test_both_ports_refuse_alike(server: Server) -> None:
    for method, path, status in (
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models/typed/infer", 405),
        ("POST", "/v2", 405),
        ("POST", "/v2/models/typed/infer", 400),
    ):
        replies = [httpx.request(method, door + path) for door in (server.url, server.data_url)]
        assert [reply.status_code for reply in replies] == [status, status]
        assert replies[0].json() == replies[1].json()
        assert replies[0].headers.get("Allow") == replies[1].headers.get("Allow")
