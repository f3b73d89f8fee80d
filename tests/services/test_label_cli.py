"""`trimtab label`, against the real routes and ledger, with no server."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bentoml
import httpx
import pytest
import typer
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

with warnings.catch_warnings():
    # Starlette warns about the library that its test client is made with.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient

from compression.workload import Workload
from monitoring.ledger import Ledger
from services import cli, label_cli
from services.client import Client, GatewayError
from services.control.app import make_app
from services.errors import BadRequest
from services.label_cli import COLUMNS, as_csv, filled_rows
from tests.services.test_label_routes import IDS, TOKEN, Gateway, add, started

app = typer.Typer()
cli.register(app)


@pytest.fixture
def calls(workload: Workload, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A gateway without a server that the commands talk to; how many labels it was sent at a time."""
    gateway = Gateway(workload, ledger)
    monkeypatch.setattr(bentoml, "get_current_service", lambda: gateway, raising=False)
    sent: list[int] = []
    with TestClient(make_app(), headers=TOKEN) as http:

        class Wired(Client):
            def __init__(self) -> None:
                self._url = "http://testserver"
                self._http = http

            def __exit__(self, *_: object) -> None:
                """The same one serves the next command."""

            def feedback(self, items: Sequence[Mapping[str, Any]]) -> dict[str, int]:
                sent.append(len(items))
                return super().feedback(items)

        monkeypatch.setattr(label_cli, "_client", lambda _: Wired())
        yield sent


@pytest.fixture
def rollout_id(ledger: Ledger) -> str:
    return started(ledger)


def invoked(*arguments: object) -> Result:
    """A command that ran; an error of ours is raised."""
    result = CliRunner().invoke(app, ["label", *(str(argument) for argument in arguments)])
    if isinstance(result.exception, (BadRequest, GatewayError)):
        raise result.exception
    return result


def run(*arguments: object) -> str:
    """Standard output of a command that succeeds."""
    result = invoked(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def known(name: str | None = None) -> str:
    return IDS.issue(name)[1]


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def written(path: Path, *rows: tuple[object, ...], columns: str = "request_id,index,label") -> Path:
    with path.open("w", newline="") as stream:
        stream.write(columns + "\n")
        csv.writer(stream, lineterminator="\n").writerows(rows)
    return path


def stored(ledger: Ledger) -> dict[str, int]:
    ledger.revision()
    connection = sqlite3.connect(ledger.path)
    rows = connection.execute("SELECT request_id, label FROM labels").fetchall()
    connection.close()
    return dict(rows)


# -- the list ------------------------------------------------------------------------------------------------


def test_the_list_is_csv_with_an_empty_column_for_the_label(
    calls: list[int], ledger: Ledger, rollout_id: str
) -> None:
    add(ledger, rollout_id, "q", 1, 0)
    text = run("queue")
    assert text.splitlines()[0] == ",".join(COLUMNS)
    (row,) = table(text)
    assert json.loads(row.pop("record")) == {"a": 0.5, "TEAM": "A"}
    assert row.pop("deadline").endswith("Z")
    assert row == {
        "request_id": "q",
        "index": "0",
        "why": "disagreement",
        "probability": "1.0",
        "control": "high",
        "treatment": "low",
        "label": "",
    }


def test_the_deadline_is_in_utc() -> None:
    assert table(as_csv([item(deadline_at=1_700_000_000.9)]))[0]["deadline"] == "2023-11-14T22:13:20Z"


def test_agreements_are_listed_only_where_they_are_asked_for(
    calls: list[int], ledger: Ledger, rollout_id: str
) -> None:
    add(ledger, rollout_id, "same")
    assert table(run("queue")) == []
    (row,) = table(run("queue", "--agreements", "1"))
    assert (row["request_id"], row["why"], row["probability"]) == ("same", "sample", "1.0")


def test_the_rollout_and_the_number_of_rows_can_be_said(
    calls: list[int], ledger: Ledger, rollout_id: str
) -> None:
    for i in range(3):
        add(ledger, rollout_id, f"q{i}", 1, 0, age=9 - i)
    result = invoked("queue", "--id", rollout_id, "--limit", 2)
    assert [row["request_id"] for row in table(result.stdout)] == ["q0", "q1"]
    assert result.stderr == "2 of 3 disagreements that wait for a label, 0 agreements\n"
    with pytest.raises(GatewayError, match="points-9"):
        run("queue", "--id", "points-9")


@pytest.mark.parametrize("options", [["--limit", "0"], ["--limit", "10001"], ["--agreements", "1.1"]])
def test_numbers_out_of_range_are_wrong_calls(calls: list[int], options: list[str]) -> None:
    assert invoked("queue", *options).exit_code == 2


def test_json_has_all_that_the_route_says(calls: list[int], ledger: Ledger, rollout_id: str) -> None:
    add(ledger, rollout_id, "q", 1, 0)
    body = json.loads(run("queue", "--json"))
    assert body["disagreements_waiting"] == 1
    assert body["items"][0]["control"] == {"class": 1, "label": "high"}


def test_a_file_is_written_once_and_labels_in_it_are_never_overwritten(
    calls: list[int], ledger: Ledger, rollout_id: str, tmp_path: Path
) -> None:
    add(ledger, rollout_id, "q", 1, 0)
    path = tmp_path / "queue.csv"
    result = invoked("queue", "--out", path)
    assert result.stdout == ""
    assert "1 of 1 disagreements" in result.stderr
    text = path.read_text()
    assert text == run("queue")
    with pytest.raises(BadRequest, match="may hold labels"):
        run("queue", "--out", path)
    assert path.read_text() == text


# -- the way back --------------------------------------------------------------------------------------------


def test_what_was_filled_in_is_stored_and_the_rest_stays_in_the_queue(
    calls: list[int], ledger: Ledger, rollout_id: str, tmp_path: Path
) -> None:
    ids = [known(name) for name in (None, "-user", "=A1+B1", "@home", "+7", "plain")]
    for request_id in ids:
        add(ledger, rollout_id, request_id, 1, 0)
    rows = table(run("queue"))
    assert not any(cell[:1] in "=+-@" for row in rows for cell in row.values() if cell)
    path = tmp_path / "queue.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows({**row, "label": "low"} for row in rows[:-1])
        writer.writerow(rows[-1])
    assert run("send", path) == "5 accepted, 0 duplicates, 0 conflicts\n"
    left = rows[-1]["request_id"].removeprefix("'")
    assert stored(ledger) == dict.fromkeys(set(ids) - {left}, 0)
    assert [row["request_id"].removeprefix("'") for row in table(run("queue"))] == [left]
    assert run("send", path) == "0 accepted, 5 duplicates, 0 conflicts\n"


def test_a_file_with_no_label_sends_nothing(calls: list[int], tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", (known(), 0, " "), (known(), 0))
    assert json.loads(run("send", path, "--json")) == {"accepted": 0, "duplicates": 0, "conflicts": 0}
    assert calls == []


def test_another_label_than_the_first_is_a_conflict(calls: list[int], ledger: Ledger, tmp_path: Path) -> None:
    request_id = known()
    run("send", written(tmp_path / "a.csv", (request_id, 0, "low")))
    text = run("send", written(tmp_path / "b.csv", (request_id, 0, "high"), (known(), 0, "high")))
    assert text == "1 accepted, 0 duplicates, 1 conflicts\n"
    assert stored(ledger)[request_id] == 0


def test_with_correct_the_labels_take_the_place_of_those_that_are_known(
    calls: list[int], ledger: Ledger, tmp_path: Path
) -> None:
    request_id = known()
    run("send", written(tmp_path / "a.csv", (request_id, 0, "low")))
    path = written(tmp_path / "b.csv", (request_id, 0, "high"), (known(), 0, "high"))
    assert run("send", path, "--correct") == (
        "1 accepted, 0 duplicates, 0 conflicts, 1 corrected, 0 too late\n"
    )
    assert stored(ledger)[request_id] == 1
    again = json.loads(run("send", path, "--correct", "--json"))
    assert again == {"accepted": 0, "duplicates": 2, "conflicts": 0, "corrected": 0, "too_late": 0}


def test_many_labels_go_in_batches_of_what_the_gateway_takes(
    calls: list[int], ledger: Ledger, tmp_path: Path
) -> None:
    rows = [(known(), 0, "low" if i % 3 else "high") for i in range(2001)]
    assert run("send", written(tmp_path / "a.csv", *rows)) == "2001 accepted, 0 duplicates, 0 conflicts\n"
    assert calls == [1000, 1000, 1]
    assert stored(ledger) == {request_id: int(label == "high") for request_id, _, label in rows}


def test_spreadsheets_may_add_a_mark_and_drop_what_is_empty_and_order_columns_anew(
    calls: list[int], ledger: Ledger, tmp_path: Path
) -> None:
    request_id = known("=x")
    path = tmp_path / "a.csv"
    path.write_bytes(
        f"\ufefflabel,request_id\r\n high ,{request_id}\r\n\r\n,{known()}\r\nlow,'{known()}\r\n".encode()
    )
    assert run("send", path) == "2 accepted, 0 duplicates, 0 conflicts\n"
    assert stored(ledger)[request_id] == 1


def test_a_label_that_is_no_class_is_refused_with_its_line_before_anything_is_stored(
    calls: list[int], ledger: Ledger, tmp_path: Path
) -> None:
    rows = [(known(), 0, "low") for _ in range(1500)]
    rows[1400] = (known(), 0, "middling")
    with pytest.raises(GatewayError) as caught:
        run("send", written(tmp_path / "a.csv", *rows))
    says = (
        f"{tmp_path}/a.csv line 1402: label 'middling' is not a class; the classes are low, high (HTTP 400)"
    )
    assert str(caught.value) == says
    assert stored(ledger) == {}


def test_an_unknown_request_id_is_refused_with_its_line_and_what_went_before(
    calls: list[int], ledger: Ledger, tmp_path: Path
) -> None:
    rows = [(known(), 0, "low") for _ in range(1500)]
    rows[1400] = ("of-another-server~0123456789ab", 0, "low")
    with pytest.raises(GatewayError) as caught:
        run("send", written(tmp_path / "a.csv", *rows))
    assert f"{tmp_path}/a.csv line 1402: unknown request id 'of-another-server~" in str(caught.value)
    assert str(caught.value).endswith("; 1000 labels went before, and sending them again does no harm")
    assert len(stored(ledger)) == 1000


def test_an_index_that_no_request_has_is_refused_with_its_line(calls: list[int], tmp_path: Path) -> None:
    with pytest.raises(GatewayError, match=r"line 3: index 256: a request has at most 256 records"):
        run("send", written(tmp_path / "a.csv", (known(), 0, "low"), (known(), 256, "low")))


def test_a_gateway_that_is_not_there_is_an_error_of_one_line(
    calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    client = Client("http://gateway")
    client._http.close()
    client._http = httpx.Client(base_url="http://gateway", transport=httpx.MockTransport(gone))
    monkeypatch.setattr(label_cli, "_client", lambda _: client)
    with pytest.raises(GatewayError, match=r"^no gateway at http://gateway"):
        run("send", written(tmp_path / "a.csv", (known(), 0, "low")))


A = "id~0"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1: the column request_id is missing"),
        ("request_id,index\n", "line 1: the column label is missing"),
        ("request_id,lable\n", "line 1: no column is called 'lable'; the columns are request_id,index,why"),
        ("request_id;label\n", "line 1: no column is called 'request_id;label'"),
        ("request_id,label,\n", "line 1: no column is called ''"),
        ("request_id,label,label\n", "line 1: the column label comes twice"),
        ("request_id,label\n\nq,low,more\n", "line 3: 3 cells for 2 columns"),
        ("request_id,label\n,low\n", "line 2: a request_id has 1 to 200 characters"),
        ("request_id,label\n" + "q" * 201 + ",low\n", "line 2: a request_id has 1 to 200 characters"),
        ("request_id,index,label\nq,1,low\nq,1.0,low\n", "line 3: index '1.0' is not a whole number"),
        ("request_id,index,label\nq,-1,low\n", "line 2: index '-1' is not a whole number"),
        ("request_id,index,label\nq,²,low\n", "line 2: index '²' is not a whole number"),
        ("request_id,index,label\nq," + "9" * 5000 + ",low\n", "is not a whole number"),
        ("request_id,label\nq,low\n\nq,high\n", "line 4: line 2 has another label for the same record"),
        ('request_id,label\nq,"low\n', "line 2: unexpected end of data"),
        ("request_id,label\nq,low\n" + "x" * 200_000, "line 3: field larger than field limit"),
    ],
)
def test_a_file_that_is_wrong_is_refused_whole_in_one_line(text: str, says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        filled_rows(io.StringIO(text), "labels.csv")
    assert str(caught.value).startswith("labels.csv line ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_refused(calls: list[int], tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(BadRequest, match=r"a\.xlsx: it is not text in UTF-8"):
        run("send", path)


def test_the_same_row_twice_is_sent_twice() -> None:
    rows = filled_rows(["request_id,label\n", f"{A},low\n", f"{A},low\n"], "labels.csv")
    assert [(row.line, row.item) for row in rows] == [
        (2, {"request_id": A, "index": 0, "label": "low"}),
        (3, {"request_id": A, "index": 0, "label": "low"}),
    ]


# -- there and back ------------------------------------------------------------------------------------------


def item(**changes: object) -> dict[str, Any]:
    made = {
        "request_id": "q",
        "index": 0,
        "why": "disagreement",
        "probability": 1.0,
        "control": {"class": 1, "label": "high"},
        "treatment": {"class": 0, "label": "low"},
        "deadline_at": 1_700_000_000.0,
        "record": {},
    }
    return {**made, **changes}


ids = st.from_regex(r"[A-Za-z0-9_.:/@+=-]{1,128}~[0-9a-f]{12}", fullmatch=True)
words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda word: word == word.strip()
)
records = st.dictionaries(st.text(max_size=9), st.none() | st.integers() | st.text(max_size=20), max_size=3)


@given(st.lists(st.tuples(ids, words, records), max_size=5, unique_by=lambda row: row[0]))
def test_ids_names_and_records_survive_the_way_through_a_file(rows: list[tuple[str, str, Any]]) -> None:
    named = [
        item(request_id=request_id, control={"class": 0, "label": name}, record=record)
        for request_id, name, record in rows
    ]
    cells = table(as_csv(named))
    assert [json.loads(row["record"]) for row in cells] == [record for _, _, record in rows]
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in cells for cell in row.values())
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, COLUMNS)
    writer.writeheader()
    # Whoever labels takes the name over as it stands in the file.
    writer.writerows({**row, "label": row["control"]} for row in cells)
    stream.seek(0)
    back = [(row.request_id, row.label) for row in filled_rows(stream, "labels.csv")]
    assert back == [(request_id, name) for request_id, name, _ in rows]


def test_a_class_without_a_name_is_shown_by_its_index_and_no_answer_by_nothing() -> None:
    (row,) = table(as_csv([item(control={"class": 7, "label": None}, treatment=None)]))
    assert (row["control"], row["treatment"]) == ("7", "")
