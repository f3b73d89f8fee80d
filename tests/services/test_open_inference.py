"""The routes under /v2 over a minimal engine with real sessions: no server, no rollout."""

from __future__ import annotations

import asyncio
import gzip
import logging
import re
import zlib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
import onnxruntime
import orjson
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from services.batching import DeadlineExceeded, Overloaded
from services.control.auth import RequestIds
from services.dataplane import DataPlane
from services.engine import Statistics
from services.errors import ArmFailed, BadRequest, NotFound, ServingError
from services.http import Reply, Request
from services.protocol import OpenInference
from services.signature import Signature
from tests import models
from tests.typed import echo

MAX_BODY = 20_000
MAX_RECORDS = 16
ECHO = echo.echo_onnx()
FUZZ = hypothesis_settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass
class FakeModel:
    name: str
    session: Any
    signature: Signature


def loaded(name: str, content: bytes = ECHO) -> FakeModel:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return FakeModel(name, session, Signature.of(session))


@dataclass
class FakeServed:
    request_id: str
    model: FakeModel
    arm: str
    outputs: tuple[np.ndarray, ...]


@dataclass
class FakeEngine:
    """Answers from `full`, or from the variant that is asked for."""

    variants: list[FakeModel]
    sensitive: tuple[str, ...] = ("TEAM", "AGE")
    waits: bool = False
    failure: Exception | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    rejected: int = 0
    mirrored: list[str] = field(default_factory=list)
    mirrors: bool = False

    def __post_init__(self) -> None:
        self._ids = RequestIds("key")
        self.workload = SimpleNamespace(name="typed", max_records=MAX_RECORDS, sensitive=self.sensitive)
        self.live = SimpleNamespace(control=self.variants[0])

    def models(self) -> list[FakeModel]:
        return self.variants

    def reject(self) -> None:
        self.rejected += 1

    def answer(self, headers: Any, inputs: Any, rows: int, **options: Any) -> Any:
        self.asked.append({"headers": headers, "inputs": inputs, "rows": rows, **options})
        _, request_id = self._ids.issue(options["supplied_id"])
        if self.waits:
            return self._later(request_id, inputs, options["version"])
        return self._answer(request_id, inputs, options["version"])

    async def _later(self, *call: Any) -> FakeServed:
        await asyncio.sleep(0)
        return self._answer(*call)

    def _answer(self, request_id: str, inputs: Any, version: str | None) -> FakeServed:
        if self.failure is not None:
            raise self.failure
        model = next(model for model in self.variants if version in (None, model.name))
        outputs = tuple(model.session.run(None, inputs))
        return FakeServed(request_id, model, "control" if model is self.variants[0] else "treatment", outputs)

    def mirror_after(self, served: FakeServed) -> Callable[[], None] | None:
        return (lambda: self.mirrored.append(served.request_id)) if self.mirrors else None


@dataclass
class Bench:
    """The routes, and what is behind them."""

    engine: FakeEngine
    ready: bool = True
    statistics: dict[str, Statistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        routes = OpenInference(
            self.engine,  # type: ignore[arg-type]
            max_body_bytes=MAX_BODY,
            ready=lambda: self.ready,
            statistics=lambda name: self.statistics.setdefault(name, Statistics()),
        )
        self.plane = DataPlane(self.engine, routes)  # type: ignore[arg-type]

    def send(
        self, method: str, path: str, body: bytes = b"", headers: dict[bytes, bytes] | None = None
    ) -> Reply:
        """The reply, which breaks no rule that holds for all of them."""
        reply = self.plane.handle(Request(method, path, headers or {}, body))
        if isinstance(reply, Coroutine):
            reply = asyncio.run(_awaited(reply))
        assert all(re.fullmatch(rb"[a-z-]+", name) for name, _ in reply.headers)
        if reply.status != 200:
            assert_one_line(reply)
        return reply

    def get(self, path: str) -> Any:
        reply = self.send("GET", path)
        assert reply.status == 200, reply.body
        return orjson.loads(reply.body)

    def infer(self, document: Any = None, path: str = "/v2/models/typed/infer", **headers: str) -> Reply:
        named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
        return self.send("POST", path, orjson.dumps(REQUEST if document is None else document), named)

    def refusal(self, document: Any) -> str:
        reply = self.infer(document)
        assert reply.status == 400
        assert self.engine.asked == []
        assert self.engine.rejected == 1
        return str(orjson.loads(reply.body)["error"])


async def _awaited(reply: Coroutine[Any, Any, Reply]) -> Reply:
    return await reply


def assert_one_line(reply: Reply) -> None:
    assert reply.content_type == b"application/json"
    content = orjson.loads(reply.body)
    assert list(content) == ["error"]
    assert isinstance(content["error"], str)
    assert re.fullmatch(r"[^\r\n]+", content["error"])


def header(reply: Reply, name: bytes) -> str | None:
    found = [value.decode() for key, value in reply.headers if key == name]
    return found[0] if found else None


def tensor(name: str, values: Any, rows: int = 1) -> dict[str, Any]:
    _, _, size, datatype = echo.INPUTS[name]
    return {"name": name, "shape": [rows, size], "datatype": datatype, "data": values}


INPUTS = [
    tensor("x", [0.25, -1]),
    tensor("half", [0.1, 3]),
    tensor("small", [1, -128, 127]),
    tensor("large", [2**62, -1]),
    tensor("flags", [True, False]),
    tensor("text", ["é", ""]),
]
REQUEST = {"inputs": INPUTS}
TWO = [
    {**item, "shape": [2, item["shape"][1]], "data": item["data"] * 2}  # type: ignore[index, operator]
    for item in INPUTS
]


@pytest.fixture(scope="module")
def variants() -> list[FakeModel]:
    return [loaded("full"), loaded("int8-dynamic")]


@pytest.fixture
def bench(variants: list[FakeModel]) -> Bench:
    return Bench(FakeEngine(variants))


@pytest.fixture(params=["at once", "later"])
def either(request: pytest.FixtureRequest, variants: list[FakeModel]) -> Bench:
    """As `bench`, and with an engine that has to wait for the answer."""
    return Bench(FakeEngine(variants, waits=request.param == "later"))


# -- health and metadata -------------------------------------------------------------------------------------


def test_a_server_is_live_and_ready(bench: Bench) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/typed/ready"):
        reply = bench.send("GET", path)
        assert (reply.status, reply.body) == (200, b"")


def test_a_server_that_drains_is_live_and_not_ready(bench: Bench) -> None:
    bench.ready = False
    assert bench.send("GET", "/v2/health/live").status == 200
    for path in ("/v2/health/ready", "/v2/models/typed/ready", "/v2/models/typed/versions/full/ready"):
        assert bench.send("GET", path).status == 400


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_the_server_says_what_it_is(bench: Bench, path: str) -> None:
    said = bench.get(path)
    assert said["name"] == "trimtab"
    assert said["version"]
    assert "binary_tensor_data" in said["extensions"]


def test_a_model_says_what_it_takes_and_gives(bench: Bench) -> None:
    said = bench.get("/v2/models/typed")
    assert said["name"] == "typed"
    assert said["versions"] == ["full", "int8-dynamic"]
    assert said["platform"] == "onnxruntime_onnx"
    assert said["inputs"][:2] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "half", "datatype": "FP16", "shape": [-1, 2]},
    ]
    assert said["outputs"][-1] == {"name": "text_out", "datatype": "BYTES", "shape": [-1, 2]}


def test_a_version_speaks_for_itself(bench: Bench) -> None:
    assert bench.get("/v2/models/typed/versions/int8-dynamic")["versions"] == ["int8-dynamic"]
    assert bench.send("GET", "/v2/models/typed/versions/int8-dynamic/ready").status == 200


def test_the_configuration_leaves_out_the_axis_of_records(bench: Bench) -> None:
    for path in ("/v2/models/typed/config", "/v2/models/typed/versions/full/config"):
        said = bench.get(path)
        assert said["max_batch_size"] == MAX_RECORDS
        assert said["input"][2] == {"name": "small", "data_type": "TYPE_INT8", "dims": [3]}
        assert said["output"][5] == {"name": "text_out", "data_type": "TYPE_STRING", "dims": [2]}


def test_a_model_for_one_record_at_a_time_takes_no_batches() -> None:
    content = models.parsed(
        '<ir_version: 10, opset_import: ["" : 21]> one (float[1, 2] x) => (float[1, 2] y) { y = Identity(x) }'
    )
    said = Bench(FakeEngine([loaded("full", content)])).get("/v2/models/typed/config")
    assert said["max_batch_size"] == 0
    assert said["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [1, 2]}]


def test_statistics_are_those_of_the_loaded_variants(bench: Bench) -> None:
    bench.statistics["int8-dynamic"] = Statistics(
        requests=3, request_seconds=0.5, failures=1, failure_seconds=0.25, runs=2, run_seconds=0.125, rows=7,
        last_at=12.5, batches={4: 1, 3: 2},
    )  # fmt: skip
    both = bench.get("/v2/models/typed/stats")["model_stats"]
    assert [(one["name"], one["version"]) for one in both] == [("typed", "full"), ("typed", "int8-dynamic")]
    assert bench.get("/v2/models/stats")["model_stats"] == both
    (one,) = bench.get("/v2/models/typed/versions/int8-dynamic/stats")["model_stats"]
    assert one == both[1]
    assert (one["inference_count"], one["execution_count"], one["last_inference"]) == (7, 2, 12_500)
    assert one["inference_stats"]["success"] == {"count": 3, "ns": 500_000_000}
    assert one["inference_stats"]["fail"] == {"count": 1, "ns": 250_000_000}
    assert one["inference_stats"]["compute_infer"] == {"count": 2, "ns": 125_000_000}
    assert [(batch["batch_size"], batch["compute_infer"]["count"]) for batch in one["batch_stats"]] == [
        (3, 2),
        (4, 1),
    ]


def test_the_repository_has_the_loaded_variants(bench: Bench) -> None:
    for body in (b"", b"{}", b'{"ready": true}'):
        reply = bench.send("POST", "/v2/repository/index", body)
        assert reply.status == 200
        assert orjson.loads(reply.body) == [
            {"name": "typed", "version": name, "state": "READY", "reason": ""}
            for name in ("full", "int8-dynamic")
        ]


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_models_are_loaded_by_rollouts_only(bench: Bench, verb: str) -> None:
    reply = bench.send("POST", f"/v2/repository/models/typed/{verb}", b"{}")
    assert reply.status == 400
    assert b"rollout" in reply.body
    assert bench.send("POST", f"/v2/repository/models/other/{verb}", b"{}").status == 404


@pytest.mark.parametrize(
    "path",
    [
        "/v2/trace/setting",
        "/v2/logging",
        "/v2/systemsharedmemory/status",
        "/v2/cudasharedmemory/region/a/status",
        "/v2/models/typed/trace/setting",
        "/v2/models/typed/generate",
        "/v2/models/typed/versions/full/generate_stream",
    ],
)
def test_an_extension_that_is_not_there_is_named(bench: Bench, path: str) -> None:
    for method in ("GET", "POST"):
        reply = bench.send(method, path)
        assert reply.status == 404
        assert b"this server has no " in reply.body


@pytest.mark.parametrize(
    "path",
    [
        "/v2/nothing",
        "/v2/health",
        "/v2/health/well",
        "/v2/models",
        "/v2/models/",
        "/v2/models/other",
        "/v2/models/other/infer",
        "/v2/models/typed/",
        "/v2/models/typed/versions",
        "/v2/models/typed/versions/",
        "/v2/models/typed/versions/fp8/infer",
        "/v2/models/typed/versions/full/versions/full",
        "/v2/models/typed/infer/infer",
        "/v2/models/typed\n/infer",
        "/v2/models/\udc80/infer",
        "/v2/models/" + "x" * 100_000,
        "/v2/repository",
        "/v2/repository/models/typed",
        "//v2",
    ],
)
def test_a_path_that_is_not_there_is_not_found(bench: Bench, path: str) -> None:
    for method in ("GET", "POST"):
        reply = bench.send(method, path)
        assert reply.status == 404
        assert len(reply.body) < 500


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v2", "GET, HEAD"),
        ("POST", "/v2/health/live", "GET, HEAD"),
        ("DELETE", "/v2/models/typed", "GET, HEAD"),
        ("PUT", "/v2/models/typed/stats", "GET, HEAD"),
        ("POST", "/v2/models/stats", "GET, HEAD"),
        ("POST", "/v2/openapi.json", "GET, HEAD"),
        ("GET", "/v2/models/typed/infer", "POST"),
        ("HEAD", "/v2/models/typed/versions/full/infer", "POST"),
        ("GET", "/v2/repository/index", "POST"),
        ("GET", "/v2/repository/models/typed/load", "POST"),
        ("X" * 1000, "/v2", "GET, HEAD"),
    ],
)
def test_another_method_is_told_which_ones_there_are(
    bench: Bench, method: str, path: str, allowed: str
) -> None:
    reply = bench.send(method, path)
    assert reply.status == 405
    assert header(reply, b"allow") == allowed


def test_a_route_that_is_read_answers_head(bench: Bench) -> None:
    for path in ("/v2", "/v2/health/ready", "/v2/models/typed"):
        assert bench.send("HEAD", path).status == 200


# -- inference -----------------------------------------------------------------------------------------------


def test_json_in_json_out(either: Bench) -> None:
    reply = either.infer()
    assert reply.status == 200
    assert reply.content_type == b"application/json"
    assert header(reply, b"inference-header-content-length") is None
    body = orjson.loads(reply.body)
    assert list(body) == ["model_name", "model_version", "id", "parameters", "outputs"]
    assert (body["model_name"], body["model_version"]) == ("typed", "full")
    assert [output["name"] for output in body["outputs"]] == [echo.output(name) for name in echo.INPUTS]
    for given_, got in zip(INPUTS, body["outputs"], strict=True):
        assert (got["datatype"], got["shape"]) == (given_["datatype"], given_["shape"])
        want = np.array(given_["data"], echo.INPUTS[given_["name"]][1])  # type: ignore[index]
        assert np.array_equal(np.array(got["data"], want.dtype), want)


def test_a_reply_names_who_answered_and_under_which_id(either: Bench) -> None:
    reply = either.infer({**REQUEST, "id": "mine-7"}, x_request_id="another")
    body = orjson.loads(reply.body)
    assert body["id"] == "mine-7"
    request_id = body["parameters"]["request_id"]
    assert request_id.startswith("mine-7.")
    RequestIds("key").check(request_id)
    assert header(reply, b"x-request-id") == request_id
    assert header(reply, b"x-trimtab-variant") == "full"
    assert header(reply, b"x-trimtab-arm") == "control"
    (asked,) = either.engine.asked
    assert asked["supplied_id"] == "mine-7"
    assert asked["headers"] == {b"x-request-id": b"another"}  # the engine looks there where no id is supplied


@pytest.mark.parametrize("document", [REQUEST, {**REQUEST, "id": ""}, {**REQUEST, "id": None}])
def test_a_request_without_an_id_gets_one(bench: Bench, document: Any) -> None:
    reply = bench.infer(document)
    assert bench.engine.asked[0]["supplied_id"] is None
    assert orjson.loads(reply.body)["id"]


@pytest.mark.parametrize("bad", ["a b", "é", "x" * 129, "x\n"])
def test_an_id_that_no_header_could_carry_is_refused(bench: Bench, bad: str) -> None:
    assert bench.infer({**REQUEST, "id": bad}).status == 400
    assert bench.engine.rejected == 1


def test_a_version_answers_itself(either: Bench) -> None:
    reply = either.infer(path="/v2/models/typed/versions/int8-dynamic/infer")
    assert orjson.loads(reply.body)["model_version"] == "int8-dynamic"
    assert header(reply, b"x-trimtab-variant") == "int8-dynamic"
    assert header(reply, b"x-trimtab-arm") == "treatment"
    assert either.engine.asked[0]["version"] == "int8-dynamic"


def test_a_variant_is_asked_in_terms_of_its_own_signature(variants: list[FakeModel]) -> None:
    content = models.parsed(
        '<ir_version: 10, opset_import: ["" : 21]> other (float[N, 1] x) => (float[N, 1] y) { y = Identity(x) }'
    )
    bench = Bench(FakeEngine([variants[0], loaded("other", content)]))
    document = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [2.5]}]}
    reply = bench.infer(document, "/v2/models/typed/versions/other/infer")
    assert orjson.loads(reply.body)["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [1, 1], "data": [2.5]}
    ]


def test_what_is_sampled_is_mirrored_after_the_reply(either: Bench) -> None:
    either.engine.mirrors = True
    reply = either.infer()
    assert either.engine.mirrored == []
    assert reply.after is not None
    reply.after()
    assert either.engine.mirrored == [header(reply, b"x-request-id")]


def test_what_is_not_sampled_has_nothing_to_do_after_the_reply(bench: Bench) -> None:
    assert bench.infer().after is None


@pytest.mark.parametrize(
    ("failure", "status", "retry"),
    [
        (ArmFailed("error", "full: no"), 503, "1"),
        (Overloaded(2.5), 503, "3"),
        (DeadlineExceeded(), 504, None),
        (NotFound("gone"), 404, None),
        (BadRequest("no"), 400, None),
    ],
)
def test_what_the_engine_says_the_client_hears(
    either: Bench, failure: ServingError, status: int, retry: str | None
) -> None:
    either.engine.failure = failure
    reply = either.infer()
    assert reply.status == status
    assert orjson.loads(reply.body) == {"error": str(failure)}
    assert header(reply, b"retry-after") == retry


def test_a_surprise_is_logged_and_answered_in_one_line(
    either: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    either.engine.failure = RuntimeError("a secret\nof two lines")
    with caplog.at_level(logging.ERROR, "trimtab.gateway"):
        reply = either.infer()
    assert reply.status == 500
    assert b"secret" not in reply.body
    assert "a secret" in caplog.text


def test_only_what_is_not_valid_counts_as_rejected(bench: Bench) -> None:
    bench.engine.failure = ArmFailed("error", "full: no")
    assert bench.infer().status == 503
    assert bench.infer(path="/v2/models/typed/versions/fp8/infer").status == 404
    assert bench.engine.rejected == 0
    assert bench.infer({}).status == 400
    assert bench.engine.rejected == 1


# -- parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "seconds"),
    [
        ({}, None),
        ({"timeout": 0}, None),
        ({"timeout": None}, None),
        ({"timeout": 1_500_000}, 1.5),
        ({"timeout": 1}, 1e-6),
        ({"timeout": 2**64 - 1}, (2**64 - 1) / 1e6),
        ({"priority": 1, "unheard_of": "x", "sequence_id": 0, "sequence_start": False}, None),
    ],
)
def test_a_timeout_is_in_microseconds_and_other_parameters_change_nothing(
    bench: Bench, parameters: dict[str, Any], seconds: float | None
) -> None:
    assert bench.infer({**REQUEST, "parameters": parameters}).status == 200
    assert bench.engine.asked[0]["timeout"] == seconds


@pytest.mark.parametrize("timeout", [-1, 1.5, "1", True, [], {}])
def test_a_timeout_that_is_none_is_refused(bench: Bench, timeout: Any) -> None:
    assert "microseconds" in bench.refusal({**REQUEST, "parameters": {"timeout": timeout}})


@pytest.mark.parametrize("sequence", [7, "a", [], True])
def test_sequences_are_refused(bench: Bench, sequence: Any) -> None:
    assert "sequence_id" in bench.refusal({**REQUEST, "parameters": {"sequence_id": sequence}})


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("TEAM=A", [{"TEAM": "A"}]),
        ("TEAM=A,AGE=40-49", [{"TEAM": "A", "AGE": "40-49"}]),
        ("AGE=ü = ü", [{"AGE": "ü = ü"}]),
        ("TEAM=A;TEAM=B", [{"TEAM": "A"}, {"TEAM": "B"}]),
        (f"TEAM={'x' * 64}", [{"TEAM": "x" * 64}]),
    ],
)
def test_groups_reach_the_engine(bench: Bench, text: str, groups: Any) -> None:
    assert bench.infer({"inputs": TWO, "parameters": {"groups": text}}).status == 200
    assert bench.engine.asked[0]["groups"] == groups
    assert bench.engine.asked[0]["rows"] == 2


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["TEAM=A"], "must be a string"),
        ({"TEAM": "A"}, "must be a string"),
        ("", "no sensitive attribute ''; this workload has TEAM, AGE"),
        ("SEX=1", "no sensitive attribute 'SEX'"),
        ("TEAM=A,", "no sensitive attribute ''"),
        ("TEAM", "the value of TEAM must be 1 to 64 printable characters"),
        ("TEAM=", "the value of TEAM must be 1 to 64 printable characters"),
        ("TEAM=" + "x" * 65, "the value of TEAM must be 1 to 64 printable characters"),
        ("TEAM=a\nb", "the value of TEAM must be 1 to 64 printable characters"),
        ("TEAM=A,TEAM=B", "TEAM is given twice for one record"),
        ("TEAM=A;TEAM=B;TEAM=C", "3 entries for 2 records"),
        ("x" * 10_000 + "=1", "no sensitive attribute"),
    ],
)
def test_groups_that_are_none_are_refused(bench: Bench, groups: Any, message: str) -> None:
    said = bench.refusal({"inputs": TWO, "parameters": {"groups": groups}})
    assert message in said
    assert len(said) < 300


def test_a_workload_without_sensitive_attributes_takes_no_groups(variants: list[FakeModel]) -> None:
    bench = Bench(FakeEngine(variants, sensitive=()))
    assert "this workload has none" in bench.refusal({**REQUEST, "parameters": {"groups": "TEAM=A"}})


# -- compressed bodies ---------------------------------------------------------------------------------------

PLAIN = orjson.dumps(REQUEST)
INFER = "/v2/models/typed/infer"


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        (b"gzip", gzip.compress(PLAIN)),
        (b"GZip ", gzip.compress(PLAIN)),
        (b"x-gzip", gzip.compress(PLAIN)),
        (b"deflate", zlib.compress(PLAIN)),
        (b"identity", PLAIN),
        (b"", PLAIN),
    ],
)
def test_a_compressed_body_is_read(bench: Bench, encoding: bytes, body: bytes) -> None:
    assert bench.send("POST", INFER, body, {b"content-encoding": encoding}).status == 200


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        (b"br", PLAIN, 415),
        (b"zstd", PLAIN, 415),
        (b"gzip, gzip", gzip.compress(gzip.compress(PLAIN)), 415),
        (b"\xff" * 1000, PLAIN, 415),
        (b"gzip", PLAIN, 400),
        (b"gzip", b"", 400),
        (b"gzip", gzip.compress(PLAIN)[:-1], 400),
        (b"gzip", gzip.compress(PLAIN) + b"x", 400),
        (b"gzip", gzip.compress(PLAIN) * 2, 400),
        (b"gzip", gzip.compress(PLAIN)[:-8] + b"\0" * 8, 400),
        (b"gzip", zlib.compress(PLAIN), 400),
        (b"deflate", gzip.compress(PLAIN), 400),
        (b"deflate", zlib.compress(PLAIN)[:-1], 400),
        (b"gzip", gzip.compress(PLAIN + b" " * MAX_BODY), 413),
        (b"deflate", zlib.compress(b"\0" * 50_000_000), 413),
    ],
)
def test_a_body_that_does_not_decompress_is_refused(
    bench: Bench, encoding: bytes, body: bytes, status: int
) -> None:
    assert bench.send("POST", INFER, body, {b"content-encoding": encoding}).status == status
    assert bench.engine.rejected == 1


def test_a_body_may_be_as_large_decompressed_as_it_may_be_plain(bench: Bench) -> None:
    body = PLAIN.ljust(MAX_BODY)
    assert bench.send("POST", INFER, gzip.compress(body), {b"content-encoding": b"gzip"}).status == 200
    assert bench.send("POST", INFER, gzip.compress(body + b" "), {b"content-encoding": b"gzip"}).status == 413


# -- valid requests of every form ----------------------------------------------------------------------------


@st.composite
def valid_requests(
    draw: st.DrawFn,
) -> tuple[bytes, dict[bytes, bytes], dict[str, np.ndarray], list[tuple[str, bool]]]:
    """Body, headers, the arrays in it, and the outputs to expect with whether they are binary."""
    rows = draw(st.integers(1, 3))
    arrays, inputs, raw = {}, [], b""
    for name in draw(st.permutations(list(echo.INPUTS))):
        _, dtype, size, datatype = echo.INPUTS[name]
        if datatype == "BYTES":
            element: st.SearchStrategy[Any] = st.text(max_size=5)
        elif datatype == "BOOL":
            element = st.booleans()
        elif datatype.startswith("INT"):
            limits = np.iinfo(dtype)  # type: ignore[type-var]
            element = st.integers(int(limits.min), int(limits.max))
        else:
            element = st.floats(
                width=16 if dtype is np.float16 else 32, allow_nan=False, allow_infinity=False
            )
        values = draw(st.lists(element, min_size=rows * size, max_size=rows * size))
        array = np.array(values, dtype).reshape(rows, size)
        described = {"name": name, "datatype": datatype, "shape": [rows, size]}
        if draw(st.booleans()):
            content = array.tobytes()
            if datatype == "BYTES":
                encoded = [text.encode() for text in values]
                content = b"".join(len(text).to_bytes(4, "little") + text for text in encoded)
            described["parameters"] = {"binary_data_size": len(content)}
            raw += content
        else:
            described["data"] = draw(st.sampled_from([values, array.tolist()]))
        arrays[echo.output(name)] = array
        inputs.append(described)
    document: dict[str, Any] = {"inputs": inputs}
    all_binary = draw(st.booleans())
    if all_binary or draw(st.booleans()):
        document["parameters"] = {"binary_data_output": all_binary}
    expected = [(echo.output(name), all_binary) for name in echo.INPUTS]
    if draw(st.booleans()):
        asked = draw(st.lists(st.sampled_from(sorted(arrays)), min_size=1, unique=True))
        choices = [draw(st.sampled_from([None, True, False])) for _ in asked]
        document["outputs"] = [
            {"name": name} | ({} if choice is None else {"parameters": {"binary_data": choice}})
            for name, choice in zip(asked, choices, strict=True)
        ]
        expected = [
            (name, all_binary if choice is None else choice)
            for name, choice in zip(asked, choices, strict=True)
        ]
    text = orjson.dumps(document)
    headers = {}
    if raw or draw(st.booleans()):
        headers[b"inference-header-content-length"] = str(len(text)).encode()
    body = text + raw
    if draw(st.booleans()):
        headers[b"content-encoding"] = b"gzip"
        body = gzip.compress(body)
    return body, headers, arrays, expected


@given(valid_requests())
@FUZZ
def test_whatever_is_valid_comes_back_to_the_last_bit(bench: Bench, request_: Any) -> None:
    body, headers, arrays, expected = request_
    reply = bench.send("POST", INFER, body, headers)
    assert reply.status == 200, reply.body
    got, binary = outputs_of(reply)
    assert [(name, name in binary) for name in got] == expected
    for name, array in got.items():
        want = arrays[name]
        assert array.shape == want.shape
        if want.dtype == object:
            assert array.tolist() == want.tolist()
        else:
            assert array.tobytes() == want.tobytes()


def outputs_of(reply: Reply) -> tuple[dict[str, np.ndarray], set[str]]:
    """The arrays in a reply, as a client reads them, and which were binary."""
    at = int(header(reply, b"inference-header-content-length") or len(reply.body))
    found, binary = {}, set()
    dtypes = {echo.output(name): dtype for name, (_, dtype, _, _) in echo.INPUTS.items()}
    raw = reply.body[at:]
    for output in orjson.loads(reply.body[:at])["outputs"]:
        name, dtype = output["name"], dtypes[output["name"]]
        if "data" in output:
            values = np.array(output["data"], dtype)
        else:
            binary.add(name)
            size = output["parameters"]["binary_data_size"]
            part, raw = raw[:size], raw[size:]
            values = (
                np.array(list(_texts(part)), object) if dtype is np.object_ else np.frombuffer(part, dtype)
            )
        found[name] = values.reshape(output["shape"])
    assert raw == b""
    assert (reply.content_type == b"application/octet-stream") == bool(binary)
    return found, binary


def _texts(raw: bytes) -> Iterator[str]:
    while raw:
        end = 4 + int.from_bytes(raw[:4], "little")
        yield raw[4:end].decode()
        raw = raw[end:]


# -- the description, and requests made from it --------------------------------------------------------------


@pytest.fixture(scope="module")
def description(variants: list[FakeModel]) -> dict[str, Any]:
    found: dict[str, Any] = Bench(FakeEngine(variants)).get("/v2/openapi.json")
    return found


def resolved(node: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        place: Any = description
        for part in node["$ref"].removeprefix("#/").split("/"):
            place = place[part]
        node = place
    return node


def values_of(schema: dict[str, Any], description: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a schema allows; of the words of JSON Schema, those that the description uses."""
    schema = resolved(schema, description)
    for choice in ("oneOf", "anyOf"):
        if choice in schema:
            return st.one_of([values_of(part, description) for part in schema[choice]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of([_values_of_type(kind, schema, description) for kind in kinds])


def _values_of_type(kind: str, schema: dict[str, Any], description: dict[str, Any]) -> st.SearchStrategy[Any]:
    match kind:
        case "object":
            properties = {
                name: values_of(part, description) for name, part in schema.get("properties", {}).items()
            }
            required = {name: properties.pop(name) for name in schema.get("required", [])}
            return st.fixed_dictionaries(required, optional=properties)
        case "array" if "prefixItems" in schema:
            return st.tuples(*(values_of(part, description) for part in schema["prefixItems"])).map(list)
        case "array":
            least = schema.get("minItems", 0)
            items = values_of(schema["items"], description) if "items" in schema else st.integers(0, 1)
            return st.lists(items, min_size=least, max_size=min(schema.get("maxItems", 4), least + 4))
        case "integer":
            return st.integers(schema.get("minimum", -(2**63)), schema.get("maximum", 2**63))
        case "number":
            return st.floats(
                schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False
            )
        case "string":
            return (
                st.from_regex(schema["pattern"], fullmatch=True)
                if "pattern" in schema
                else st.text(max_size=20)
            )
    assert kind == "boolean"
    return st.booleans()


def fits(value: Any, schema: dict[str, Any], description: dict[str, Any]) -> bool:
    """Whether a value is one that a schema allows."""
    schema = resolved(schema, description)
    if "oneOf" in schema:
        return sum(fits(value, part, description) for part in schema["oneOf"]) == 1
    if "enum" in schema:
        return value in schema["enum"]
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
    }
    if not isinstance(value, types[schema["type"]]) or (
        isinstance(value, bool) and schema["type"] != "boolean"
    ):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        return (
            set(schema.get("required", [])) <= set(value)
            and (schema.get("additionalProperties", True) is not False or set(value) <= set(properties))
            and all(
                fits(part, properties[name], description)
                for name, part in value.items()
                if name in properties
            )
        )
    if isinstance(value, list):
        return all(fits(part, schema["items"], description) for part in value)
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))


def check_described(reply: Reply, operation: dict[str, Any], description: dict[str, Any]) -> None:
    """The reply is one that the description announces."""
    described = operation["responses"].get(str(reply.status))
    assert described is not None, (reply.status, reply.body[:300])
    content = described.get("content")
    if content is None:
        assert reply.body == b""
        return
    assert reply.content_type.decode() in content
    at = int(header(reply, b"inference-header-content-length") or len(reply.body))
    value = orjson.loads(reply.body[:at])
    assert fits(value, content["application/json"]["schema"], description), value


def operations(description: dict[str, Any]) -> list[tuple[str, str, dict[str, Any], list[dict[str, Any]]]]:
    """Path, method, operation and parameters of every route under /v2."""
    found = []
    for path, item in description["paths"].items():
        for method in ("get", "post"):
            if method in item and path != "/predict":
                given_ = [*item.get("parameters", []), *item[method].get("parameters", [])]
                found.append((path, method, item[method], [resolved(part, description) for part in given_]))
    return found


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
anywhere = st.text(max_size=10).filter(lambda text: "/" not in text and text != "stats")
in_headers = st.binary(max_size=20) | st.sampled_from(
    [b"gzip", b"deflate", b"0", b"12", b"99999999999999999999"]
)


def test_every_route_is_described(description: dict[str, Any], bench: Bench) -> None:
    assert description["openapi"] == "3.1.0"
    assert "/predict" in description["paths"]
    found = operations(description)
    assert len(found) == 18
    for path, method, operation, _ in found:
        filled = path.format(model="typed", version="full")
        check_described(bench.send(method.upper(), filled, PLAIN), operation, description)
        other = "GET" if method == "post" else "POST"
        assert bench.send(other, filled).status == 405


def test_every_reference_in_the_description_leads_somewhere(description: dict[str, Any]) -> None:
    places = re.findall(r'"\$ref":"([^"]+)"', orjson.dumps(description).decode())
    assert len(set(places)) > 10
    for place in set(places):
        assert resolved({"$ref": place}, description)


def test_the_description_tells_a_good_reply_from_a_bad_one(description: dict[str, Any], bench: Bench) -> None:
    schema = {"$ref": "#/components/schemas/InferReply"}
    good = orjson.loads(bench.infer().body)
    assert fits(good, schema, description)
    assert not fits({**good, "model_name": "other"}, schema, description)
    assert not fits({**good, "outputs": [{**good["outputs"][0], "data": ["1"]}]}, schema, description)
    assert not fits({name: good[name] for name in good if name != "id"}, schema, description)
    assert not fits({**good, "surplus": 1}, schema, description)


@given(st.data())
@hypothesis_settings(FUZZ, max_examples=200)
def test_no_request_made_from_the_description_gets_an_answer_that_is_not_in_it(
    bench: Bench, description: dict[str, Any], data: st.DataObject
) -> None:
    path, method, operation, parameters = data.draw(st.sampled_from(operations(description)))
    headers: dict[bytes, bytes] = {}
    for parameter in parameters:
        valid = values_of(parameter["schema"], description)
        if parameter["in"] == "path":
            value = data.draw(valid | anywhere)
            path = path.replace(f"{{{parameter['name']}}}", value)
        elif data.draw(st.booleans()):
            good = valid.map(lambda value: quote(str(value)).encode())
            headers[parameter["name"].lower().encode()] = data.draw(good | in_headers)
    body = b""
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        documents = values_of(schema, description) | anything
        body = data.draw(documents.map(orjson.dumps) | st.binary(max_size=50))
    check_described(bench.send(method.upper(), path, body, headers), operation, description)


@given(
    st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", ""])
    | st.text(max_size=5),
    st.lists(
        st.sampled_from(
            [
                "",
                "models",
                "typed",
                "versions",
                "full",
                "infer",
                "ready",
                "stats",
                "config",
                "repository",
                "index",
            ]
        )
        | st.sampled_from(["load", "health", "live", "openapi.json", "trace", "logging", "..", "%2f"])
        | st.text(max_size=5),
        max_size=6,
    ),
    st.binary(max_size=40) | st.just(PLAIN),
    st.dictionaries(
        st.sampled_from(
            [b"content-encoding", b"inference-header-content-length", b"x-request-id", b"content-type"]
        ),
        in_headers,
    ),
)
@hypothesis_settings(FUZZ, max_examples=200)
def test_nothing_under_v2_ever_fails(
    bench: Bench, method: str, parts: list[str], body: bytes, headers: dict[bytes, bytes]
) -> None:
    reply = bench.send(method, "/".join(["/v2", *parts]), body, headers)
    assert reply.status in (200, 400, 404, 405, 413, 415)
