"""tau(y): what is known of a picture becomes what the U-Net understands.

One interface for every modality: a conditioner returns `Embedded`, and owns its null condition, which stands for an
absent condition in training (dropped at random) and in sampling (classifier-free guidance).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.errors import LimnerError, suggest


@dataclass(frozen=True)
class Embedded:
    """tau(y) of a batch; a part that no condition gives is None.

    vector: (B, E), added to the time embedding, hence into AdaGN. tokens: (B, L, D), with token_mask (B, L) bool,
    for cross-attention. spatial: (B, Cs, H, W), concatenated to x_t. guidance: (B,), the scale that a student of
    guidance distillation is told; no conditioner gives it.
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    token_mask: Tensor | None = None
    spatial: Tensor | None = None
    guidance: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[Embedded]) -> Embedded:
        """One batch of several, in order; shorter token sequences are padded and masked."""
        length = max((p.tokens.shape[1] for p in parts if p.tokens is not None), default=0)
        padded = [p.padded(length) for p in parts]
        return Embedded(*(_cat([getattr(p, name) for p in padded], 0) for name in FIELDS))

    @staticmethod
    def merge(parts: Sequence[Embedded]) -> Embedded:
        """The conditions of several modalities on one batch: vectors are summed, tokens and maps concatenated."""
        vectors = [p.vector for p in parts if p.vector is not None]
        with_tokens = [p.padded(p.tokens.shape[1]) for p in parts if p.tokens is not None]
        return Embedded(
            torch.stack(vectors).sum(0) if vectors else None,
            _cat([p.tokens for p in with_tokens], 1) if with_tokens else None,
            _cat([p.token_mask for p in with_tokens], 1) if with_tokens else None,
            _cat([p.spatial for p in parts if p.spatial is not None], 1),
        )

    @staticmethod
    def lerp(first: Embedded, last: Embedded, share: Tensor) -> Embedded:
        """(N,) ways between two batches of one. Tokens that only one of them has count all along."""

        def between(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            if a is None or b is None:
                return None
            return torch.lerp(a, b, share.to(a).view(-1, *(1,) * (a.ndim - 1)))

        masks = [part.token_mask for part in (first, last)]
        mask = None if masks[0] is None or masks[1] is None else (masks[0] | masks[1]).expand(len(share), -1)
        return Embedded(between(first.vector, last.vector), between(first.tokens, last.tokens), mask,
                        between(first.spatial, last.spatial), between(first.guidance, last.guidance))  # fmt: skip

    def padded(self, length: int) -> Embedded:
        """The same with tokens padded to `length`, and a mask."""
        if self.tokens is None:
            return self
        missing = length - self.tokens.shape[1]
        mask = self.token_mask
        if mask is None:
            mask = torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)
        return replace(self, tokens=F.pad(self.tokens, (0, 0, 0, missing)), token_mask=F.pad(mask, (0, missing)))

    def __getitem__(self, rows: slice | Tensor) -> Embedded:
        return Embedded(*(None if part is None else part[rows] for part in (getattr(self, name) for name in FIELDS)))


FIELDS = ("vector", "tokens", "token_mask", "spatial", "guidance")


def _cat(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    given = [p for p in parts if p is not None]
    return torch.cat(given, dim) if given else None


class LabelConditioner(nn.Module):
    """One of `classes` labels, as a vector into AdaGN or as one token (LDM's ClassEmbedder).

    null: whether there is a learned row, the last, for the absent label; without it an absent label adds zero.
    """

    def __init__(self, classes: int, width: int, *, enters: Literal["vector", "token"] = "vector",
                 null: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.classes, self.enters, self.null = classes, enters, null
        self.token_channels = width if enters == "token" else None
        self.table = nn.Embedding(classes + null, width)

    def forward(self, label: Tensor | None, batch: int, drop: Tensor | None = None) -> Embedded:
        """label (B,) int64 in 0..classes-1, or -1 for absent; drop (B,) bool marks rows to treat as absent."""
        device = self.table.weight.device
        label = torch.full((batch,), -1, device=device) if label is None else label.to(device)
        label = label if drop is None else torch.where(drop.to(device), -1, label)
        absent = label < 0
        rows = self.table(torch.where(absent, self.classes if self.null else 0, label))
        rows = rows if self.null else rows.masked_fill(absent[:, None], 0.0)
        return Embedded(tokens=rows[:, None]) if self.enters == "token" else Embedded(vector=rows)


class Conditioner(nn.Module):
    """All modalities of one model, by name: `label`, `text`, ..."""

    def __init__(self, modalities: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.modalities = nn.ModuleDict(modalities)
        widths = {name: m.token_channels for name, m in modalities.items() if m.token_channels is not None}
        if len(set(widths.values())) > 1:
            said = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise LimnerError(f"conditions: their tokens should be of one width for cross-attention, are {said}")
        self.token_channels: int | None = next(iter(widths.values())) if widths else None  # pyright: ignore

        self.spatial_channels: int = sum(getattr(m, "spatial_channels", 0) for m in modalities.values())

    def learn(self, values: Mapping[str, Sequence[str]]) -> None:
        """Let each modality that learns from data before training do so (the vocabulary of captions)."""
        for name, module in self.modalities.items():
            if name in values and hasattr(module, "learn"):
                module.learn(values[name])  # pyright: ignore[reportCallIssue]

    def forward(self, cond: Mapping[str, Any], batch: int, drop: Mapping[str, Tensor] | None = None,
                size: tuple[int, int] | None = None) -> Embedded:  # fmt: skip
        """cond: by modality, an absent one is null; drop: rows (B,) bool to treat as absent, by modality; size: (H, W)
        of x_t, where it isn't that of training.

        Raises LimnerError for a modality that the model wasn't trained with.
        """
        for name in cond:
            if name not in self.modalities:
                raise LimnerError(f"condition '{name}': this model has none such{suggest(name, self.modalities)}")
        drop = drop or {}
        parts = []
        for name, module in self.modalities.items():
            where = {"size": size} if hasattr(module, "spatial_channels") else {}
            parts.append(module(cond.get(name), batch, drop.get(name), **where))
        return Embedded.merge(parts)
