"""The other servers, each in a virtual environment of its own under .bench/, with one worker and production flags."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.serving.formats import FORMATS, Inputs, Target, check
from benchmarks.serving.processes import BenchmarkError, Child, environment, free_ports, run, wait_until

__all__ = ["PEERS", "Peer", "describe", "prepare", "serve"]

_APPS = Path(__file__).parent.parent / "peers"
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
    return lambda bin_, _port: [str(bin_ / "python"), str(_APPS / name)]


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
            *(str(bin_ / "bentoml"), "serve", "bentoml_app:Mlp", "--working-dir", str(_APPS)),
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


def prepare(peer: Peer, cache: Path, say: Callable[[str], None]) -> Path:
    """Make the peer's environment, unless it is there with these very requirements; returns its `bin`.

    Raises:
        BenchmarkError: it does not install on this machine.
    """
    requirements = _APPS / f"{peer.name}.txt"
    folder = cache / "venvs" / peer.name
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    mark = folder / ".installed"
    if not (mark.exists() and mark.read_text() == wanted):
        say(f"installing {peer.title} into {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        log = cache / "logs" / f"{peer.name}-pip.log"
        try:
            run([sys.executable, "-m", "venv", str(folder)], log)
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            run([*pip, "--disable-pip-version-check", "--no-deps", "-r", str(requirements)], log)
        except BenchmarkError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        mark.write_text(wanted)
    return folder / "bin"


def describe(peer: Peer, cache: Path) -> dict[str, Any]:
    """The pinned version of the peer and what its environment takes on disk."""
    pins = (_APPS / f"{peer.name}.txt").read_text().splitlines()
    version = next((pin for pin in pins if pin.lower().startswith(peer.package + "==")), peer.package)
    files = (
        path for path in (cache / "venvs" / peer.name).rglob("*") if path.is_file() and not path.is_symlink()
    )
    return {"version": version, "disk_mb": round(sum(path.stat().st_size for path in files) / 1e6)}


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
        child = stack.enter_context(Child(peer.command(bin_, port), log, variables, cwd=_APPS))
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
