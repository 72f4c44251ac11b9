"""Make of a finished run a model that comes with Limner: small, with a card, and with nothing of this machine in it.

python scripts/ship.py runs/digits digits --summary "A handwritten digit by its number" --license cc-by-4.0 \\
    --source examples/digits/train.parquet --data "https://doi.org/10.24432/C50P49" \\
    --report report.json --figures class_accuracy FD --notes notes.md

The weights are the run's average (or that of --checkpoint), those with two dimensions or more in bfloat16. --report:
what `limner evaluate digits --json` printed, of which the card takes the --figures. --notes: Markdown for the card.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from limner import config, zoo
from limner.config import RunConfig
from limner.errors import LimnerError

METRICS = "metrics.jsonl"


def ship(run: Path, name: str, *, summary: str, licence: str, source: str | None, data: str = "",
         report: Mapping[str, Any] | None = None, figures: Sequence[str] = (), notes: str = "",
         checkpoint: str | None = None, home: Path = zoo.HOME) -> Path:  # fmt: skip
    """Write `home/name` from a run: config.yaml, model.safetensors, metrics.jsonl, README.md. Returns the directory.

    source: where the public finds the data, for the recipe. data: the same in words, for the card. Raises LimnerError
    for a figure that the report lacks, a run that isn't finished, and a directory that holds something.
    """
    out = home / name
    if out.exists() and any(out.iterdir()):
        raise LimnerError(f"{out}: holds something already; take it away first")
    weights = run / zoo.WEIGHTS if checkpoint is None else run / "checkpoints" / checkpoint / "ema.safetensors"
    if not weights.is_file() or not (run / METRICS).is_file():
        raise LimnerError(f"{run}: holds no {weights.name} or no {METRICS}; name a finished run")
    recipe = public(config.load(run / "config.yaml"), source)
    chosen = [chosen_figure(report or {}, figure) for figure in figures]
    head = {"library_name": "limner", "license": licence, "summary": summary, "figures": chosen}
    out.mkdir(parents=True, exist_ok=True)
    save_file(halved(load_file(weights)), out / zoo.WEIGHTS, metadata={"format": "pt"})
    (out / zoo.WEIGHTS).chmod(0o644)  # safetensors writes for its owner alone
    config.dump(recipe, out / "config.yaml")
    shutil.copyfile(run / METRICS, out / METRICS)
    (out / zoo.CARD).write_text(card(name, head, recipe, data, notes), encoding="utf-8")
    return out


def halved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels in bfloat16; vectors (norms, biases, statistics) and whole numbers as they are."""
    return {name: w.to(torch.bfloat16) if w.dim() >= 2 and w.is_floating_point() else w for name, w in weights.items()}


def public(recipe: RunConfig, source: str | None) -> RunConfig:
    """The recipe with `source` for its data, and of every other path its last part alone."""
    raw = recipe.model_dump(mode="json")
    raw["data"]["source"] = None
    raw = _without_paths(raw)
    raw["data"]["source"] = source
    return config.parse(raw, "the recipe without paths")


def _without_paths(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_paths(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_paths(value) for value in node]
    is_path = isinstance(node, str) and "/" in node and " " not in node
    return Path(node).name if is_path else node


def chosen_figure(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A figure of an evaluation, with or without the feature network in its name. Raises LimnerError."""
    found = {key: value for key, value in report.get("figures", {}).items() if key.startswith(name)}
    if len(found) != 1:
        raise LimnerError(f"figure '{name}': the report has {len(found)} of that name: {', '.join(found) or 'none'}")
    ((key, figure),) = found.items()
    return {"name": key, **{part: figure.get(part) for part in ("value", "low", "high", "n")}}


def card(name: str, head: Mapping[str, Any], recipe: RunConfig, data: str, notes: str) -> str:
    """`README.md`: the head, how to use it, where it comes from, what was measured."""
    rows = [f"| {f['name']} | {f['value']:.4g} | {_interval(f)} | {f['n'] or ''} |" for f in head["figures"]]
    measured = ["| figure | value | 95% interval | n |", "| --- | --- | --- | --- |", *rows, ""] if rows else []
    use = ["```bash", f"limner sample {name} --out {name}.png", "```"]
    if recipe.task != "diffusion":
        use = ["```python", "import limner", "", f'model = limner.load("{name}")', "```"]
    preset = recipe.provenance.get("preset", "a recipe of its own")
    parts = [
        f"---\n{yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True)}---",
        f"# {name}\n",
        f"{head['summary']}.\n",
        *use,
        "",
        f"Recipe: `config.yaml`, from {preset}. Log of the training: `{METRICS}`.",
        f"Data: {data or recipe.data.source}. Licence of the weights: {head['license']}.\n",
        *measured,
        notes.strip(),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _interval(figure: Mapping[str, Any]) -> str:
    return "" if figure["low"] is None else f"{figure['low']:.4g} to {figure['high']:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--summary", required=True, help="what it draws, in words")
    parser.add_argument("--license", required=True, dest="licence", help="SPDX, in small letters")
    parser.add_argument("--source", help="where the data are for everybody, for the recipe")
    parser.add_argument("--data", default="", help="where the data are from, in words")
    parser.add_argument("--report", type=Path, help="what `limner evaluate --json` printed")
    parser.add_argument("--figures", nargs="*", default=[], help="of the report, for the card")
    parser.add_argument("--notes", type=Path, help="Markdown for the card")
    parser.add_argument("--checkpoint", help="such as images-000096000, instead of the newest")
    asked = vars(parser.parse_args())
    report, notes = asked.pop("report"), asked.pop("notes")
    made = ship(
        asked.pop("run"),
        asked.pop("name"),
        report=None if report is None else json.loads(report.read_text()),
        notes="" if notes is None else notes.read_text(),
        **asked,
    )
    print(f"{made}: {(made / zoo.WEIGHTS).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
