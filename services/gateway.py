"""The Gateway service: two doors to one engine, the queue to the shadow, and the operators' routes.

Everything a user waits for happens in this process and touches neither the ledger nor another service.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
from typing import Annotated, Any

import aiohttp
import bentoml
import orjson
from pydantic import Field

from compression.variant import FULL, tag_name
from compression.workload import load_workload
from monitoring.rows import FeedbackResult
from services.arms import Pool
from services.control.app import make_app
from services.control.auth import RequestIds, load_secret
from services.dataplane import DataPlane, Door
from services.engine import Engine
from services.http import Request
from services.limits import Limits
from services.listener import Listener, ListenerLimits
from services.live import Live, LiveState
from services.mirror import Mirror, ShadowRefused
from services.monitor import Monitor
from services.process import ProcessSampler, speak
from services.protocol import OpenInference
from services.routing import CONTROL, TREATMENT
from services.serve import ServeError, tls_context
from services.settings import Settings
from services.shadow import Shadow

__all__ = ["Gateway"]

log = logging.getLogger("trimtab.gateway")

_settings = Settings.from_env()
_DRAIN_SECONDS = 5.0
_BIND_AGAIN_SECONDS = 1.0


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
            pool=Pool(self.settings.model_threads, self.settings.max_queue_s, self._count_batch),
        )
        self._process = ProcessSampler("gateway")
        self._binding: asyncio.Task[None] | None = None
        self._draining = self._listening = False

    @bentoml.on_startup
    async def start(self) -> None:
        speak()
        settings, metrics = self.settings, self._metrics
        self._prepare_series(self.state.live)
        metrics.CORE_PRICE.set(settings.core_price)
        metrics.CORE_WATTS.set(settings.core_watts)
        await asyncio.to_thread(self.state.start)
        self._client = _ShadowClient()
        self.mirror = Mirror(
            self._client.send,
            settings.mirror_queue,
            on_shed=lambda outcome, number: metrics.SHADOW_SHED.labels(outcome).inc(number),
            on_depth=metrics.SHADOW_QUEUE.set,
            busy=self._is_busy,
        )
        self.mirror.start()
        self.engine = Engine(settings, self.workload, self.state, self.request_ids, metrics, self.mirror)
        inference = OpenInference(
            self.engine,
            max_body_bytes=settings.max_body_bytes,
            ready=lambda: not self._draining,
            statistics=self.engine.statistics,
        )
        self.plane = DataPlane(self.engine, inference, settings.api_key)
        self.listener = Listener(
            self.plane.handle,
            ListenerLimits(
                max_body_bytes=settings.max_body_bytes,
                max_connections=settings.max_connections,
                # The engine refuses before this does, from whichever door a request comes. It must: a coroutine that
                # the listener refuses would keep its place in the engine.
                max_in_flight=2 * settings.max_in_flight,
                max_bodies_bytes=max(256 << 20, 4 * settings.max_body_bytes),
            ),
            on_refused=lambda status: metrics.REFUSED.labels(str(status)).inc(),
        )
        if settings.data_port:
            self._binding = asyncio.create_task(self._listen(), name="listen")
        self.engine.counters.start()
        self._process.start()
        # What was loaded so far stays: looking through it again and again would only cost the slowest requests. And a
        # request makes dozens of objects that no cycle holds, so looking after every 700 of them finds nothing.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)

    @bentoml.on_shutdown
    async def stop(self) -> None:
        self._draining = True
        if self._binding is not None:
            self._binding.cancel()
        await self.listener.stop(_DRAIN_SECONDS)
        self.engine.counters.stop()
        await self.mirror.stop()
        await self._client.close()
        self._process.stop()
        await asyncio.to_thread(self.state.stop)

    async def _listen(self) -> None:
        """Open the data plane's own port; again and again while another process has it."""
        settings = self.settings
        context = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            try:
                context = tls_context(settings.tls_certificate, settings.tls_key)
            except ServeError as error:
                log.error("no data plane port: %s", error)
                return
        said = False
        while True:
            try:
                await self.listener.start(
                    settings.data_host,
                    settings.data_port,
                    # Alone, this worker must not share the port with a server of somebody else's.
                    reuse_port=settings.workers > 1,
                    ssl=context,
                )
            except OSError as error:
                if not said:
                    log.error("cannot listen on %s:%d yet: %s", settings.data_host, settings.data_port, error)
                said = True
                await asyncio.sleep(_BIND_AGAIN_SECONDS)
            else:
                log.info("predictions also on %s:%d", settings.data_host, self.listener.port)
                self._listening = True
                return

    async def __is_ready__(self) -> bool:
        """BentoML asks this for /readyz: a worker whose own port is not open would get no traffic there."""
        return self._listening or not self.settings.data_port

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
        # BentoML lists this route and its types; what comes over HTTP is answered by `Door`, before it gets here.
        headers = {name.lower(): value for name, value in ctx.request.headers.raw}
        reply = self.plane.handle(Request("POST", "/predict", headers, orjson.dumps({"records": records})))
        if asyncio.iscoroutine(reply):
            reply = await reply
        ctx.response.status_code = reply.status
        return orjson.loads(reply.body)

    # -- counting -------------------------------------------------------------------------------------------

    def count_feedback(self, result: FeedbackResult) -> None:
        """Show what became of labels and rewards."""
        feedback = self._metrics.FEEDBACK
        feedback.labels("accepted").inc(result.accepted)
        feedback.labels("duplicate").inc(result.duplicates)
        feedback.labels("conflict").inc(result.conflicts)
        feedback.labels("corrected").inc(result.corrected)
        feedback.labels("too_late").inc(result.too_late)

    def count_rejected_feedback(self) -> None:
        """Show a feedback request that was refused whole."""
        self._metrics.FEEDBACK.labels("rejected").inc()

    def _count_batch(self, name: str, rows: int, requests: int) -> None:
        self._metrics.BATCH_ROWS.labels(name).observe(rows)
        self._metrics.BATCH_REQUESTS.labels(name).observe(requests)
        self.engine.counters.batch(name, rows)

    def _is_busy(self) -> bool:
        """Whether users' requests wait already, so that the mirror has to give way."""
        return 2 * self.engine.in_flight > self.settings.max_in_flight

    def _prepare_series(self, live: Live) -> None:
        served = [(live.control.name, CONTROL)]
        if live.treatment is not None:
            served.append((live.treatment.name, TREATMENT))
        self._metrics.prepare(served)


# The first one added is the outermost: what comes to the door is whole and within the limits.
Gateway.add_asgi_middleware(  # type: ignore[attr-defined]  # the decorator's type hides it
    Limits, max_body_bytes=_settings.max_body_bytes, max_in_flight=_settings.max_in_flight
)
Gateway.add_asgi_middleware(  # type: ignore[attr-defined]
    Door, plane=lambda: bentoml.get_current_service().plane
)
