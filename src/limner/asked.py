"""What a user asks for, made into what a model's conditioner takes: a value for each picture, by modality."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from limner.config import BoxesCondition, RunConfig, SemanticMapCondition
from limner.data.boxes import clipped, filled
from limner.data.overlays import refuse_empty
from limner.data.transforms import PictureError, fitted, flattened
from limner.errors import LimnerError, suggest
from limner.guide import Labels, label_numbers
from limner.nn.spatial import with_hole

Pictures = Tensor | npt.NDArray[np.uint8] | Image.Image | Sequence[Image.Image]
Box = Sequence[Any]
"""class (a name or a number), x, y, w, h; x, y is the left upper corner, all in 0..1."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """What is given to `Generator.stream` by modality, as a user has it; None: not given.

    mask: white, or 1, is what is painted. strength: see `Generator.stream`. conditions: values by modality that are
    already as the conditioner takes them. size: (H, W) of the canvas.
    """

    label: Labels | None = None
    text: str | Sequence[str] | Tensor | None = None
    negative_text: str | Sequence[str] | Tensor | None = None
    image: Pictures | None = None
    mask: Pictures | None = None
    semantic_map: Any = None
    boxes: Any = None
    strength: float | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """Values for N pictures, a tensor or a list each.

    conditions: by modality. start: pictures (N, C, H, W) in [-1, 1] from which to draw, at noise `strength`.
    hole: (N, C + 1, H, W), pictures of which all but the hole is kept to the bit. negative: captions to move away from.
    """

    conditions: dict[str, Any]
    start: Tensor | None = None
    hole: Tensor | None = None
    negative: list[Any] | None = None

    def rotated(self, num: int | None, own: str | None) -> tuple[Asked, int]:
        """Each value repeated in rotation to `num` pictures; None: as many as the longest has, but for `own`, which
        is a default of the model. Raises LimnerError where there is nothing of one."""
        lists: dict[str, Any] = {**self.conditions, ".start": self.start, ".hole": self.hole, ".neg": self.negative}
        lists = {name: values for name, values in lists.items() if values is not None}
        asked = max((len(values) for name, values in lists.items() if name != own), default=1)
        num = asked if num is None else num
        if num < 1 or any(len(values) == 0 for values in lists.values()):
            raise LimnerError(f"num: {num}, should be 1 or more, with at least one label or caption")
        rows = torch.arange(num)
        made = {name: taken(values, rows % len(values)) for name, values in lists.items()}
        conditions = {name: made[name] for name in self.conditions}
        return replace(self, conditions=conditions, start=made.get(".start"), hole=made.get(".hole"),
                       negative=made.get(".neg")), num  # fmt: skip


def taken(values: Any, rows: Tensor) -> Any:
    """These rows of a tensor or a list."""
    return values[rows] if isinstance(values, Tensor) else [values[row] for row in rows.tolist()]


def asked_of(config: RunConfig, wish: Wish, size: tuple[int, int]) -> Asked:
    """A wish checked against a model's recipe, for a canvas of `size` (H, W) pixels. Raises LimnerError."""
    kinds: dict[str, Any] = {section.kind: section for section in config.conditions}
    conditions = dict(wish.conditions)
    for name in (*conditions, *(n for n in ("label", "text", "semantic_map", "boxes") if getattr(wish, n) is not None)):
        if name not in kinds:
            raise LimnerError(f"{name}: this model was not trained with it; {has(kinds)}")
    classes = tuple(config.classes or ()) if "label" in kinds else ()
    if wish.label is not None:
        conditions["label"] = label_numbers(wish.label, classes)
    if wish.text is not None:
        conditions["text"] = _captions(wish.text)
    if wish.semantic_map is not None:
        conditions["semantic_map"] = as_maps(wish.semantic_map, kinds["semantic_map"])
    if wish.boxes is not None:
        conditions["boxes"] = as_boxes(wish.boxes, kinds["boxes"])
    if wish.negative_text is not None and "text" not in kinds:
        raise LimnerError(f"negative_text: this model was not trained with text; {has(kinds)}")
    asked = _pictures(config, wish, size, kinds, conditions)
    if classes and not asked.conditions:  # nothing was asked for: every class in turn
        asked.conditions["label"] = torch.arange(len(classes))
    negative = None if wish.negative_text is None else _captions(wish.negative_text)
    return replace(asked, negative=negative)


def _captions(text: str | Sequence[str] | Tensor) -> list[Any]:
    return [text] if isinstance(text, str) else list(text)


def _pictures(config: RunConfig, wish: Wish, size: tuple[int, int], kinds: Mapping[str, Any],
              conditions: dict[str, Any]) -> Asked:  # fmt: skip
    """What `image` and `mask` mean: to a model that knows them conditions, to any other where drawing starts."""
    if wish.strength is not None and not 0 < wish.strength <= 1:
        raise LimnerError(f"strength: {wish.strength:g}, should be above 0, where the picture stays, up to 1")
    if wish.image is None:
        if wish.mask is not None or wish.strength is not None:
            raise LimnerError(f"{'strength' if wish.mask is None else 'mask'}: goes with the image that it is about")
        hole = conditions.get("mask")
        return Asked(conditions, hole=None if hole is None else hole.float().cpu())
    image = as_images(wish.image)
    if wish.mask is not None:
        hole = as_hole(image, wish.mask, size)
        if "mask" in kinds:
            conditions["mask"] = hole
        start = hole[:, :-1] if wish.strength is None else image
        return Asked(conditions, None if wish.strength is None else start, hole)
    for name in ("image", "variation"):
        if name in kinds and (name == "image" or wish.strength is None):
            conditions[name] = image
            break
    else:
        if wish.strength is None:
            needs = "a mask" if "mask" in kinds else "strength, to draw from it, or mask, to paint in it"
            raise LimnerError(f"image: this model was not trained with it; {has(kinds)}; give {needs} as well")
    return Asked(conditions, None if wish.strength is None else resized(image, size, config.data.channels))


def has(kinds: Mapping[str, Any]) -> str:
    """What a model knows, in words."""
    return f"it has {' and '.join(kinds)}" if kinds else "it is unconditional"


def as_images(pictures: Pictures, name: str = "image") -> Tensor:
    """Pictures of any kind as floats (N, C, h, w) in [-1, 1]. Raises LimnerError for another shape or for nothing."""
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if not isinstance(pictures, Tensor | np.ndarray):
        arrays = [np.asarray(p)[..., None] if p.mode == "L" else np.asarray(p) for p in pictures]
        shapes = {array.shape for array in arrays}
        if len(shapes) != 1:
            raise LimnerError(f"{name}: {len(shapes)} sorts of shape, should be pictures of one size and mode")
        pictures = np.stack(arrays)
    if isinstance(pictures, np.ndarray):
        pictures = torch.from_numpy(pictures).movedim(-1, 1).float() / 127.5 - 1
    if pictures.ndim != 4:
        raise LimnerError(f"{name}: shape {tuple(pictures.shape)}, should be (N, C, h, w)")
    return pictures


def as_hole(image: Tensor, mask: Pictures, size: tuple[int, int]) -> Tensor:
    """Pictures with a hole (N, C + 1, H, W). Raises LimnerError: another size than the canvas, a mask of nothing or
    of everything, or a number of masks that isn't that of the pictures, nor one."""
    if isinstance(mask, Image.Image):
        mask = [mask]
    if not isinstance(mask, Tensor | np.ndarray):
        mask = [m.convert("L") for m in mask]
    levels = as_images(mask, "mask")
    if isinstance(mask, Tensor):
        levels = 2 * levels.float() - 1
    for name, pictures in (("image", image), ("mask", levels)):
        height, width = pictures.shape[2:]
        if (height, width) != size:
            raise LimnerError(f"{name}: is {width}x{height}, the canvas is {size[1]}x{size[0]}; both should be of one "
                              f"size, so resize it, or set the size to {width}x{height}")  # fmt: skip
    painted = levels[:, :1] >= 0
    for row in painted[:, 0].numpy():
        try:
            refuse_empty(row)
        except PictureError as error:
            raise LimnerError(str(error)) from None
    num = max(len(image), len(painted))
    rows = torch.arange(num)
    return with_hole(image[rows % len(image)], painted[rows % len(painted)].float())


def resized(images: Tensor, size: tuple[int, int], channels: int) -> Tensor:
    """Pictures (N, C, h, w) in [-1, 1], their centre resized to `size`, in so many channels."""
    if tuple(images.shape[1:]) == (channels, *size):
        return images
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in levels]
    made = [fitted(flattened(p, channels, (255, 255, 255)), size) for p in pictures]
    return as_images(made)


def as_maps(maps: Any, section: SemanticMapCondition) -> Tensor:
    """Semantic maps, one or many: PIL pictures or integers (N, h, w), or floats (N, K, h, w). Raises LimnerError."""
    if isinstance(maps, Image.Image):
        maps = [maps]
    if not isinstance(maps, Tensor | np.ndarray):
        arrays = [np.asarray(m) for m in maps]
        if len({a.shape for a in arrays}) != 1:
            raise LimnerError("semantic_map: should be maps of one size")
        maps = np.stack(arrays)
    maps = torch.as_tensor(maps)
    if not maps.is_floating_point():
        maps = maps.long()
        maps = maps[None] if maps.ndim == 2 else maps
    classes = len(section.classes or ())
    if maps.ndim != (4 if maps.is_floating_point() else 3) or (maps.ndim == 4 and maps.shape[1] != classes):
        raise LimnerError(f"semantic_map: shape {tuple(maps.shape)}, should be class numbers (N, h, w), or "
                          f"(N, {classes}, h, w)")  # fmt: skip
    return maps


def as_boxes(boxes: Any, section: BoxesCondition) -> Tensor:
    """Layouts, one or many, as (N, M, 5): each a list of (class, x, y, w, h). What lies outside of the canvas is cut
    off, and a warning tells. Raises LimnerError for an unknown class or another form."""
    if isinstance(boxes, Tensor):
        return boxes
    layouts = [boxes] if _is_layout(boxes) else boxes
    return filled([_layout(layout, number, section.names) for number, layout in enumerate(layouts)])


def _is_layout(boxes: Any) -> bool:
    """Whether it is one layout, a list of boxes, rather than a list of layouts."""
    return not boxes or (isinstance(boxes[0], Sequence) and len(boxes[0]) == 5
                         and not isinstance(boxes[0][0], Sequence | Mapping)) or (
        isinstance(boxes[0], Sequence) and len(boxes[0]) == 5 and isinstance(boxes[0][0], str))  # fmt: skip


def _layout(layout: Sequence[Box], number: int, names: Sequence[str]) -> npt.NDArray[np.float32]:
    rows = []
    for place, box in enumerate(layout):
        where = f"boxes: layout {number}, box {place}"
        try:
            kind, *span = box
            x, y, w, h = (float(value) for value in span)
        except (TypeError, ValueError):
            raise LimnerError(f"{where}: {box!r:.60} should be (class, x, y, w, h)") from None
        if isinstance(kind, str) and kind not in names:
            raise LimnerError(f"{where}: there is no class '{kind}'{suggest(kind, names)}")
        if not isinstance(kind, str) and not 0 <= int(kind) < len(names):
            raise LimnerError(f"{where}: class {kind}, there are {len(names)}, from 0 on")
        if not (np.isfinite([x, y, w, h]).all() and w > 0 and h > 0):
            raise LimnerError(f"{where}: {span} should be x, y, and a width and a height above 0")
        if x >= 1 or y >= 1 or x + w <= 0 or y + h <= 0:
            raise LimnerError(f"{where}: {span} lies outside of the canvas, which is 0 to 1 in both directions")
        rows.append([names.index(kind) if isinstance(kind, str) else int(kind), x, y, w, h])
    table = np.array(rows, np.float32).reshape(-1, 5)
    cut = clipped(table)
    if (np.abs(cut - table) > 1e-6).any():
        _log.warning("boxes: layout %d has boxes that leave the canvas; they are clipped to 0..1", number)
    return cut
