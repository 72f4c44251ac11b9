"""The model card of an exported run: what it draws, how to draw with it, pictures, figures, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from limner import config as c

PICTURES = "samples.png"
FIGURES = ("images", "loss", "held_out_loss", "psnr", "accuracy")
"""Of the last line of `metrics.jsonl` that has them."""

DRAW = "pictures = pipe(num_inference_steps={steps}{clipped}).images"
DRAW_FROM_TEXT = 'pictures = pipe("a cat", num_inference_steps={steps}, guidance_scale={guidance:g}).images'
PAINT = """\
# image: a PIL picture of the model's size; mask: white where it is painted anew.
pictures = pipe("a cat", image, mask, num_inference_steps={steps}, guidance_scale={guidance:g}).images"""
LABELLED = """\
# No pipeline of diffusers passes labels on; this is the loop.
unet, scheduler = pipe.unet, pipe.scheduler
label, null = torch.tensor([0]), torch.tensor([{classes}])
x = torch.randn(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
scheduler.set_timesteps({steps})
for t in scheduler.timesteps:
    with torch.no_grad():
        guided = unet(x, t, label).sample
{guiding}    x = scheduler.step(guided, t, x{clipped}).prev_sample
"""
DRAWN = {"unconditional-image-generation": DRAW, "text-to-image": DRAW_FROM_TEXT, "image-to-image": PAINT}
GUIDING = """\
        plain = unet(x, t, null).sample
        guided = plain + {guidance:g} * (guided - plain)
"""


def card(out: Path, name: str, config: c.RunConfig, scheduler: str, notes: Sequence[str], *, run: Path | None,
         licence: str | None) -> None:  # fmt: skip
    """Write `README.md` into `out`, and beside it the run's newest preview where there is one."""
    pictures = _preview(run)
    if pictures is not None:
        shutil.copyfile(pictures, out / PICTURES)
    head = {
        "library_name": "diffusers",
        "license": licence or "unknown",
        "pipeline_tag": _task(config),
        "tags": ["diffusers", "limner", config.task],
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {name}\n",
        _what(config),
        f"![Samples]({PICTURES})\n" if pictures is not None else "",
        _how(config, scheduler),
        _list("Notes", notes),
        _figures(run),
        f"## Licence\n\n{licence or 'Not stated by whoever exported this model: ask before you use it.'}\n",
    ]
    (out / "README.md").write_text("\n".join(part for part in parts if part), encoding="utf-8")


def _kinds(config: c.RunConfig) -> list[str]:
    return [section.kind for section in config.conditions]


def _task(config: c.RunConfig) -> str:
    """The hub's name of what it does."""
    kinds = _kinds(config)
    if "text" not in kinds:
        return "unconditional-image-generation"
    return "image-to-image" if "mask" in kinds else "text-to-image"


def _what(config: c.RunConfig) -> str:
    height, width = config.data.size or (0, 0)
    kinds = " and ".join(_kinds(config))
    by = f", conditioned on {kinds}" if kinds else ""
    if config.task == "autoencoder":
        said = f"An autoencoder of pictures, trained at {width}x{height}, with Limner."
    else:
        where = "in the latents of an autoencoder" if config.space.kind == "latent" else "in pixels"
        said = f"A diffusion model {where} of pictures of {width}x{height}{by}, made with Limner."
    facts = {
        "Data": config.data.source,
        "Classes": ", ".join(config.classes[:20]) if config.classes else None,
        "Prediction": None if config.task == "autoencoder" else config.process.prediction,
        "Origin": ", ".join(f"{k} {v}" for k, v in config.provenance.items() if isinstance(v, str | int) and v) or None,
    }
    return "\n".join([said, "", *(f"- {name}: {value}" for name, value in facts.items() if value), ""])


def _how(config: c.RunConfig, scheduler: str) -> str:
    options: dict[str, Any] = {"steps": config.sampling.steps, "guidance": config.sampling.guidance}
    # Limner's DDIM takes the noise from the clipped picture, as guided-diffusion's; diffusers' does when asked.
    clipped = config.sampling.clip and config.space.kind == "pixels" and scheduler == "DDIMScheduler"
    options["clipped"] = ", use_clipped_model_output=True" if clipped else ""
    if config.task == "autoencoder":
        kind = "AutoencoderKL" if getattr(config.model, "regulariser", c.KLConfig()).kind == "kl" else "VQModel"
        lines = [f"from diffusers import {kind}", "", f'autoencoder = {kind}.from_pretrained("PATH")']
    else:
        lines = ["import torch", "from diffusers import DiffusionPipeline", "",
                 'pipe = DiffusionPipeline.from_pretrained("PATH")']  # fmt: skip
        null = next((section.null for section in config.conditions if isinstance(section, c.LabelCondition)), None)
        if null is None:
            lines.append(DRAWN[_task(config)].format(**options))
        else:
            guiding = GUIDING.format(**options) if null and config.sampling.guidance != 1 else ""
            lines.append(LABELLED.format(classes=len(config.classes or ()), guiding=guiding, **options).rstrip())
    return "\n".join(["## How to use", "", "```python", *lines, "```", ""])


def _list(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {line}" for line in lines), ""]) if lines else ""


def _preview(run: Path | None) -> Path | None:
    found = sorted((run / "previews").glob("*.png")) if run is not None else []
    return found[-1] if found else None


def _figures(run: Path | None) -> str:
    """The newest of each figure that the run's training left."""
    file = run / "metrics.jsonl" if run is not None else None
    if file is None or not file.is_file():
        return ""
    found: dict[str, Any] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a training that was killed
        if isinstance(row, Mapping):
            found |= {name: row[name] for name in FIGURES if isinstance(row.get(name), int | float)}
    rows = [f"| {name.replace('_', ' ')} | {value:,.4g} |" for name, value in found.items()]
    return "\n".join(["## Training", "", "| figure | last |", "| --- | --- |", *rows, ""]) if rows else ""
