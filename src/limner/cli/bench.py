"""`limner bench`."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from limner.cli.console import emit

TITLES = {
    "training": "training, images/s",
    "sampling": "network calls/s",
    "guided": "guided pictures/s",
    "autoencoder": "autoencoder, images/s",
    "loading": "reading, images/s",
}


def bench(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in each of which everything is measured once.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="About how long each takes in a round.")] = 2.0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures as Markdown as well.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every figure of every round as JSON.")] = False,
) -> None:
    """Measure this machine, and Limner on it, beside diffusers where that is installed.

    \b
    Run it while nothing else runs. Everything takes turns within each round; a ratio is the median over the rounds.
    Examples:
      limner bench
      limner bench --rounds 9 --json > bench.json
    """
    from limner.bench.measure import measure

    terminal = sys.stderr.isatty()
    figures = measure(rounds=rounds, seconds=seconds, tell=_tell if terminal else None)
    if terminal:
        _tell("")
    lines = _lines(figures)
    if out is not None:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    emit(figures, lines, json)


def _tell(words: str) -> None:
    print(f"\r\033[K{words}", end="", file=sys.stderr, flush=True)


def _lines(figures: dict[str, Any]) -> list[str]:
    """A Markdown table, and what it comes to."""
    where = figures["machine"]
    lines = [
        f"{where['name']}, {where['threads']} threads, torch {where['torch']}: {figures['matmul_fp32_gflops']:.0f} "
        f"GFLOP/s in fp32, {figures['matmul_bf16_gflops']:.0f} in bf16, {figures['copy_gb_per_s']:.1f} GB/s copied",
        "",
        "| what | who | median | least | most |",
        "| --- | --- | --- | --- | --- |",
    ]
    for stage, title in TITLES.items():
        for who, values in figures["raw"].get(stage, {}).items():
            row = (statistics.median(values), min(values), max(values))
            lines.append(f"| {title} | {who} | " + " | ".join(f"{value:.4g}" for value in row) + " |")
    lines.append("")
    if figures["train_ratio"] is None:
        return [*lines, "diffusers isn't installed, so there is nothing to compare with"]
    for name, words in (("train", "training"), ("sample", "a network call"), ("guided", "a guided picture")):
        lines.append(f"{words}: {figures[f'{name}_ratio']:.2f} times {figures[f'{name}_rival']}")
        if (near := figures.get(f"{name}_int8_ratio")) is not None:
            lines.append(f"the same in 8 bits: {near:.2f} times, off by {figures['int8_error']:.1%} a call")
    lines.append(f"training reaches {figures['peak_fraction']:.0%} of the machine's best product of matrices")
    for who, size in figures.get("memory_bytes", {}).items():
        lines.append(f"memory that training adds, {who}: {size / 2**20:.0f} MiB")
    return lines
