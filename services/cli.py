"""`trimtab serve`, `rollout`, `replay` and `doctor`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.client import Client, base_url, read_token
from services.errors import BadRequest
from services.errors_cli import errors
from services.label_cli import label_app
from services.settings import Settings
from services.ui import ui

if TYPE_CHECKING:
    from monitoring.cli import ReportContext

__all__ = ["register", "report_context"]

Workload = Annotated[str, typer.Argument(help="A workload folder, or module:attribute.")]
Url = Annotated[str | None, typer.Option("--url", help="The gateway; else TRIMTAB_URL, else port 3000 here.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RolloutId = Annotated[str, typer.Option("--id", help="A rollout's id.")]
Reason = Annotated[str, typer.Option("--reason", help="Kept in the ledger.")]

EXIT_ROLLED_BACK, EXIT_TIMEOUT = 3, 4

rollout_app = typer.Typer(help="Start, watch and steer a rollout.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add this package's commands."""
    app.command("serve")(serve)
    app.command("replay")(replay_command)
    app.command("doctor")(doctor)
    app.command("errors")(errors)
    app.command("ui")(ui)
    app.add_typer(rollout_app, name="rollout")
    app.add_typer(label_app, name="label")


def serve(
    workload: Workload,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 3000,
    data_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            envvar="TRIMTAB_DATA_PORT",
            help="The fast port for /predict and /v2; else --port + 1, 0 for none.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=64, envvar="TRIMTAB_WORKERS", help="Gateway processes.")
    ] = 1,
    tls_cert: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Certificate (PEM), for both ports.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Its private key (PEM).")
    ] = None,
) -> None:
    """Serve a workload: gateway, shadow and monitor, through BentoML. Ctrl-C stops them."""
    from compression.variant import FULL, load_variant, tag_name
    from compression.workload import load_workload
    from services.serve import ServeError, check_port, command_and_environment, lock_home, tls_context

    if (tls_cert is None) != (tls_key is None):
        raise ServeError("--tls-cert and --tls-key belong together: pass both")
    if data_port is None:
        data_port = port + 1 if port < 65535 else 0
    if data_port == port:
        raise ServeError("--data-port must differ from --port")
    if tls_cert is not None and tls_key is not None:
        tls_context(tls_cert, tls_key)
    Settings.from_env()  # the one-line error comes here and not from each worker's log

    name = load_workload(workload).name
    load_variant(tag_name(name, FULL))  # the one-line error comes here and not from a worker's log
    home = Path(os.environ["TRIMTAB_HOME"])
    lock_home(home)
    lock_home(Path(os.environ["BENTOML_HOME"]), "BENTOML_HOME")
    check_port(host, port)
    if data_port:
        check_port(host, data_port, "--data-port")
    command, environment = command_and_environment(
        workload, host, port, workers, data_port, tls_cert, tls_key
    )
    scheme = "http" if tls_cert is None else "https"
    fast = f", predictions also on {scheme}://{host}:{data_port}" if data_port else ""
    print(f"serving {name} on {scheme}://{host}:{port}{fast} (state in {home}; Ctrl-C stops)", flush=True)
    os.execve(command[0], command, environment)  # noqa: S606  # no shell; signals reach BentoML directly


def _client(url: str | None) -> Client:
    return Client(base_url(url), read_token(Path(os.environ["TRIMTAB_HOME"])))


def _print(body: Any, as_json: bool, text: str) -> None:
    print(json.dumps(body, indent=2) if as_json else text)


@rollout_app.command("start")
def start(
    workload: Workload,
    variant: Annotated[str, typer.Argument(help="Name of a variant, or name:version.")],
    url: Url = None,
    override: Annotated[
        str | None, typer.Option(help="Start although the gate refused, for this reason (recorded).")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="YAML with settings that replace the workload's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Start a rollout of a variant on the running server."""
    from compression.workload import load_workload
    from monitoring.policy_file import read_settings

    settings = {} if policy is None else read_settings(policy)
    name = load_workload(workload).name
    tag = variant if variant.startswith(f"{name}-") else f"{name}-{variant}"
    with _client(url) as client:
        body = client.start(tag, override=override, policy=settings, actor=_actor())
    _print(body, as_json, f"rollout {body['id']} of {body['treatment']} started")


@rollout_app.command("status")
def status(
    url: Url = None,
    rollout: RolloutId = "current",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Redraw until it ends.")] = False,
    wait: Annotated[
        bool, typer.Option(help="Wait for the end: exit 0 promoted, 3 rolled back, 4 out of time.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait or watch.", min=0)] = 3600.0,
    as_json: Json = False,
) -> None:
    """Show where a rollout is, why, and on what evidence."""
    from services.status_view import render

    end = time.monotonic() + timeout
    with _client(url) as client:
        while True:
            body = client.status(rollout)
            if watch and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            if not wait or watch:
                _print(body, as_json, render(body))
            if not (watch or wait):
                return
            if body["state"] in ("promoted", "rolled_back"):
                if wait and not watch:
                    _print(body, as_json, render(body))
                raise typer.Exit(0 if body["state"] == "promoted" else EXIT_ROLLED_BACK)
            if time.monotonic() >= end:
                print(f"trimtab: still {body['state']} after {timeout:g} s", file=sys.stderr)
                raise typer.Exit(EXIT_TIMEOUT)
            time.sleep(1.0)


def _actor() -> str:
    return os.environ.get("TRIMTAB_ACTOR") or os.environ.get("USER") or "operator"


def _send_verb(verb: str, url: str | None, rollout: str, as_json: bool, **body: Any) -> None:
    with _client(url) as client:
        result = client.verb(rollout, verb, actor=_actor(), **body)
    _print(result, as_json, f"rollout {result['id']} is {result['state']} at {result['weight']}%")


@rollout_app.command("promote")
def promote(
    url: Url = None,
    rollout: RolloutId = "current",
    full: Annotated[
        bool, typer.Option("--full", help="Straight to promoted, evidence or not (recorded).")
    ] = False,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Go to the next step now, or with --full to the end."""
    _send_verb("promote", url, rollout, as_json, full=full, reason=reason)


@rollout_app.command("pause")
def pause(
    url: Url = None, rollout: RolloutId = "current", reason: Reason = "", as_json: Json = False
) -> None:
    """Freeze the split. The guardrails still guard."""
    _send_verb("pause", url, rollout, as_json, reason=reason)


@rollout_app.command("resume")
def resume(
    url: Url = None, rollout: RolloutId = "current", reason: Reason = "", as_json: Json = False
) -> None:
    """Go on from where it was paused or held."""
    _send_verb("resume", url, rollout, as_json, reason=reason)


@rollout_app.command("rollback")
def rollback(
    reason: Annotated[str, typer.Option("--reason", help="Kept in the ledger.")],
    url: Url = None,
    rollout: RolloutId = "current",
    as_json: Json = False,
) -> None:
    """Send all traffic to control, now and for good."""
    _send_verb("rollback", url, rollout, as_json, reason=reason)


@rollout_app.command("history")
def history(
    url: Url = None,
    rollout: Annotated[
        str | None, typer.Option("--id", help="One rollout's decisions; else all rollouts.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check that no decision was changed or removed: exit 0, else 1.")
    ] = False,
    expect: Annotated[
        str | None,
        typer.Option("--expect", help="A head that --verify printed earlier; it must still be there."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the rollouts, or every decision about one with the evidence it was made on; or check all decisions."""
    from services.status_view import render_decisions, render_rollouts, render_verified

    if expect is not None and not verify:
        raise BadRequest("--expect belongs to --verify: pass both")
    if verify and rollout is not None:
        raise BadRequest("--verify checks the decisions of all rollouts: leave --id out")
    with _client(url) as client:
        if verify:
            verified = client.verify(expect)
            _print(verified, as_json, render_verified(verified))
            if verified["problem"] is not None:
                raise typer.Exit(1)
        elif rollout is None:
            rollouts = client.rollouts()
            _print(rollouts, as_json, render_rollouts(rollouts))
        else:
            decisions = client.decisions(rollout)
            _print(decisions, as_json, render_decisions(decisions))


def replay_command(
    workload: Workload,
    url: Url = None,
    rate: Annotated[float, typer.Option(help="Requests per second.", min=0.01, max=100_000)] = 50.0,
    labels_after: Annotated[float, typer.Option(help="Seconds from a request to its label.", min=0)] = 5.0,
    rows: Annotated[int | None, typer.Option(help="At most so many rows.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Send the workload's production rows as traffic, and their labels later."""
    from rich.progress import Progress

    from compression.workload import load_workload
    from services.replay import ReplayResult, replay

    split = load_workload(workload).split("production")
    records = split.records.head(rows).to_dict("records") if rows else split.records.to_dict("records")
    labels = split.labels[: len(records)].tolist()
    with _client(url) as client:
        client.call("GET", "/rollouts")  # the one-line error comes before the first request

    result = ReplayResult()

    async def run() -> None:
        work = asyncio.create_task(
            replay(base_url(url), records, labels, rate=rate, labels_after=labels_after, result=result)
        )
        with Progress(disable=as_json or not sys.stderr.isatty()) as progress:
            task = progress.add_task("replay", total=len(records))
            while not work.done():
                progress.update(task, completed=result.requests)
                await asyncio.wait([work], timeout=0.25)
        await work

    asyncio.run(run())
    body = {
        "requests": result.requests,
        "failed": result.failed,
        "errors": result.errors,
        "by_arm": result.by_arm,
        "labels_acknowledged": result.labels_acknowledged,
    }
    arms = ", ".join(f"{arm} {number}" for arm, number in sorted(result.by_arm.items()))
    why = ", ".join(f"{error}: {number}" for error, number in result.errors.items())
    failed = f"{result.failed} failed" + (f" ({why})" if why else "")
    answered = f" ({arms})" if arms else ""
    text = f"{result.requests} requests{answered}, {failed}, {result.labels_acknowledged} labels"
    if "HTTP 401" in result.errors:
        text += "; the server asks for a key: set TRIMTAB_API_KEY"
    _print(body, as_json, text)
    if result.failed:
        raise typer.Exit(1)


def report_context(workload: str) -> ReportContext:
    """Where `trimtab report` finds a workload's rollouts and reference rows."""
    from compression.workload import load_workload
    from monitoring.cli import ReportContext
    from services.reports import report_job_for

    loaded = load_workload(workload)
    settings = Settings.from_env()
    return ReportContext(
        workload=loaded.name,
        ledger=settings.ledger_path(loaded.name),
        job_for=lambda rollout: report_job_for(loaded, rollout, settings),
    )


def doctor(as_json: Json = False) -> None:
    """Check this machine: what is missing, and the command that mends it."""
    from services.doctor import checks

    results = checks(Settings.from_env())
    body = [
        {"check": check.name, "ok": check.ok, "detail": check.detail, "fix": check.fix} for check in results
    ]
    lines = [
        f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}"
        + ("" if check.ok else f"\n      fix: {check.fix}")
        for check in results
    ]
    _print(body, as_json, "\n".join(lines))
    if not all(check.ok for check in results):
        raise typer.Exit(1)
