"""Names of the weights in CompVis' autoencoders, and in ours.

Theirs keep blocks and attention of a level in two lists, and number the way up from the finest level; ours keep them
in the order in which they run, which on the way up begins with the coarsest.
"""

from __future__ import annotations

from collections.abc import Sequence

from limner.config import AutoencoderConfig, Level
from limner.interop.keymap import Rule, joined, pointwise, rule, under

RESBLOCK = (
    rule("norm1", "norm1"),
    rule("conv1", "conv1"),
    rule("norm2", "norm2"),
    rule("conv2", "conv2"),
    rule("nin_shortcut", "skip"),
)
ATTENTION = (
    rule("norm", "norm"),
    rule(("q", "k", "v"), "qkv", pointwise(2).then(joined(3))),
    rule("proj_out", "out", pointwise(2)),
)


def autoencoder(config: AutoencoderConfig) -> list[Rule]:
    """Everything but the measured latent mean and deviation."""
    levels = list(enumerate(config.levels))
    encoder = [one for i, level in levels for one in _level(f"down.{i}", f"down.{i}", level, level.blocks)]
    decoder = [
        one for i, level in levels for one in _level(f"up.{i}", f"up.{len(levels) - 1 - i}", level, level.blocks + 1)
    ]
    ends = [rule("conv_in", "stem"), rule("norm_out", "norm"), rule("conv_out", "out"), *_middle(config)]
    return [
        *under("encoder.", "encoder.", [*ends, *encoder]),
        *under("decoder.", "decoder.", [*ends, *decoder]),
        rule("quant_conv", "quant_conv"),
        rule("post_quant_conv", "post_quant_conv"),
        Rule(("quantize.embedding.weight",), ("quantizer.codebook",)),
    ]


def _level(source: str, target: str, level: Level, blocks: int) -> list[Rule]:
    stride = 2 if level.attention else 1
    rules: list[Rule] = []
    for j in range(blocks):
        rules += under(f"{source}.block.{j}.", f"{target}.{stride * j}.", RESBLOCK)
        rules += under(f"{source}.attn.{j}.", f"{target}.{stride * j + 1}.", ATTENTION) if level.attention else []
    for name in ("downsample", "upsample"):
        rules.append(rule(f"{source}.{name}.conv", f"{target}.{stride * blocks}.conv"))
    return rules


def _middle(config: AutoencoderConfig) -> Sequence[Rule]:
    attention = under("mid.attn_1.", "middle.1.", ATTENTION) if config.middle == "attention" else []
    last = f"middle.{1 + bool(attention)}."
    return [*under("mid.block_1.", "middle.0.", RESBLOCK), *attention, *under("mid.block_2.", last, RESBLOCK)]
