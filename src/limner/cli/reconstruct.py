"""`limner reconstruct`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limner.cli.console import emit, progress


def reconstruct(
    run: Annotated[str, typer.Argument(metavar="RUN", help="An autoencoder's run, or one that draws in latents.")],
    images: Annotated[
        str | None, typer.Argument(metavar="IMAGES", help="Pictures, or an .npz. Default: those held out in training.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A .png shows pairs; a directory, .npz or .tar holds all reconstructions."),
    ] = None,
    num: Annotated[int | None, typer.Option(min=1, help="At most so many pictures. Default: all.")] = None,
    features: Annotated[
        str, typer.Option(metavar="NAME", help="Of rFD: efficientnet-lite0, inception, dinov2[:FOLDER], clip[:FOLDER].")
    ] = "efficientnet-lite0",
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 32,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Every figure as CSV.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace reconstructions that are there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print every figure as JSON.")] = False,
) -> None:
    """Encode pictures and decode them again: what the autoencoder loses, and how fast it is.

    \b
    Examples:
      limner reconstruct runs/autoencoder photos --out pairs.png
      limner reconstruct runs/emoji --num 500 --json
      limner reconstruct runs/autoencoder photos --out reconstructions
    """
    from limner import api

    with progress("reconstructing") as tell:
        report = api.reconstruct(
            run, images, num=num, features=features, batch=batch, out=out, overwrite=overwrite, progress=tell
        )
    if csv is not None:
        report.to_csv(csv)
    emit(report.to_dict(), report.lines(), json)
