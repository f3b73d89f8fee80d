"""Compressed request bodies, which never become larger than a body may be."""

from __future__ import annotations

import zlib

from services.errors import BadRequest, ServingError

__all__ = ["BodyTooLarge", "UnsupportedEncoding", "decompressed"]

# What `wbits` of zlib says of the format around the data: gzip, or (for `deflate`, as HTTP defines it) zlib.
_FORMATS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}


class BodyTooLarge(ServingError):
    """The body is over the limit once it is decompressed."""

    status = 413


class UnsupportedEncoding(ServingError):
    """The body is compressed in a way that nobody here can undo."""

    status = 415


def decompressed(body: bytes, encoding: bytes, limit: int) -> bytes:
    """The body that a client compressed as its Content-Encoding says.

    Args:
        limit: bytes that it may have; no more than that is ever decompressed.

    Raises:
        UnsupportedEncoding: neither gzip nor deflate nor identity.
        BadRequest: it is not compressed so, was cut off, or goes on after its end.
        BodyTooLarge: there is more than `limit`.
    """
    name = encoding.strip().lower()
    if name in (b"", b"identity"):
        return body
    if name not in _FORMATS:
        said = name.decode("latin-1")[:40]
        raise UnsupportedEncoding(
            f"Content-Encoding {said!r} is not supported: send gzip, deflate or identity"
        )
    stream = zlib.decompressobj(_FORMATS[name])
    try:
        content = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise BadRequest(f"the body is not valid {name.decode()}: {error}") from None
    if len(content) > limit:
        raise BodyTooLarge(f"the body is over {limit} bytes once decompressed")
    # Several gzip members in a row are refused too: each would cost a pass over what is left.
    if not stream.eof or stream.unused_data:
        raise BadRequest(f"the body is not one whole {name.decode()} stream")
    return content
