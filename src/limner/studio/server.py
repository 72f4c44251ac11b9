"""The studio as a process: where it listens, who may come in."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from limner.errors import LimnerError
from limner.studio.limits import Limits

TOKEN_VARIABLE = "LIMNER_TOKEN"
SHORTEST_TOKEN = 12


def serve(runs: Sequence[str | Path], *, host: str = "127.0.0.1", port: int = 7860, token: str | None = None,
          limits: Limits | None = None, page: bool = True) -> None:  # fmt: skip
    """Load the runs and answer until the process is told to end.

    host: any address but loopback demands a token: the one given, that of the environment's LIMNER_TOKEN, or a new
    one, which is printed. page: False for the HTTP API alone. Raises LimnerError: a run that cannot be loaded, a
    token too short, a port that is taken.
    """
    import uvicorn

    app, token = prepare(runs, host=host, token=token, limits=limits, page=page)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}/" + (f"?token={token}" if token is not None else "")
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning", server_header=False,
                                           timeout_graceful_shutdown=5, ws="none"))  # fmt: skip
    bound = _bind(server.config, host, port)
    print(f"The studio is at {address} (Ctrl-C ends it)", flush=True)
    server.run(sockets=[bound])


@contextmanager
def running(app: Any, lifespan: Literal["on", "off"] = "on") -> Iterator[str]:
    """An ASGI application that answers on a free port of this machine, from a thread, inside the block; its address.

    lifespan: off leaves the application's engine open at the end.
    """
    import uvicorn

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan=lifespan, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://localhost:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


def prepare(runs: Sequence[str | Path], *, host: str = "127.0.0.1", token: str | None = None,
            limits: Limits | None = None, page: bool = True) -> tuple[Any, str | None]:  # fmt: skip
    """The ASGI application over the runs, and the token that it demands, None for none. Raises LimnerError."""
    try:
        from limner.studio.engine import Engine
        from limner.studio.guard import Guard, is_loopback
        from limner.studio.http import application
    except ImportError as error:
        raise LimnerError(f"the studio needs {error.name}: pip install 'limner[studio]'") from None
    from limner.studio.shelf import Shelf

    token = token or os.environ.get(TOKEN_VARIABLE) or (None if is_loopback(host) else secrets.token_urlsafe(24))
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise LimnerError(f"--token: should be {SHORTEST_TOKEN} or more plain characters, nobody's guess")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    engine = Engine(Shelf.open(runs), limits)
    app: Any = application(engine)
    if page:
        from limner.studio.page import mount

        app = mount(app, engine)
    return Guard(app, token=token, upload=engine.limits.upload, metrics=engine.metrics), token


def _bind(config: Any, host: str, port: int) -> Any:
    """The socket to listen on. Raises LimnerError where the address isn't ours or the port is taken."""
    try:
        return config.bind_socket()
    except (OSError, SystemExit):
        raise LimnerError(f"--port {port}: {host} cannot be listened on there; another --port, or 0 for any") from None
