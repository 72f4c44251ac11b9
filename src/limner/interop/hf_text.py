"""Text encoders and tokenizers beside a diffusion model, as transformers saves them; kept in the run whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from limner.config import BPEText
from limner.errors import LimnerError
from limner.interop.hf_files import Component, read_json
from limner.nn.text import Vocabulary

ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "LDMBertModel")
TEXT = "conditioner.modalities.text."
CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_MARKS = ("<|startoftext|>", "<|endoftext|>")


@dataclass(frozen=True)
class TextFacts:
    """A text condition's section of a recipe, and the prefix under which its weights lie in their file."""

    section: dict[str, Any]
    family: str
    width: int


def encoder(component: Component) -> TextFacts:
    """CLIPTextModel or LDMBertModel. Raises LimnerError for whatever has no counterpart."""
    s, where = component.settings, component.where
    if component.kind not in ENCODERS:
        raise LimnerError(f"{where}: {component.kind or 'no class'} has no counterpart; {', '.join(ENCODERS)} have")
    if component.kind == "LDMBertModel":
        width, heads = s.get("d_model", 1280), s.get("encoder_attention_heads", 8)
        facts = {"vocabulary": s.get("vocab_size", 30522), "width": width, "depth": s.get("encoder_layers", 32),
                 "heads": heads, "head_dim": s.get("head_dim", 64), "hidden": s.get("encoder_ffn_dim", 5120),
                 "length": s.get("max_position_embeddings", 77),
                 "activation": _activation(s.get("activation_function", "gelu"), where)}  # fmt: skip
        return TextFacts(section(facts, frozen=False), "bert", width)
    inner = s.get("text_config")
    s = inner if isinstance(inner, Mapping) else s
    width, heads = s.get("hidden_size", 512), s.get("num_attention_heads", 8)
    if width % heads:
        raise LimnerError(f"{where}: num_attention_heads: {heads} don't divide hidden_size {width}")
    if s.get("layer_norm_eps", 1e-5) != 1e-5:
        raise LimnerError(f"{where}: layer_norm_eps: {s['layer_norm_eps']} has no counterpart; 1e-05 has")
    facts = {"vocabulary": s.get("vocab_size", 49408), "width": width, "depth": s.get("num_hidden_layers", 12),
             "heads": heads, "head_dim": width // heads, "hidden": s.get("intermediate_size", 2048),
             "length": s.get("max_position_embeddings", 77), "causal": True, "bias": True,
             "activation": _activation(s.get("hidden_act", "quick_gelu"), where)}  # fmt: skip
    return TextFacts(section(facts, frozen=True), "clip", width)


def _activation(name: str, where: str) -> str:
    if name not in ("gelu", "quick_gelu"):
        raise LimnerError(f"{where}: activation '{name}' has no counterpart; gelu and quick_gelu have")
    return name


def section(encoder: Mapping[str, Any], *, frozen: bool) -> dict[str, Any]:
    """A text condition as the published models have it: tokens, padding attended to, the empty caption for none."""
    return {"kind": "text", "dropout": 0.1, "pooled": False, "null": "empty",
            "encoder": {"kind": "bpe", "masked": False, "frozen": frozen, **encoder}}  # fmt: skip


# --- tokenizers --------------------------------------------------------------------------------------------------


def packed(tokenizer: str, vocabulary: int, length: int) -> Tensor:
    """A tokenizer's JSON as the weight that a run keeps it in. Raises LimnerError where it doesn't fit."""
    keeper = Vocabulary(vocabulary, length)
    keeper.put(tokenizer)
    return keeper.data


def tokenizer(folder: Path, family: str) -> str:
    """The JSON of a tokenizer's folder. Raises LimnerError where files are missing or damaged."""
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    pad = _pad(folder, settings, family)
    if (folder / "tokenizer.json").is_file():
        return padded(json.dumps(read_json(folder / "tokenizer.json")), pad, str(folder))
    if family == "clip":
        merges = _lines(folder / "merges.txt")
        pairs = [(a, b) for a, _, b in (line.partition(" ") for line in merges) if b and not a.startswith("#")]
        return padded(clip(read_json(folder / "vocab.json"), pairs), pad, str(folder))
    return padded(bert(_lines(folder / "vocab.txt"), lowercase=settings.get("do_lower_case", True)), pad, str(folder))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LimnerError(f"{path}: cannot be read ({error})") from None


def _pad(folder: Path, settings: Mapping[str, Any], family: str) -> str:
    special = folder / "special_tokens_map.json"
    named = {**(read_json(special) if special.is_file() else {}), **settings}.get("pad_token")
    named = named.get("content") if isinstance(named, Mapping) else named
    return str(named or (CLIP_MARKS[1] if family == "clip" else "[PAD]"))


def padded(tokenizer: str, pad: str, where: str) -> str:
    """A tokenizer's JSON with the token that it pads with. Raises LimnerError where it has none such."""
    from tokenizers import Tokenizer

    try:
        made = Tokenizer.from_str(tokenizer)
    except Exception as error:  # tokenizers raises nothing narrower
        raise LimnerError(f"{where}: no tokenizer that can be read ({' '.join(str(error).split())[:120]})") from None
    number = made.token_to_id(pad)
    if number is None:
        raise LimnerError(f"{where}: its padding '{pad}' is no token of the tokenizer")
    made.enable_padding(pad_id=number, pad_token=pad)
    return made.to_str()


def clip(vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> str:
    """CLIP's tokenizer (Radford et al. 2021, section 2.4): lower-cased byte-level BPE, words end in `</w>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    start, end = CLIP_MARKS
    made = Tokenizer(models.BPE(dict(vocabulary), merges, unk_token=end, end_of_word_suffix="</w>",
                                continuing_subword_prefix="", fuse_unk=False))  # fmt: skip
    made.add_special_tokens([start, end])
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])  # pyright: ignore
    split = pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    closing, opening = ((mark, made.token_to_id(mark) or 0) for mark in (end, start))
    made.post_processor = processors.RobertaProcessing(  # pyright: ignore
        closing, opening, add_prefix_space=False, trim_offsets=False
    )
    return made.to_str()


def bert(words: list[str], *, lowercase: bool = True) -> str:
    """BERT's tokenizer (Devlin et al. 2019): WordPiece between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.add_special_tokens([word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if word in words])
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)  # pyright: ignore
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    made.decoder = decoders.WordPiece()  # pyright: ignore
    marks = [(mark, made.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="[CLS] $A [SEP]", special_tokens=marks
    )
    return made.to_str()


# --- out ------------------------------------------------------------------------------------------------------------


def kept(data: Tensor, encoder: BPEText) -> str:
    """The tokenizer's JSON out of a run's weights. Raises LimnerError where the run has none."""
    keeper = Vocabulary(encoder.vocabulary, encoder.length)
    keeper.data.copy_(data)
    return keeper.json()


def settings(encoder: BPEText, heads: int, kind: str, tokenizer: str) -> dict[str, Any]:
    """The settings of CLIPTextModel or LDMBertModel."""
    pad = (json.loads(tokenizer).get("padding") or {}).get("pad_id", 0)
    hidden = encoder.hidden or 4 * encoder.width
    common = {"architectures": [kind], "vocab_size": encoder.vocabulary, "max_position_embeddings": encoder.length,
              "pad_token_id": pad}  # fmt: skip
    if kind == "LDMBertModel":
        return {**common, "model_type": "ldmbert", "d_model": encoder.width, "encoder_layers": encoder.depth,
                "encoder_ffn_dim": hidden, "encoder_attention_heads": heads, "head_dim": encoder.head_dim,
                "activation_function": encoder.activation}  # fmt: skip
    words = _words(tokenizer)
    marks = {name: words.get(mark) for name, mark in zip(("bos_token_id", "eos_token_id"), CLIP_MARKS, strict=True)}
    return {**common, **{name: number for name, number in marks.items() if number is not None},
            "model_type": "clip_text_model", "hidden_size": encoder.width, "intermediate_size": hidden,
            "num_hidden_layers": encoder.depth, "num_attention_heads": heads, "hidden_act": encoder.activation,
            "projection_dim": encoder.width, "layer_norm_eps": 1e-5}  # fmt: skip


def _words(tokenizer: str) -> dict[str, int]:
    raw = json.loads(tokenizer)
    return {**raw["model"]["vocab"], **{token["content"]: token["id"] for token in raw.get("added_tokens", [])}}


def tokenizer_class(tokenizer: str) -> str:
    """Whose a tokenizer's JSON is, for transformers: CLIP's words end in `</w>`, BERT's are pieces; a vocabulary that
    Limner learnt is none of them."""
    model = json.loads(tokenizer)["model"]
    if model.get("type") == "WordPiece":
        return "BertTokenizer"
    return "CLIPTokenizer" if model.get("end_of_word_suffix") == "</w>" else "PreTrainedTokenizerFast"


def write_tokenizer(folder: Path, kind: str, tokenizer: str, length: int) -> None:
    """A tokenizer as transformers' class `kind` reads it: whole in one file, and in the files of older versions."""
    folder.mkdir()
    raw = json.loads(tokenizer)
    words = sorted(_words(tokenizer).items(), key=lambda word: word[1])
    pad = (raw.get("padding") or {}).get("pad_token", words[0][0])  # without one, `Vocabulary` pads with token 0
    raw |= {"padding": None, "truncation": None}
    contents: dict[str, str] = {"tokenizer.json": json.dumps(raw, ensure_ascii=False)}
    named: dict[str, Any] = {}
    if kind == "CLIPTokenizer":
        start, end = CLIP_MARKS
        special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in raw["model"]["merges"]]
        contents["vocab.json"] = json.dumps(dict(words), ensure_ascii=False)
        contents["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""])
    elif kind == "BertTokenizer":
        marks = {"unk_token": "[UNK]", "sep_token": "[SEP]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
        special = {"pad_token": pad, **marks}
        contents["vocab.txt"] = "\n".join(word for word, _ in words)
        lowercase = (raw.get("normalizer") or {}).get("lowercase", True)
        named["do_lower_case"] = lowercase
    else:
        special = {"pad_token": pad}
    contents["special_tokens_map.json"] = json.dumps(special)
    contents["tokenizer_config.json"] = json.dumps(
        {"tokenizer_class": kind, **named, "model_max_length": length, **special}
    )
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
