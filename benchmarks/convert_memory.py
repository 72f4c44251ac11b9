"""How much memory `limner convert` takes for a file of Stable Diffusion 1.5's size, made here with random weights.

    python benchmarks/convert_memory.py --folder /tmp/convert

Prints a Markdown table of the peak of resident memory, over the file's size. Takes three times the file's size on the
disk, 13 GB, and leaves nothing there. The file is CompVis' (a `.ckpt` or safetensors, with its YAML).
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import limner
from limner import build
from limner import config as c
from limner.interop import compvis_config, compvis_keys, hf_keys, hf_text, unet_keys
from limner.interop.hf_files import Component
from limner.interop.keymap import convert, reverse, under
from limner.interop.writing import write_weights


def part(target: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.{target}", "params": params}


UNET = part(
    "UNetModel", image_size=32, in_channels=4, out_channels=4, model_channels=320, attention_resolutions=[4, 2, 1],
    num_res_blocks=2, channel_mult=[1, 2, 4, 4], num_heads=8, use_spatial_transformer=True, transformer_depth=1,
    context_dim=768, legacy=False,
)  # fmt: skip
STAGE = part("AutoencoderKL", embed_dim=4, ddconfig={
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
})  # fmt: skip
MODEL = part(
    "LatentDiffusion", linear_start=0.00085, linear_end=0.012, image_size=64, scale_factor=0.18215, use_ema=False,
    conditioning_key="crossattn", unet_config=UNET, first_stage_config=STAGE,
    cond_stage_config=part("FrozenCLIPEmbedder"),
)  # fmt: skip
"""`v1-inference.yaml` of CompVis/stable-diffusion."""
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
CASES = (("safetensors", "float32", "limner"), ("ckpt", "float32", "limner"), ("ckpt", "float16", "limner"),
         ("ckpt", "float32", "diffusers"), ("ckpt", "float16", "diffusers"))  # fmt: skip


def layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in the published file, its schedule left out."""
    text = hf_text.encoder(Component("CLIPTextModel", CLIP_L, Path("text_encoder"))).section
    settings = compvis_config.Settings(MODEL["params"], "LatentDiffusion", "v1-inference.yaml", "model")
    made = compvis_config.recipe(settings, [text], None, "v1-inference.yaml")
    assert isinstance(made.space, c.LatentSpace)
    rules = under("model.diffusion_model.", "network.", [*unet_keys.ENDS, *unet_keys.blocks(unet_keys.TRANSFORMER)])
    rules += under("first_stage_model.", "autoencoder.", compvis_keys.autoencoder(made.space.autoencoder))
    rules += under("cond_stage_model.transformer.text_model.", f"{hf_text.TEXT}encoder.", hf_keys.CLIP)
    back = {one.sources: one for one in reversed(reverse(rules))}  # of two names for a convolution the first: `op`
    with torch.device("meta"):
        state = build.model(made).state_dict()
    kept = {name: x for name, x in state.items() if "latent_" not in name and "tokenizer" not in name}
    found = convert(kept, list(back.values()), None, where="layout").shapes
    return {name.replace(".op.", ".conv.") if "output" in name else name: shape for name, shape in found.items()}


class Random(Mapping[str, Tensor]):
    """Random weights of these shapes, each made when it is asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.shapes, self.dtype = shapes, dtype

    def __getitem__(self, name: str) -> Tensor:
        return (0.02 * torch.randn(self.shapes[name])).to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def make(file: Path, dtype: str) -> None:
    """Write the checkpoint and its YAML."""
    weights = Random(layout(), getattr(torch, dtype))
    if file.suffix == ".ckpt":
        torch.save({"state_dict": dict(weights), "global_step": 1}, file)
    else:
        write_weights(file, weights)
    file.with_suffix(".yaml").write_text(yaml.safe_dump({"model": MODEL}))


def measure(file: Path, out: Path, to: Any, results: Any) -> None:
    """Convert in a process of its own: bytes at the peak, seconds, and how often progress was told."""
    told: list[int] = []
    began = time.monotonic()
    limner.convert(file, out, to=to, config=file.with_suffix(".yaml"), progress=lambda done, _: told.append(done))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put((peak, time.monotonic() - began, len(told)))


def alone(target: Any, *arguments: Any) -> None:
    """Run in a fresh process, so that its memory is its own."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{target.__name__} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description="The peak of memory that `limner convert` takes.")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder, deleted in the end")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True)
    print("| from | to | file | peak | peak / file | seconds | progress told |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    try:
        for kind, dtype, to in CASES:
            if to == "diffusers" and importlib.util.find_spec("open_clip") is None:
                print("to diffusers: needs CLIP's vocabulary; pip install open_clip_torch")
                continue
            file, out = folder / f"model.{kind}", folder / "out"
            alone(make, file, dtype)
            results = multiprocessing.get_context("spawn").SimpleQueue()
            alone(measure, file, out, to, results)
            size, (peak, seconds, told) = file.stat().st_size, results.get()
            row = (f"{kind}, {dtype}", to, f"{size / 1e9:.2f} GB", f"{peak / 1e9:.2f} GB", f"{peak / size:.2f}",
                   f"{seconds:.0f}", f"{told} times")  # fmt: skip
            print(f"| {' | '.join(row)} |", flush=True)
            file.unlink()
            shutil.rmtree(out)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
