"""Who may come in, and with how much: an ASGI layer before everything else."""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from limner.studio.metrics import Metrics

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "limner_token"
OPEN = ("/healthz",)
"""Paths that need no token."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "media-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""The page is whole by itself: the browser fetches nothing from anywhere else."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Lets in who has the token, and bodies up to `upload` bytes.

    token: None on loopback alone; then only requests to a loopback name are answered, so that no foreign site can
    reach the studio by a name of its own. Requests that another site's page sends are refused in either case.
    """

    def __init__(self, app: App, *, token: str | None, upload: int, metrics: Metrics) -> None:
        self.app, self.token, self.upload, self.metrics = app, token, upload, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            self.metrics.http.labels("refused", str(refusal[0])).inc()
            await _refuse(scope, send, *refusal)
        else:
            await self.app(scope, self._bounded(receive), self._marked(scope, send))

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self.token is None and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return 403, "this studio answers to localhost alone"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "requests from another site's page are refused"
        if self.token is not None and scope["path"] not in OPEN and not self._knows(scope, headers):
            return 401, "a token is needed: 'Authorization: Bearer TOKEN', or the address with ?token=TOKEN"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.upload:
            return 413, f"the body has more than {self.upload} bytes"
        return None

    def _knows(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        given = [headers.get("authorization", "").removeprefix("Bearer ").strip(), _from_query(scope),
                 _from_cookie(headers.get("cookie", ""))]  # fmt: skip
        mine = (self.token or "").encode()
        return sum(hmac.compare_digest(each.encode("utf-8", "replace"), mine) for each in given) > 0

    def _bounded(self, receive: Receive) -> Receive:
        """A body that says nothing of its length is cut off where it grows beyond the bound."""
        seen = 0

        async def bounded() -> dict[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return {"type": "http.disconnect"} if seen > self.upload else message

        return bounded

    def _marked(self, scope: Scope, send: Send) -> Send:
        """Adds the headers that every answer has, and counts it."""
        extra = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"),
                 (b"referrer-policy", b"no-referrer")]  # fmt: skip
        if self.token is not None and _from_query(scope):
            secure = "; Secure" if scope.get("scheme") == "https" else ""
            extra.append((b"set-cookie", f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict{secure}".encode()))

        async def marked(message: Mapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
                route = getattr(scope.get("route"), "path", None)
                self.metrics.http.labels(route or "page", str(message["status"])).inc()
            await send(message)

        return marked


def _from_query(scope: Scope) -> str:
    found = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])
    return found[0]


def _from_cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""


async def _refuse(scope: Scope, send: Send, status: int, message: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": message})
        return
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
