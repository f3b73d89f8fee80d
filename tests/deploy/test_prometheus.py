"""Rules, alerts and dashboard: valid, tested, and about series that exist."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from tests.e2e.server import free_port

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
ALERTMANAGER = DEPLOY / "alertmanager" / "alertmanager.yml"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "trimtab.json").read_text())
PANELS: list[dict[str, Any]] = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
Tool = Callable[[str], str]


def check(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=PROMETHEUS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_configuration(tool: Tool) -> None:
    check(tool("promtool"), "check", "config", "prometheus.yml")


def test_the_rules_are_valid_and_free_of_lint(tool: Tool) -> None:
    check(tool("promtool"), "check", "rules", "--lint=all", "--lint-fatal", "rules.yml")


@pytest.mark.parametrize("file", ["rules_test.yml", "rules_slo_test.yml"])
def test_every_rule_fires_when_it_should_and_only_then(tool: Tool, file: str) -> None:
    check(tool("promtool"), "test", "rules", file)


def test_alertmanager_takes_the_configuration(tool: Tool) -> None:
    check(tool("amtool"), "check-config", str(ALERTMANAGER))


@pytest.mark.parametrize("alert", ALERTS, ids=lambda a: str(a["alert"]))
def test_every_alert_reaches_the_receiver_of_its_severity(tool: Tool, alert: dict[str, Any]) -> None:
    severity = alert["labels"]["severity"]
    out = check(
        tool("amtool"),
        *("config", "routes", "test", f"--config.file={ALERTMANAGER}"),
        *(f"severity={severity}", f"alertname={alert['alert']}"),
    )
    assert out.strip() == severity


@pytest.mark.parametrize("alert", ALERTS, ids=lambda a: str(a["alert"]))
def test_every_alert_has_a_test_that_it_fires_and_an_entry_in_the_docs(alert: dict[str, Any]) -> None:
    tests = [
        case
        for file in ("rules_test.yml", "rules_slo_test.yml")
        for test in yaml.safe_load((PROMETHEUS / file).read_text())["tests"]
        for case in test.get("alert_rule_test", ())
        if case["alertname"] == alert["alert"]
    ]
    assert any(case["exp_alerts"] for case in tests)
    assert f"`{alert['alert']}`" in (ROOT / "docs" / "how-to" / "alerts-and-metrics.md").read_text()


def test_every_series_in_deploy_and_its_docs_is_one_that_trimtab_has() -> None:
    from monitoring import metrics

    known: set[str] = set()
    for family in vars(metrics).values():
        if isinstance(family, (Counter, Gauge, Histogram)):
            for described in family.describe():
                known.add(described.name)
                known |= {f"{described.name}{end}" for end in ("_total", "_bucket", "_count", "_sum")}
    files = [
        *(p for p in DEPLOY.rglob("*") if p.is_file()),
        ROOT / "docs" / "how-to" / "alerts-and-metrics.md",
    ]
    recorded = {re.split(":", rule["record"])[1] for rule in RULES if "record" in rule}
    used = {
        name
        for file in files
        for name in re.findall(r"(?<![\w:])trimtab_[a-z0-9_]+(?![\w:*])", file.read_text())
    }
    assert len(used) > 25
    assert used - known == set()
    assert {
        name for name in recorded if not any(k.startswith(name) or name.startswith(k) for k in known)
    } == set()


# The dashboard -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("panel", PANELS, ids=lambda p: str(p["title"]))
def test_a_panel_has_title_unit_description_and_the_datasource_variable(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    for target in [panel, *panel["targets"]]:
        assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        assert 'instance=~"$instance"' in target["expr"]
        assert target["legendFormat"]
        assert re.findall(r"\[([^\]]+)\]", target["expr"]) in (
            [],
            ["$__rate_interval"],
            ["$__rate_interval"] * 2,
        )


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [p["id"] for p in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        g = panel["gridPos"]
        assert g["x"] + g["w"] <= 24
        cells = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


# A Prometheus that scrapes a server ----------------------------------------------------------------------


def get(port: int, path: str, **parameters: str) -> Any:
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}?{query}", timeout=5) as answer:
        return json.loads(answer.read())["data"]


def result(port: int, expression: str) -> list[Any]:
    found: list[Any] = get(port, "/api/v1/query", query=expression)["result"]
    return found


@pytest.fixture(scope="module")
def live(tool: Tool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a Prometheus with deploy/'s own files, only quicker, that has scraped a server for a while."""
    folder = tmp_path_factory.mktemp("prometheus")
    port, target = free_port(), free_port()
    settings = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "500ms", "scrape_timeout": "400ms", "evaluation_interval": "1s"}
    settings["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{target}"]
    settings["rule_files"] = [str(PROMETHEUS / "rules.yml")]
    del settings["alerting"]
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(settings))
    exporter = subprocess.Popen(
        [sys.executable, "-m", "tests.deploy.exporter", str(target)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    server = subprocess.Popen(
        [
            tool("prometheus"),
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 40
        while True:
            try:
                if result(port, "arm:trimtab_request_seconds:over_slo_ratio_rate1d") and result(
                    port, "count_over_time(trimtab_weight_ratio[1m]) > 6"
                ):
                    break
            except (OSError, urllib.error.URLError):
                pass
            assert time.monotonic() < deadline, "Prometheus has no data"
            time.sleep(0.25)
        yield port
    finally:
        for process in (server, exporter):
            process.terminate()
            process.wait(timeout=20)


def test_every_panels_query_has_an_answer(live: int) -> None:
    empty = []
    for panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "10s").replace("$instance", ".*")
            if not result(live, expression):
                empty.append((panel["title"], expression))
    assert empty == []


def test_every_recorded_figure_has_an_answer(live: int) -> None:
    assert [rule["record"] for rule in RULES if "record" in rule and not result(live, rule["record"])] == []


def test_every_alert_can_be_evaluated(live: int) -> None:
    groups = get(live, "/api/v1/rules")["groups"]
    unhealthy = [r["name"] for g in groups for r in g["rules"] if r["health"] != "ok"]
    assert unhealthy == []


def test_bentomls_series_by_raw_path_are_dropped(live: int) -> None:
    assert result(live, '{__name__=~"bentoml_.*"}') == []
    assert result(live, "trimtab_requests_total")
