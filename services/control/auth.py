"""The operators' token, and request ids that prove themselves.

A label decides whether a rollout lives, so feedback must come from somebody who saw the reply. Every reply's
request id ends in a keyed checksum; feedback for an id without a valid one is refused. No id is stored for
that: the check holds in every worker and replica that shares the key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from services.errors import BadRequest, NotFound, Unauthorized

__all__ = ["RequestIds", "check_token", "load_secret"]

_CLIENT_ID = re.compile(r"[A-Za-z0-9_.:/@+=-]{1,128}")
_TAG_CHARS = 12


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


def check_token(header: str | None, token: str) -> None:
    """Raise Unauthorized unless the Authorization header carries the operators' token."""
    scheme, _, given = (header or "").partition(" ")
    # An empty token (a file that was emptied) is nobody's, not everybody's.
    if (
        not token
        or scheme.lower() != "bearer"
        or not hmac.compare_digest(given.strip().encode(), token.encode())
    ):
        raise Unauthorized(
            "this verb changes a rollout: send 'Authorization: Bearer TOKEN' "
            "(TRIMTAB_TOKEN, or the file 'token' in TRIMTAB_HOME)"
        )


class RequestIds:
    """Give out and check request ids of the form `<id>~<checksum>`."""

    def __init__(self, key: str) -> None:
        self._key = hashlib.blake2b(key.encode(), digest_size=32).digest()

    def _tag(self, plain: str) -> str:
        return hashlib.blake2b(plain.encode(), digest_size=_TAG_CHARS // 2, key=self._key).hexdigest()

    def issue(self, supplied: str | None) -> tuple[str, str]:
        """Return (plain id, signed id) for a request. The client's own id is kept, so a retry pairs once.

        Raises:
            BadRequest: the client's id is empty, too long, or has characters that do not belong in a header.
        """
        if supplied is None:
            plain = secrets.token_hex(12)
            return plain, f"{plain}~{self._tag(plain)}"
        plain, mark, tag = supplied.rpartition("~")
        if mark and hmac.compare_digest(tag.encode(), self._tag(plain).encode()):
            return plain, supplied
        if not _CLIENT_ID.fullmatch(supplied):
            raise BadRequest("X-Request-Id must be 1 to 128 letters, digits or any of _.:/@+=-")
        return supplied, f"{supplied}~{self._tag(supplied)}"

    def check(self, signed: str) -> None:
        """Raise NotFound unless this installation gave the id out."""
        plain, mark, tag = signed.rpartition("~")
        if not mark or not hmac.compare_digest(tag.encode(), self._tag(plain).encode()):
            raise NotFound(
                f"unknown request id {signed[:140]!r}: use the request_id (or X-Request-Id) of the reply, whole"
            )
