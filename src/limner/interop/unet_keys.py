"""Names of the weights in OpenAI's U-Net, as guided-diffusion and latent-diffusion save them, and in ours.

Both count the stem as input block 0; apart from that the blocks stand in the same order as in `nn.unet.UNet`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from limner.config import ClassifierConfig, UNetConfig
from limner.interop.keymap import Rule, heads_inside, joined, pointwise, rule, under

RESBLOCK = (
    rule("in_layers.0", "norm1"),
    rule("in_layers.2", "conv1"),
    rule("emb_layers.1", "emb"),
    rule("out_layers.0", "norm2"),
    rule("out_layers.3", "conv2"),
    rule("skip_connection", "skip"),
)
RESAMPLE = (rule("op", "conv"), rule("conv", "conv"))

STEM = (
    rule("time_embed.0", "time.linear1"),
    rule("time_embed.2", "time.linear2"),
    rule("input_blocks.0.0", "stem"),
)
ENDS = (*STEM, rule("out.0", "norm"), rule("out.2", "out"))

PLACES = (
    ("input_blocks.{i}.{j}.", "down.{i-1}.{j}."),
    ("middle_block.{j}.", "middle.{j}."),
    ("output_blocks.{i}.{j}.", "up.{i}.{j}."),
)


def heads_of(model: UNetConfig | ClassifierConfig) -> Callable[[int], int]:
    """The number of heads by the number of channels, as `nn.unet.Blocks` has it."""
    return lambda channels: model.heads or max(1, channels // (model.head_dim or channels))


def self_attention(heads: Callable[[int], int], *, heads_outside: bool) -> list[Rule]:
    """An attention block. heads_outside: its rows are ordered (head, q/k/v, channel), which is the legacy order."""
    qkv = pointwise(1).then(heads_inside(heads)) if heads_outside else pointwise(1)
    return [rule("norm", "norm"), rule("qkv", "qkv", qkv), rule("proj_out", "out", pointwise(1))]


def blocks(attention: Iterable[Rule]) -> list[Rule]:
    """Everything between the stem and the head; `attention` is the table of whatever follows the residual blocks."""
    table = [*RESBLOCK, *RESAMPLE, *attention]
    return [one for source, target in PLACES for one in under(source, target, table)]


TRANSFORMER_BLOCK = (
    rule("norm1", "norm1"),
    rule("norm2", "norm2"),
    rule("norm3", "norm3"),
    rule("attn1.to_q", "self_attention.q"),
    rule(("attn1.to_k", "attn1.to_v"), "self_attention.kv", joined(2)),
    rule("attn1.to_out.0", "self_attention.out"),
    rule("attn2.to_q", "cross_attention.q"),
    rule(("attn2.to_k", "attn2.to_v"), "cross_attention.kv", joined(2)),
    rule("attn2.to_out.0", "cross_attention.out"),
    rule("ff.net.0.proj", "feed_forward.up"),
    rule("ff.net.2", "feed_forward.down"),
)

TRANSFORMER = (
    rule("norm", "norm"),
    rule("proj_in", "proj_in", pointwise(2)),
    *under("transformer_blocks.{k}.", "blocks.{k}.", TRANSFORMER_BLOCK),
    rule("proj_out", "proj_out", pointwise(2)),
)
"""The spatial transformer of latent-diffusion; Stable Diffusion 2 has linear projections already."""
