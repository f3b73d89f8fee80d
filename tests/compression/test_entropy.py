from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compression.coding import decode
from compression.compress import compress
from compression.errors import CompressionError, StepError, VariantCorrupted
from compression.export import open_session, run
from compression.recipe import Recipe, StepSpec, find_recipe
from compression.steps import STEPS, StepContext
from compression.variant import CODED, MODEL, PROGRAM, Variant, load_variant, save_variant
from compression.workload import Workload

RECIPE = Recipe(
    name="coded",
    steps=[
        StepSpec(step="prune_magnitude", params={"amount": 0.5}),
        StepSpec(step="cluster_weights", params={"clusters": 8, "epochs": 1}),
        StepSpec(step="entropy_code"),
    ],
)


@pytest.fixture(scope="module")
def coded(tiny: Workload, full: Variant) -> Variant:
    return compress(tiny, [RECIPE])[1]


def one_matrix(weight: np.ndarray, *, raw: bool = True) -> bytes:
    tensor = numpy_helper.from_array(weight, "w")
    if not raw:
        tensor = helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.ravel())
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", weight.shape[0]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [tensor],
    )
    content: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()
    return content


@pytest.mark.parametrize("raw", [True, False])
def test_a_codebook_becomes_small_however_the_file_keeps_it(context: StepContext, raw: bool) -> None:
    draw = np.random.default_rng(0)
    content = one_matrix(draw.choice(draw.normal(size=16), (64, 64)).astype(np.float32), raw=raw)
    smaller = STEPS["entropy_code"]().apply(content, context)
    # 4096 weights of 4 bits, and the rest.
    assert len(smaller) < 2048 + 600
    assert decode(smaller) == content


def test_huffman_codes_give_the_same_file_back_and_take_a_bit_for_every_weight(context: StepContext) -> None:
    draw = np.random.default_rng(0)
    weight = draw.choice(draw.normal(size=16), (64, 64)) * (draw.random((64, 64)) < 0.1)
    content = one_matrix(weight.astype(np.float32))
    sizes = {}
    for coder in ("ans", "huffman"):
        smaller = STEPS["entropy_code"](coder=coder).apply(content, context)
        assert decode(smaller) == content
        sizes[coder] = len(smaller)
    # Nine of ten weights are zero: 0.9 bits of entropy each, and a code of one bit for the zeros.
    assert sizes["ans"] < sizes["huffman"] < sizes["ans"] + 4096 / 8


def test_int8_weights_become_smaller_too(context: StepContext, graph: onnx.ModelProto) -> None:
    quantized = STEPS["int8_static"](rows=100).apply(graph, context).SerializeToString()
    assert len(STEPS["entropy_code"]().apply(quantized, context)) < 0.7 * len(quantized)


@pytest.mark.parametrize(
    ("weights", "told"), [("normal", True), ("sparse", False), ("shared", False), ("int8", False)]
)
def test_coding_weights_that_hardly_repeat_is_remarked_on(
    context: StepContext, weights: str, told: bool
) -> None:
    draw = np.random.default_rng(0)
    array = draw.normal(size=(64, 64)).astype(np.float32)
    if weights == "sparse":
        array[draw.random(array.shape) < 0.5] = 0
    elif weights == "shared":
        array = draw.choice(array.ravel()[:200], array.shape)
    content = one_matrix(array)
    if weights == "int8":
        content = (
            STEPS["int8_dynamic"]().apply(onnx.load_model_from_string(content), context).SerializeToString()
        )
        context.warnings.clear()
    STEPS["entropy_code"]().apply(content, context)
    assert [line.startswith("entropy_code: the file became only") for line in context.warnings] == [
        True
    ] * told


def test_a_file_that_would_grow_is_an_error(context: StepContext) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 4 * 900, np.uint8).view(np.float32).reshape(30, 30)
    with pytest.raises(StepError, match="the file would grow from"):
        STEPS["entropy_code"]().apply(one_matrix(noise), context)


def test_a_coded_variant_keeps_only_the_coded_file_and_reports_both_sizes(coded: Variant) -> None:
    card = coded.scorecard()
    assert card is not None
    assert coded.manifest.decoded is not None
    assert not coded.has(MODEL)
    assert card.size_bytes == coded.manifest.files[CODED].bytes == (coded.path / CODED).stat().st_size
    assert card.size_bytes < coded.manifest.decoded.bytes / 2
    assert coded.has(PROGRAM)


def test_a_coded_variant_gives_its_model_like_any_other(
    coded: Variant, tiny: Workload, context: StepContext
) -> None:
    again = load_variant(coded.tag)
    rows = context.data.rows("test")
    classes = run(open_session(again.onnx_bytes()), rows.tensors, 100).argmax(1)
    card = again.scorecard()
    assert card is not None
    assert (classes == rows.labels).mean() == pytest.approx(card.quality.value)
    assert len(again.onnx_bytes()) == coded.manifest.decoded.bytes  # type: ignore[union-attr]


def test_a_damaged_coded_file_is_found_out(coded: Variant) -> None:
    path = coded.path / CODED
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-1])
        with pytest.raises(VariantCorrupted, match=r"model\.onnx\.coded does not match its sha256"):
            coded.onnx_bytes()
    finally:
        path.write_bytes(good)


def test_a_file_that_holds_another_model_is_found_out(coded: Variant, context: StepContext) -> None:
    draw = np.random.default_rng(0)
    content = one_matrix(draw.choice(draw.normal(size=4), (50, 50)).astype(np.float32))
    manifest = coded.manifest.model_copy(update={"workload": "shelf", "name": "swapped"})
    swapped = save_variant(manifest, {CODED: STEPS["entropy_code"]().apply(content, context)})
    with pytest.raises(VariantCorrupted, match=r"more than|holds another model"):
        swapped.onnx_bytes()
    junk = save_variant(manifest.model_copy(update={"name": "junk"}), {CODED: b"junk"})
    with pytest.raises(VariantCorrupted, match="it does not start with TRIMTABC; make the variant again"):
        junk.onnx_bytes()


def test_a_coded_variant_needs_its_file(coded: Variant) -> None:
    with pytest.raises(CompressionError, match=r"needs model\.onnx\.coded"):
        save_variant(coded.manifest, {MODEL: b"model"})


def test_deep_compression_is_made_on_request_only_and_is_small(tiny: Workload, full: Variant) -> None:
    recipe = find_recipe("deep-compression", tiny.directory)
    assert recipe.on_request
    card = compress(tiny, [recipe])[1].scorecard()
    assert card is not None
    assert card.size_ratio > 3
    assert card.nonzero_parameters < 0.3 * card.parameters
