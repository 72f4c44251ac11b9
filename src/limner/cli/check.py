"""`limner check`."""

from __future__ import annotations

from typing import Annotated

import typer

from limner.cli.console import WRONG_INPUT, emit, progress


def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A folder, Parquet file, WebDataset tar or hub name.")],
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Only this split. Default: all.")] = None,
    image_column: Annotated[str | None, typer.Option(metavar="NAME", help="Default: found by its type.")] = None,
    label_column: Annotated[str | None, typer.Option(metavar="NAME", help="Default: found by its type.")] = None,
    text_column: Annotated[str | None, typer.Option(metavar="NAME", help="Default: found by its type.")] = None,
    map_column: Annotated[str | None, typer.Option(metavar="NAME", help="Semantic maps. Default: found.")] = None,
    mask_column: Annotated[str | None, typer.Option(metavar="NAME", help="Masks. Default: found.")] = None,
    boxes_column: Annotated[str | None, typer.Option(metavar="NAME", help="Boxes. Default: found.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many lines of each sort of problem.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Tell what is in a data set, and what is wrong with it, before any training.

    Every picture is decoded. Exit code 2 where training could not start.

    \b
    Examples:
      limner check photos/
      limner check examples/emoji --json
    """
    from limner.data.check import check as examine

    with progress("reading pictures") as tell:
        report = examine(
            data,
            split=split,
            image_column=image_column,
            label_column=label_column,
            text_column=text_column,
            map_column=map_column,
            mask_column=mask_column,
            boxes_column=boxes_column,
            progress=tell,
        )
    emit(report.to_json(), report.lines(limit), json)
    if not report.ok:
        raise typer.Exit(WRONG_INPUT)
