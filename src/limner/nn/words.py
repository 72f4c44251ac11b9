"""Words that mean something before the first picture: captions of few pictures, in a vocabulary of many words.

A text encoder that learns from a few thousand captions knows no word that isn't in them. Here every token begins as a
vector of a large language model, so that an unknown "watermelon" lies beside a known "melon". The table is that of
all-MiniLM-L6-v2's word pieces (Apache-2.0), reduced to 64 principal components in 8 bits; `scripts/words.py` makes it.
"""

from __future__ import annotations

import functools
import logging
import re
import zlib
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from limner.nn.text import Tokens, encoded

FILE = "words.safetensors"
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
"""Padding, an unknown word, and the marks before and after a caption."""
UNKNOWN = 0.02
"""Share of captions with unknown words from which on it is worth a warning."""

WORD = re.compile(r"[^\W_]+")
LONGEST = 16
"""Pieces of one word that are looked at, at most."""
NEAR = 0.4
"""Cosine from which on a word stands for another."""

_log = logging.getLogger(__name__)


@functools.cache
def _stored() -> dict[str, Tensor]:
    """vectors int8 (V, D), scale float (D,), words: deflated UTF-8, a token a line."""
    return load(resources.files("limner.nn").joinpath(FILE).read_bytes())


@functools.cache
def words() -> tuple[str, ...]:
    """The tokens, in the order of their ids; those that go on with a word begin with ##."""
    return tuple(zlib.decompress(_stored()["words"].numpy().tobytes()).decode().split("\n"))


@functools.cache
def vectors(device: torch.device) -> Tensor:
    """The table (V, D), of mean square 1."""
    stored = _stored()
    return (stored["vectors"].to(device).float() * stored["scale"].to(device)).contiguous()


class WordTokenizer(nn.Module):
    """WordPiece of the table's tokens: lower case, no accents; words of other scripts are [UNK]. It has no weights."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def learn(self, texts: Sequence[str]) -> None:
        """Knows its words already, and warns where they aren't those of the captions."""
        ids = self(texts).ids
        unknown = int((ids == words().index(MARKS[1])).any(1).sum())
        if unknown > UNKNOWN * len(texts):
            _log.warning("%d of %d captions have words that no English vocabulary has; encoder.kind bpe learns any",
                         unknown, len(texts))  # fmt: skip

    def forward(self, texts: Sequence[str]) -> Tokens:
        return encoded(tokenizer(self.length), texts, self.length)


@functools.cache
def tokenizer(length: int) -> Any:
    """A `tokenizers.Tokenizer` that cuts and pads to `length` tokens, the two marks included."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {word: place for place, word in enumerate(words())}
    made = Tokenizer(models.WordPiece(ids, unk_token=MARKS[1]))  # pyright: ignore[reportCallIssue]
    made.normalizer = normalizers.BertNormalizer()  # pyright: ignore[reportAttributeAccessIssue]
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    made.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=[(mark, ids[mark]) for mark in MARKS[2:]]
    )
    made.enable_truncation(length)
    made.enable_padding(length=length, pad_id=ids[MARKS[0]], pad_token=MARKS[0])
    return made


class WordVectors(nn.Module):
    """Token ids (B, L) to (B, L, width): frozen vectors through a learned linear layer.

    noise: standard deviation of what training adds to a vector, whose own mean square is 1. In 64 dimensions words stay
    apart under it, and the network learns to draw for a new word what it draws for the nearest that it knows.
    """

    def __init__(self, width: int, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.proj = nn.Linear(_stored()["vectors"].shape[1], width)

    def forward(self, ids: Tensor) -> Tensor:
        found = vectors(ids.device)[ids]
        if self.training and self.noise:
            found = found + self.noise * torch.randn_like(found)
        return self.proj(found)


def words_of(captions: Iterable[str]) -> set[str]:
    """The words of captions, in lower case."""
    return {word.lower() for caption in captions for word in WORD.findall(caption)}


class Rewording:
    """Captions with the words that a text encoder has learnt: any other becomes the nearest of them, if one is near.

    An encoder that learnt from few captions has nothing but noise for other words. known: the words it learnt; where
    most of them aren't English, captions stay as they are.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self.known = frozenset(known)
        places = {word: place for place, word in enumerate(words())}
        self._places = places
        self._candidates = sorted(word for word in self.known if word in places)
        self._speaks_english = 2 * len(self._candidates) > len(self.known)
        self._instead: dict[str, str | None] = {}

    def __call__(self, caption: str) -> str:
        """The caption reworded. Each new word is told once, in the log."""
        if not self._speaks_english:
            return caption
        return WORD.sub(lambda match: self._read(match.group()), caption)

    def _read(self, word: str) -> str:
        lower = word.lower()
        if lower in self.known or lower.isdigit():
            return word
        if lower not in self._instead:
            self._instead[lower] = found = self.nearest(lower)
            told = "nor any word near it" if found is None else f"it is read as '{found}'"
            _log.warning("text: no caption in training has '%s', %s", lower, told)
        return self._instead[lower] or word

    def nearest(self, word: str) -> str | None:
        """The known word nearest to one in lower case, by cosine; None where none is as near as `NEAR`."""
        table = vectors(torch.device("cpu"))
        ids = [self._places[word]] if word in self._places else tokenizer(LONGEST).encode(word).ids[1:]
        ids = [k for k in ids if words()[k] not in MARKS]
        if not ids:
            return None
        rows = table[[self._places[known] for known in self._candidates]]
        likeness = F.cosine_similarity(table[ids].mean(0)[None], rows)
        best = int(likeness.argmax())
        return self._candidates[best] if likeness[best] >= NEAR else None
