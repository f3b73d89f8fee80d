"""Simulated rollouts: they decide what the real controller decides, and their error rates are those promised.

`assert_rate_at_most` demands that the whole 99% interval is under the promise. The tests of broken methods show that it
does fail where a rate is really exceeded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.guardrails.measure import measure
from benchmarks.guardrails.peers import PEERS, as_they_arrive, split
from benchmarks.guardrails.results import merge, table
from benchmarks.guardrails.scenarios import SCENARIOS, Goal, Outcome, Scenario, result
from monitoring import controller, simulate
from monitoring.guardrails import Assessment, Scope, evaluate
from monitoring.ledger import LabelRow, PairRow
from monitoring.policy import Policy, parse_policy
from monitoring.records import HELD, PROMOTING, ROLLED_BACK
from monitoring.simulate import CLASSES, Run
from monitoring.simulate_cli import guardrails_app, simulated
from monitoring.simulate_cli import table as told
from monitoring.tally import Tallies, TallyKey, bucket_of
from monitoring.tally import merge as added
from monitoring.traffic import NO_ANSWER, START, Scene, Traffic, generate, guarded_groups
from tests.monitoring.judgement import World, assert_rate_at_most

ALPHA, MARGIN = 0.05, 0.01
OFF = {
    name: {"enabled": False}
    for name in (
        *("group_harm", "class_harm", "demographic_parity", "latency_p95", "latency_vs_control"),
        *("treatment_errors", "sample_ratio"),
    )
}
ACCURACY = parse_policy(
    {"false_rollback_rate": ALPHA, "guardrails": {"accuracy_drop": {"margin": MARGIN}, **OFF}}
)
SMALL_STEPS = {"step_min_pairs": 100, "step_min_seconds": 1}
TWO = (("A", (0.2, 0.8)), ("B", (0.5, 0.3, 0.2)))

Decided = tuple[int, str, str, str | None, str | None, int, int, int]


# -- the same as the real controller ----------------------------------------------------------------------------


def made_by_simulation(policy: Policy, scene: Scene, traffic: Traffic, every: int) -> list[Decided]:
    run = simulate.simulate(policy, guarded_groups(scene), traffic, look_every=every)
    return [decided(made.requests, made.decision) for made in run.made]


def decided(requests: int, decision: controller.Decision) -> Decided:
    return (
        requests,
        decision.verb,
        decision.to_state,
        decision.guardrail,
        decision.group,
        decision.pairs,
        decision.labels,
        decision.weight,
    )


def made_by_the_controller(
    world: World, policy: Policy, scene: Scene, traffic: Traffic, every: int
) -> list[Decided]:
    """The same traffic through a ledger: pairs and labels as they come, counts of requests, a beat before each step."""
    world.now = START - 1.0
    world.start(policy, guarded_groups(scene), classes=CLASSES)
    world.warm()
    assert world.now == START
    found, before = [], START
    for end in range(every, len(traffic.request) + 1, every):
        rows = range(end - every, end)
        weight = world.rollout.weight
        world.now = float(traffic.created_at[end - 1])
        world.ledger.record_pairs([pair_row(world, traffic, row) for row in rows])
        come = np.flatnonzero((traffic.labelled_at > before) & (traffic.labelled_at <= world.now))
        world.ledger.record_labels(
            [LabelRow(f"q{traffic.request[i]}", 0, int(traffic.label[i]), world.now) for i in come]
        )
        world.flushes += 1
        world.ledger.add_counts("g1", world.flushes, flush(world, traffic, rows, weight), world.now)
        before, more = world.now, True
        while more:
            world.beat()
            step = world.controller.step()
            assert step.error is None
            found += [decided(end, decision) for decision in step.decisions]
            more = step.more
        if world.rollout.state == ROLLED_BACK:
            break
    return found


def pair_row(world: World, traffic: Traffic, row: int) -> PairRow:
    treatment = int(traffic.treatment[row])
    members = zip(traffic.attributes, traffic.members[row], strict=True)
    return PairRow(
        world.rollout_id,
        f"q{traffic.request[row]}",
        0,
        "control",
        int(traffic.control[row]),
        None if treatment == NO_ANSWER else treatment,
        0.9,
        0.8,
        {attribute: str(value) for attribute, value in members},
        {},
        float(traffic.created_at[row]),
    )


def flush(
    world: World, traffic: Traffic, rows: range, weight: int
) -> dict[tuple[str, TallyKey], dict[int, int]]:
    """What a gateway would have counted of these requests."""
    tallies: Tallies = {}

    def count(guardrail: str, group: str, row: int, outcome: int) -> None:
        key = TallyKey(guardrail, group, bucket_of(float(traffic.created_at[row])))
        tallies[key] = added(tallies.get(key, {}), {outcome: 1})

    for row in rows:
        treated = bool(traffic.ticket[row] < weight / 100)
        slow = traffic.slow if treated else traffic.control_slow
        count("requests", "treatment" if treated else "control", row, 0)
        count("latency_p95", "treatment" if treated else "control", row, int(slow[row]))
        if treated:
            count("treatment_errors", "", row, int(traffic.failed[row]))
        if 0 < weight < 100:
            count("sample_ratio", str(weight), row, int(treated))
    return {(world.rollout_id, key): counts for key, counts in tallies.items()}


ALIKE = {
    "a drop of 10 points": (Scene(requests=2000, drop=0.1, discordance=0.12), {}),
    "promoted, and then worse": (
        Scene(requests=4000, discordance=0.02, late_after=3000, late_drop=0.3, attributes=TWO),
        {
            **SMALL_STEPS,
            "promoted_run_length": 10_000,
            "guardrails": {"accuracy_drop": {"margin": 0.05}, "group_harm": {"margin": 0.1}},
        },
    ),
    "a harmed group": (
        Scene(requests=3000, attributes=TWO, harmed="A=0", harm=0.3),
        {**SMALL_STEPS, "guardrails": {"accuracy_drop": {"margin": 0.2}}},
    ),
    "labels late and missing, requests twice": (
        Scene(
            requests=5000,
            per_second=100,
            drop=0.15,
            discordance=0.2,
            attributes=TWO,
            label_delay_s=2.0,
            good_news_delay_s=20.0,
            label_share=0.8,
            good_news_share=0.5,
            repeated=0.1,
        ),
        {**SMALL_STEPS, "label_deadline_s": 30, "false_rollback_rate": 0.0001},
    ),
    "everybody waits for one label, and then all come at once": (
        Scene(requests=8000, per_second=160, discordance=0.001, good_news_share=0.0, attributes=TWO),
        {**SMALL_STEPS, "label_deadline_s": 25, "guardrails": {"accuracy_drop": {"margin": 0.05}}},
    ),
    "failing": (Scene(requests=4000, failing=0.08, discordance=0.0), SMALL_STEPS),
    "slow": (
        Scene(requests=5000, slow=0.4, control_slow=0.1, discordance=0.0),
        {**SMALL_STEPS, "step_min_pairs": 500},
    ),
    "held, and only shown": (
        Scene(requests=4000, drop=0.1, discordance=0.12, failing=0.05, attributes=TWO),
        {
            **SMALL_STEPS,
            "guardrails": {
                "accuracy_drop": {"action": "hold", "margin": 0.01},
                "class_harm": {"action": "dry-run"},
                "group_harm": {"action": "alert"},
                "demographic_parity": {"action": "dry-run"},
            },
        },
    ),
}


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[list[World]]:
    made = [World(tmp_path / f"{number}.db") for number in range(2)]
    yield made
    for world in made:
        world.ledger.close()


@pytest.mark.parametrize("name", ALIKE)
def test_a_simulated_rollout_decides_the_same_at_the_same_pair_as_the_real_controller(
    worlds: list[World], name: str
) -> None:
    scene, settings = ALIKE[name]
    policy = parse_policy(settings)
    for seed, world in enumerate(worlds):
        traffic = generate(scene, np.random.default_rng(seed))
        real = made_by_the_controller(world, policy, scene, traffic, 100)
        assert made_by_simulation(policy, scene, traffic, 100) == real
        assert real


def test_passing_over_looks_at_which_nothing_happens_changes_no_decision() -> None:
    for name, (scene, settings) in ALIKE.items():
        policy, looks = parse_policy(settings), []

        def note(requests: int, _assessment: Assessment, looks: list[int] = looks) -> None:
            looks.append(requests)

        traffic = generate(replace(scene, requests=2000), np.random.default_rng(7))
        groups = guarded_groups(scene)
        every = simulate.simulate(policy, groups, traffic, look_every=50, watch=note)
        some = simulate.simulate(policy, groups, traffic, look_every=50)
        assert some.made == every.made, name
        assert some.exposed() == every.exposed()
        assert looks[:2] == [50, 100]


def test_the_simulation_has_the_controllers_constants() -> None:
    ours = (simulate.BATCH, simulate.RETRIES, simulate.BLOCK_GRACE_S, simulate.MIN_BLOCK_REQUESTS)
    theirs = (controller.BATCH, controller.RETRIES, controller.BLOCK_GRACE_S, controller.MIN_BLOCK_REQUESTS)
    assert ours == theirs
    verdicts = evaluate(Policy(), Scope(), {}).verdicts
    assert {v.tolerated for v in verdicts if v.guardrail == "latency_p95"} == {simulate.LATENCY_SHARE}


# -- traffic ----------------------------------------------------------------------------------------------------


def test_traffic_has_the_rates_that_were_asked_for() -> None:
    scene = Scene(
        requests=100_000, drop=0.03, discordance=0.07, attributes=TWO, harmed="A=0", harm=0.2, failing=0.1
    )
    traffic = generate(scene, np.random.default_rng(1))
    others = (traffic.members[:, 0] == 1) & ~traffic.failed
    harmed = (traffic.members[:, 0] == 0) & ~traffic.failed
    right = traffic.control == traffic.label
    d = right.astype(int) - (traffic.treatment == traffic.label)
    assert right.mean() == pytest.approx(0.92, abs=0.005)
    assert d[others].mean() == pytest.approx(0.03, abs=0.005)
    assert (d[others] != 0).mean() == pytest.approx(0.07, abs=0.005)
    assert d[harmed].mean() == pytest.approx(0.23, abs=0.01)
    assert (traffic.treatment == NO_ANSWER).mean() == pytest.approx(0.1, abs=0.005)
    assert (traffic.members[:, 1] == 2).mean() == pytest.approx(0.2, abs=0.005)


def test_the_same_seed_gives_the_same_traffic() -> None:
    one, other = (generate(Scene(requests=500, repeated=0.1), np.random.default_rng(3)) for _ in range(2))
    assert (one.request == other.request).all()
    assert (one.treatment == other.treatment).all()


def test_late_and_missing_labels_are_those_that_were_asked_for() -> None:
    scene = Scene(requests=50_000, discordance=0.5, good_news_delay_s=60, good_news_share=0.3)
    traffic = generate(scene, np.random.default_rng(2))
    good = (traffic.treatment == traffic.label) & (traffic.control != traffic.label)
    delay = traffic.labelled_at - traffic.created_at
    assert delay[~good] == pytest.approx(0, abs=1e-6)
    assert np.isfinite(delay[good]).mean() == pytest.approx(0.3, abs=0.02)
    assert delay[good & np.isfinite(delay)] == pytest.approx(60, abs=1e-6)


def test_labels_of_agreements_change_nothing() -> None:
    scene = Scene(requests=6000, drop=0.03, discordance=0.05)
    for seed in range(5):
        with_all, without = (
            simulate.simulate(
                ACCURACY,
                (),
                generate(replace(scene, label_agreements=asked), np.random.default_rng(seed)),
            )
            for asked in (True, False)
        )
        assert with_all.made == without.made


# -- rates ------------------------------------------------------------------------------------------------------


def runs_of(
    scene: Scene, runs: int, policy: Policy = ACCURACY, until: tuple[str, ...] = (ROLLED_BACK,)
) -> list[Run]:
    return [
        simulate.simulate(
            policy, guarded_groups(scene), generate(scene, np.random.default_rng((17, run))), until=until
        )
        for run in range(runs)
    ]


def rolled_back(runs: list[Run]) -> int:
    return sum(run.rollout.state in (ROLLED_BACK, HELD) for run in runs)


@pytest.mark.parametrize(
    ("drop", "runs"), [(0.0, 200), (MARGIN, 500)], ids=["no drop", "exactly at the margin"]
)
def test_a_rollout_of_a_candidate_within_the_margin_is_rolled_back_less_often_than_promised(
    drop: float, runs: int
) -> None:
    assert_rate_at_most(rolled_back(runs_of(Scene(requests=5000, drop=drop), runs)), runs, ALPHA)


def test_with_all_guardrails_and_everything_at_its_limit_the_promise_holds() -> None:
    policy = parse_policy({"false_rollback_rate": ALPHA, "guardrails": {"accuracy_drop": {"margin": MARGIN}}})
    scene = Scene(requests=5000, drop=MARGIN, failing=0.01, slow=0.05, attributes=TWO)
    assert_rate_at_most(rolled_back(runs_of(scene, 600, policy)), 600, ALPHA)


def test_a_candidate_at_the_margin_is_promoted_less_often_than_promised() -> None:
    runs = runs_of(Scene(requests=9000, drop=MARGIN), 400, until=(PROMOTING, ROLLED_BACK))
    assert_rate_at_most(sum(run.rollout.state == PROMOTING for run in runs), 400, ALPHA)


def test_a_drop_is_caught_as_soon_as_the_method_promises() -> None:
    found = [run.made[-1].requests for run in runs_of(Scene(requests=4000, drop=0.05, discordance=0.07), 200)]
    assert np.median(found) == pytest.approx(320, rel=0.15)


LATE = Scene(requests=6000, discordance=0.1, good_news_delay_s=150.0)


def test_labels_that_come_late_when_they_speak_for_the_candidate_do_no_harm() -> None:
    assert_rate_at_most(rolled_back(runs_of(LATE, 150)), 150, ALPHA)


# -- broken on purpose ------------------------------------------------------------------------------------------


def test_judging_the_same_traffic_by_labels_as_they_arrive_breaks_the_promise() -> None:
    hits = 0
    for run in range(40):
        traffic = as_they_arrive(generate(LATE, np.random.default_rng((17, run))))
        hits += simulate.simulate(ACCURACY, (), traffic).rollout.state == ROLLED_BACK
    with pytest.raises(AssertionError, match=r"over 0\.05"):
        assert_rate_at_most(hits, 40, ALPHA)
    assert hits > 20


def stopped(name: str, scene: Scene, runs: int) -> list[int | None]:
    peer = next(peer for peer in PEERS if peer.name == name)
    made = (generate(scene, np.random.default_rng((19, run))) for run in range(runs))
    return [peer.stops(split(traffic, peer.share, scene.accuracy), MARGIN, ALPHA) for traffic in made]


@pytest.mark.parametrize(
    ("name", "drop"),
    [("threshold", 0.0), ("z-test", MARGIN), ("mann-whitney", MARGIN)],
)
def test_what_is_looked_at_again_and_again_breaks_the_promise(name: str, drop: float) -> None:
    hits = sum(found is not None for found in stopped(name, Scene(drop=drop), 100))
    with pytest.raises(AssertionError, match=r"over 0\.05"):
        assert_rate_at_most(hits, 100, ALPHA)


@pytest.mark.parametrize("name", ["unpaired-50", "unpaired-10"])
def test_bets_without_pairs_keep_the_promise_and_need_several_times_the_requests(name: str) -> None:
    hits = sum(found is not None for found in stopped(name, Scene(requests=8000, drop=MARGIN), 1000))
    assert_rate_at_most(hits, 1000, ALPHA)
    found = stopped(name, Scene(drop=0.05, discordance=0.07), 60)
    assert np.median([math.inf if at is None else at for at in found]) > 3 * 320


# -- the benchmark ----------------------------------------------------------------------------------------------


def test_a_benchmark_of_one_scenario_gives_a_row_for_each_judge() -> None:
    rows = measure(frozenset({"drop-10"}), 3, lambda _text: None)
    scenario = next(scenario for scenario in SCENARIOS if scenario.name == "drop-10")
    assert [row["name"] for row in rows] == [f"drop-10/{judge}" for judge in scenario.judges]
    machine = {"date": "2026-01-01"}
    text = table(merge({}, {"rows": rows, "machine": machine}))
    assert "a drop of 10 pt" in text
    assert "median <= 130" in text


def test_a_promise_is_kept_when_the_whole_interval_keeps_it() -> None:
    scenario = Scenario("x", "x", Scene(), goals={"trimtab": Goal("false rollbacks", 0.05)})
    never, once = Outcome(None, 0), Outcome(100, 0)
    assert result(scenario, "trimtab", [never] * 100)["met"]
    assert result(scenario, "trimtab", [never] * 100)["ci"][1] == pytest.approx(0.0362, abs=1e-4)
    assert not result(scenario, "trimtab", [never] * 98 + [once] * 2)["met"]


def test_a_run_in_which_nothing_was_found_counts_as_longer_than_it_was() -> None:
    scenario = Scenario("x", "x", Scene(), harm_from=1000)
    outcomes = [Outcome(1500, 0), Outcome(1700, 0), Outcome(None, 0), Outcome(900, 0)]
    row = result(scenario, "trimtab", outcomes)
    assert (row["false_rollback"], row["median_delay"], row["p95_delay"]) == (0.25, 700, None)
    assert row["caught"] == pytest.approx(2 / 3)


# -- the command line -------------------------------------------------------------------------------------------


def run(*words: str) -> tuple[int, str]:
    app = typer.Typer()
    app.add_typer(guardrails_app, name="guardrails")
    done = CliRunner().invoke(app, ["guardrails", *words])
    return done.exit_code, done.stdout


def test_a_policys_figures_are_told_in_a_table_and_as_json(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("false_rollback_rate: 0.05\nguardrails: {accuracy_drop: {margin: 0.01}}\n")
    words = ["simulate", "--policy", str(policy), "--runs", "4", "--pairs", "3000", "--drop", "0.1"]
    words += ["--discordance", "0.12", "--requests-per-day", "86400"]
    code, text = run(*words)
    assert code == 0
    assert "a drop of 10 pt  100% (4 of 4)" in text
    assert "at most 5% are ever rolled back" in text
    code, text = run(*words, "--json")
    found = json.loads(text)
    none, some = found["candidates"]
    assert (none["rolled_back"]["runs"], some["rolled_back"]["runs"]) == (0, 4)
    # A pair a second.
    assert some["rolled_back"]["median_seconds"] == pytest.approx(some["rolled_back"]["median_pairs"])


def test_a_smaller_mirror_rate_takes_longer_for_the_same_pairs() -> None:
    settings = {"drop": 0.1, "discordance": 0.12, "requests_per_day": 86_400, "runs": 3, "pairs": 2000}
    whole, tenth = (
        simulated(parse_policy({"mirror_rate": rate, "label_deadline_s": 0}), **settings)  # type: ignore[arg-type]
        for rate in (1.0, 0.1)
    )
    one, other = (found["candidates"][1]["rolled_back"] for found in (whole, tenth))
    assert one["median_pairs"] == other["median_pairs"]
    assert other["median_seconds"] == pytest.approx(10 * one["median_seconds"])
    assert "one request in 10 makes a pair" in told(tenth)


def test_a_drop_that_no_run_finds_is_told_as_such() -> None:
    found = simulated(Policy(), drop=0.005, discordance=0.05, runs=2, pairs=500)
    assert "> 500, > 500" in told(found)
    assert found["candidates"][1]["rolled_back"]["median_pairs"] is None


@pytest.mark.parametrize("enabled", [False, True])
def test_a_guardrail_that_is_not_simulated_is_said_to_be_in_one_line(enabled: bool) -> None:
    policy = parse_policy({"guardrails": {"reward": {"enabled": enabled}}})
    found = simulated(policy, drop=0.1, discordance=0.12, runs=1, pairs=200)
    assert found["not_simulated"] == ["reward"] * enabled
    told_of = [line for line in told(found).splitlines() if line.startswith("reward is not simulated")]
    assert len(told_of) == enabled


@pytest.mark.parametrize(
    ("text", "why"),
    [("policy: {}", "with no 'policy:' above"), ("margins: 1", "no such setting"), ("a: [", "policy.yaml")],
)
def test_a_file_that_is_no_policy_is_refused_in_one_line(tmp_path: Path, text: str, why: str) -> None:
    from monitoring.errors import PolicyError
    from monitoring.simulate_cli import read_policy

    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=why):
        read_policy(path)


def test_the_schema_knows_the_settings() -> None:
    code, text = run("schema")
    assert code == 0
    assert "false_rollback_rate" in json.loads(text)["properties"]
