"""`trimtab label`: a list of what is worth labelling, as a file to fill in, and the way back."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from services.client import Client, GatewayError, base_url, read_token
from services.errors import BadRequest

__all__ = ["COLUMNS", "FilledRow", "as_csv", "filled_rows", "label_app"]

Url = Annotated[str | None, typer.Option("--url", help="The gateway; else TRIMTAB_URL, else port 3000 here.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

COLUMNS = (
    *("request_id", "index", "why", "probability", "control", "treatment", "deadline", "record"),
    "label",
)
BATCH = 1000
_MAX_ID = 200
_MARK = "'"
_ACTIVE = (_MARK, "=", "+", "-", "@", "\t", "\r")

label_app = typer.Typer(help="See which pairs need a label, and send labels.", no_args_is_help=True)


@label_app.command("queue")
def queue(
    url: Url = None,
    rollout: Annotated[str, typer.Option("--id", help="A rollout's id.")] = "current",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many rows.")] = 100,
    agreements: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the pairs on which both arms agree to list as well.")
    ] = 0.0,
    as_json: Json = False,
    out: Annotated[
        Path | None, typer.Option("--out", dir_okay=False, help="A new file for it; else it is printed.")
    ] = None,
) -> None:
    """List what is worth labelling next: disagreements, oldest first, and if asked a sample of agreements.

    It is CSV with an empty column `label` to fill in, unless --json asks for JSON.
    """
    with _client(url) as client:
        body = client.label_queue(rollout, limit=limit, agreements=agreements)
    text = json.dumps(body, indent=2) + "\n" if as_json else as_csv(body["items"])
    if out is None:
        sys.stdout.write(text)
    else:
        _write_new(out, text)
    listed = sum(item["why"] == "disagreement" for item in body["items"])
    summary = (
        f"{listed} of {body['disagreements_waiting']} disagreements that wait for a label, "
        f"{len(body['items']) - listed} agreements"
    )
    # Beside the rows, so that what is piped on has nothing but them.
    print(summary if out is None else f"{out}: {summary}", file=sys.stderr)


@label_app.command("send")
def send(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="CSV of `trimtab label queue`, filled in.")
    ],
    url: Url = None,
    correct: Annotated[
        bool, typer.Option("--correct", help="Put these labels in the place of those that are known.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send the rows of a file whose column `label` is filled in. Sending it again changes nothing."""
    with file.open(newline="", encoding="utf-8-sig") as stream:
        rows = filled_rows(stream, str(file))
    with _client(url) as client:
        body = _send(client, rows, str(file), correct=correct)
    text = ", ".join(f"{number} {outcome.replace('_', ' ')}" for outcome, number in body.items())
    print(json.dumps(body, indent=2) if as_json else text)


def as_csv(items: Iterable[Mapping[str, Any]]) -> str:
    """The queue as a file to fill in.

    A spreadsheet runs cells that begin with one of = + - @ as formulas, and clients choose how their request ids begin.
    Such a cell gets a ' in front, which no request id begins with, and `filled_rows` takes away. Records are JSON and
    begin with a brace.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for item in items:
        writer.writerow(
            (
                _marked(item["request_id"]),
                item["index"],
                item["why"],
                item["probability"],
                _answer(item["control"]),
                _answer(item["treatment"]),
                datetime.fromtimestamp(item["deadline_at"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                json.dumps(item["record"], ensure_ascii=False),
                "",
            )
        )
    return stream.getvalue()


@dataclass(frozen=True, slots=True)
class FilledRow:
    """A row with a label: where it stands in its file, and what feedback takes."""

    line: int
    request_id: str
    index: int
    label: str

    @property
    def item(self) -> dict[str, Any]:
        return {"request_id": self.request_id, "index": self.index, "label": self.label}


def filled_rows(lines: Iterable[str], name: str) -> list[FilledRow]:
    """The rows whose label is filled in, of a file that `as_csv` made.

    The whole file is checked before any of it is sent, because the first label of a record stands.

    Args:
        name: what to call the file in errors.

    Raises:
        BadRequest: it is not such a file; the message has the line.
    """
    found: list[FilledRow] = []
    known: dict[tuple[str, int], FilledRow] = {}
    reader = csv.reader(lines, strict=True)
    try:
        columns = _checked(next(reader, []), name)
        for cells in reader:
            where = f"{name} line {reader.line_num}"
            if len(cells) > len(columns):
                raise BadRequest(f"{where}: {len(cells)} cells for {len(columns)} columns")
            row = _filled(dict(zip(columns, cells, strict=False)), reader.line_num, where)
            if row is None:
                continue
            other = known.setdefault((row.request_id, row.index), row)
            if other.label != row.label:
                raise BadRequest(f"{where}: line {other.line} has another label for the same record")
            found.append(row)
    except csv.Error as error:
        raise BadRequest(f"{name} line {reader.line_num}: {error}") from None
    except UnicodeDecodeError:
        raise BadRequest(f"{name}: it is not text in UTF-8") from None
    return found


def _checked(header: Sequence[str], name: str) -> list[str]:
    columns = [column.strip() for column in header]
    for number, column in enumerate(columns):
        if column not in COLUMNS:
            raise BadRequest(
                f"{name} line 1: no column is called {column[:60]!r}; the columns are {','.join(COLUMNS)}"
            )
        if column in columns[:number]:
            raise BadRequest(f"{name} line 1: the column {column} comes twice")
    for column in ("request_id", "label"):
        if column not in columns:
            raise BadRequest(f"{name} line 1: the column {column} is missing")
    return columns


def _filled(cells: Mapping[str, str], line: int, where: str) -> FilledRow | None:
    label = _unmarked(cells.get("label", "").strip())
    if not label:
        return None
    request_id = _unmarked(cells.get("request_id", "").strip())
    if not 1 <= len(request_id) <= _MAX_ID:
        raise BadRequest(f"{where}: a request_id has 1 to {_MAX_ID} characters")
    index = cells.get("index", "").strip() or "0"
    if not (index.isascii() and index.isdigit() and len(index) <= 9):
        raise BadRequest(f"{where}: index {index[:60]!r} is not a whole number from 0 on")
    return FilledRow(line, request_id, int(index), label)


def _send(client: Client, rows: Sequence[FilledRow], name: str, *, correct: bool) -> dict[str, int]:
    """Send the rows, so many at a time as the gateway takes; returns how many had which outcome.

    One row of every label goes first: a batch is stored whole or not at all, so that a file with a label that is no
    class is refused before anything of it is stored.
    """
    first = {row.label: row for row in reversed(rows)}
    ordered = sorted(rows, key=lambda row: first[row.label] is not row)
    total = {"accepted": 0, "duplicates": 0, "conflicts": 0}
    if correct:
        total |= {"corrected": 0, "too_late": 0}
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        try:
            result = client.feedback([row.item | ({"correction": True} if correct else {}) for row in batch])
        except GatewayError as error:
            refused = next((row for row in batch if _is_about(str(error), row)), None)
            where = "" if refused is None else f"{name} line {refused.line}: "
            sent = f"; {start} labels went before, and sending them again does no harm" if start else ""
            raise GatewayError(f"{where}{error}{sent}") from error
        for outcome in total:
            total[outcome] += result[outcome]
    return total


def _is_about(message: str, row: FilledRow) -> bool:
    """Whether the gateway's refusal of a batch, which quotes what is wrong, is about this row."""
    quoted = (f"label {row.label[:60]!r} ", f"request id {row.request_id[:140]!r}", f"index {row.index}:")
    return any(part in message for part in quoted)


def _answer(answer: Mapping[str, Any] | None) -> str:
    """An arm's answer by its name, or by its index where the workload has no such class any more."""
    if answer is None:
        return ""
    return _marked(str(answer["class"]) if answer["label"] is None else answer["label"])


def _marked(text: str) -> str:
    return _MARK + text if text.startswith(_ACTIVE) else text


def _unmarked(text: str) -> str:
    return text.removeprefix(_MARK)


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8", newline="") as stream:
            stream.write(text)
    except FileExistsError:
        raise BadRequest(f"{path}: the file exists, and may hold labels; name another one") from None


def _client(url: str | None) -> Client:
    return Client(base_url(url), read_token(Path(os.environ["TRIMTAB_HOME"])))
