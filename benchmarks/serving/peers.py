"""The other servers, each in a virtual environment of its own under .bench/, with one worker and production flags."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import venvs
from benchmarks.serving.formats import FORMATS, Inputs, Target, check
from benchmarks.serving.processes import BenchmarkError, Child, environment, free_ports, wait_until

__all__ = ["PEERS", "Peer", "serve"]

_V2 = "/v2/models/mlp/infer"


@dataclass(frozen=True)
class Peer:
    """One server.

    Attributes:
        name: of its requirements, `benchmarks/peers/<name>.txt`, and of its virtual environment.
        command: from (folder of the environment's commands, port) to what starts it.
        endpoints: series of measurements -> (path, format).
        env: what it needs besides BENCH_MODEL and BENCH_PORT.
    """

    name: str
    title: str
    package: str
    command: Callable[[Path, int], list[str]]
    endpoints: Mapping[str, tuple[str, str]]
    env: Mapping[str, str] = field(default_factory=dict)


def _uvicorn(app: str) -> Callable[[Path, int], list[str]]:
    flags = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    return lambda bin_, port: [str(bin_ / "uvicorn"), app, "--host", "127.0.0.1", "--port", str(port), *flags]


def _script(name: str) -> Callable[[Path, int], list[str]]:
    return lambda bin_, _port: [str(bin_ / "python"), str(venvs.PEERS / name)]


PEERS = (
    Peer(
        "bare-asgi",
        "bare ASGI",
        "uvicorn",
        _uvicorn("bare_asgi:app"),
        {"bare-asgi v2-json": (_V2, "v2-json"), "bare-asgi v2-binary": (_V2, "v2-binary")},
    ),
    Peer("fastapi", "FastAPI", "fastapi", _uvicorn("fastapi_app:app"), {"fastapi": ("/predict", "data")}),
    Peer(
        "bentoml",
        "BentoML API",
        "bentoml",
        lambda bin_, port: [
            *(str(bin_ / "bentoml"), "serve", "bentoml_app:Mlp", "--working-dir", str(venvs.PEERS)),
            *("--host", "127.0.0.1", "--port", str(port)),
        ],
        {"bentoml": ("/predict", "records")},
    ),
    Peer("mlserver", "MLServer", "mlserver", _script("mlserver_app.py"), {"mlserver": (_V2, "v2-json")}),
    Peer("litserve", "LitServe", "litserve", _script("litserve_app.py"), {"litserve": ("/predict", "data")}),
    Peer(
        "ray",
        "Ray Serve",
        "ray",
        _script("ray_app.py"),
        {"ray": ("/", "data")},
        # Ray's own switch for throughput; by default it is off.
        {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    ),
)


@contextlib.contextmanager
def serve(
    peer: Peer, bin_: Path, model: Path, records: list[Inputs], logits: Any, cache: Path
) -> Iterator[dict[str, Target]]:
    """Run the peer and give its targets by series, once each answers as the model does.

    Raises:
        BenchmarkError: it does not start, or answers something else.
    """
    port, other = free_ports(2)
    home = cache / "homes" / peer.name
    home.mkdir(parents=True, exist_ok=True)
    targets = {
        series: Target(port, path, FORMATS[format_], records, logits)
        for series, (path, format_) in peer.endpoints.items()
    }
    with contextlib.ExitStack() as stack:
        # Removed when the peer has been killed, should it leave something there.
        scratch = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)
        )
        variables = environment(
            BENCH_MODEL=str(model),
            BENCH_PORT=str(port),
            BENCH_PORT_2=str(other),
            BENTOML_HOME=str(home),
            TMPDIR=scratch,
            PYTHONPATH="",
            **peer.env,
        )
        log = cache / "logs" / f"{peer.name}.log"
        child = stack.enter_context(Child(peer.command(bin_, port), log, variables, cwd=venvs.PEERS))
        _wait_for_answers(peer, targets, child)
        yield targets


def _wait_for_answers(peer: Peer, targets: Mapping[str, Target], child: Child) -> None:
    problem = ""

    def answers() -> bool:
        nonlocal problem
        try:
            for target in targets.values():
                check(target)
        except BenchmarkError as error:
            problem = str(error)
            return False
        return True

    try:
        wait_until(answers, f"{peer.title} answers", child)
    except BenchmarkError as error:
        raise BenchmarkError(f"{error}; {problem}") from None
    child.descendants()
