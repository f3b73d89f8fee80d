"""Drift: what has moved is found, what has not is not, at any window size and for odd columns."""

import warnings

import numpy as np
import pandas as pd
import pytest

from monitoring.drift import (
    DESCRIPTORS,
    MISSING,
    OTHER,
    DriftSettings,
    _describe,
    jensen_shannon,
    measure_drift,
    prepare_columns,
    wasserstein,
)


def rows(n: int, seed: int, *, shift: float = 0.0, disabled: float = 0.12) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "AGEP": np.clip(rng.normal(42 + shift, 20, n), 0, 95).round(),
            "PINCP": rng.lognormal(10, 1, n),
            "SCHL": rng.integers(1, 25, n),
            "DIS": rng.choice([1, 2], n, p=[disabled, 1 - disabled]),
            "STATE": rng.choice(["CA", "NY", "TX"], n),
            "prediction": rng.choice(["no", "yes"], n),
        }
    )


def drifted(current: pd.DataFrame, reference: pd.DataFrame) -> set[str]:
    return {c.column for c in measure_drift(current, reference).columns if c.drifted}


@pytest.mark.parametrize("n", [60, 300, 3000])
def test_rows_of_the_same_distribution_do_not_drift_however_few_they_are(n: int) -> None:
    reference = rows(3000, 0)
    found = [drifted(rows(n, seed), reference) for seed in range(1, 9)]
    assert sum(map(len, found)) <= 1


def test_a_shifted_number_drifts_and_only_it() -> None:
    result = measure_drift(rows(2000, 1, shift=10), rows(3000, 0))
    assert {c.column for c in result.columns if c.drifted} == {"AGEP"}
    assert result.share == pytest.approx(1 / 5)
    assert not result.drifted


def test_a_code_that_becomes_frequent_drifts_and_only_it() -> None:
    assert drifted(rows(2000, 1, disabled=0.35), rows(3000, 0)) == {"DIS"}


def test_the_window_drifts_when_half_of_its_columns_do() -> None:
    reference = rows(3000, 0)
    current = rows(2000, 1, shift=10, disabled=0.35).assign(STATE="CA")
    result = measure_drift(current, reference)
    assert result.share == pytest.approx(3 / 5)
    assert result.drifted


def test_predictions_are_judged_apart_from_the_inputs() -> None:
    current = rows(2000, 1).assign(prediction="yes")
    result = measure_drift(current, rows(3000, 0))
    assert result.prediction is not None
    assert result.prediction.drifted
    assert "prediction" not in {c.column for c in result.columns}
    assert result.share == 0
    assert result.scores()["prediction"] == result.prediction.score


def test_every_column_names_its_method_and_a_threshold_not_under_the_chosen_one() -> None:
    settings = DriftSettings(numeric_threshold=0.2, categorical_threshold=0.15)
    result = measure_drift(rows(4000, 1), rows(4000, 0), settings=settings)
    methods = {c.column: (c.kind, c.method) for c in result.columns}
    assert methods["AGEP"] == ("numeric", "wasserstein")
    assert methods["DIS"] == ("categorical", "jensenshannon")
    assert all(c.threshold >= (0.2 if c.kind == "numeric" else 0.15) for c in result.columns)


def test_distances_are_the_textbook_ones() -> None:
    assert jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(np.sqrt(np.log(2)))
    assert jensen_shannon(np.array([3.0, 1.0]), np.array([6.0, 2.0])) == 0
    y = np.arange(100.0)
    assert wasserstein(y + 5, y) == pytest.approx(5 / np.std(y))


def test_a_number_that_stops_coming_drifts_by_its_gaps() -> None:
    current = rows(1000, 1)
    current.loc[:400, "PINCP"] = np.nan
    assert "PINCP is missing" in drifted(current, rows(3000, 0))


def test_a_number_that_has_stopped_coming_is_judged_by_its_gaps_alone() -> None:
    result = measure_drift(rows(1000, 1).assign(PINCP=np.nan), rows(3000, 0))
    assert {c.column for c in result.columns if c.drifted} == {"PINCP is missing"}
    assert any("PINCP" in note for note in result.notes)


def test_columns_that_cannot_be_compared_are_left_out_and_named() -> None:
    n = 500
    reference = rows(n, 0).assign(
        tags=[["a", "b"]] * n,
        nested=[{"a": 1}] * n,
        id=[f"u{i}" for i in range(n)],
        when=pd.Timestamp("2020-01-01"),
        empty=None,
        only_then=1,
    )
    current = reference.drop(columns="only_then")
    result = measure_drift(current, reference)
    left_out = {note.split(":")[0] for note in result.notes if "left out" in note}
    assert left_out == {"tags", "nested", "id", "when", "empty", "only_then"}
    assert {c.column for c in result.columns} == {"AGEP", "PINCP", "SCHL", "DIS", "STATE"}


def test_one_value_has_one_spelling_whether_or_not_its_column_has_gaps() -> None:
    reference = pd.DataFrame({"code": [1, 2] * 100})
    current = pd.DataFrame({"code": [1.0, 2.0] * 90 + [None] * 20})
    prepared = prepare_columns(current, reference, ["code"])
    assert set(prepared.reference["code"]) == {"1", "2"}
    assert set(prepared.current["code"]) == {"1", "2", MISSING}


def test_values_that_the_reference_does_not_know_are_one_value() -> None:
    reference = pd.DataFrame({"state": ["CA", "NY"] * 100})
    current = pd.DataFrame({"state": ["CA", "<script>", "ZZ", "QQ"] * 50})
    prepared = prepare_columns(current, reference, ["state"])
    assert set(prepared.current["state"]) == {"CA", OTHER}


def test_numbers_sent_as_text_are_gaps_not_a_crash() -> None:
    current = rows(500, 1)
    current["AGEP"] = ["forty"] * 250 + list(current["AGEP"][250:])
    assert "AGEP is missing" in drifted(current, rows(3000, 0))


def test_too_few_rows_give_no_scores_and_a_reason() -> None:
    result = measure_drift(rows(20, 1), rows(3000, 0))
    assert result.columns == ()
    assert result.share == 0
    assert "needs 50 rows" in result.notes[0]


def test_a_declared_code_is_categorical_however_many_values_it_has() -> None:
    result = measure_drift(rows(1000, 1), rows(1000, 0), categorical=["SCHL"])
    assert {c.column: c.kind for c in result.columns}["SCHL"] == "categorical"


# Text and embeddings -------------------------------------------------------------------------------------


def reviews(n: int, seed: int, *, words: int = 12, digits: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))

    def word() -> str:
        return str(rng.integers(10**5)) if rng.random() < digits else "".join(rng.choice(letters, 5))

    return pd.DataFrame(
        {"review": [" ".join(word() for _ in range(rng.integers(3, words))) for _ in range(n)]}
    )


def vectors(n: int, seed: int, *, shift: float = 0.0, width: int = 16) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    common = rng.normal(0, 2, (n, 1))  # the numbers hang together, as they do in an embedding
    return pd.DataFrame({"vector": (rng.normal(shift, 1, (n, width)) + common).tolist()})


def test_free_text_is_judged_by_its_descriptors() -> None:
    result = measure_drift(reviews(500, 1), reviews(1500, 0))
    assert {c.column for c in result.columns} == {"review: length", "review: words", "review: non-letter %"}
    assert {(c.kind, c.method) for c in result.columns} == {("text", "wasserstein")}
    assert all(c.threshold >= 0.1 for c in result.columns)
    assert result.share == 0


def test_longer_texts_drift_by_length_and_words() -> None:
    assert drifted(reviews(500, 1, words=20), reviews(1500, 0)) == {"review: length", "review: words"}


def test_texts_of_digits_drift_by_their_share_of_letters() -> None:
    found = drifted(reviews(500, 1, digits=0.3), reviews(1500, 0))
    assert "review: non-letter %" in found
    assert "review: length" not in found


def test_descriptors_are_evidentlys() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about itself while it is imported
        from evidently import DataDefinition, Dataset
        from evidently.descriptors import NonLetterCharacterPercentage, TextLength, WordCount

    texts = pd.DataFrame({"t": [*reviews(60, 1, digits=0.2)["review"], "Well, it costs 5 EUR - twice!", "x"]})
    theirs = Dataset.from_pandas(
        texts,
        data_definition=DataDefinition(text_columns=["t"]),
        descriptors=[TextLength("t", "a"), WordCount("t", "b"), NonLetterCharacterPercentage("t", "c")],
    ).as_dataframe()
    ours = _describe(texts["t"])
    for name, column in zip(DESCRIPTORS, "abc", strict=True):
        assert ours[name].tolist() == pytest.approx(theirs[column].tolist())


def test_words_of_any_alphabet_count_and_an_empty_text_has_none() -> None:
    found = _describe(pd.Series(["все счастливые семьи", "", "123 -"]))
    assert found["words"].tolist() == [3, 0, 0]
    assert found["non-letter %"].tolist() == [0, 0, pytest.approx(80)]


def test_texts_that_stop_coming_are_seen_by_their_gaps() -> None:
    current = reviews(500, 1)
    current.loc[:250, "review"] = None
    assert "review is missing" in drifted(current, reviews(1500, 0))


@pytest.mark.parametrize("n", [60, 300, 2000])
def test_embeddings_of_the_same_distribution_do_not_drift(n: int) -> None:
    reference = vectors(2000, 0)
    assert sum(len(drifted(vectors(n, seed), reference)) for seed in range(1, 9)) == 0


def test_embeddings_that_move_drift_and_say_how() -> None:
    result = measure_drift(vectors(1000, 1, shift=0.5), vectors(2000, 0))
    [column] = result.columns
    assert (column.column, column.kind, column.method) == ("vector", "embedding", "mean distance")
    assert column.drifted
    # 16 numbers moved by 0.5 each; each has a variance of 1 + 4.
    assert column.score == pytest.approx(0.5 * 4 / np.sqrt(16 * 5), abs=0.1)


def test_the_threshold_of_embeddings_can_be_chosen() -> None:
    settings = DriftSettings(embedding_threshold=0.9)
    result = measure_drift(vectors(1000, 1, shift=0.5), vectors(2000, 0), settings=settings)
    assert result.columns[0].threshold == 0.9
    assert not result.drifted


def test_lists_of_another_length_are_gaps() -> None:
    current = vectors(1000, 1)
    current.loc[:500, "vector"] = pd.Series([[1.0, 2.0]] * 501)
    assert drifted(current, vectors(2000, 0)) == {"vector is missing"}


def test_true_is_not_spelled_as_one() -> None:
    reference = pd.DataFrame({"flag": [1, True, "x"] * 50}, dtype=object)
    prepared = prepare_columns(reference, reference, ["flag"])
    assert set(prepared.reference["flag"]) == {"1", "True", "x"}
