"""A report as one HTML file that needs nothing else: figures, what they depend on, and pictures to look at."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from limner.evaluation.plots import rendered
from limner.evaluation.report import Report, Sheet, described, sweep_table, written
from limner.outputs import png

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; font-weight: 600 }
th, td { padding: .25rem .75rem; text-align: left; border-bottom: 1px solid #8884; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.warning { border-left: 4px solid #c80; padding-left: .75rem }
.sheet { display: flex; flex-wrap: wrap; gap: .75rem; padding: 0 } figure { margin: 0; width: 8.5rem }
figure img { width: 4rem; height: auto; image-rendering: pixelated }
figcaption { font-size: 12px; overflow-wrap: anywhere }
.plot { max-width: 100%; background: white }
"""


def write(reports: Report | Mapping[float, Report], path: str | Path, *, swept: str = "guidance") -> Path:
    """Write one report, or those of a sweep by scale. Raises LimnerError when the file cannot be written."""
    written(html(reports, swept=swept), path)
    return Path(path)


def html(reports: Report | Mapping[float, Report], *, swept: str = "guidance") -> str:
    """The page as text."""
    if isinstance(reports, Report):
        body = [_heading(reports), *_one(reports)]
    else:
        ordered = dict(sorted(reports.items()))
        first = next(iter(ordered.values()))
        header, rows = sweep_table(ordered)
        plot = image(rendered(ordered, "png", swept=swept), f"the figures by {swept} scale", "plot")
        body = [_heading(first), table((f"{swept} scale", *header[1:]), rows, numbers=range(len(header))), plot]
        for scale, report in ordered.items():
            body += [f"<h2>{escape(swept)} {scale:g}</h2>", *_one(report)]
    return document("evaluation", body)


def document(title: str, body: Sequence[str]) -> str:
    """A whole page of parts that are HTML already; it needs no other file."""
    head = f'<meta charset="utf-8"><title>Limner: {escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _heading(report: Report) -> str:
    return f"<h1>{escape(str(report.about['samples']['source']))}</h1>"


def _one(report: Report) -> list[str]:
    warnings = [f'<p class="warning">{escape(text)}</p>' for text in report.warnings]
    about = "".join(f"<li>{escape(line)}</li>" for line in described(report.about))
    parts = [*warnings, table(Report.HEADER, report.table(), numbers=(1, 2, 3)), f"<ul>{about}</ul>"]
    return parts if report.sheet is None else [*parts, _sheet(report.sheet)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int]) -> str:
    """A table of texts; `numbers`: columns that are set to the right."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = []
    for row in rows:
        kinds = [' class="number"' if k in numbers else "" for k in range(len(row))]
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _sheet(sheet: Sheet) -> str:
    beside = "" if sheet.nearest is None else ", each with the nearest real picture (right) and its distance"
    cells = []
    for k, picture in enumerate(sheet.pictures):
        images = _picture(picture, f"sample {k}: {sheet.captions[k]}")
        words = sheet.captions[k]
        if sheet.nearest is not None and sheet.distances is not None:
            images += _picture(sheet.nearest[k], "nearest real picture")
            words = f"{words} ({sheet.distances[k]:.3g})".strip()
        cells.append(f"<figure>{images}<figcaption>{escape(words)}</figcaption></figure>")
    return f'<h3>Samples{beside}</h3><div class="sheet">{"".join(cells)}</div>'


def _picture(pixels: npt.NDArray[np.uint8], words: str) -> str:
    return image(png(pixels), words)


def image(data: bytes, words: str, kind: str | None = None) -> str:
    """A PNG inside the page. kind: `plot` for one that is as wide as the page allows."""
    style = f' class="{kind}"' if kind else ""
    return f'<img{style} alt="{escape(words)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
