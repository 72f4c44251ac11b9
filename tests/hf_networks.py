"""Tiny networks of diffusers and transformers with random weights, and their pipelines, for tests of the exchange."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from safetensors.torch import save_file
from torch import Tensor, nn

import limner
from limner import build
from limner import config as c
from limner.generator import Generator

M = TypeVar("M", bound=nn.Module)
START, END = "<|startoftext|>", "<|endoftext|>"

logging.getLogger("diffusers").setLevel(logging.ERROR)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def random_weights(module: M, spread: float = 0.1) -> M:
    """Every weight random, no branch zero: a wrong place for any of them shows in the output."""
    rng = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        parameter.data = spread * noise if parameter.dim() > 1 else 0.5 + 0.2 * noise
    return module.eval().requires_grad_(False)


def unet(**settings: Any) -> diffusers.UNet2DModel:
    small: dict[str, Any] = {
        "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 16,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return random_weights(diffusers.UNet2DModel(**{**small, **settings}))


def unet_condition(**settings: Any) -> diffusers.UNet2DConditionModel:
    small: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 32,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return random_weights(diffusers.UNet2DConditionModel(**{**small, **settings}), 0.05)


def levels(count: int, attention: bool = False) -> dict[str, Any]:
    kind = "Attn" if attention else ""
    return {
        "block_out_channels": tuple(32 * (i + 1) for i in range(count)),
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for _ in range(count)),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for _ in range(count)),
    }


def autoencoder_kl(count: int = 2, *, attention: bool = False, **settings: Any) -> diffusers.AutoencoderKL:
    return random_weights(
        diffusers.AutoencoderKL(sample_size=8 * 2 ** (count - 1), **levels(count, attention), **settings)
    )


def vq_model(**settings: Any) -> diffusers.VQModel:
    return random_weights(diffusers.VQModel(sample_size=16, scaling_factor=1.0, **levels(2), **settings))


def autoencoder_tiny(**settings: Any) -> diffusers.AutoencoderTiny:
    small: dict[str, Any] = {
        "encoder_block_out_channels": (16, 16), "num_encoder_blocks": (1, 2), "decoder_block_out_channels": (16, 16),
        "num_decoder_blocks": (3, 1),
    }  # fmt: skip
    return random_weights(diffusers.AutoencoderTiny(**{**small, **settings}))


def clip_tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    from tokenizers import pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "ca", "cat</w>", START, END]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def clip_text(vocabulary: int, **settings: Any) -> transformers.CLIPTextModel:
    small = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2, **settings}
    config = transformers.CLIPTextConfig(vocab_size=vocabulary, bos_token_id=vocabulary - 2,
                                         eos_token_id=vocabulary - 1, **small)  # fmt: skip
    return random_weights(transformers.CLIPTextModel(config))


DDIM = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
"""Stable Diffusion's."""


def stable_diffusion(
    folder: Path,
    kind: Any = diffusers.StableDiffusionPipeline,
    *,
    text: dict[str, Any] | None = None,
    prediction: str = "epsilon",
    **network: Any,
) -> Any:
    """kind: its class, or that of inpainting with in_channels=9."""
    tokenizer = clip_tokenizer(folder)
    pipeline = kind(
        vae=autoencoder_kl(), text_encoder=clip_text(len(tokenizer), **(text or {})), tokenizer=tokenizer,
        unet=unet_condition(**network), scheduler=diffusers.DDIMScheduler(prediction_type=prediction, **DDIM),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def bert_tokenizer(folder: Path) -> transformers.BertTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", ",", *"bcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=77)


def latent_diffusion(folder: Path, *, heads: int = 2, head_dim: int = 8,
                     hidden: int = 40) -> diffusers.LDMTextToImagePipeline:  # fmt: skip
    """As the published text-to-image model: an autoencoder with f = 8."""
    tokenizer = bert_tokenizer(folder)
    config = LDMBertConfig(vocab_size=len(tokenizer), encoder_layers=2, encoder_ffn_dim=hidden, head_dim=head_dim,
                           encoder_attention_heads=heads, d_model=32, dropout=0.0)  # fmt: skip
    pipeline = diffusers.LDMTextToImagePipeline(
        vqvae=autoencoder_kl(4), bert=random_weights(LDMBertModel(config)), tokenizer=tokenizer, unet=unet_condition(),
        scheduler=diffusers.DDIMScheduler(**DDIM),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- runs of Limner --------------------------------------------------------------------------------------------------


def alike(mine: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """To a share of the largest value."""
    assert mine.shape == theirs.shape
    assert float((mine - theirs).abs().max()) < tolerance * float(theirs.abs().max())


def load(path: Path) -> Generator:
    loaded = limner.load(path)
    assert isinstance(loaded, Generator)
    return loaded


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_of(raw: dict[str, Any], folder: Path, captions: list[str] | None = None) -> Path:
    """A run of a recipe, with random weights, and a vocabulary learnt from the captions."""
    recipe = c.parse({**raw, "training": {"precision": "fp32"}}, "recipe")
    model = random_weights(build.model(recipe))
    if model.autoencoder is not None:
        channels = len(model.autoencoder.latent_mean)
        model.autoencoder.latent_mean = noise(channels)
        model.autoencoder.latent_std = 0.5 + noise(channels, seed=1).abs()
    if model.conditioner is not None and captions is not None:
        model.conditioner.learn({"text": captions})
    folder.mkdir()
    c.dump(recipe, folder / "config.yaml")
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def raw_network(gen: Generator, x: Tensor, step: Tensor, **cond: Any) -> Tensor:
    """The network at DDPM steps, at the same times where the schedule is continuous."""
    if gen.schedule.steps is not None:
        return gen.raw(x, step, **cond)
    with torch.no_grad():
        return gen.model.raw(x, (step + 1) / 1000, gen.embed(len(x), **cond))
