"""The operators' token, and request ids that prove themselves.

A label decides whether a rollout lives, so feedback must come from somebody who saw the reply. Every reply's
request id ends in a keyed checksum; feedback for an id without a valid one is refused. No id is stored for
that: the check holds in every worker and replica that shares the key.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import os
import re
import secrets
from pathlib import Path

from services.errors import BadRequest, NotFound, Unauthorized

__all__ = ["RequestIds", "bears", "check_token", "load_secret"]

_CLIENT_ID = re.compile(r"[A-Za-z0-9_.:/@+=-]{1,128}")
_TAG_CHARS = 12
_NONCE_BYTES = 10


def load_secret(path: Path, variable: str) -> str:
    """Return the secret in the environment variable, else in the file, which is made (mode 0600) if absent.

    Safe to call from many processes at once: the file appears whole or not at all, and the first one wins.
    """
    if value := os.environ.get(variable):
        return value
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_urlsafe(32) + "\n")
        try:
            os.link(draft, path)  # unlike a rename, a link never replaces another process's secret
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text().strip()


def bears(header: str | None, secret: str) -> bool:
    """Whether an Authorization header carries this secret as its bearer token.

    An empty secret (a file that was emptied) is nobody's, not everybody's.
    """
    scheme, _, given = (header or "").partition(" ")
    return (
        bool(secret)
        and scheme.lower() == "bearer"
        and hmac.compare_digest(given.strip().encode(), secret.encode())
    )


def check_token(header: str | None, token: str) -> None:
    """Raise Unauthorized unless the Authorization header carries the operators' token."""
    if not bears(header, token):
        raise Unauthorized(
            "this verb changes a rollout: send 'Authorization: Bearer TOKEN' "
            "(TRIMTAB_TOKEN, or the file 'token' in TRIMTAB_HOME)"
        )


class RequestIds:
    """Give out and check request ids: `<client's id>.<nonce>~<checksum>`, or `<nonce>~<checksum>` without one.

    The nonce makes every reply's id new, so that nobody else can come by it, and a client that sends the same id
    with everything (some proxies do) does not fold all its requests into one.
    """

    def __init__(self, key: str) -> None:
        self._key = hashlib.blake2b(key.encode(), digest_size=32).digest()
        # Of this size for all uses: BLAKE2 of another size is another function, not the beginning of this one.
        self._keyed = hashlib.blake2b(digest_size=_TAG_CHARS // 2, key=self._key)
        # New for each of these objects, and then counted up: an id must be new, and it is the checksum that cannot
        # be guessed.
        self._nonces = map(f"{secrets.token_hex(_NONCE_BYTES - 4)}%08x".__mod__, itertools.count())

    def _tag(self, plain: str) -> str:
        digest = self._keyed.copy()
        digest.update(plain.encode())
        return digest.hexdigest()

    def _verifies(self, signed: str) -> bool:
        plain, mark, tag = signed.rpartition("~")
        return bool(mark) and hmac.compare_digest(tag.encode(), self._tag(plain).encode())

    def issue(self, supplied: str | None) -> tuple[str, str]:
        """Return (assignment key, signed id) for a request.

        The key is what the client supplied, so that a repeated request meets the same arm. A signed id that is
        sent back is kept as it is: a request repeated under it counts once.

        Raises:
            BadRequest: the client's id is empty, too long, or has characters that do not belong in a header.
        """
        if supplied is not None and self._verifies(supplied):
            plain = supplied.rpartition("~")[0]
            return plain.rpartition(".")[0] or plain, supplied
        if supplied is not None and not _CLIENT_ID.fullmatch(supplied):
            raise BadRequest("X-Request-Id must be 1 to 128 letters, digits or any of _.:/@+=-")
        nonce = next(self._nonces)
        plain = nonce if supplied is None else f"{supplied}.{nonce}"
        return supplied or nonce, f"{plain}~{self._tag(plain)}"

    def check(self, signed: str) -> None:
        """Raise NotFound unless this installation gave the id out."""
        if not self._verifies(signed):
            raise NotFound(
                f"unknown request id {signed[:140]!r}: use the request_id (or X-Request-Id) of the reply, whole"
            )

    def draw(self, signed: str, records: int) -> int:
        """The record of a request that is judged: drawn by the key, so that no client can choose it."""
        if records == 1:
            return 0
        digest = hashlib.blake2b(b"draw:" + signed.encode(), digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "big") % records
