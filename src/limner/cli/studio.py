"""`limner studio`."""

from __future__ import annotations

from typing import Annotated

import typer


def studio(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Runs to draw with and to watch; a classifier guides the rest."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own demands a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    token: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="Demanded of clients. Better told by LIMNER_TOKEN.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are told when to come back.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once, of several requests together.")] = 16,
    num: Annotated[int, typer.Option(min=1, help="Pictures a request.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Steps a request.")] = 250,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Of a request, waiting included.")] = 300.0,
    api_only: Annotated[bool, typer.Option("--api-only", help="The HTTP API without the page.")] = False,
) -> None:
    """Open a web page to draw with models and to watch them learn, and an HTTP API in OpenAI's form.

    \b
    Examples:
      limner studio runs/emoji
      limner studio runs/emoji runs/noisy-classifier --port 8000
      LIMNER_TOKEN=... limner studio runs/emoji --host 0.0.0.0
    """
    from limner.studio.limits import Limits
    from limner.studio.server import serve

    limits = Limits(queue=queue, batch=batch, num=num, steps=steps, timeout_s=timeout)
    serve(runs, host=host, port=port, token=token, limits=limits, page=not api_only)
