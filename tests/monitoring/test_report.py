"""The report: complete, atomic, bounded, and clear about what it cannot say."""

import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from monitoring import report as module
from monitoring.cli import ReportContext, register
from monitoring.errors import RolloutNotFound
from monitoring.report import (
    ReportError,
    ReportJob,
    ReportSpec,
    ReportSummary,
    make_report,
    pairs_to_rows,
    report_job,
)

CLASSES = ("not employed", "employed")
SPEC = ReportSpec(
    workload="employment",
    classes=CLASSES,
    sensitive=("SEX", "DIS"),
    rollout_id="r-7",
    candidate="employment-int8:abc",
)


def traffic(
    n: int, seed: int, *, harmed: float = 0.0, shift: float = 0.0, labelled: float = 0.8
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    disability = rng.choice([1, 2], n, p=[0.15, 0.85])
    label = (rng.random(n) < np.where(disability == 1, 0.3, 0.55)).astype(int)
    full = label ^ (rng.random(n) < 0.15)
    candidate = full ^ (rng.random(n) < 0.01 + harmed * (disability == 1))
    sex = rng.choice([1, 2], n)
    rows = pd.DataFrame(
        {
            "AGEP": np.clip(rng.normal(42 + shift, 20, n), 0, 95).round(),
            "SEX": sex,
            "DIS": disability,
            "tags": [["a", "b"]] * n,
            "prediction": [CLASSES[c] for c in candidate],
            "prediction_full": [CLASSES[c] for c in full],
            "label": [CLASSES[c] for c in label],
            "group_SEX": sex.astype(str),
            "group_DIS": disability.astype(str),
        }
    )
    rows["label"] = rows["label"].where(rng.random(n) < labelled, None)
    return rows


def reference_rows(n: int = 3000) -> pd.DataFrame:
    """As the full-precision variant carries them: class indices, and full precision's answers."""
    rows = traffic(n, 99, labelled=1.0)
    index = {name: i for i, name in enumerate(CLASSES)}
    rows = rows.assign(label=rows["label"].map(index), prediction=rows["prediction_full"].map(index))
    return rows.drop(columns="prediction_full").assign(confidence=0.9)


class Made:
    """One report and its files."""

    def __init__(self, summary: ReportSummary) -> None:
        assert summary.html is not None
        assert summary.json is not None
        self.summary = summary
        self.page = Path(summary.html).read_text()
        self.body: dict[str, Any] = json.loads(Path(summary.json).read_text())


@pytest.fixture(scope="module")
def harmful(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A candidate that harms one group, on traffic whose ages have shifted."""
    out = tmp_path_factory.mktemp("harmful")
    current = traffic(3000, 1, harmed=0.3, shift=12)
    return Made(make_report(current, reference_rows(), SPEC, out))


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(make_report(traffic(3000, 2), reference_rows(), SPEC, tmp_path_factory.mktemp("harmless")))


def test_a_harmless_candidate_fails_no_test(harmless: Made) -> None:
    assert harmless.summary.failed == ()
    assert harmless.summary.tests_failed == 0
    assert harmless.summary.tests_passed > 10
    assert "No test failed" in harmless.page


def test_a_harmed_group_fails_by_name(harmful: Made) -> None:
    failed = [told for told in harmful.summary.failed if told.startswith("accuracy drop of DIS=1")]
    assert len(failed) == 1
    assert harmful.summary.worst_group["DIS"] == "1"
    assert not any("SEX" in told for told in harmful.summary.failed)


def test_a_shifted_column_fails_by_name(harmful: Made, harmless: Made) -> None:
    assert harmful.summary.drifted_columns == ("AGEP",)
    assert harmful.summary.drift_score == pytest.approx(1 / 3)
    assert any("column AGEP" in told for told in harmful.summary.failed)
    assert harmless.summary.drifted_columns == ()


def test_the_summary_counts_what_evidently_counted(harmful: Made) -> None:
    statuses = [t["status"] for t in harmful.body["evidently"]["tests"]]
    s = harmful.summary
    assert (s.tests_passed, s.tests_failed, s.tests_warned) == tuple(
        statuses.count(status) for status in ("SUCCESS", "FAIL", "WARNING")
    )
    assert s.tests_failed == len(s.failed)


def test_the_json_has_summary_drift_fairness_and_evidently(harmful: Made) -> None:
    assert set(harmful.body) == {"format", "summary", "drift", "fairness", "errors", "evidently"}
    assert harmful.body["summary"] == harmful.summary.as_dict()
    assert set(harmful.body["fairness"]) == {"SEX", "DIS"}
    names = " ".join(m["metric_name"] for m in harmful.body["evidently"]["metrics"])
    for metric in ("ValueDrift(column=prediction", "AccuracyGap", "EqualizedOddsDifference", "AccuracyDrop"):
        assert metric in names


def test_every_drift_test_states_its_method_and_threshold(harmful: Made) -> None:
    drifts = [m for m in harmful.body["evidently"]["metrics"] if m["metric_name"].startswith("ValueDrift")]
    assert len(drifts) == 4
    assert all("method=" in m["metric_name"] and "threshold=" in m["metric_name"] for m in drifts)


def test_our_distances_are_evidentlys(harmful: Made) -> None:
    theirs = {
        m["config"]["column"]: m["value"]
        for m in harmful.body["evidently"]["metrics"]
        if m["metric_name"].startswith("ValueDrift")
    }
    assert theirs == pytest.approx(dict(harmful.summary.column_drift), abs=1e-9)


def test_the_page_shows_every_section_and_what_failed(harmful: Made) -> None:
    for title in ("Quality", "Fairness: SEX", "Fairness: DIS", "Prediction drift", "Input drift", "Left out"):
        assert title in harmful.page
    assert "accuracy drop of DIS=1: 0." in harmful.page


def test_a_field_of_lists_is_left_out_with_a_note(harmful: Made) -> None:
    assert any(note.startswith("tags: left out") for note in harmful.summary.notes)


def test_quality_is_told_for_both_arms_on_labelled_rows(harmful: Made) -> None:
    s = harmful.summary
    assert s.accuracy is not None
    assert s.accuracy_full is not None
    assert s.accuracy_drop == pytest.approx(s.accuracy_full - s.accuracy)
    assert 2300 < s.labelled_rows < 2500


def test_without_labels_there_is_drift_and_parity_and_no_accuracy(tmp_path: Path) -> None:
    summary = make_report(traffic(400, 3, labelled=0), reference_rows(), SPEC, tmp_path)
    assert summary.status == "ok"
    assert summary.labelled_rows == 0
    assert summary.accuracy is None
    assert set(summary.fairness_gap["DIS"]) == {"demographic_parity_difference"}
    assert any("no row has a label yet" in note for note in summary.notes)


def test_without_sensitive_attributes_there_is_no_fairness(tmp_path: Path) -> None:
    rows = traffic(400, 3).drop(columns=["group_SEX", "group_DIS"])
    summary = make_report(rows, reference_rows(), replace(SPEC, sensitive=()), tmp_path)
    assert summary.status == "ok"
    assert summary.fairness_gap == {}


def test_a_missing_group_column_is_a_note(tmp_path: Path) -> None:
    summary = make_report(traffic(400, 3).drop(columns="group_DIS"), reference_rows(), SPEC, tmp_path)
    assert set(summary.fairness_gap) == {"SEX"}
    assert any("no column 'group_DIS'" in note for note in summary.notes)


def test_a_class_that_is_absent_from_the_window_is_no_trouble(tmp_path: Path) -> None:
    rows = traffic(400, 3).assign(label=CLASSES[0], prediction=CLASSES[0], prediction_full=CLASSES[0])
    spec = replace(SPEC, classes=(*CLASSES, "unheard of"))
    assert make_report(rows, reference_rows(), spec, tmp_path).accuracy == 1.0


def test_without_full_precisions_answers_the_candidate_is_reported_alone(tmp_path: Path) -> None:
    rows = traffic(400, 3).drop(columns="prediction_full")
    summary = make_report(rows, reference_rows(), SPEC, tmp_path)
    assert summary.accuracy is not None
    assert summary.accuracy_full is None
    assert summary.agreement is None


def test_too_few_rows_write_nothing_and_say_so(tmp_path: Path) -> None:
    summary = make_report(traffic(49, 3), reference_rows(), SPEC, tmp_path)
    assert summary.status == "not_enough_rows"
    assert "needs 50" in summary.notes[0]
    assert list(tmp_path.iterdir()) == []


def test_a_long_window_is_sampled_the_same_way_every_time(tmp_path: Path) -> None:
    spec = replace(SPEC, max_rows=300, sensitive=())
    current, reference = traffic(2000, 3), reference_rows()
    first, second = (make_report(current, reference, spec, tmp_path, now=n) for n in (1.0, 2.0))
    assert first.rows == 300
    assert first.column_drift == second.column_drift
    assert any("300 of 2000 current rows" in note for note in first.notes)


def test_only_the_newest_reports_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = SimpleNamespace(
        tests_results=[], get_html_str=lambda as_iframe: "<html>", json=lambda: '{"metrics": [], "tests": []}'
    )
    monkeypatch.setattr(module, "_draw", lambda *_: snapshot)
    spec = replace(SPEC, keep=2, sensitive=())
    current, reference = traffic(100, 3), reference_rows(200)
    made = [make_report(current, reference, spec, tmp_path, now=float(n)) for n in range(1, 5)]
    left = {str(p) for p in tmp_path.iterdir()}
    assert left == {path for m in made[-2:] for path in (m.html, m.json)}


def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        module._write_atomically(tmp_path / "report-x.html", "half")
    assert list(tmp_path.iterdir()) == []


def test_users_text_cannot_end_the_pages_script(tmp_path: Path) -> None:
    rows = traffic(400, 3)
    evil = "</script><script>alert(1)</script>"
    rows["group_DIS"] = rows["group_DIS"].replace({"1": evil, "2": "<25"})
    rows[evil] = 1
    made = Made(make_report(rows, reference_rows(), SPEC, tmp_path))
    assert "<script>alert" not in made.page
    assert "DIS=\\u003c25" in made.page


def test_no_value_of_any_kind_can_end_the_pages_script(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)><!--"
    classes = (f"low {evil}", f"high {evil}")
    named = dict(zip(CLASSES, classes, strict=True))
    reference = reference_rows().assign(kind=evil, **{f"column {evil}": 1.5})
    answers = ["prediction", "prediction_full", "label"]
    rows = traffic(400, 3).assign(kind=evil, **{f"column {evil}": 1.5})
    rows[answers] = rows[answers].replace(named)
    spec = replace(SPEC, classes=classes, candidate=f"small {evil}", workload=f"work {evil}")
    made = Made(make_report(rows, reference, spec, tmp_path))
    harmless = Made(make_report(traffic(400, 3), reference_rows(), SPEC, tmp_path))
    for ending in ("</script", "<img src=x", "<!--"):
        assert made.page.count(ending) == harmless.page.count(ending)
    data = re.findall(r"^\s*var metric_\w+ = (.*);$", made.page, re.MULTILINE)
    assert len(data) == 1
    assert classes[1] in json.dumps(json.loads(data[0]), ensure_ascii=False)


def test_the_report_says_what_compression_broke(harmful: Made) -> None:
    assert "What compression broke" in harmful.page
    worst = harmful.body["errors"]["groups"][0]
    assert worst["name"] == "DIS=1"
    assert worst["lost"] > 40
    assert harmful.summary.lost_most is not None
    assert harmful.summary.lost_most.startswith("DIS=1, net drop ")
    assert harmful.summary.lost == harmful.body["errors"]["overall"]["lost"] > worst["lost"] // 2
    shown = harmful.body["errors"]["lost_rows"]
    assert len(shown) == 20
    assert all(row["groups"]["DIS"] == "1" and row["full"] == row["label"] for row in shown)
    assert {"AGEP", "SEX", "DIS"} <= set(shown[0]["record"])


def test_without_labels_nothing_is_said_of_what_was_lost(tmp_path: Path) -> None:
    made = Made(make_report(traffic(400, 3, labelled=0), reference_rows(), SPEC, tmp_path))
    assert made.summary.lost is None
    assert made.summary.lost_most is None
    assert "What compression broke" not in made.page


def test_a_report_is_its_owners_alone(harmful: Made) -> None:
    assert harmful.summary.html is not None
    assert harmful.summary.json is not None
    assert {Path(p).stat().st_mode & 0o777 for p in (harmful.summary.html, harmful.summary.json)} == {0o600}


def test_lost_records_of_users_cannot_end_the_pages_script(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    rows = traffic(600, 3, harmed=1.0).assign(comment=evil)
    made = Made(make_report(rows, reference_rows().assign(comment="fine"), SPEC, tmp_path))
    assert made.body["errors"]["lost_rows"][0]["record"]["comment"] == evil
    assert "<script>alert" not in made.page


def test_free_text_and_embeddings_are_in_the_drift_section(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def with_text(rows: pd.DataFrame, words: int, shift: float) -> pd.DataFrame:
        texts = [
            " ".join(f"w{a}" for a in rng.integers(0, 9999, rng.integers(3, words))) for _ in range(len(rows))
        ]
        return rows.assign(review=texts, vector=list(rng.normal(shift, 1, (len(rows), 8))))

    made = Made(
        make_report(with_text(traffic(400, 3), 30, 0.5), with_text(reference_rows(), 12, 0.0), SPEC, tmp_path)
    )
    assert {"review: length", "review: words", "vector"} <= set(made.summary.drifted_columns)
    assert "review: non-letter %" in made.summary.column_drift
    failed = " ".join(made.summary.failed)
    assert "drift of vector (limit " in failed
    assert "column review: words" in failed


def test_every_report_goes_to_the_workspace_too(job: ReportJob, tmp_path: Path) -> None:
    from monitoring.workspace import project_id

    assert report_job(replace(job, workspace=tmp_path / "workspace")).status == "ok"
    found = list((tmp_path / "workspace" / str(project_id("employment")) / "snapshots").iterdir())
    assert len(found) == 1
    assert "What compression broke" in found[0].read_text()


def test_a_workspace_that_cannot_be_written_does_not_cost_the_report(job: ReportJob, tmp_path: Path) -> None:
    (tmp_path / "workspace").write_text("a file is in the way")
    summary = report_job(replace(job, workspace=tmp_path / "workspace"))
    assert summary.status == "ok"
    assert summary.html is not None
    assert Path(summary.html).is_file()
    assert any("not added to the Evidently workspace" in note for note in summary.notes)


def test_a_job_tells_its_cpu_seconds(job: ReportJob) -> None:
    summary = report_job(job)
    assert 0 < summary.cpu_seconds < 60


# From the ledger -----------------------------------------------------------------------------------------


def pair(treatment: int | None, control: int | None, label: int | None, **record: object) -> SimpleNamespace:
    return SimpleNamespace(
        treatment=treatment, control=control, label=label, record=record, groups={"SEX": "1"}
    )


def test_pairs_become_rows_with_class_names() -> None:
    rows = pairs_to_rows([pair(1, 0, None, AGEP=40), pair(0, None, 1, AGEP=50), pair(None, 1, 1)], SPEC)
    assert rows["prediction"].tolist() == ["employed", "not employed"]
    assert rows["prediction_full"].tolist() == ["not employed", None]
    assert rows["label"].tolist() == [None, "employed"]
    assert rows["AGEP"].tolist() == [40, 50]
    assert rows["group_SEX"].tolist() == ["1", "1"]


def test_a_record_field_cannot_pass_for_an_answer() -> None:
    posing = pair(1, 0, 0, AGEP=40)
    posing.record |= {"prediction": "not employed", "label": "employed"}
    rows = pairs_to_rows([posing], SPEC)
    assert rows[["prediction", "prediction_full", "label"]].iloc[0].tolist() == [
        "employed",
        "not employed",
        "not employed",
    ]


def test_no_pairs_are_no_rows() -> None:
    assert len(pairs_to_rows([], SPEC)) == 0


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ReportJob:
    """A ledger with 300 pairs of a rollout, half of them labelled, and reference rows."""
    from monitoring import LabelRow, Ledger, PairRow, Policy

    folder = tmp_path_factory.mktemp("job")
    ledger = Ledger(folder / "ledger.db")
    rollout = ledger.create_rollout(
        workload="employment",
        control="employment-full:1",
        treatment="employment-int8:abc",
        policy=Policy(),
        actor="test",
        now=1000.0,
    )
    rows = traffic(300, 5).drop(columns="tags")
    pairs = [
        PairRow(
            rollout_id=rollout.id,
            request_id=f"q{i}",
            index=0,
            served_arm="treatment",
            control=CLASSES.index(row["prediction_full"]),
            treatment=CLASSES.index(row["prediction"]),
            control_confidence=0.9,
            treatment_confidence=0.9,
            groups={"SEX": row["group_SEX"], "DIS": row["group_DIS"]},
            record={name: int(row[name]) for name in ("AGEP", "SEX", "DIS")},
            created_at=1000.0 + i,
        )
        for i, row in enumerate(rows.to_dict("records"))
    ]
    assert ledger.record_pairs(pairs) == 300
    ledger.record_labels([LabelRow(f"q{i}", 0, i % 2, 2000.0) for i in range(0, 300, 2)])
    reference_rows(500).to_parquet(folder / "reference.parquet")
    return ReportJob(
        ledger=folder / "ledger.db",
        reference=folder / "reference.parquet",
        out_dir=folder / "reports",
        spec=replace(SPEC, rollout_id=rollout.id),
        niceness=0,
    )


def test_a_job_reads_the_ledger_by_itself(job: ReportJob) -> None:
    summary = report_job(pickle.loads(pickle.dumps(job)))
    assert (summary.rows, summary.labelled_rows, summary.reference_rows) == (300, 150, 500)
    assert pickle.loads(pickle.dumps(summary)) == summary


def test_a_job_lowers_its_own_priority(job: ReportJob, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered: list[int] = []
    monkeypatch.setattr(os, "setpriority", lambda which, who, priority: lowered.append(priority))
    monkeypatch.setattr(
        module, "make_report", lambda *_, **__: ReportSummary("ok", "w", "r", "c", 0.0, 0, 0, 0)
    )
    report_job(replace(job, niceness=15))
    report_job(replace(job, niceness=-5))
    assert lowered == [15]


def test_a_job_without_its_files_says_what_is_missing(job: ReportJob, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no reference rows at"):
        report_job(replace(job, reference=tmp_path / "no.parquet"))
    with pytest.raises(ReportError, match="no ledger at"):
        report_job(replace(job, ledger=tmp_path / "no.db"))


def test_importing_this_package_does_not_import_evidently_or_pandas() -> None:
    code = (
        "import sys, monitoring.drift, monitoring.fairness, monitoring.report, monitoring.cli;"
        "print([m for m in ('evidently', 'pandas', 'fairlearn', 'sklearn', 'scipy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# The command line ----------------------------------------------------------------------------------------


@pytest.fixture
def run(job: ReportJob) -> Callable[..., Any]:
    """`trimtab report ...` on the ledger of `job`."""

    def resolve(workload: str) -> ReportContext:
        spec = replace(job.spec, min_rows=301 if workload.startswith("quiet/") else 50)
        return ReportContext(
            workload=workload.removeprefix("quiet/"),
            ledger=job.ledger,
            job_for=lambda rollout: replace(job, spec=replace(spec, rollout_id=rollout.id)),
        )

    def invoke(*arguments: str) -> Any:
        app = typer.Typer()
        app.callback()(lambda: None)
        register(app, resolve)
        return CliRunner().invoke(app, ["report", *arguments])

    return invoke


def test_the_command_writes_where_it_is_told_and_says_where(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("employment", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "300 rows" in result.stdout
    assert "lost by compression: " in result.stdout
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".html", ".json"]
    assert "loading Evidently" in result.stderr


def test_the_command_prints_json_and_nothing_else_on_stdout(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("employment", "--json", "--out", str(tmp_path))
    assert json.loads(result.stdout)["rows"] == 300


def test_a_rollout_without_traffic_exits_4(run: Callable[..., Any]) -> None:
    result = run("quiet/employment")
    assert result.exit_code == 4
    assert "not enough rows" in result.stdout


def test_rollouts_that_are_not_the_workloads_are_refused(run: Callable[..., Any], job: ReportJob) -> None:
    for arguments, message in (
        (("employment", "--rollout", "unknown"), "no rollout is called"),
        (("sentiment", "--rollout", job.spec.rollout_id), "is of employment"),
        (("sentiment",), "has had no rollout"),
    ):
        error = run(*arguments).exception
        assert isinstance(error, RolloutNotFound)
        assert message in str(error)


def test_a_missing_ledger_is_a_one_line_error(tmp_path: Path) -> None:
    from monitoring.cli import find_rollout

    context = ReportContext("employment", tmp_path / "ledger.db", job_for=lambda _: pytest.fail("no"))
    with pytest.raises(RolloutNotFound, match="there is no ledger"):
        find_rollout(context)


def test_a_job_runs_in_a_spawned_process(job: ReportJob) -> None:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        summary = pool.submit(report_job, replace(job, niceness=10)).result(timeout=120)
    assert summary.status == "ok"
