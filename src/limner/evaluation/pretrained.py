"""Feature networks that need a package or a download: Inception, DINOv2, CLIP."""

from __future__ import annotations

import hashlib
import importlib
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.errors import LimnerError
from limner.evaluation.features import SPATIAL_VALUES, FeatureNetwork, Pictures, as_rgb, resized, resizing

INCEPTION_VARIABLE = "LIMNER_INCEPTION"
"""Environment variable that names the file of Inception's weights."""


class Inception(FeatureNetwork):
    """FID's Inception v3 of 2015, as torch-fidelity has it, weights converted from TensorFlow's.

    pooled: 2048. spatial: 7 channels of the 17x17 map that sFID is defined on (Nash et al. 2021, arXiv:2103.03841, as
    measured by guided-diffusion's evaluator). logits: 1008 classes, without bias, as in the Inception score.
    `inception` resizes to 299 by bicubic with antialiasing (clean-fid); `inception-tf` leaves it to the network's own
    bilinear, which does not antialias: for comparison with figures published before.
    """

    name = "inception"
    dim = 2048
    SIDE = 299
    SPATIAL = 7

    def __init__(
        self,
        weights: str | None = None,
        device: torch.device | str = "cpu",
        side: int | None = None,
        *,
        antialiased: bool = True,
    ) -> None:
        super().__init__(device, self.SIDE)
        if side not in (None, self.SIDE):
            raise LimnerError(f"inception@{side}: this network takes {self.SIDE} pixels")
        self.antialiased = antialiased
        self.name = "inception" if antialiased else "inception-tf"
        extractor = _package("torch_fidelity.feature_extractor_inceptionv3", "inception", "limner[inception]")
        path = weights or os.environ.get(INCEPTION_VARIABLE)
        if path is not None and not Path(path).is_file():
            raise LimnerError(f"{path}: no such file; it should hold Inception's weights, as torch-fidelity has them")
        try:
            if path is not None:
                torch.load(path, map_location="cpu", weights_only=True)  # refuses pickled code, whatever comes after
            self.body: Any = extractor.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
            )
        except Exception as error:  # whatever the download or the unpickler raises
            raise LimnerError(_unavailable("inception", path, error)) from None
        self.body.eval().requires_grad_(False).to(self.device)
        self.body.Mixed_6d.branch1x1.conv.register_forward_hook(self._keep_spatial)
        self.digest = "" if path is None else _file_digest(path)

    def __call__(self, pictures: Pictures) -> dict[str, Tensor]:
        x = as_rgb(pictures).to(self.device)
        with torch.inference_mode():
            found = self.features(resized(x, self.SIDE) if self.antialiased else x)
        return {key: value.float().cpu() for key, value in found.items()}

    def features(self, x: Tensor) -> dict[str, Tensor]:
        pooled, logits = self.body(x)
        return {"pooled": pooled.flatten(1), "spatial": self._spatial.flatten(1), "logits": logits}

    def recipe(self, size: tuple[int, ...]) -> str:
        way = "" if self.antialiased else f"{size[0]}x{size[1]} resized to {self.SIDE} bilinear without antialiasing"
        words = [self.name, way or resizing(size, self.SIDE), self.precision]
        return ", ".join(words + ([f"weights {self.digest}"] if self.digest else []))

    @property
    def precision(self) -> str:
        return "fp32"

    def _keep_spatial(self, module: torch.nn.Module, given: Any, output: Tensor) -> None:
        self._spatial = output[:, : self.SPATIAL]


class _Transformer(FeatureNetwork, ABC):
    """A vision transformer of `transformers`, from a folder or the hub; safetensors only."""

    default: str
    dim = 0

    def __init__(self, source: str | None, device: torch.device | str, side: int | None) -> None:
        super().__init__(device, side)
        self.source = source or self.default
        transformers = _package("transformers", self.name, "limner[text]")
        try:
            self.body: Any = self.load(transformers)
        except Exception as error:  # transformers raises OSError, ValueError, and the hub's own
            raise LimnerError(_unavailable(self.name, self.source, error)) from None
        self.body.eval().requires_grad_(False).to(self.device)
        self.digest = str(getattr(self.body.config, "_commit_hash", None) or "")[:12] or _weights_digest(self.body)

    @abstractmethod
    def load(self, transformers: Any) -> Any:
        """The network from `self.source`."""

    def recipe(self, size: tuple[int, ...]) -> str:
        return f"{super().recipe(size)}, weights {Path(self.source).name} {self.digest}"

    @property
    def precision(self) -> str:
        return "fp32"


class DINOv2(_Transformer):
    """DINOv2 (Oquab et al. 2023, arXiv:2304.07193), which Stein et al. 2023 (arXiv:2306.04675) find nearest to people's
    judgement. pooled: the class token. spatial: the first channels of the patch tokens."""

    name = "dinov2"
    default = "facebook/dinov2-base"
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

    def __init__(self, source: str | None = None, device: torch.device | str = "cpu", side: int | None = None) -> None:
        super().__init__(source, device, side or 224)
        self.dim = int(self.body.config.hidden_size)

    def load(self, transformers: Any) -> Any:
        return transformers.AutoModel.from_pretrained(self.source, use_safetensors=True)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        found = self.body(pixel_values=x)
        patches = found.last_hidden_state[:, 1:]
        channels = max(1, SPATIAL_VALUES // patches.shape[1])
        return {"pooled": found.pooler_output, "spatial": patches[..., :channels].flatten(1)}


class CLIP(_Transformer):
    """CLIP's picture encoder (Radford et al. 2021, arXiv:2103.00020). pooled: the projected embedding."""

    name = "clip"
    default = "openai/clip-vit-large-patch14"
    mean, std = (122.771, 116.746, 104.094), (68.5, 66.632, 70.323)

    def __init__(self, source: str | None = None, device: torch.device | str = "cpu", side: int | None = None) -> None:
        super().__init__(source, device, side)
        self.fixed_side = side or int(self.body.config.image_size)
        self.dim = int(self.body.config.projection_dim)

    def load(self, transformers: Any) -> Any:
        return transformers.CLIPVisionModelWithProjection.from_pretrained(self.source, use_safetensors=True)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        return {"pooled": self.body(pixel_values=x).image_embeds}


def _package(module: str, name: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise LimnerError(f"features '{name}': a package is missing; pip install '{extra}'") from None


def _unavailable(name: str, source: str | None, error: Exception) -> str:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    if name == "inception" and source is None:
        return (
            f"features 'inception': the weights cannot be downloaded ({why}); give a file as inception:FILE or in the "
            f"variable {INCEPTION_VARIABLE}"
        )
    return f"features '{name}': {source} cannot be loaded ({why})"


def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _weights_digest(network: torch.nn.Module) -> str:
    """Of all weights, so that two checkpoints of one name are never taken for each other."""
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()[:12]
