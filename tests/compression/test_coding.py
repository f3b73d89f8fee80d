from __future__ import annotations

import base64
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.coding import MAGIC, Coder, Span, decode, encode
from compression.errors import CodingError

HEAD = len(MAGIC) + 4
CODERS: tuple[Coder, ...] = ("ans", "huffman")
OLD = (
    "VFJJTVRBQkO+AAAAeyJ2ZXJzaW9uIjoxLCJieXRlcyI6NDgwMCwic2hhMjU2IjoiYTIxMzlkOGQ5ZDY5ZTRlZWVhZWY3MzJiNzMx"
    "OWVmNmU3MWJmYjU5ZDA3NTNlYzM3ZDk1YzBmNTQyNWYwYzRjMSIsInJlc3QiOjgsImFycmF5cyI6W3siYXQiOjAsImNvdW50Ijox"
    "MjAwLCJ3aWR0aCI6NCwicGxhbmVzIjpbeyJzeW1ib2xzIjozLCJ3b3JkcyI6NTd9XX1dfXjaAwAAAAABAAAAAAAAwD8AAADA/3//"
    "P/8/NMgSl6T29XWg9oTbJe10xqz19XWg9oTbJe10xqz19XWg9oTbJe10xqz19XWg9oTbJe10xqz19XWg9oTbJe10xqz19XWg9oTb"
    "Je10xqz19XWg9oTbJe10xqz19XWg9oTbJe10xqz19XWg9oTbJe10xqz19XWg9oTbJe10xqz19XWg9oTbJe10xqz19XWg9oTbJe10"
    "xqz19XWg9oTbJe10xqz19XWg9oTbJe10xqz19XWg9oTbJe10xqz19XWg9oTbJe10xqz19XWg9oTbJe10xqz19XWg9oTbJe10xm/X"
    "gNf3jTsK"
)
"""300 times 1.5, -2, 0, 0 in float32, coded when there was nothing but rANS."""


def blob(array: np.ndarray, before: bytes = b"before", after: bytes = b"after") -> tuple[bytes, Span]:
    return before + array.tobytes() + after, Span(len(before), array.size, array.itemsize)


def forged(coded: bytes, **changes: object) -> bytes:
    """The coded file with other entries in its header."""
    (length,) = struct.unpack_from("<I", coded, len(MAGIC))
    header = json.loads(coded[HEAD : HEAD + length]) | changes
    text = json.dumps(header).encode()
    return MAGIC + struct.pack("<I", len(text)) + text + coded[HEAD + length :]


def outcome(coded: bytes) -> bytes | str:
    """What is decoded, or why not."""
    try:
        return decode(coded)
    except CodingError as error:
        return str(error)


@pytest.fixture(scope="module")
def codebook() -> np.ndarray:
    draw = np.random.default_rng(0)
    return draw.choice(draw.normal(size=17).astype(np.float32), 20_000)


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, list[Span]]:
    """Bytes with arrays in them: of few values, sparse, of one value, random; empty gaps too."""
    content, spans = b"", []
    for _ in range(draw(st.integers(0, 4))):
        content += draw(st.binary(max_size=20))
        width, count = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(1, 3000))
        numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        values = numbers.integers(0, 256**width, draw(st.integers(1, 5000)), f"u{width}", endpoint=False)
        array = numbers.choice(values, count) * (numbers.random(count) < draw(st.floats(0, 1)))
        spans.append(Span(len(content), count, width))
        content += array.astype(f"<u{width}").tobytes()
    return content + draw(st.binary(max_size=20)), spans


@pytest.mark.parametrize("coder", CODERS)
@settings(deadline=None)
@given(file=files())
def test_what_is_decoded_is_what_was_coded(coder: Coder, file: tuple[bytes, list[Span]]) -> None:
    content, spans = file
    assert decode(encode(content, spans, coder), len(content)) == content


@pytest.mark.parametrize("coder", CODERS)
@given(data=st.data())
def test_a_changed_byte_is_refused_in_one_line(coder: Coder, data: st.DataObject) -> None:
    draw = np.random.default_rng(1)
    content, span = blob(draw.choice(draw.normal(size=5), 600))
    coded = bytearray(encode(content, [span], coder))
    coded[data.draw(st.integers(0, len(coded) - 1))] ^= data.draw(st.integers(1, 255))
    got = outcome(bytes(coded))
    # A frequency can change without any effect.
    assert got == content or (isinstance(got, str) and "\n" not in got)


@pytest.mark.parametrize("coder", CODERS)
@given(length=st.integers(0, 400))
def test_a_file_that_ends_early_is_refused(coder: Coder, length: int) -> None:
    content, span = blob(np.arange(3000, dtype=np.int32) % 7)
    with pytest.raises(CodingError):
        decode(encode(content, [span], coder)[:length])


def test_huffman_codes_take_what_the_best_prefix_code_takes(codebook: np.ndarray) -> None:
    content, span = blob(codebook)
    # 17 values about as frequent as each other: 15 codes of 4 bits and 2 of 5, a bit less where some are rarer.
    _, counts = np.unique(codebook, return_counts=True)
    heap = sorted(int(count) for count in counts)
    bits = 0
    while len(heap) > 1:
        joined = heap[0] + heap[1]
        bits += joined
        heap = sorted([*heap[2:], joined])
    huffman, ans = (len(encode(content, [span], coder)) for coder in ("huffman", "ans"))
    assert bits / 8 < huffman < 1.002 * bits / 8 + 500
    assert ans < huffman


def test_the_container_says_which_coder_it_was(codebook: np.ndarray) -> None:
    content, span = blob(codebook)
    coded = {coder: encode(content, [span], coder) for coder in CODERS}
    assert b'"coder":"huffman"' in coded["huffman"]
    # Files from before there was a choice name none.
    assert b"coder" not in coded["ans"]
    assert "\n" not in outcome(forged(coded["huffman"], coder="ans"))  # type: ignore[operator]
    assert outcome(forged(coded["huffman"], coder="ans")) != content
    assert (
        outcome(forged(coded["ans"], coder="zip")) == "the coded file is damaged: its header cannot be read"
    )


def test_a_file_of_before_there_was_a_choice_is_still_decoded() -> None:
    assert (
        decode(base64.b64decode(OLD)) == np.tile(np.array([1.5, -2.0, 0.0, 0.0], np.float32), 300).tobytes()
    )


def test_a_short_stream_that_claims_many_elements_is_refused_at_once() -> None:
    content, span = blob(np.arange(3000, dtype=np.uint8) % 7, b"", b"")
    coded = encode(content, [span], "huffman")
    (length,) = struct.unpack_from("<I", coded, len(MAGIC))
    (array,) = json.loads(coded[HEAD : HEAD + length])["arrays"]
    huge = 2**30
    claimed = forged(coded, bytes=huge, arrays=[array | {"count": huge}])
    assert outcome(claimed) == "the coded file is damaged: a stream ends too early"


def test_a_codebook_takes_the_entropy_of_its_indices(codebook: np.ndarray) -> None:
    content, span = blob(codebook)
    _, counts = np.unique(codebook, return_counts=True)
    shares = counts / counts.sum()
    entropy = -(shares * np.log2(shares)).sum() * codebook.size / 8
    assert entropy < len(encode(content, [span])) < 1.01 * entropy + 500


def test_zeros_among_many_values_take_next_to_nothing() -> None:
    draw = np.random.default_rng(0)
    weights = np.where(draw.random(50_000) < 0.1, draw.normal(size=50_000), 0).astype(np.float32)
    content, span = blob(weights)
    # 5000 numbers of 4 bytes, and a mask of 0.47 bits for each weight.
    assert len(encode(content, [span])) < 5000 * 4 + 50_000 * 0.47 / 8


def test_negative_zeros_and_nans_keep_their_bits() -> None:
    content, span = blob(np.tile(np.array([0.0, -0.0, np.nan, -np.nan, np.inf], np.float32), 500))
    assert decode(encode(content, [span])) == content


def test_noise_is_left_as_it_is() -> None:
    content, span = blob(np.random.default_rng(0).integers(0, 2**64, 2000, np.uint64))
    coded = encode(content, [span])
    assert len(coded) < len(content) + 300
    assert decode(coded) == content


@pytest.mark.parametrize(
    "spans", [[Span(0, 4, 4), Span(8, 2, 4)], [Span(0, 5, 4)], [Span(0, 2, 3)], [Span(0, 0, 4)]]
)
def test_arrays_that_cannot_be_in_the_file_are_refused(spans: list[Span]) -> None:
    with pytest.raises(ValueError, match="overlaps another, or lies outside 16 bytes"):
        encode(bytes(16), spans)


def test_a_file_of_another_version_is_refused(codebook: np.ndarray) -> None:
    content, span = blob(codebook)
    with pytest.raises(CodingError, match="of version 2; this Trimtab reads 1"):
        decode(forged(encode(content, [span]), version=2))


def test_a_file_that_claims_to_be_huge_is_refused_before_memory_is_taken(codebook: np.ndarray) -> None:
    content, span = blob(codebook)
    coded = encode(content, [span])
    with pytest.raises(CodingError, match="says it holds 80011 bytes, more than 1000"):
        decode(coded, 1000)
    with pytest.raises(CodingError, match="another size"):
        decode(forged(coded, bytes=2**30))
    with pytest.raises(CodingError, match="header cannot be read"):
        decode(forged(coded, bytes=2**40))


@pytest.mark.parametrize(
    "change",
    [
        {"at": 10**6},
        {"count": 10**6},
        {"width": 3},
        {"planes": []},
        {"planes": [{"symbols": 0, "words": 0}] * 2},
    ],
)
def test_arrays_that_do_not_fit_are_refused(codebook: np.ndarray, change: dict[str, object]) -> None:
    content, span = blob(codebook)
    coded = encode(content, [span])
    array = json.loads(coded[HEAD : HEAD + struct.unpack_from("<I", coded, len(MAGIC))[0]])["arrays"][0]
    with pytest.raises(CodingError, match="do not fit into it"):
        decode(forged(coded, arrays=[array | change]))


@pytest.mark.parametrize("content", [b"", b"TRIM", b"TRIMTABC", b"\x80\x04pickle"])
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(CodingError, match="does not start with TRIMTABC"):
        decode(content)


def test_bytes_after_the_end_are_refused(codebook: np.ndarray) -> None:
    content, span = blob(codebook)
    with pytest.raises(CodingError, match="not what went in"):
        decode(encode(content, [span]) + b"more")
