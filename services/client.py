"""A client of a running gateway, for the command line, the replay and the demo."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from services.errors import ServingError

__all__ = ["Client", "GatewayError", "base_url", "read_token"]


class GatewayError(ServingError):
    """The gateway refused, or is not there. The message is one line with the fix."""


def base_url(url: str | None) -> str:
    """The gateway's address: given, else TRIMTAB_URL, else the default port on this machine."""
    return (url or os.environ.get("TRIMTAB_URL") or "http://127.0.0.1:3000").rstrip("/")


def read_token(home: Path) -> str | None:
    """The operators' token from TRIMTAB_TOKEN or TRIMTAB_HOME, or None."""
    if token := os.environ.get("TRIMTAB_TOKEN"):
        return token
    try:
        return (home / "token").read_text().strip()
    except OSError:
        return None


class Client:
    """Calls the control routes. Every failure is a GatewayError of one line."""

    def __init__(self, url: str, token: str | None = None, timeout: float = 10.0) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._url = url
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request and return the reply's JSON. Raises GatewayError."""
        try:
            reply = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise GatewayError(
                    f"{self._url}: {error}: if an authority of your own signed it, set SSL_CERT_FILE to its certificate"
                ) from error
            raise GatewayError(
                f"no gateway at {self._url} ({error}): start one with 'trimtab serve WORKLOAD', "
                "or say where it is with --url or TRIMTAB_URL"
            ) from error
        if reply.is_error:
            try:
                message = reply.json()["error"]
            except (ValueError, KeyError, TypeError):
                message = reply.text[:200]
            raise GatewayError(f"{message} (HTTP {reply.status_code})")
        try:
            return reply.json()
        except ValueError:
            raise GatewayError(f"{self._url} answers, but not as a gateway does: pass --url") from None

    def ready(self) -> bool:
        """Whether the gateway answers its readiness check."""
        try:
            return self._http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def metrics(self) -> str:
        return self._http.get("/metrics").text

    def start(
        self,
        variant: str,
        *,
        override: str | None = None,
        policy: Mapping[str, Any] | None = None,
        actor: str = "operator",
    ) -> dict[str, Any]:
        body = {"variant": variant, "override": override, "policy": dict(policy or {}), "actor": actor}
        result: dict[str, Any] = self.call("POST", "/rollouts", body)
        return result

    def rollouts(self) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.call("GET", "/rollouts")["rollouts"]
        return result

    def status(self, rollout_id: str = "current") -> dict[str, Any]:
        result: dict[str, Any] = self.call("GET", f"/rollouts/{rollout_id}")
        return result

    def decisions(self, rollout_id: str = "current") -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.call("GET", f"/rollouts/{rollout_id}/decisions")["decisions"]
        return result

    def verify(self, expect: str | None = None) -> dict[str, Any]:
        asked = "" if expect is None else f"?{httpx.QueryParams(expect=expect)}"
        result: dict[str, Any] = self.call("GET", f"/rollouts/verify{asked}")
        return result

    def verb(self, rollout_id: str, verb: str, **body: Any) -> dict[str, Any]:
        result: dict[str, Any] = self.call("POST", f"/rollouts/{rollout_id}/{verb}", body)
        return result

    def feedback(self, items: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        result: dict[str, int] = self.call("POST", "/feedback", {"feedback": list(items)})
        return result

    def label_queue(
        self, rollout_id: str = "current", *, limit: int = 100, agreements: float = 0.0
    ) -> dict[str, Any]:
        asked = httpx.QueryParams(limit=limit, agreements=agreements)
        result: dict[str, Any] = self.call("GET", f"/rollouts/{rollout_id}/label-queue?{asked}")
        return result
