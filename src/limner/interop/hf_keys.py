"""Names of the weights in diffusers' and transformers' networks, and in ours.

Theirs keep residual blocks, attention and resampling of a level in three lists; ours keep them in the order in which
they run. On the way up both begin with the coarsest level.
"""

from __future__ import annotations

from collections.abc import Sequence

from limner.config import AutoencoderConfig, Level, UNetConfig
from limner.interop.keymap import Rule, joined, pointwise, rule, under
from limner.interop.unet_keys import TRANSFORMER

RESNET = (
    rule("norm1", "norm1"),
    rule("conv1", "conv1"),
    rule("time_emb_proj", "emb"),
    rule("norm2", "norm2"),
    rule("conv2", "conv2"),
    rule("conv_shortcut", "skip"),
)
ATTENTION = (
    rule("group_norm", "norm"),
    rule(("to_q", "to_k", "to_v"), "qkv", joined(3)),
    rule("to_out.0", "out"),
)
OLD_ATTENTION = (
    rule(("query", "key", "value"), "qkv", pointwise(2).then(joined(3))),
    rule("proj_attn", "out", pointwise(2)),
)
"""As diffusers called it before version 0.17; its files are still around."""
RESAMPLE = (rule("conv", "conv"),)
TINY = tuple(
    rule(name, name)
    for half in ("encoder", "decoder")
    for name in (f"{half}.layers.{{i}}", f"{half}.layers.{{i}}.conv.{{j}}")
)
"""The tiny autoencoder has the same names on both sides."""


def unet(model: UNetConfig, *, old: bool = True) -> list[Rule]:
    """From UNet2DModel or UNet2DConditionModel to `nn.unet.UNet`. old: names of old versions as well."""
    attention = [*ATTENTION, *(OLD_ATTENTION if old else ())]
    resample = RESNET if model.resample == "block" else RESAMPLE
    last = len(model.levels) - 1
    rules = [
        rule("conv_in", "stem"),
        rule("time_embedding.linear_1", "time.linear1"),
        rule("time_embedding.linear_2", "time.linear2"),
        rule("conv_norm_out", "norm"),
        rule("conv_out", "out"),
    ]
    stage = 0
    for i, level in enumerate(model.levels):
        for j in range(level.blocks):
            rules += _block(f"down_blocks.{i}", j, f"down.{stage}", level, attention)
            stage += 1
        if i < last:
            rules += under(f"down_blocks.{i}.downsamplers.0.", f"down.{stage}.0.", resample)
            stage += 1
    rules += _middle(model, attention)
    stage = 0
    for i, level in enumerate(reversed(model.levels)):
        for j in range(level.blocks + 1):
            rules += _block(f"up_blocks.{i}", j, f"up.{stage}", level, attention)
            stage += 1
        if i < last:
            after = 2 if level.attention or level.cross_attention else 1
            rules += under(f"up_blocks.{i}.upsamplers.0.", f"up.{stage - 1}.{after}.", resample)
    return rules


def _block(source: str, j: int, target: str, level: Level, attention: Sequence[Rule]) -> list[Rule]:
    rules = under(f"{source}.resnets.{j}.", f"{target}.0.", RESNET)
    if level.cross_attention:
        rules += under(f"{source}.attentions.{j}.", f"{target}.1.", TRANSFORMER)
    elif level.attention:
        rules += under(f"{source}.attentions.{j}.", f"{target}.1.", attention)
    return rules


def _middle(model: UNetConfig, attention: Sequence[Rule]) -> list[Rule]:
    between = {"none": (), "attention": attention, "transformer": TRANSFORMER}[model.middle]
    return _middle_of(RESNET, between)


def _middle_of(resnet: Sequence[Rule], between: Sequence[Rule]) -> list[Rule]:
    return [
        *under("mid_block.resnets.0.", "middle.0.", resnet),
        *under("mid_block.attentions.0.", "middle.1.", between),
        *under("mid_block.resnets.1.", f"middle.{1 + bool(between)}.", resnet),
    ]


def autoencoder(config: AutoencoderConfig, *, old: bool = True) -> list[Rule]:
    """From AutoencoderKL, VQModel or AutoencoderTiny to `nn.autoencoder.Autoencoder`, all but the latent's mean and
    deviation."""
    if config.blocks == "tiny":
        return list(TINY)
    attention = [*ATTENTION, *(OLD_ATTENTION if old else ())]
    ends = [
        rule("conv_in", "stem"),
        rule("conv_norm_out", "norm"),
        rule("conv_out", "out"),
        *_middle_of(RESNET, attention if config.middle == "attention" else ()),
    ]
    down = [
        one
        for i, level in enumerate(config.levels)
        for one in _level(f"down_blocks.{i}", f"down.{i}", level, level.blocks, attention)
    ]
    up = [
        one
        for i, level in enumerate(reversed(config.levels))
        for one in _level(f"up_blocks.{i}", f"up.{i}", level, level.blocks + 1, attention)
    ]
    return [
        *under("encoder.", "encoder.", [*ends, *down]),
        *under("decoder.", "decoder.", [*ends, *up]),
        rule("quant_conv", "quant_conv"),
        rule("post_quant_conv", "post_quant_conv"),
        Rule(("quantize.embedding.weight",), ("quantizer.codebook",)),
    ]


def _level(source: str, target: str, level: Level, blocks: int, attention: Sequence[Rule]) -> list[Rule]:
    stride = 2 if level.attention else 1
    rules: list[Rule] = []
    for j in range(blocks):
        rules += under(f"{source}.resnets.{j}.", f"{target}.{stride * j}.", RESNET)
        if level.attention:
            rules += under(f"{source}.attentions.{j}.", f"{target}.{stride * j + 1}.", attention)
    resample = "downsamplers" if source.startswith("down") else "upsamplers"
    return rules + under(f"{source}.{resample}.0.", f"{target}.{stride * blocks}.", RESAMPLE)


CLIP = (
    Rule(("embeddings.token_embedding.weight",), ("embedding.weight",)),
    Rule(("embeddings.position_embedding.weight",), ("position",)),
    *under(
        "encoder.layers.{i}.",
        "blocks.{i}.",
        [
            rule("layer_norm1", "norm1"),
            rule(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attention.qkv", joined(3)),
            rule("self_attn.out_proj", "attention.out"),
            rule("layer_norm2", "norm2"),
            rule("mlp.fc1", "up"),
            rule("mlp.fc2", "down"),
        ],
    ),
    rule("final_layer_norm", "norm"),
)
"""From transformers' CLIPTextModel, below `text_model.`, to `nn.text.TextTransformer`."""

BERT = (
    Rule(("embed_tokens.weight",), ("embedding.weight",)),
    Rule(("embed_positions.weight",), ("position",)),
    *under(
        "layers.{i}.",
        "blocks.{i}.",
        [
            rule("self_attn_layer_norm", "norm1"),
            rule(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attention.qkv", joined(3)),
            rule("self_attn.out_proj", "attention.out"),
            rule("final_layer_norm", "norm2"),
            rule("fc1", "up"),
            rule("fc2", "down"),
        ],
    ),
    rule("layer_norm", "norm"),
)
"""From diffusers' LDMBertModel, below `model.`, to `nn.text.TextTransformer`."""
