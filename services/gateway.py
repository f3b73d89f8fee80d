"""The Gateway service: assign, infer, reply; then count and mirror.

Everything a user waits for happens in this process and touches neither the ledger nor another service.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import aiohttp
import bentoml
import orjson
from pydantic import Field, ValidationError
from starlette.responses import Response

from compression.variant import FULL, tag_name
from compression.workload import InvalidRecord, load_workload
from monitoring.rows import LabelResult
from services.arms import Answer, Model
from services.control.app import make_app
from services.control.auth import RequestIds, load_secret
from services.errors import ArmFailed, BadRequest, ServingError
from services.limits import Limits
from services.live import Live, LiveState
from services.mirror import Mirror, ShadowRefused
from services.monitor import Monitor
from services.process import ProcessSampler
from services.routing import CONTROL, TREATMENT, Arm, assign, is_sampled
from services.settings import Settings
from services.shadow import Shadow

__all__ = ["Gateway"]

log = logging.getLogger("trimtab.gateway")

_MAX_KEY_CHARS = 256
_settings = Settings.from_env()


@dataclass(frozen=True, slots=True)
class _Served:
    """What one request got, and from whom."""

    answer: Answer
    model: Model
    arm: Arm
    treatment_failed: bool


class _ShadowClient:
    """Sends samples to the Shadow's socket, which BentoML names in the environment of each worker."""

    def __init__(self) -> None:
        address = json.loads(os.environ.get("BENTOML_RUNNER_MAP", "{}")).get("Shadow", "")
        scheme, _, path = address.partition("://")
        if scheme in ("file", "unix"):
            connector: aiohttp.BaseConnector = aiohttp.UnixConnector(path=path)
            self._url = "http://shadow/mirror"
        else:
            connector = aiohttp.TCPConnector()
            self._url = f"http://{path}/mirror"
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=50.0, sock_connect=1.0)
        )

    async def send(self, batch: list[bytes]) -> int:
        body = b"[" + b",".join(batch) + b"]"
        async with self._session.post(
            self._url, data=body, headers={"Content-Type": "application/json"}
        ) as reply:
            if reply.status == 503:
                raise ConnectionError(await reply.text())
            if reply.status != 200:
                raise ShadowRefused(f"HTTP {reply.status}: {(await reply.text())[:200]}")
            return int((await reply.json())["taken"])

    async def close(self) -> None:
        await self._session.close()


@bentoml.service(
    name="Gateway",
    workers=_settings.workers,
    # BentoML keeps a timer for every request alive for this long: a large value costs p99, not only memory.
    traffic={"timeout": 5},
    # A line for every request costs more than the model; the metrics count them.
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(make_app())
class Gateway:
    """Serves predictions from two arms and takes the labels that judge them."""

    # Declared so that BentoML starts both beside the gateway. `__init__` puts plain values in their place:
    # BentoML's own readiness check asks every dependency, and a dead one would take the gateway down with it.
    shadow = bentoml.depends(Shadow)
    monitor = bentoml.depends(Monitor)

    def __init__(self) -> None:
        # Imported here, when BentoML has told this process where its metrics files are.
        from monitoring import metrics

        self._metrics = metrics
        self.shadow = self.monitor = None
        self.settings = _settings
        self.workload = load_workload(self.settings.workload)
        self.token = load_secret(self.settings.home / "token", "TRIMTAB_TOKEN")
        self.request_ids = RequestIds(
            load_secret(self.settings.home / "feedback-key", "TRIMTAB_FEEDBACK_KEY")
        )
        self.state = LiveState(
            self.settings,
            self.workload,
            "gateway",
            tag_name(self.workload.name, FULL),
            on_change=self._prepare_series,
        )
        self._process = ProcessSampler("gateway")

    @bentoml.on_startup
    async def start(self) -> None:
        self._prepare_series(self.state.live)
        await asyncio.to_thread(self.state.start)
        self._client = _ShadowClient()
        self.mirror = Mirror(
            self._client.send,
            self.settings.mirror_queue,
            on_shed=lambda outcome, number: self._metrics.SHADOW_SHED.labels(outcome).inc(number),
            on_depth=self._metrics.SHADOW_QUEUE.set,
        )
        self.mirror.start()
        self._process.start()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        await self.mirror.stop()
        await self._client.close()
        self._process.stop()
        await asyncio.to_thread(self.state.stop)

    @bentoml.api(route="/predict")
    async def predict(
        self,
        records: Annotated[
            list[dict[str, Any]], Field(description="The workload's raw records, one prediction each.")
        ],
        ctx: bentoml.Context,
    ) -> dict[str, Any]:
        """Predict one class for each record.

        Headers: `X-Assignment-Key` keeps a user on one arm; `X-Request-Id` is kept and comes back signed.
        Reply: `{"request_id", "variant", "arm", "predictions": [{"class", "label", "confidence"}]}`.
        """
        started = time.perf_counter()
        headers = ctx.request.headers
        live = self.state.live
        try:
            key, request_id = self.request_ids.issue(headers.get("x-request-id"))
            key = headers.get("x-assignment-key") or key
            if len(key) > _MAX_KEY_CHARS:
                raise BadRequest(f"X-Assignment-Key is over {_MAX_KEY_CHARS} characters")
            inputs = self._encode(records)
        except ServingError as error:
            self._metrics.REQUESTS.labels(live.control.name, CONTROL, "rejected").inc()
            return _error_reply(ctx, error)  # type: ignore[return-value]  # BentoML passes a Response through
        arm, model = CONTROL, live.control
        if live.treatment is not None:
            arm = assign(key, live.route.rollout_id, live.route.weight)
            model = live.treatment if arm == TREATMENT else live.control
        try:
            served = await self._serve(live, arm, model, inputs)
        except ArmFailed as error:
            log.error("control failed: %s", error)  # the message says it all
            self._count_request(live, arm, model, time.perf_counter() - started, failed=True)
            return _error_reply(ctx, error)  # type: ignore[return-value]
        self._offer_to_mirror(live, request_id, served, records)
        reply = self._reply(request_id, served)
        self._count_request(live, arm, model, time.perf_counter() - started, failed=False)
        return reply  # type: ignore[return-value]

    def _encode(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not records:
            raise BadRequest("'records' is empty: send at least one record")
        if len(records) > self.workload.max_records:
            raise BadRequest(
                f"{len(records)} records in one request; the limit of this workload is {self.workload.max_records}"
            )
        try:
            return self.workload.encode(records)
        except InvalidRecord as error:
            raise BadRequest(str(error)) from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A workload that checks less than it could: what it was given is still the client's.
            raise BadRequest(
                f"the records do not fit the workload: {type(error).__name__}: {error}"
            ) from error

    async def _serve(self, live: Live, arm: Arm, model: Model, inputs: Mapping[str, Any]) -> _Served:
        """Answer from the assigned arm's model; whatever goes wrong with the treatment is answered by control."""
        failed = False
        if arm == TREATMENT:
            try:
                answer = await self._try_treatment(live.route.rollout_id, model, inputs)
                return _Served(answer, model, TREATMENT, treatment_failed=False)
            except ArmFailed as error:
                failed = True
                self._metrics.FALLBACKS.labels(model.name, error.kind).inc()
        answer = await live.control.infer(inputs)
        self._metrics.MODEL_SECONDS.labels(live.control.name, CONTROL).observe(answer.model_seconds)
        return _Served(answer, live.control, CONTROL, treatment_failed=failed)

    async def _try_treatment(self, rollout_id: str | None, model: Model, inputs: Mapping[str, Any]) -> Answer:
        if not model.breaker.allow():
            # Not counted as a failure of its own: the requests that opened the breaker were.
            raise ArmFailed("breaker", "the treatment failed several times in a row and rests")
        answer = None
        try:
            answer = await model.infer(inputs, self.settings.treatment_deadline)
        finally:
            if answer is None:
                model.breaker.failed()
            else:
                model.breaker.succeeded()
            if rollout_id is not None:
                self.state.count(rollout_id, "treatment_errors", "", int(answer is None), time.time())
        self._metrics.MODEL_SECONDS.labels(model.name, TREATMENT).observe(answer.model_seconds)
        return answer

    def _offer_to_mirror(
        self,
        live: Live,
        request_id: str,
        served: _Served,
        records: Sequence[Mapping[str, Any]],
    ) -> None:
        route = live.route
        if route.rollout_id is None or route.treatment is None:
            return
        if not is_sampled(request_id, route.rollout_id, route.mirror_rate):
            return
        predictions = served.answer.predictions
        sample = {
            "rollout_id": route.rollout_id,
            "request_id": request_id,
            "arm": served.arm,
            "treatment_failed": served.treatment_failed,
            "records": records,
            "judged": self.request_ids.draw(request_id, len(records)),
            "classes": predictions.classes.tolist(),
            "confidences": predictions.confidences.tolist(),
            "at": time.time(),
        }
        try:
            self.mirror.offer(orjson.dumps(sample))
        except TypeError as error:
            # A field that the workload ignores may hold what JSON allows and orjson does not, such as 10**30.
            log.warning("a sample was not mirrored: %s", error)
            self._metrics.SHADOW_SHED.labels("failed").inc()

    def _reply(self, request_id: str, served: _Served) -> Response:
        predictions = served.answer.predictions
        body = {
            "request_id": request_id,
            "variant": served.model.name,
            "arm": served.arm,
            "predictions": [
                {"class": index, "label": self.workload.classes[index], "confidence": confidence}
                for index, confidence in zip(
                    predictions.classes.tolist(), predictions.confidences.tolist(), strict=True
                )
            ],
        }
        headers = {
            "X-Request-Id": request_id,
            "X-Trimtab-Variant": served.model.name,
            "X-Trimtab-Arm": served.arm,
        }
        return Response(orjson.dumps(body), media_type="application/json", headers=headers)

    def _count_request(self, live: Live, arm: Arm, model: Model, seconds: float, *, failed: bool) -> None:
        """Count a request for the arm it was assigned to: what a failing candidate made a user wait is the
        candidate's latency, whoever answered in the end."""
        self._metrics.REQUESTS.labels(model.name, arm, "failed" if failed else "ok").inc()
        self._metrics.REQUEST_SECONDS.labels(model.name, arm).observe(seconds)
        route = live.route
        if route.rollout_id is None:
            return
        now = time.time()
        self.state.count(route.rollout_id, "requests", arm, int(failed), now)
        self.state.count(
            route.rollout_id, "latency_p95", arm, int(seconds * 1000.0 > route.latency_slo_ms), now
        )

    def count_feedback(self, result: LabelResult) -> None:
        """Show what became of labels."""
        feedback = self._metrics.FEEDBACK
        feedback.labels("accepted").inc(result.accepted)
        feedback.labels("duplicate").inc(result.duplicates)
        feedback.labels("conflict").inc(result.conflicts)

    def count_rejected_feedback(self) -> None:
        """Show a feedback request that was refused whole."""
        self._metrics.FEEDBACK.labels("rejected").inc()

    def _prepare_series(self, live: Live) -> None:
        served = [(live.control.name, CONTROL)]
        if live.treatment is not None:
            served.append((live.treatment.name, TREATMENT))
        self._metrics.prepare(served)


def _error_reply(ctx: bentoml.Context, error: ServingError) -> Response:
    # BentoML sets the context's status on whatever Response it is handed.
    ctx.response.status_code = error.status
    body = orjson.dumps({"error": str(error)})
    return Response(body, error.status, error.headers, media_type="application/json")


class _BodyThatDoesNotFit(logging.Filter):
    """Leave out the traceback, with the client's data in it, that BentoML logs for each; the reply says it all."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], ValidationError))


logging.getLogger("bentoml._internal.server.http_app").addFilter(_BodyThatDoesNotFit())

Gateway.add_asgi_middleware(  # type: ignore[attr-defined]  # the decorator's type hides it
    Limits, max_body_bytes=_settings.max_body_bytes, max_in_flight=_settings.max_in_flight
)
