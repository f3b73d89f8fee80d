"""`trimtab errors`: what compression broke, on a split of the workload or on the pairs of a rollout."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from services.errors import BadRequest

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from compression.data import Rows
    from compression.variant import Variant
    from compression.workload import Progress, Workload
    from monitoring.error_analysis import ErrorAnalysis, LostRow, SliceErrors

__all__ = ["errors", "pair_rows", "print_errors", "split_rows"]

EXIT_NO_LABELS = 4
_CHUNK = 8192
_SHOWN_SLICES = 15
_SHOWN_CLASSES = 8
"""A matrix of more classes is wider than a terminal: its largest confusions are printed in its place."""
_SHOWN_CONFUSIONS = 15
_SHOWN_FIELDS = 400


class SplitChoice(StrEnum):
    """The splits that are offered: neither was trained on."""

    TEST = "test"
    VALIDATION = "validation"


def errors(
    workload: Annotated[str, typer.Argument(help="A workload folder, or module:attribute.")],
    variant: Annotated[
        str | None,
        typer.Argument(help="A variant's name, or name:version. Default: the only one there is."),
    ] = None,
    split: Annotated[
        SplitChoice | None, typer.Option("--split", help="Rows to run both on; the default is test.")
    ] = None,
    rollout: Annotated[
        str | None,
        typer.Option(
            "--rollout", help="A rollout's id, or current: its labelled pairs in place of a split's rows."
        ),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(
            "--pairs", min=1, max=200_000, help="With --rollout: of the newest so many pairs; default 20,000."
        ),
    ] = None,
    examples: Annotated[
        int, typer.Option("--examples", min=0, max=1000, help="Lost rows to show, at most.")
    ] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which classes and groups lost most by compression, rows that were lost, and who is taken for whom.

    Exit codes: 0 done, 2 it cannot be done, 4 no pair of the rollout has a label yet.
    """
    from rich.console import Console

    from compression.workload import load_workload
    from monitoring.error_analysis import analyse_errors

    if rollout is not None and (variant is not None or split is not None):
        raise BadRequest("--rollout has its own candidate and its own rows: leave VARIANT and --split out")
    if rollout is None and pairs is not None:
        raise BadRequest("--pairs is about the pairs of a rollout: give --rollout too")
    loaded = load_workload(workload)
    progress = Console(stderr=True, highlight=False)
    with progress.status("loading") as status:

        def told(what: str, done: float) -> None:
            status.update(f"{what} {done:.0%}" if done else what)

        if rollout is not None:
            told("reading pairs", 0.0)
            about, rows, classes = pair_rows(loaded, workload, rollout, pairs or 20_000)
        else:
            candidate, full = _arms(loaded, workload, variant)
            where = (split or SplitChoice.TEST).value
            rows = split_rows(loaded, candidate, full, where, told)
            classes = loaded.classes
            about = {"candidate": candidate.tag, "full": full.tag, "split": where}
        told("comparing", 0.0)
        found = analyse_errors(rows, classes, sensitive=loaded.sensitive, examples=examples)
    if found.overall is None:
        typer.echo(
            f"no pair of rollout {about['rollout']} has a label and both answers yet, of {len(rows):,}: send labels to "
            "/feedback, or with `trimtab label queue` and `trimtab label send`",
            err=True,
        )
        raise typer.Exit(EXIT_NO_LABELS)
    if as_json:
        body = {"workload": loaded.name, **about, "worst": found.worst and found.worst.name}
        typer.echo(json.dumps(body | found.as_dict(), indent=2))
    else:
        console = Console(highlight=False)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = 140
        print_errors(console, loaded.name, about, found)


def _arms(workload: Workload, ref: str, name: str | None) -> tuple[Variant, Variant]:
    """The variant asked for, and the full precision it was made from."""
    from compression.errors import VariantNotFound
    from compression.variant import FULL, list_variants, load_variant, tag_name

    there = [found.name for found in list_variants(workload.name)]
    others = [found for found in there if found != FULL]
    if name is None:
        if not others:
            raise VariantNotFound(
                f"{workload.name} has no compressed variant yet: run `trimtab compress {ref}`"
            )
        if len(others) > 1:
            raise BadRequest(f"which variant of {workload.name}? name one of {', '.join(others)}")
        name = others[0]
    tag = name if name.startswith(f"{workload.name}-") else tag_name(workload.name, name)
    try:
        chosen = load_variant(tag)
    except VariantNotFound as error:
        names = f"; there are {', '.join(others)}" if others else ""
        raise VariantNotFound(f"{error}{names}") from None
    if chosen.manifest.parent is None:
        names = f": name one of {', '.join(others)}" if others else f": run `trimtab compress {ref}`"
        raise BadRequest(f"{chosen.tag} is full precision itself, which the others are held against{names}")
    return chosen, load_variant(chosen.manifest.parent)


def split_rows(
    workload: Workload, candidate: Variant, full: Variant, split: str, progress: Progress
) -> pd.DataFrame:
    """The rows of a split with both arms' answers, as a report's rows; takes as long as the models do.

    Raises:
        compression.errors.CompressionError: a variant is damaged, or does not fit the workload.
    """
    from compression.data import Data

    progress(f"encoding the {split} split", 0.0)
    data = Data(workload)
    rows = data.rows(split)  # type: ignore[arg-type]  # one of the names that SplitChoice has
    told = {
        "prediction_full": _answers(workload, full, rows, progress),
        "prediction": _answers(workload, candidate, rows, progress),
        "label": np.array(workload.classes, dtype=object)[rows.labels],
    }
    told |= {f"group_{name}": values for name, values in data.groups(split).items()}  # type: ignore[arg-type]
    return _beside(rows.records, told)


def _answers(workload: Workload, variant: Variant, rows: Rows, progress: Progress) -> np.ndarray:
    """Class names [N]; where the output is no number, the name that stands for none of them."""
    from compression.measure import answer, open_checked
    from monitoring.error_analysis import NO_ANSWER

    session = open_checked(variant.onnx_bytes(), rows.tensors)
    names = np.array([*workload.classes, NO_ANSWER], dtype=object)
    found = []
    for start in range(0, len(rows), _CHUNK):
        progress(f"running {variant.name}", start / len(rows))
        part = slice(start, start + _CHUNK)
        answers = answer(workload, session, {name: array[part] for name, array in rows.tensors.items()})
        found.append(names[np.where(answers.finite, answers.classes, len(workload.classes))])
    return np.concatenate(found)


def _beside(records: pd.DataFrame, told: dict[str, Any]) -> pd.DataFrame:
    """Records with what is told of them; a field that could pass for one of those is left out."""
    from monitoring.report import is_input

    fields = records.rename(columns=str).reset_index(drop=True)
    return fields[[name for name in fields.columns if is_input(name)]].assign(**told)


def pair_rows(
    workload: Workload, ref: str, rollout_id: str, pairs: int
) -> tuple[dict[str, Any], pd.DataFrame, Sequence[str]]:
    """What they are of, a rollout's newest pairs as a report's rows, and the names of its classes.

    Args:
        ref: how the workload was named.
        rollout_id: "current" for the active rollout, or the newest if none is active.

    Raises:
        monitoring.errors.TrimtabError: there is no such rollout, or no ledger.
    """
    from monitoring.cli import find_rollout
    from monitoring.report import ReportSpec, read_pairs
    from services.cli import report_context

    context = report_context(ref)
    rollout = find_rollout(context, "" if rollout_id == "current" else rollout_id)
    classes = rollout.classes or workload.classes
    spec = ReportSpec(
        workload=workload.name, classes=classes, sensitive=workload.sensitive, rollout_id=rollout.id
    )
    about = {"candidate": rollout.treatment, "full": rollout.control, "rollout": rollout.id}
    return about, read_pairs(context.ledger, spec, pairs), classes


def print_errors(console: Console, workload: str, about: dict[str, Any], found: ErrorAnalysis) -> None:
    """The analysis as tables: classes, groups, confusions, lost rows."""
    if found.overall is None:
        return
    where = f"{about['split']} split" if "split" in about else f"rollout {about['rollout']}"
    left_out = f" ({found.left_out:,} without a label or an answer left out)" if found.left_out else ""
    total = found.overall
    console.print(
        f"{workload}: {_text(about['candidate'])} against {_text(about['full'])}, {where}, "
        f"{found.rows:,} labelled rows{left_out}",
        soft_wrap=True,
    )
    console.print(
        f"accuracy {100 * total.accuracy_full:.2f}% -> {100 * total.accuracy:.2f}%, net drop {_drop(total)} pt: "
        f"{total.lost:,} rows lost, {total.won:,} won",
        soft_wrap=True,
    )
    worst = found.worst
    told = "nothing of 30 rows or more lost accuracy" if worst is None else f"lost most: {worst.told()}"
    console.print(_text(told), soft_wrap=True)
    _print_slices(console, "by true class", "class", found.classes, found.more_classes)
    _print_slices(console, "by group", "group", found.groups, found.more_groups)
    _print_confusions(console, found)
    _print_lost(console, found.lost_rows, total.lost)


def _print_slices(console: Console, title: str, head: str, slices: Sequence[SliceErrors], more: int) -> None:
    if not slices:
        return
    console.print(f"\n{title}", style="bold")
    table = _table()
    table.add_column(head, no_wrap=True, max_width=40)
    for column in ("rows", "full %", "candidate %", "lost", "won", "net drop pt (95%)"):
        table.add_column(column, justify="right", no_wrap=True)
    for s in slices[:_SHOWN_SLICES]:
        figures = (f"{100 * s.accuracy_full:.1f}", f"{100 * s.accuracy:.1f}", f"{s.lost:,}", f"{s.won:,}")
        mark = " (few rows)" if s.small else ""
        table.add_row(_text(s.name) + mark, f"{s.rows:,}", *figures, _drop(s))
    console.print(table)
    hidden = more + max(0, len(slices) - _SHOWN_SLICES)
    if hidden:
        console.print(f"and {hidden:,} more, which lost less or have few rows")


def _print_confusions(console: Console, found: ErrorAnalysis) -> None:
    if found.labels and len(found.labels) <= _SHOWN_CLASSES:
        console.print("\nanswers by true class: full precision / candidate", style="bold")
        table = _table()
        table.add_column("true class", no_wrap=True, max_width=24)
        for name in found.answers:
            table.add_column(_text(name), justify="right", max_width=24)
        for name, full, mine in zip(found.labels, found.matrix_full, found.matrix, strict=True):
            table.add_row(_text(name), *(f"{a:,} / {b:,}" for a, b in zip(full, mine, strict=True)))
        console.print(table)
        return
    console.print("\nlargest confusions of the candidate", style="bold")
    table = _table()
    for column in ("true class", "taken for"):
        table.add_column(column, no_wrap=True, max_width=40)
    for column in ("full", "candidate"):
        table.add_column(column, justify="right")
    for label, answer, full_count, count in _largest(found)[:_SHOWN_CONFUSIONS]:
        table.add_row(_text(label), _text(answer), f"{full_count:,}", f"{count:,}")
    console.print(table)


def _largest(found: ErrorAnalysis) -> list[tuple[str, str, int, int]]:
    if found.confusions:
        return [(c.label, c.answer, c.full, c.candidate) for c in found.confusions]
    cells = [
        (label, answer, found.matrix_full[i][j], found.matrix[i][j])
        for i, label in enumerate(found.labels)
        for j, answer in enumerate(found.answers)
        if i != j and (found.matrix_full[i][j] or found.matrix[i][j])
    ]
    return sorted(cells, key=lambda c: (-c[3], c[2]))


def _print_lost(console: Console, lost_rows: Sequence[LostRow], lost: int) -> None:
    if not lost_rows:
        return
    console.print(
        f"\n{len(lost_rows):,} of {lost:,} lost rows, from the class or group that lost most", style="bold"
    )
    for row in lost_rows:
        fields = ", ".join(f"{name}={value}" for name, value in row.record.items()) or "(no record: tensors)"
        if len(fields) > _SHOWN_FIELDS:
            fields = fields[: _SHOWN_FIELDS - 1] + "…"
        answer = f"row {row.row} ({row.because}): {row.label}, taken for {row.candidate}: {fields}"
        console.print(_text(answer), soft_wrap=True)


def _text(text: str) -> str:
    """Users' text as it is: it must neither steer the terminal nor be read as markup."""
    from rich.markup import escape

    return escape("".join(letter if letter.isprintable() else " " for letter in text))


def _drop(s: SliceErrors) -> str:
    return f"{100 * s.drop:z.2f} ({100 * s.low:z.2f} to {100 * s.high:z.2f})"


def _table() -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
