"""A lossless container for files that hold arrays of few different values, such as the weights of a compressed model.

Order-zero rANS (Duda, arXiv 1311.2540), or Huffman codes, of three ways to see an array, whichever is smallest:

- a palette: the different values, and their indices coded (codebooks, INT8);
- a mask of the non-zero elements, and the bytes of those apart by their place in the number (pruned weights). An ideal
  coder of the mask needs no more than the index distances of Han et al., "Deep Compression" (1510.00149), section 3;
- the same without a mask: in floating-point weights, the byte of the exponent takes few values.

The format, version 1, numbers little-endian:

    8 bytes   TRIMTABC
    4 bytes   length of the header
    header    JSON, see `_Header`
    streams   one after the other: the rest of the file, deflated; then those of each array in the header's order
    stream    `symbols` values of `width` bytes, `symbols` frequencies less one of 2 bytes, `words` coded words of 4
              bytes; where `symbols` is 0, the elements as they are; where it is 1, nothing but the one value

The header names the coder of all streams where it is not rANS. Huffman's tree is that which constriction makes of the
frequencies, its codes fill the words from the lowest bit.

Decoding reads bytes and checks them; it runs nothing, and what it takes of memory is a few times its limit at most.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compression.errors import CodingError

Coder = Literal["ans", "huffman"]

MAGIC = b"TRIMTABC"
VERSION = 1
MAX_BYTES = 2**31
"""No ONNX file is larger: protobuf ends there."""
_PALETTE = 4096
_SCALE = 65536
"""Frequencies are kept in parts of this."""
_MAX_HEADER = 1 << 20


class Span(NamedTuple):
    """An array within a file: where it starts, how many elements it has, and how many bytes each (1, 2, 4 or 8)."""

    at: int
    elements: int
    width: int

    @property
    def end(self) -> int:
        """Where the array ends in the file."""
        return self.at + self.elements * self.width


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Stream(_Frozen):
    symbols: int = Field(ge=0, le=_PALETTE)
    words: int = Field(ge=0, le=MAX_BYTES)


class _Array(_Frozen):
    at: int = Field(ge=0, le=MAX_BYTES)
    count: int = Field(ge=1, le=MAX_BYTES)
    width: int = Field(ge=1, le=8)
    mask: _Stream | None = None
    planes: tuple[_Stream, ...]
    """One stream of whole elements, or one for each byte of them."""

    @property
    def span(self) -> Span:
        return Span(self.at, self.count, self.width)


class _Header(_Frozen):
    version: int
    coder: Coder = "ans"
    bytes: int = Field(ge=0, le=MAX_BYTES)
    sha256: str
    rest: int = Field(ge=0, le=MAX_BYTES)
    arrays: tuple[_Array, ...]


def encode(content: bytes, spans: Sequence[Span], coder: Coder = "ans") -> bytes:
    """Code a file; `decode` gives the same bytes back.

    Args:
        content: the file.
        spans: arrays in it that may hold few different values; those that would not become smaller are left.
        coder: `huffman` takes a whole number of bits for each element, and about a microsecond.

    Raises:
        ValueError: spans overlap, lie outside the file, or have elements of another width.
    """
    arrays: list[_Array] = []
    payload: list[bytes] = []
    rest: list[bytes] = []
    position = end = 0
    for span in sorted(spans):
        if span.width not in (1, 2, 4, 8) or span.elements < 1 or span.at < end or span.end > len(content):
            raise ValueError(f"{span} overlaps another, or lies outside {len(content)} bytes")
        end = span.end
        values = np.frombuffer(content, f"<u{span.width}", span.elements, span.at)
        array, data = _encode_array(span, values, coder)
        # An entry in the header has its price too.
        if len(data) + 200 >= end - span.at:
            continue
        rest.append(content[position : span.at])
        position = end
        arrays.append(array)
        payload.append(data)
    rest.append(content[position:])
    deflated = zlib.compress(b"".join(rest), 9)
    header = _Header(
        version=VERSION,
        coder=coder,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        rest=len(deflated),
        arrays=tuple(arrays),
    )
    text = header.model_dump_json(exclude_defaults=True).encode()
    return b"".join((MAGIC, struct.pack("<I", len(text)), text, deflated, *payload))


def decode(coded: bytes, limit: int = MAX_BYTES) -> bytes:
    """The file that was coded.

    Args:
        limit: refuse a file that says it is larger than this many bytes.

    Raises:
        CodingError: it is damaged, too large, or of another version.
    """
    header, start = _header(coded)
    if header.bytes > limit:
        raise CodingError(f"the coded file says it holds {header.bytes} bytes, more than {limit}")
    reader = _Reader(coded, start)
    position = arrays_bytes = 0
    for array in header.arrays:
        fits = array.width in (1, 2, 4, 8) and position <= array.at and array.span.end <= header.bytes
        if not fits or len(array.planes) not in (1, array.width):
            raise CodingError("the coded file is damaged: its arrays do not fit into it")
        position = array.span.end
        arrays_bytes += array.count * array.width
    rest = _inflate(reader.take(header.rest), header.bytes - arrays_bytes)
    content = bytearray(header.bytes)
    position = taken = 0
    for array in header.arrays:
        gap = array.at - position
        content[position : array.at] = rest[taken : taken + gap]
        taken += gap
        position = array.span.end
        content[array.at : position] = _decode_array(array, reader, header.coder).tobytes()
    content[position:] = rest[taken:]
    if reader.position != len(coded) or hashlib.sha256(content).hexdigest() != header.sha256:
        raise CodingError("the coded file is damaged: what comes out is not what went in")
    return bytes(content)


def _header(coded: bytes) -> tuple[_Header, int]:
    start = len(MAGIC) + 4
    if coded[: len(MAGIC)] != MAGIC or len(coded) < start:
        raise CodingError(f"no coded file: it does not start with {MAGIC.decode()}")
    (length,) = struct.unpack_from("<I", coded, len(MAGIC))
    if length > min(len(coded) - start, _MAX_HEADER):
        raise CodingError("the coded file is damaged: it ends within its header")
    try:
        header = _Header.model_validate_json(coded[start : start + length])
    except ValidationError:
        raise CodingError("the coded file is damaged: its header cannot be read") from None
    if header.version != VERSION:
        raise CodingError(f"the coded file is of version {header.version}; this Trimtab reads {VERSION}")
    return header, start + length


def _inflate(deflated: bytes, size: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        # One byte more than there should be shows that there is more, and is as much as it may take.
        rest = inflater.decompress(deflated, size + 1)
    except zlib.error:
        raise CodingError("the coded file is damaged: its deflated part cannot be read") from None
    if len(rest) != size or not inflater.eof or inflater.unused_data:
        raise CodingError("the coded file is damaged: its deflated part has another size")
    return rest


class _Reader:
    """Hands out a file's bytes in order, and none beyond its end."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data = data
        self.position = position

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise CodingError("the coded file is damaged: it ends too early")
        part = self.data[self.position : end]
        self.position = end
        return part


def _encode_array(span: Span, values: np.ndarray, coder: Coder) -> tuple[_Array, bytes]:
    whole, whole_data = _encode_stream(values, coder)
    best = _Array(at=span.at, count=span.elements, width=span.width, planes=(whole,))
    data = whole_data
    nonzero = values != 0
    for masked in (False, True):
        if span.width == 1 or (masked and nonzero.all()):
            continue
        mask, mask_data = _encode_stream(nonzero.astype("u1"), coder) if masked else (None, b"")
        left = values[nonzero] if masked else values
        planes = [_encode_stream(plane, coder) for plane in left.view("u1").reshape(-1, span.width).T]
        joined = mask_data + b"".join(part for _, part in planes)
        if len(joined) < len(data):
            data = joined
            best = best.model_copy(update={"mask": mask, "planes": tuple(stream for stream, _ in planes)})
    return best, data


def _decode_array(array: _Array, reader: _Reader, coder: Coder) -> np.ndarray:
    values = np.zeros(array.count, f"<u{array.width}")
    where: slice | np.ndarray = slice(None)
    count = array.count
    if array.mask is not None:
        where = _decode_stream(array.mask, array.count, 1, reader, coder).astype(bool)
        count = int(where.sum())
    if len(array.planes) == 1:
        values[where] = _decode_stream(array.planes[0], count, array.width, reader, coder)
    else:
        left = np.empty((count, array.width), "u1")
        for place, stream in enumerate(array.planes):
            left[:, place] = _decode_stream(stream, count, 1, reader, coder)
        values[where] = left.view(values.dtype)[:, 0]
    return values


def _encode_stream(values: np.ndarray, coder: Coder) -> tuple[_Stream, bytes]:
    palette, indices, counts = np.unique(values, return_inverse=True, return_counts=True)
    raw = values.tobytes()
    if not 1 <= len(palette) <= _PALETTE:
        return _Stream(symbols=0, words=0), raw
    if len(palette) == 1:
        return _Stream(symbols=1, words=0), palette.tobytes()
    frequencies = np.clip(np.rint(counts / len(values) * _SCALE), 1, _SCALE) - 1
    stored = frequencies.astype("<u2")
    words = (_ans_encode if coder == "ans" else _huffman_encode)(indices, stored)
    data = palette.tobytes() + stored.tobytes() + words.tobytes()
    if len(data) >= len(raw):
        return _Stream(symbols=0, words=0), raw
    return _Stream(symbols=len(palette), words=len(words)), data


def _decode_stream(stream: _Stream, count: int, width: int, reader: _Reader, coder: Coder) -> np.ndarray:
    kind = np.dtype(f"<u{width}")
    if stream.symbols == 0:
        return np.frombuffer(reader.take(count * width), kind)
    palette = np.frombuffer(reader.take(stream.symbols * width), kind)
    if stream.symbols == 1:
        return np.broadcast_to(palette, count)
    stored = np.frombuffer(reader.take(stream.symbols * 2), "<u2")
    words = np.frombuffer(reader.take(stream.words * 4), "<u4")
    return palette[(_ans_decode if coder == "ans" else _huffman_decode)(words, stored, count)]


def _ans_encode(indices: np.ndarray, stored: np.ndarray) -> np.ndarray:
    import constriction

    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(indices.astype(np.int32), _model(stored))
    return np.asarray(coder.get_compressed(), "<u4")


def _ans_decode(words: np.ndarray, stored: np.ndarray, count: int) -> np.ndarray:
    import constriction

    try:
        coder = constriction.stream.stack.AnsCoder(words.astype(np.uint32))
    except ValueError:
        raise CodingError("the coded file is damaged: a stream ends in a zero") from None
    return np.asarray(coder.decode(_model(stored), count))


def _huffman_encode(indices: np.ndarray, stored: np.ndarray) -> np.ndarray:
    from constriction import symbol

    book, encoder = symbol.huffman.EncoderHuffmanTree(_counts(stored)), symbol.QueueEncoder()
    for index in indices.tolist():
        encoder.encode_symbol(index, book)
    words, _ = encoder.get_compressed()
    return np.asarray(words, "<u4")


def _huffman_decode(words: np.ndarray, stored: np.ndarray, count: int) -> np.ndarray:
    from constriction import symbol

    # Every code has a bit at least, so that a few words cannot ask for hours of work.
    if count > 32 * len(words):
        raise CodingError("the coded file is damaged: a stream ends too early")
    book = symbol.huffman.DecoderHuffmanTree(_counts(stored))
    decoder = symbol.QueueDecoder(words.astype(np.uint32))
    try:
        return np.fromiter((decoder.decode_symbol(book) for _ in range(count)), np.int32, count)
    except ValueError:
        raise CodingError("the coded file is damaged: a stream ends too early") from None


def _counts(stored: np.ndarray) -> np.ndarray:
    # Whole numbers add up without rounding, so that the tree is the same everywhere.
    return stored.astype(np.float64) + 1


def _model(stored: np.ndarray) -> object:
    import constriction

    frequencies = _counts(stored)
    # Both settings are part of the format: others make another table of the same frequencies.
    return constriction.stream.model.Categorical(frequencies / frequencies.sum(), lazy=False, perfect=False)
