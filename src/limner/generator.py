"""A model that is ready to draw: conditions, guidance and a sampler in, pictures out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from limner import build
from limner.asked import Asked, Pictures, Wish, as_images, asked_of
from limner.config import BoxesCondition, RunConfig
from limner.core import guidance
from limner.core.inpainting import repaint
from limner.core.noise import initial_noise, slerp, step_noise
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
PROJECTIONS = 8
"""Times that a picture is made to agree with the small one that it enlarges: clamping undoes a part of each."""


@dataclass(frozen=True)
class Drawn:
    """A batch of samples.

    numbers: of the pictures, which with the seed decide their noise. latent: (B, c, h, w), as the sampler left it.
    facts: what each picture was asked to show, by modality, and `label_name`. skipped: guidance gradients that were
    not finite. hole: (B, C + 1, H, W), pictures of which all but the hole is kept. small: (B, C, h, w), what the
    pictures are to be when they are reduced.
    """

    numbers: range
    latent: Tensor
    facts: list[dict[str, Any]]
    skipped: int = 0
    hole: Tensor | None = None
    small: Tensor | None = None


@dataclass(frozen=True)
class Order:
    """What is to be drawn, checked and complete: `part` of the pictures from number `first` on, `shape` (C, H, W) in
    the network's space. tau: in place of the conditions."""

    part: range
    first: int
    batch: int
    seed: int
    asked: Asked
    shape: tuple[int, int, int]
    settings: Settings
    path: Path
    guide: Guide | None
    initial_noise: Tensor | None
    step_noise: Sequence[Tensor] | None
    tau: Embedded | None = None


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

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """Least and greatest scale that a student of guidance distillation knows; None for every other model."""
        return None if self.config.distillation is None else self.config.distillation.guidance

    def settings(self, **given: Any) -> Settings:
        """Complete settings from those given; None, or left out, stands for the run's own. Raises LimnerError."""
        return Settings.of(given).resolved(self.config.sampling)

    # --- drawing --------------------------------------------------------------------------------------------------

    def sample(self, *, output: Output = "pil", **options: Any) -> Any:
        """Draw pictures; the options are those of `stream`.

        Returns a list of PIL pictures; or uint8 (N, H, W, C) for output="array", float (N, C, H, W) in [-1, 1] for
        "tensor", the network's own space for "latent". Raises LimnerError for whatever doesn't fit the model.
        """
        return self._gathered(self.stream(**options), output)

    def _gathered(self, batches: Iterator[Drawn], output: Output) -> Any:
        if output not in OUTPUTS:
            raise LimnerError(f"output '{output}': there is none such{suggest(output, OUTPUTS)}")
        drawn = list(batches)
        if output == "latent":
            return torch.cat([each.latent for each in drawn])
        x = torch.cat([self.finished(each) for each in drawn])
        if output == "tensor":
            return x
        return to_uint8(x) if output == "array" else to_pil(to_uint8(x))

    def stream(
        self,
        *,
        num: int | None = None,
        label: Labels | None = None,
        text: str | Sequence[str] | Tensor | None = None,
        negative_text: str | Sequence[str] | Tensor | None = None,
        image: Pictures | None = None,
        mask: Pictures | None = None,
        semantic_map: Any = None,
        boxes: Any = None,
        strength: float | None = None,
        size: tuple[int, int] | None = None,
        conditions: Mapping[str, Any] | None = None,
        tau: Embedded | None = None,
        seed: int = 0,
        first: int = 0,
        part: range | None = None,
        batch: int = BATCH,
        on_step: OnStep | None = None,
        classifier: Any = None,
        classifier_label: Labels | None = None,
        initial_noise: Tensor | None = None,
        step_noise: Sequence[Tensor] | None = None,
        **settings: Any,
    ) -> Iterator[Drawn]:
        """Draw batch by batch, so that memory doesn't grow with `num`. Whatever is wrong is raised at once.

        num: how many pictures; by default one for each label, caption or picture given. Each condition is one for all,
        or a list, repeated in rotation to `num`; where nothing is asked for, a labelled model draws its classes.
        semantic_map: PIL pictures or integers (N, h, w), or floats (N, K, h, w). boxes: a list of (class, x, y, w, h)
        in 0..1, or a list of such lists. negative_text: what to move away from, instead of from nothing. Where a model
        came without its text encoder, both are such an encoder's output (N, L, D).
        image: pictures: floats (N, C, h, w) in [-1, 1], uint8 (N, h, w, C), or PIL. A super-resolution model enlarges
        them, a model of variations varies them. With `mask` (white is painted anew) any model paints in them, one that
        learned to by itself and others by RePaint (2201.09865); what the mask keeps stays to the bit.
        With `strength`, any model draws from them, noised up to t = strength (SDEdit, Meng et al. 2022, 2108.01073).
        size: (H, W) of the canvas, where it isn't that of training. conditions: by modality, as the data set's batches
        give them. tau: what `embed` gives, in place of conditions.
        seed, first: picture k has the noise of (seed, first + k), whatever the batch. part: only these k of `num`.
        classifier: a noisy classifier from `limner.load`, or any `log_prob(x_t, t) -> (B,)`; it acts with
        `classifier_scale`, towards `classifier_label` where that differs from `label`.
        initial_noise (N, C, H, W) and step_noise, one such tensor a step, stand in for the seed's.
        on_step(Step): told after each step of each batch. settings: the fields of `Settings`, such as guidance (a
        number, or one by modality), sampler, steps, spacing.
        """
        if self.config.task != "diffusion":
            raise LimnerError(f"this run is an {self.config.task}: it reconstructs pictures, it draws none")
        chosen = self.settings(**settings)
        given = None if initial_noise is None else len(initial_noise)
        given = given if tau is None else _length(tau)
        if isinstance(classifier, NoisyClassifier) and "label" not in self.modalities:
            label, classifier_label = None, label if classifier_label is None else classifier_label
            if classifier_label is not None and given is None:
                given = len(label_numbers(classifier_label, classifier.classes))
        shape = self.shape_for(size, classifier)
        wish = Wish(label, text, negative_text, image, mask, semantic_map, boxes, strength, conditions or {})
        asked = asked_of(self.config, wish, size or (self.config.data.size or (0, 0)))
        own = "label" if label is None and "label" not in wish.conditions else None
        asked = asked if tau is None else replace(asked, conditions={})
        asked, count = asked.rotated(given if num is None else num, own)
        guide = Guide.towards(classifier, classifier_label, asked.conditions.get("label"), count, chosen, self.config)
        self._check(chosen, classifier, batch, tau)
        self._check_told(chosen, negative=asked.negative is not None)
        if initial_noise is not None and initial_noise.shape != (count, *shape):
            raise LimnerError(f"initial_noise: {tuple(initial_noise.shape)}, should be {(count, *shape)}")
        path = self.schedule.path(chosen.steps, chosen.spacing)
        path = path if strength is None else path.truncate(strength)
        if step_noise is not None and len(step_noise) < path.steps - 1:
            raise LimnerError(f"step_noise: {len(step_noise)} tensors for {path.steps} steps")
        order = Order(
            part or range(count), first, batch, seed, asked, shape, chosen, path, guide, initial_noise, step_noise, tau
        )
        return self._batches(order, on_step)

    def _batches(self, order: Order, on_step: OnStep | None) -> Iterator[Drawn]:
        for start in order.part[:: order.batch]:
            rows = slice(start, min(start + order.batch, order.part.stop))
            numbers = range(order.first + rows.start, order.first + rows.stop)
            cond = {name: values[rows] for name, values in order.asked.conditions.items()}
            latent, skipped = self._draw(order, rows, numbers, cond, on_step)
            towards = None if order.guide is None or "label" in cond else order.guide.named(rows)
            hole = None if order.asked.hole is None else order.asked.hole[rows]
            small = self._small(cond) if order.settings.consistent else None
            yield Drawn(numbers, latent, self._facts(cond, len(numbers), towards), skipped, hole, small)

    @torch.no_grad()
    def _draw(self, order: Order, rows: slice, numbers: range, cond: Mapping[str, Any],
              on_step: OnStep | None) -> tuple[Tensor, int]:  # fmt: skip
        """One batch through the sampler: the result, and how many guidance gradients were not finite."""
        settings, batch, asked = order.settings, len(numbers), order.asked
        noise: Noise
        if order.step_noise is not None:
            given = order.step_noise
            noise = lambda k: given[k][rows].to(self.device, torch.float32)  # noqa: E731
        else:
            noise = step_noise(order.seed, numbers, order.shape, device=self.device)
        if order.initial_noise is not None:
            x = order.initial_noise[rows].to(self.device, torch.float32)
        else:
            x = initial_noise(order.seed, numbers, order.shape, device=self.device)
        if asked.start is not None:
            knot = order.path[0]
            x = knot.alpha * self.encode(asked.start[rows]).to(self.device) + knot.sigma * x
        with autocast(self.config.training.precision, self.device):
            size = order.shape[1:]
            tau = self.model.embed(cond, batch, size=size) if order.tau is None else order.tau[rows]
            negative = {} if asked.negative is None else {"text": asked.negative[rows]}
            negative |= {name: cond[name] for name in self.config.always if name in cond}
            denoise = self.denoiser(settings, batch, cond, size=size, negative=negative)
            gradient = None
            if order.guide is not None:
                gradient = guidance.ClassifierGradient(
                    order.guide.log_prob(rows, self.device), settings.classifier_scale, settings.interval
                )
                if settings.sampler != "ddpm":
                    denoise = guidance.ClassifierGuided(denoise, gradient, self.schedule)
            if asked.hole is not None and "mask" not in cond:
                known, hole = self._known(asked.hole[rows])
                x = repaint(denoise, x, order.path, known, hole, cond=tau, noise=noise, on_step=on_step)
                return x.float(), gradient.skipped if gradient is not None else 0
            options = settings.sampler_options()
            if settings.sampler == "ddpm":
                options["gradient"] = gradient
            x = SAMPLERS[settings.sampler](denoise, x, order.path, cond=tau, noise=noise, on_step=on_step, **options)
        return x.float(), gradient.skipped if gradient is not None else 0

    def _known(self, hole: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures with a hole (B, C + 1, H, W) in the network's space, and where the hole is there (B, 1, h, w)."""
        if self.model.autoencoder is not None:
            hole = self.model.hole_of_latents(self.model.autoencoder, hole)
        hole = hole.to(self.device).float()
        return hole[:, :-1], hole[:, -1:]

    def denoiser(self, settings: Settings, batch: int, cond: Mapping[str, Any], *, size: tuple[int, int],
                 negative: Mapping[str, Any]) -> Denoise:  # fmt: skip
        """The model under the classifier-free guidance and the clipping that the settings ask for.

        cond: what a scale by modality needs to know. size: of x_t. negative: what guidance moves away from.
        """
        plain = denoise = build.denoiser(self.model, self.config)

        def null() -> Embedded:
            return self.model.embed(negative, batch, size=size)

        if self.guidance_range is not None:
            told = partial(guidance.told, plain, embed=lambda tau, scale: replace(tau, guidance=scale))
            denoise = guidance.interval(told(settings.guidance), told(1.0), *settings.interval)
        elif settings.scales:
            always = {name: cond[name] for name in self.config.always if name in cond}
            names = [name for name in self.modalities if name in cond and name not in always]
            chain = settings.composition == "chain"
            parts = [{n: cond[n] for n in (*always, *(names[: k + 1] if chain else [name]))}
                     for k, name in enumerate(names)]  # fmt: skip
            taus = [self.model.embed(part, batch, size=size) for part in parts]
            denoise = guidance.composed(plain, [settings.scales.get(name, 1.0) for name in names], taus, null=null(),
                                        join=Embedded.cat, chained=chain)  # fmt: skip
        elif settings.guidance != 1:
            denoise = guidance.classifier_free(plain, settings.guidance, null=null(), join=Embedded.cat,
                                               every=settings.guidance_every)  # fmt: skip
        if denoise is not plain and self.guidance_range is None:
            denoise = guidance.rescaled(guidance.interval(denoise, plain, *settings.interval), settings.rescale)
        if settings.consistent and self.config.space.kind == "pixels":
            small = self._small(cond).to(self.device)
            reduce, enlarge = (partial(resampled, size=(s[0], s[1])) for s in (small.shape[2:], size))
            denoise = guidance.consistent(denoise, small, reduce, enlarge)
        return guidance.clipped(denoise) if settings.clip and self.config.space.kind == "pixels" else denoise

    def interpolate(self, *, num: int = 8, seed: tuple[int, int] = (0, 0), output: Output = "pil",
                    **options: Any) -> Any:  # fmt: skip
        """`num` pictures on the way from one to another: from seed[0] to seed[1], and from the first to the second of
        each condition that is given as a pair, such as text=("a red heart", "a blue star").

        Noise goes along the sphere (Shoemake 1985; Song et al. 2021, 2010.02502, appendix D.5), tau(y) along a line.
        The other options are those of `stream`. Raises LimnerError as `stream`, and for what isn't a pair.
        """
        if num < 2:
            raise LimnerError(f"num: {num}, should be 2 or more, from one picture to the other")
        pairs = {name: options.pop(name) for name in ("label", "text", "semantic_map", "boxes") if name in options}
        for name, pair in pairs.items():
            if isinstance(pair, str) or len(pair) != 2:
                raise LimnerError(f"{name}: should be two to go between")
        size = options.get("size") or self.config.data.size or (0, 0)
        shape = self.shape_for(size, None)
        ends = [initial_noise(one, [0], shape) for one in seed]
        share = torch.linspace(0, 1, num)
        found = asked_of(self.config, Wish(**pairs), size).conditions
        with torch.no_grad(), autocast(self.config.training.precision, self.device):
            tau = self.model.embed({name: found[name] for name in pairs}, 2, size=shape[1:])
            between = Embedded.lerp(tau[:1], tau[1:], share)
        noise = slerp(ends[0], ends[1], share)
        batches = self.stream(num=num, tau=between, initial_noise=noise, **options)
        return self._gathered(batches, output)

    def shape_for(self, size: tuple[int, int] | None, classifier: Any) -> tuple[int, int, int]:
        """(C, H, W) in the network's space for a canvas of `size`. Raises LimnerError for one that doesn't do."""
        if size is None or size == self.config.data.size:
            return self.shape
        if isinstance(classifier, NoisyClassifier):
            raise LimnerError(f"size {size[1]}x{size[0]}: a classifier guides pictures of its own size alone")
        config = self.config.model_copy(update={"data": self.config.data.model_copy(update={"size": size})})
        channels, height, width = build.space_shape(config)
        build.refuse_size("size", (height, width), getattr(self.model.network, "factor", 1), "the network")
        return channels, height, width

    def _check(self, settings: Settings, classifier: Any, batch: int, tau: Embedded | None) -> None:
        if batch < 1:
            raise LimnerError(f"batch: {batch}, should be 1 or more")
        guided = settings.guidance != 1 or settings.scales
        if guided and not self.modalities:
            raise LimnerError(f"guidance {settings.guidance:g}: this model is unconditional and has nothing to guide "
                              "by; leave it at 1, or give a classifier")  # fmt: skip
        if guided and not any(getattr(s, "null", True) for s in self.config.conditions):
            raise LimnerError(f"guidance {settings.guidance:g}: this model has no null condition, since it never "
                              "learned without one; leave it at 1, or give a classifier")  # fmt: skip
        if settings.consistent and "image" not in self.modalities:
            raise LimnerError("consistent: goes with a super-resolution model; this is none")
        for name in settings.scales or ():
            if name not in self.modalities:
                raise LimnerError(
                    f"guidance of {name}: this model was not trained with it{suggest(name, self.modalities)}"
                )
            if name in self.config.always:
                raise LimnerError(f"guidance of {name}: this model never learnt without it; leave it out")
        if settings.scales and tau is not None:
            raise LimnerError("guidance by modality: needs the conditions themselves, not tau")
        if settings.classifier_scale and classifier is None:
            raise LimnerError(f"classifier_scale {settings.classifier_scale:g}: needs a classifier")

    def _check_told(self, settings: Settings, *, negative: bool) -> None:
        """Raises LimnerError for what a student of guidance distillation doesn't know: it has one call, and a scale."""
        if self.guidance_range is None:
            return
        low, high = self.guidance_range
        if not low <= settings.guidance <= high:
            raise LimnerError(f"guidance {settings.guidance:g}: this model was distilled for {low:g} to {high:g}")
        two_halves = {"guidance by modality": settings.scales, "rescale": settings.rescale, "negative_text": negative,
                      "guidance_every": settings.guidance_every > 1,
                      "interval": settings.interval != (0.0, 1.0) and low > 1}  # fmt: skip
        for name in (name for name, asked in two_halves.items() if asked):
            raise LimnerError(f"{name}: this model was distilled to guide in one call and doesn't know it; its teacher "
                              "does")  # fmt: skip

    def _facts(self, cond: Mapping[str, Any], count: int,
               towards: list[dict[str, Any]] | None) -> list[dict[str, Any]]:  # fmt: skip
        """What each picture was asked to show; `towards`: by a classifier, where the model itself knows no labels."""
        facts: list[dict[str, Any]] = towards or [{} for _ in range(count)]
        names = next((s.names for s in self.config.conditions if isinstance(s, BoxesCondition)), ())
        for row, fact in enumerate(facts):
            if "label" in cond and (label := int(cond["label"][row])) >= 0:  # below 0: left open
                fact["label"], fact["label_name"] = label, self.classes[label]
            if "text" in cond:
                fact["text"] = cond["text"][row]
            if "boxes" in cond and cond["boxes"].ndim == 3:
                boxes = [box for box in cond["boxes"][row].tolist() if box[0] >= 0]
                fact["boxes"] = [[names[int(k)], *(round(value, 4) for value in span)] for k, *span in boxes]
        return facts

    # --- parts ----------------------------------------------------------------------------------------------------

    def finished(self, drawn: Drawn) -> Tensor:
        """The pictures (B, C, H, W) in [-1, 1] of a batch; what a mask keeps is put back as it was, and where it was
        asked for they agree with the small pictures."""
        x = self.decode(drawn.latent)
        if drawn.small is not None:
            x = agreeing(x, drawn.small.to(x))
        if drawn.hole is None:
            return x
        known, hole = drawn.hole[:, :-1], drawn.hole[:, -1:]
        return torch.where(hole > 0, x, known.to(x))

    def _small(self, cond: Mapping[str, Any]) -> Tensor:
        """The small pictures (B, C, h, w) that a batch enlarges, without the level of their noise."""
        return cond["image"][:, : self.config.data.channels].float()

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


def _length(tau: Embedded) -> int:
    return next((len(part) for part in (tau.vector, tau.tokens, tau.spatial) if part is not None), 1)


def resampled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (N, C, H, W) at another size: bicubic, antialiased where they shrink."""
    return F.interpolate(x, size, mode="bicubic", antialias=True)


def agreeing(x: Tensor, small: Tensor) -> Tensor:
    """Pictures (N, C, H, W) in [-1, 1] made to agree with small ones (N, C, h, w), by back-projection (Irani & Peleg
    1991); the rule of `core.guidance.consistent`, applied to what is finished."""
    for _ in range(PROJECTIONS):
        rest = small - resampled(x, (small.shape[2], small.shape[3]))
        x = (x + resampled(rest, (x.shape[2], x.shape[3]))).clamp(-1, 1)
    return x


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


def to_uint8(images: Tensor) -> npt.NDArray[np.uint8]:
    """Images (N, C, H, W) in [-1, 1] to uint8 (N, H, W, C)."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def to_pil(pictures: npt.NDArray[np.uint8]) -> list[Image.Image]:
    """uint8 (N, H, W, C) to PIL pictures, grey where C = 1."""
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pictures]
