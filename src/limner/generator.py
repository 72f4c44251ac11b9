"""A model that is ready to draw: conditions, guidance and a sampler in, pictures out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from limner import build
from limner.config import RunConfig
from limner.core import guidance
from limner.core.noise import initial_noise, step_noise
from limner.core.path import Path
from limner.core.samplers import SAMPLERS
from limner.core.types import Denoise, Noise, OnStep
from limner.errors import LimnerError, suggest
from limner.guide import Guide, Labels, Loaded, NoisyClassifier, label_numbers
from limner.hardware import autocast
from limner.nn.conditioners import Embedded
from limner.settings import Settings

OUTPUTS = ("pil", "array", "tensor", "latent")
Output = Literal["pil", "array", "tensor", "latent"]
BATCH = 64
Pictures = Tensor | npt.NDArray[np.uint8] | Image.Image | Sequence[Image.Image]


@dataclass(frozen=True)
class Drawn:
    """A batch of samples.

    numbers: of the pictures, which with the seed decide their noise. latent: (B, c, h, w), as the sampler left it.
    facts: what each picture was asked to show, by modality, and `label_name`. skipped: guidance gradients that were
    not finite.
    """

    numbers: range
    latent: Tensor
    facts: list[dict[str, Any]]
    skipped: int = 0


@dataclass(frozen=True)
class Order:
    """What is to be drawn, checked and complete: `num` pictures from number `first` on."""

    num: int
    first: int
    batch: int
    seed: int
    conditions: Mapping[str, Any]
    settings: Settings
    path: Path
    guide: Guide | None
    initial_noise: Tensor | None
    step_noise: Sequence[Tensor] | None


@dataclass
class Generator(Loaded):
    """A diffusion model that draws: what `limner.load` gives for a run or an imported checkpoint.

    Networks run under bf16 autocast where the recipe's precision and the machine say so.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shape = build.space_shape(self.config)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The conditions that the model was trained with."""
        return tuple(section.kind for section in self.config.conditions)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, in order; empty for a model without labels."""
        return tuple(self.config.classes or ()) if "label" in self.modalities else ()

    def settings(self, **given: Any) -> Settings:
        """Complete settings from those given; None, or left out, stands for the run's own. Raises LimnerError."""
        return Settings.of(given).resolved(self.config.sampling)

    # --- drawing --------------------------------------------------------------------------------------------------

    def sample(self, *, output: Output = "pil", **options: Any) -> Any:
        """Draw pictures; the options are those of `stream`.

        Returns a list of PIL pictures; or uint8 (N, H, W, C) for output="array", float (N, C, H, W) in [-1, 1] for
        "tensor", the network's own space for "latent". Raises LimnerError for whatever doesn't fit the model.
        """
        if output not in OUTPUTS:
            raise LimnerError(f"output '{output}': there is none such{suggest(output, OUTPUTS)}")
        latent = torch.cat([drawn.latent for drawn in self.stream(**options)])
        if output == "latent":
            return latent
        x = self.decode(latent)
        if output == "tensor":
            return x
        return to_uint8(x) if output == "array" else to_pil(to_uint8(x))

    def stream(
        self,
        *,
        num: int | None = None,
        label: Labels | None = None,
        text: str | Sequence[str] | None = None,
        image: Pictures | None = None,
        seed: int = 0,
        first: int = 0,
        batch: int = BATCH,
        on_step: OnStep | None = None,
        classifier: Any = None,
        classifier_label: Labels | None = None,
        initial_noise: Tensor | None = None,
        step_noise: Sequence[Tensor] | None = None,
        **settings: Any,
    ) -> Iterator[Drawn]:
        """Draw batch by batch, so that memory doesn't grow with `num`. Whatever is wrong is raised at once.

        num: how many pictures; by default one for each label, caption or picture given. label, text: one for all, or a
        list, repeated in rotation to `num`; where none is given, a labelled model draws its classes in rotation.
        image: pictures to enlarge, for a super-resolution model: floats (N, C, h, w) in [-1, 1], uint8 (N, h, w, C),
        or PIL.
        seed, first: picture k has the noise of (seed, first + k), whatever the batch.
        classifier: a noisy classifier from `limner.load`, or any `log_prob(x_t, t) -> (B,)`; it acts with
        `classifier_scale`, towards `classifier_label` where that differs from `label`.
        initial_noise (N, C, H, W) and step_noise, one such tensor a step, stand in for the seed's.
        on_step(Step): told after each step of each batch. settings: the fields of `Settings`, such as guidance,
        sampler, steps, spacing.
        """
        if self.config.task != "diffusion":
            raise LimnerError(f"this run is an {self.config.task}: it reconstructs pictures, it draws none")
        asked = self.settings(**settings)
        given = None if initial_noise is None else len(initial_noise)
        if isinstance(classifier, NoisyClassifier) and "label" not in self.modalities:
            label, classifier_label = None, label if classifier_label is None else classifier_label
            given = (
                len(label_numbers(classifier_label, classifier.classes))
                if classifier_label is not None and given is None
                else given
            )
        conditions, count = self._conditions(label, text, image, given if num is None else num)
        guide = Guide.towards(classifier, classifier_label, conditions.get("label"), count, asked, self.config)
        self._check(asked, classifier, batch)
        if initial_noise is not None and initial_noise.shape != (count, *self.shape):
            raise LimnerError(f"initial_noise: {tuple(initial_noise.shape)}, should be {(count, *self.shape)}")
        path = self.schedule.path(asked.steps, asked.spacing)
        if step_noise is not None and len(step_noise) < path.steps - 1:
            raise LimnerError(f"step_noise: {len(step_noise)} tensors for {path.steps} steps")
        order = Order(count, first, batch, seed, conditions, asked, path, guide, initial_noise, step_noise)
        return self._batches(order, on_step)

    def _batches(self, order: Order, on_step: OnStep | None) -> Iterator[Drawn]:
        for start in range(0, order.num, order.batch):
            rows = slice(start, min(start + order.batch, order.num))
            numbers = range(order.first + rows.start, order.first + rows.stop)
            cond = {name: values[rows] for name, values in order.conditions.items()}
            latent, skipped = self._draw(order, rows, numbers, cond, on_step)
            towards = None if order.guide is None or "label" in cond else order.guide.named(rows)
            yield Drawn(numbers, latent, self._facts(cond, len(numbers), towards), skipped)

    @torch.no_grad()
    def _draw(self, order: Order, rows: slice, numbers: range, cond: Mapping[str, Any],
              on_step: OnStep | None) -> tuple[Tensor, int]:  # fmt: skip
        """One batch through the sampler: the result, and how many guidance gradients were not finite."""
        settings, batch = order.settings, len(numbers)
        noise: Noise
        if order.step_noise is not None:
            given = order.step_noise
            noise = lambda k: given[k][rows].to(self.device, torch.float32)  # noqa: E731
        else:
            noise = step_noise(order.seed, numbers, self.shape, device=self.device)
        if order.initial_noise is not None:
            x = order.initial_noise[rows].to(self.device, torch.float32)
        else:
            x = initial_noise(order.seed, numbers, self.shape, device=self.device)
        with autocast(self.config.training.precision, self.device):
            tau = self.model.embed(cond, batch)
            denoise = self.denoiser(settings, batch)
            gradient = None
            if order.guide is not None:
                gradient = guidance.ClassifierGradient(
                    order.guide.log_prob(rows, self.device), settings.classifier_scale, settings.interval
                )
                if settings.sampler != "ddpm":
                    denoise = guidance.ClassifierGuided(denoise, gradient, self.schedule)
            options = settings.sampler_options()
            if settings.sampler == "ddpm":
                options["gradient"] = gradient
            x = SAMPLERS[settings.sampler](denoise, x, order.path, cond=tau, noise=noise, on_step=on_step, **options)
        return x.float(), gradient.skipped if gradient is not None else 0

    def denoiser(self, settings: Settings, batch: int) -> Denoise:
        """The model under the classifier-free guidance and the clipping that the settings ask for."""
        plain = denoise = build.denoiser(self.model, self.config)
        if settings.guidance != 1:
            null = self.model.embed({}, batch)
            denoise = guidance.classifier_free(plain, settings.guidance, null=null, join=Embedded.cat)
            denoise = guidance.rescaled(guidance.interval(denoise, plain, *settings.interval), settings.rescale)
        return guidance.clipped(denoise) if settings.clip and self.config.space.kind == "pixels" else denoise

    def _check(self, settings: Settings, classifier: Any, batch: int) -> None:
        if batch < 1:
            raise LimnerError(f"batch: {batch}, should be 1 or more")
        if settings.guidance != 1 and not self.modalities:
            raise LimnerError(f"guidance {settings.guidance:g}: this model is unconditional and has nothing to guide "
                              "by; leave it at 1, or give a classifier")  # fmt: skip
        if settings.guidance != 1 and not any(getattr(s, "null", True) for s in self.config.conditions):
            raise LimnerError(f"guidance {settings.guidance:g}: this model has no null condition, since it never "
                              "learned without one; leave it at 1, or give a classifier")  # fmt: skip
        if settings.classifier_scale and classifier is None:
            raise LimnerError(f"classifier_scale {settings.classifier_scale:g}: needs a classifier")

    def _conditions(self, label: Labels | None, text: str | Sequence[str] | None, image: Pictures | None,
                    num: int | None) -> tuple[dict[str, Any], int]:  # fmt: skip
        """What each of the pictures is asked to show, by modality, and how many there are."""
        for name, value in (("label", label), ("text", text), ("image", image)):
            if value is not None and name not in self.modalities:
                had = f"it has {' and '.join(self.modalities)}" if self.modalities else "it is unconditional"
                raise LimnerError(f"{name}: this model was not trained with it; {had}")
        lists: dict[str, Any] = {}
        if label is not None:
            lists["label"] = label_numbers(label, self.classes)
        elif "label" in self.modalities:
            lists["label"] = torch.arange(len(self.classes))
        if text is not None:
            lists["text"] = [text] if isinstance(text, str) else list(text)
        if image is not None:
            lists["image"] = as_images(image)
        asked = max((len(v) for k, v in lists.items() if (k, label) != ("label", None)), default=1)
        num = asked if num is None else num
        if num < 1 or any(len(values) == 0 for values in lists.values()):
            raise LimnerError(f"num: {num}, should be 1 or more, with at least one label or caption")
        rows = [{name: k % len(values) for name, values in lists.items()} for k in range(num)]
        conditions = {
            name: values[torch.tensor([row[name] for row in rows])]
            if isinstance(values, Tensor)
            else [values[row[name]] for row in rows]
            for name, values in lists.items()
        }
        return conditions, num

    def _facts(self, cond: Mapping[str, Any], count: int,
               towards: list[dict[str, Any]] | None) -> list[dict[str, Any]]:  # fmt: skip
        """What each picture was asked to show; `towards`: by a classifier, where the model itself knows no labels."""
        facts: list[dict[str, Any]] = towards or [{} for _ in range(count)]
        for name, values in cond.items():
            if name == "image":
                continue
            for fact, value in zip(facts, values, strict=True):
                fact[name] = int(value) if isinstance(value, Tensor) else value
                if name == "label":
                    fact["label_name"] = self.classes[fact["label"]]
        return facts

    # --- parts ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = BATCH) -> Tensor:
        """Latents (N, c, h, w) to images (N, C, H, W) in [-1, 1]; pixels stay what they are."""
        if self.model.autoencoder is None:
            return latents.cpu()
        return decode(self.model.autoencoder, latents, self.config, self.device, batch)

    @torch.no_grad()
    def encode(self, images: Tensor, batch: int = BATCH) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] to normalised latents (N, c, h, w); pixels stay what they are."""
        if self.model.autoencoder is None:
            return images
        return encode(self.model.autoencoder, images, self.config, self.device, batch)

    def reconstruct(self, images: Tensor, batch: int = BATCH) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] through the autoencoder and back."""
        return self.decode(self.encode(images, batch), batch)

    @torch.no_grad()
    def raw(self, x_t: Tensor, step: Tensor, **cond: Any) -> Tensor:
        """The raw network at DDPM steps (B,) int, all channels: (B, C or 2C, H, W). For comparison with its source."""
        return self.model.raw(x_t.to(self.device), build.step_time(step, self.config).to(self.device),
                              self.embed(len(x_t), **cond))  # fmt: skip

    @torch.no_grad()
    def embed(self, batch: int | None = None, **cond: Any) -> Embedded:
        """tau(y) of a batch; names of labels and numbers do alike."""
        if cond.get("label") is not None:
            cond["label"] = label_numbers(cond["label"], self.classes)
        if cond.get("image") is not None:
            cond["image"] = as_images(cond["image"])
        cond = {name: value for name, value in cond.items() if value is not None}
        size = batch if batch is not None else max((len(value) for value in cond.values()), default=1)
        return self.model.embed(cond, size)


def encode(autoencoder: Any, images: Tensor, config: RunConfig, device: torch.device, batch: int) -> Tensor:
    """Images (N, C, H, W) to the normalised mode of their latents (N, c, h, w), in batches, on the CPU."""
    with autocast(config.training.precision, device):
        parts = [autoencoder.normalise(autoencoder.encode(x.to(device)).mode()) for x in images.split(batch)]
    return torch.cat([z.float().cpu() for z in parts])


def decode(autoencoder: Any, latents: Tensor, config: RunConfig, device: torch.device, batch: int) -> Tensor:
    """Normalised latents (N, c, h, w) to images (N, C, H, W), in batches, on the CPU."""
    with autocast(config.training.precision, device):
        parts = [autoencoder.decode(autoencoder.denormalise(z.to(device))) for z in latents.split(batch)]
    return torch.cat([x.float().cpu() for x in parts]).clamp(-1, 1)


def as_images(pictures: Pictures) -> Tensor:
    """Pictures of any kind as floats (N, C, h, w) in [-1, 1]. Raises LimnerError for another shape or for nothing."""
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if not isinstance(pictures, Tensor | np.ndarray):
        pictures = np.stack([np.asarray(p)[..., None] if p.mode == "L" else np.asarray(p) for p in pictures])
    if isinstance(pictures, np.ndarray):
        pictures = torch.from_numpy(pictures).movedim(-1, 1).float() / 127.5 - 1
    if pictures.ndim != 4:
        raise LimnerError(f"image: shape {tuple(pictures.shape)}, should be (N, C, h, w)")
    return pictures


def to_uint8(images: Tensor) -> npt.NDArray[np.uint8]:
    """Images (N, C, H, W) in [-1, 1] to uint8 (N, H, W, C)."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def to_pil(pictures: npt.NDArray[np.uint8]) -> list[Image.Image]:
    """uint8 (N, H, W, C) to PIL pictures, grey where C = 1."""
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pictures]
