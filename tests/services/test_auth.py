from __future__ import annotations

import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.control.auth import RequestIds, check_token, load_secret
from services.errors import BadRequest, NotFound, Unauthorized

ids = RequestIds("the key of this installation")


def test_an_id_given_out_here_is_known_in_another_process_with_the_same_key() -> None:
    _, signed = ids.issue(None)
    code = (
        "import sys; from services.control.auth import RequestIds; RequestIds(sys.argv[1]).check(sys.argv[2])"
    )
    arguments = [sys.executable, "-c", code, "the key of this installation", signed]
    assert subprocess.run(arguments, check=False).returncode == 0


def test_an_id_of_another_key_is_unknown() -> None:
    _, signed = RequestIds("another key").issue(None)
    with pytest.raises(NotFound):
        ids.check(signed)


@given(st.integers(0, 40))
def test_a_truncated_id_is_unknown(length: int) -> None:
    _, signed = ids.issue("client-1")
    if length < len(signed):
        with pytest.raises(NotFound):
            ids.check(signed[:length])


@given(st.text(max_size=60))
def test_a_made_up_id_is_unknown(text: str) -> None:
    with pytest.raises(NotFound):
        ids.check(text.encode("utf-8", "replace").decode())


def test_a_checksum_does_not_fit_another_id() -> None:
    _, signed = ids.issue("client-1")
    with pytest.raises(NotFound, match="unknown request id"):
        ids.check("client-2~" + signed.rpartition("~")[2])


def test_ids_made_here_differ() -> None:
    assert len({ids.issue(None)[1] for _ in range(1000)}) == 1000


def test_a_clients_own_id_is_kept_in_front_and_decides_the_arm() -> None:
    key, signed = ids.issue("order:17/a@shop.example+1=x_y-z")
    assert key == "order:17/a@shop.example+1=x_y-z"
    assert signed.startswith(key + ".")
    ids.check(signed)


def test_a_clients_own_id_sent_with_everything_names_every_request_anew() -> None:
    assert len({ids.issue("constant")[1] for _ in range(100)}) == 100


def test_a_signed_id_that_comes_back_is_kept_so_that_a_retry_pairs_once() -> None:
    key, signed = ids.issue("client.1")
    assert ids.issue(signed) == (key, signed)
    key, signed = ids.issue(None)
    assert ids.issue(signed) == (key, signed)


def test_which_record_is_judged_is_fixed_for_an_id_and_even_over_ids() -> None:
    signed = ids.issue(None)[1]
    assert len({ids.draw(signed, 7) for _ in range(10)}) == 1
    drawn = Counter(ids.draw(ids.issue("constant")[1], 4) for _ in range(4000))
    # 1000 each, standard deviation 27: five of them either way.
    assert all(abs(drawn[index] - 1000) < 140 for index in range(4))


@pytest.mark.parametrize(
    "supplied",
    ["", " ", "a b", "a\nb", "a\x00", "ä", "a" * 129, "a~b", "~", "x~" + "0" * 12, "<script>", 'a"b'],
)
def test_an_id_with_other_characters_is_refused(supplied: str) -> None:
    with pytest.raises(BadRequest, match="X-Request-Id"):
        ids.issue(supplied)


@given(st.text())
def test_any_supplied_id_is_either_signed_or_refused(supplied: str) -> None:
    text = supplied.encode("utf-8", "replace").decode()
    try:
        key, signed = ids.issue(text)
    except BadRequest:
        return
    ids.check(signed)
    assert key == text


_MAKE = """
import sys, time
from pathlib import Path
from services.control.auth import load_secret
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
print(load_secret(Path(sys.argv[1]), "TRIMTAB_NO_SUCH"))
"""


def test_twenty_processes_that_start_at_once_share_one_secret(tmp_path: Path) -> None:
    import time

    path = tmp_path / "home" / "token"
    together = str(time.time() + 1.5)
    command = [sys.executable, "-c", _MAKE, str(path), together]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(20)]
    secrets = {process.communicate(timeout=60)[0] for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(secrets) == 1
    assert len(secrets.pop().strip()) >= 32
    assert [file.name for file in path.parent.iterdir()] == ["token"]


def test_the_secret_can_be_read_by_its_owner_only(tmp_path: Path) -> None:
    load_secret(tmp_path / "token", "TRIMTAB_NO_SUCH")
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_TOKEN", "from-outside")
    assert load_secret(tmp_path / "token", "TRIMTAB_TOKEN") == "from-outside"
    assert not (tmp_path / "token").exists()


@pytest.mark.parametrize("header", ["Bearer s3cret", "bearer s3cret", "BEARER  s3cret "])
def test_the_operators_token_is_let_in(header: str) -> None:
    check_token(header, "s3cret")


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "s3cret", "Basic s3cret", "Bearer s3cre", "Bearer s3crett", "Bearer ä"],
)
def test_anything_else_is_turned_away(header: str | None) -> None:
    with pytest.raises(Unauthorized, match="Bearer TOKEN"):
        check_token(header, "s3cret")


def test_an_empty_secret_file_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    with pytest.raises(Unauthorized):
        check_token("Bearer ", load_secret(tmp_path / "token", "TRIMTAB_NO_SUCH"))
