"""`bentoml build` makes a bento that serves from an empty directory, without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests import models
from tests.e2e.server import ROOT, Server, until

pytestmark = pytest.mark.e2e

_MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
tiny (int64[N, 15] codes, float[N, 1] age) => (float[N, 2] logits)
<float[1] zero = {0.0}, int64[1] across = {1}>
{
  numbers = Cast <to = 1> (codes)
  total = ReduceSum (numbers, across)
  nothing = Mul(total, zero)
  high = Add(age, nothing)
  low = Neg(high)
  logits = Concat <axis = 1> (low, high)
}
"""

# An editable install would give the checkout's sources to a bento that lacks its own.
_WITHOUT_CHECKOUT = f"""
import sys
sys.path[:] = [path for path in sys.path if path.rstrip("/") != {str(ROOT)!r}]
sys.meta_path[:] = [f for f in sys.meta_path if not str(getattr(f, "__module__", "")).startswith("__editable__")]
"""

RECORD = {
    "AGEP": 40,
    "SCHL": 21,
    "MAR": 1,
    "RELP": 0,
    "DIS": 2,
    "ESP": 0,
    "CIT": 1,
    "MIG": 1,
    "MIL": 4,
    "ANC": 1,
    "NATIVITY": 1,
    "DEAR": 2,
    "DEYE": 2,
    "DREM": 2,
    "SEX": 1,
    "RAC1P": 1,
}


@pytest.fixture(scope="module")
def bento(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """BENTOML_HOME of a freshly built bento, and its tag."""
    home = tmp_path_factory.mktemp("bento") / "bentoml"
    environment = {**os.environ, "BENTOML_HOME": str(home)}
    code = (
        "from tests import models; from tests.e2e.test_bento import _MODEL; "
        "models.save('full', models.parsed(_MODEL), workload='employment')"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
    build = [sys.executable, "-m", "bentoml", "build", "--output", "tag"]
    done = subprocess.run(build, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return home, done.stdout.strip().splitlines()[-1].removeprefix("__tag__:")


def test_a_bento_carries_sources_and_settings_but_no_data_and_no_tests(bento: tuple[Path, str]) -> None:
    home, tag = bento
    name, _, version = tag.partition(":")
    source = home / "bentos" / name / version / "src"
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {"services/gateway.py", "monitoring/ledger.py", "examples/employment/workload.yaml"} <= files
    assert not [file for file in files if file.startswith(("tests", ".trimtab", ".venv", ".git/"))]
    assert not [file for file in files if file.endswith((".parquet", ".pyc"))]


def test_a_bento_serves_from_an_empty_directory_also_while_its_shadow_is_dead(
    bento: tuple[Path, str], tmp_path: Path
) -> None:
    bentoml_home, tag = bento
    empty, home, site = tmp_path / "empty", tmp_path / "home", tmp_path / "site"
    for folder in (empty, home, site):
        folder.mkdir()
    (site / "sitecustomize.py").write_text(_WITHOUT_CHECKOUT)
    server = Server(
        home,
        command=[sys.executable, "-m", "bentoml", "serve", tag, "--host", "127.0.0.1"],
        cwd=empty,
        workload="employment",
        BENTOML_HOME=str(bentoml_home),
        PYTHONPATH=str(site),
    )
    try:
        server.start()
        for pid in (*server.pids("Gateway"), *server.pids("Shadow"), *server.pids("Monitor")):
            assert str(Path(f"/proc/{pid}/cwd").readlink()).startswith((str(bentoml_home), str(empty)))
        with httpx.Client(base_url=server.url, timeout=10) as http:
            reply = http.post("/predict", json={"records": [RECORD]})
            assert reply.status_code == 200, reply.text
            assert (reply.headers["X-Trimtab-Variant"], reply.json()["variant"]) == ("full", "full")
            assert reply.json()["predictions"][0]["label"] == "not_employed"
            killed = server.kill_one("Shadow")
            for _ in range(20):
                assert http.get("/readyz", timeout=2).status_code == 200
                assert http.post("/predict", json={"records": [RECORD]}).status_code == 200
            until(lambda: server.pids("Shadow") not in ([], [killed]), "the shadow runs again")
            assert http.get("/readyz").status_code == 200
        assert list(empty.iterdir()) == []
    finally:
        server.stop()


def test_the_tiny_model_has_the_inputs_of_the_workload() -> None:
    import onnxruntime

    from compression.workload import load_workload

    tensors = load_workload(ROOT / "examples" / "employment").encode([RECORD])
    session = onnxruntime.InferenceSession(models.parsed(_MODEL), providers=["CPUExecutionProvider"])
    assert session.run(None, tensors)[0].tolist() == [[0.25, -0.25]]
