"""Guidance: a denoiser around a denoiser. Wrappers compose with each other and with every sampler.

    denoise = classifier_free(network_denoiser(...), scale=3.0, join=Embedded.cat)
    denoise = interval(denoise, plain, 0.2, 0.8)
    denoise = clipped(rescaled(denoise, 0.7))
    denoise = classifier(denoise, log_prob, 2.0, schedule)      # outermost: Algorithm 2 does not clip again

Scales: s = 1 is off for everything that extrapolates from a weaker prediction, u + s (c - u). The classifier's scale
is its own: 0 is off. Predictions are those of x0; since eps, v and flow are affine in x0 at a given x_t, extrapolating
any of them with the same s is the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from limner.core.denoiser import per_image
from limner.core.path import Path
from limner.core.prediction import PredictionKind, from_x0, to_x0
from limner.core.schedule import Schedule
from limner.core.types import Cond, Denoise, Denoised, LogProb
from limner.errors import LimnerError, suggest

Join = Callable[[Sequence[Cond]], Cond]
"""The conditions of several batches, made that of one batch, in this order."""


Linear = Callable[[Tensor], Tensor]


def bind(denoise: Denoise, cond: Cond) -> Denoise:
    """A denoiser with its condition already given; another one handed to it is ignored."""
    return lambda x, t, _=None, /: denoise(x, t, cond)


def classifier_free(denoise: Denoise, scale: float | Tensor, *, null: Cond = None, join: Join | None = None,
                    every: int = 1) -> Denoise:  # fmt: skip
    """Classifier-free guidance, Ho & Salimans 2022 (2207.12598), eq. 6: u + s (c - u). The paper's w is s - 1.

    scale: s, or one by image (B,). null: what u is conditioned on: the null condition, or a negative one.
    join: makes one condition of [cond, null], so that c and u are one call of the network; None: two calls.
    every: u is computed at every so many steps; between them c - u stays what it was (measured in
        docs/distillation.md). It is remembered from step to step and forgotten when t rises or x has another shape:
        make one denoiser for each call of a sampler.
    s = 1 calls c alone, s = 0 u alone. The variance is that of c.
    """
    if every < 1:
        raise LimnerError(f"guidance every {every} steps: should be 1 (each) or more")
    memory = _Kept(every)

    def guided(x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        if not isinstance(scale, Tensor) and scale in (0, 1):
            return denoise(x, t, cond if scale == 1 else null)
        s = per_image(scale, x) if isinstance(scale, Tensor) else scale
        difference = memory.due(x, t)
        if difference is not None:
            c = denoise(x, t, cond)
            return replace(c, x0=c.x0 + (s - 1) * difference, plain=_plain(c))
        c, u = _pair(denoise, x, t, cond, null, join)
        memory.keep(c.x0 - u, t)
        return replace(c, x0=u + s * (c.x0 - u), plain=_plain(c))

    return guided


def told(denoise: Denoise, scale: float | Tensor, *, embed: Callable[[Cond, Tensor], Cond]) -> Denoise:
    """A network that is told the guidance scale s and guides in one call (Meng et al. 2023, 2210.03142).

    scale: s, or one by image (B,). embed: puts (B,) scales into the condition of a batch.
    """

    def guided(x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        return denoise(x, t, embed(cond, torch.as_tensor(scale, dtype=torch.float32, device=x.device).expand(len(x))))

    return guided


class _Kept:
    """What guidance remembers between steps: c - u, given back until it is `every` steps old."""

    def __init__(self, every: int) -> None:
        self.every, self.age = every, 0
        self.difference: Tensor | None = None
        self.t = 0.0

    def due(self, x: Tensor, t: Tensor) -> Tensor | None:
        """What is kept, if it still does at x and t; None where it is to be computed."""
        self.age += 1
        if self.difference is None or self.age >= self.every:
            return None
        return self.difference if self.difference.shape == x.shape and float(t.max()) < self.t else None

    def keep(self, difference: Tensor, t: Tensor) -> None:
        if self.every > 1:
            self.difference, self.t, self.age = difference, float(t.max()), 0


def composed(denoise: Denoise, scales: Sequence[float], parts: Sequence[Cond], *, null: Cond = None,
             join: Join | None = None, chained: bool = False) -> Denoise:  # fmt: skip
    """Several conditions, a scale each.

    chained=False, Liu et al. 2022 (2206.01714), eq. 11: u + sum_i s_i (c_i - u), `parts` each of the conditions alone.
    chained=True, InstructPix2Pix, Brooks et al. 2023 (2211.09800), eq. 3: each part holds all that came before it and
    one condition more, and s_i weighs what this one adds: u + sum_i s_i (c_i - c_{i-1}), c_0 = u.
    The condition handed to the denoiser is ignored. All predictions are one call of the network with `join`. The
    variance is that of the last part; `plain` is the sum with all scales at 1.
    """
    if len(scales) != len(parts) or not parts:
        raise LimnerError(f"guidance: {len(scales)} scales for {len(parts)} conditions, should be one for each")

    def guided(x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        *given, u = _all(denoise, x, t, [*parts, null], join)
        below = [u, *given[:-1]] if chained else [u] * len(given)
        plain = guided_x0 = u.x0
        for scale, part, base in zip(scales, given, below, strict=True):
            plain = plain + (part.x0 - base.x0)
            guided_x0 = guided_x0 + scale * (part.x0 - base.x0)
        return replace(given[-1], x0=guided_x0, plain=plain)

    return guided


def cfg_plus_plus(
    denoise: Denoise, scale: float, path: Path, *, null: Cond = None, join: Join | None = None
) -> Denoise:
    """CFG++, Chung et al. 2024 (2406.08070), Algorithm 2: guide x0 with lambda in [0, 1], renoise with the null eps.

    Its DDIM step, x' = alpha' (u + lambda (c - u)) + sigma' eps_u, is the DDIM step of classifier-free guidance whose
    scale depends on the step: s = lambda / (1 - exp(-h)), h = log(alpha' / sigma') - log(alpha / sigma). So it is a
    wrapper that knows the path, exact for `ddim` (eta = 0) and `euler`; the other samplers use the same scale.
    scale: the paper's lambda; about 0.6 is much. LimnerError outside [0, 1]. t must be a scalar, at a knot or between.
    """
    if not 0 <= scale <= 1:
        raise LimnerError(f"CFG++ scale {scale:g}: should be from 0 to 1 (0.6 acts like a guidance of about 7.5)")

    def guided(x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        here, there = next((pair for pair in path.pairs() if pair[1].t < float(t)), (path[-2], path[-1]))
        s = scale / -math.expm1((here.log_snr - there.log_snr) / 2)
        c, u = _pair(denoise, x, t, cond, null, join)
        return replace(c, x0=u + s * (c.x0 - u), plain=_plain(c))

    return guided


def apg(
    denoise: Denoise,
    scale: float,
    *,
    null: Cond = None,
    join: Join | None = None,
    parallel: float = 0.0,
    threshold: float | None = None,
    momentum: float = 0.0,
) -> Denoise:
    """Adaptive projected guidance, Sadat et al. 2024 (2410.02416), Algorithm 1: large scales without oversaturation.
    c + (s - 1) (orthogonal + eta parallel): the parts of c - u that are orthogonal and parallel to c.

    parallel: eta; 1 with the other two off is classifier-free guidance. threshold: r, the largest norm of c - u.
    momentum: beta, below 0 in the paper (-0.75). It is remembered from step to step and forgotten when t rises:
    make one denoiser for each call of a sampler.
    """
    memory: dict[str, Tensor] = {}

    def running(difference: Tensor, t: Tensor) -> Tensor:
        if momentum == 0:
            return difference
        if memory and memory["sum"].shape == difference.shape and float(t.max()) <= float(memory["t"]):
            difference = difference + momentum * memory["sum"]
        memory.update(sum=difference, t=t.max())
        return difference

    def guided(x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        c, u = _pair(denoise, x, t, cond, null, join)
        difference = running(c.x0 - u, t)
        if threshold is not None:
            norm = _norm(difference)
            difference = difference * torch.where(norm > threshold, threshold / norm, 1.0)
        direction = c.x0 / _norm(c.x0).clamp(min=1e-12)
        along = (difference * direction).sum(dim=_image_dims(x), keepdim=True) * direction
        return replace(c, x0=c.x0 + (scale - 1) * (difference - along + parallel * along), plain=_plain(c))

    return guided


def autoguided(denoise: Denoise, weak: Denoise, scale: float) -> Denoise:
    """Autoguidance, Karras et al. 2024 (2406.02507), eq. 5: weak + s (strong - weak), both with the condition; `weak`
    is a smaller or less trained version of the model, on the same schedule. s = 1 calls the strong one alone."""

    def guided(x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        strong = denoise(x, t, cond)
        if scale == 1:
            return strong
        worse = weak(x, t, cond).x0
        return replace(strong, x0=worse + scale * (strong.x0 - worse), plain=_plain(strong))

    return guided


def interval(guided: Denoise, plain: Denoise, lo: float, hi: float) -> Denoise:
    """Guidance for lo <= t <= hi only, Kynkaanniemi et al. 2024 (2404.07724), eq. 6; for an interval of sigma see
    `interval_of_sigma`. Only the one that is needed is called; both for a batch of t on both sides."""
    if not 0 <= lo <= hi <= 1:
        raise LimnerError(f"guidance interval {lo:g} to {hi:g}: should be 0 <= low <= high <= 1, in t")

    def limited(x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        inside = _within(t, lo, hi)
        if bool(inside.all()):
            return guided(x, t, cond)
        out = plain(x, t, cond)
        if not bool(inside.any()):
            return out
        picked = per_image(inside, x).bool()
        return replace(out, x0=torch.where(picked, guided(x, t, cond).x0, out.x0), plain=_plain(out))

    return limited


def interval_of_sigma(schedule: Schedule, lo: float, hi: float) -> tuple[float, float]:
    """The interval of t with lo <= sigma(t) / alpha(t) <= hi, the noise level of Karras et al. and of 2404.07724."""
    if not 0 <= lo <= hi:
        raise LimnerError(f"guidance interval of sigma {lo:g} to {hi:g}: should be 0 <= low <= high")
    log_snr = [math.inf if s == 0 else -math.inf if math.isinf(s) else -2 * math.log(s) for s in (lo, hi)]
    low, high = schedule.t_of_log_snr(torch.tensor(log_snr, dtype=torch.float64)).tolist()
    return low, high


def rescaled(
    guided: Denoise, phi: float, *, kind: PredictionKind = "sample", schedule: Schedule | None = None
) -> Denoise:
    """Rescaled guidance, Lin et al. 2024 (2305.08891), eq. 15-16: the guided prediction takes the standard deviation of
    the unguided one, image by image, by the share phi. Unchanged where nothing was guided (`Denoised.plain` is None).

    kind: the space in which deviations are compared. The paper takes the network's own output, and so does diffusers:
    give the network's prediction and its schedule to do as they do. The default, x0, is the space in which the fault
    that this repairs, overexposure, is seen; it does the same for every network, and agrees with v-prediction where
    it matters most, at alpha = 0, where v = -x0.
    """
    if not 0 <= phi <= 1:
        raise LimnerError(f"guidance rescale {phi:g}: should be from 0 (off) to 1")
    if kind != "sample" and schedule is None:
        raise LimnerError(f"rescaled guidance in the space of '{kind}' needs the schedule")

    def rescale(x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        out = guided(x, t, cond)
        if out.plain is None or phi == 0:
            return out
        if schedule is None:
            return replace(out, x0=_with_std_of(out.plain, out.x0, phi))
        alpha, sigma = per_image(schedule.alpha(t), x), per_image(schedule.sigma(t), x)
        raw, raw_plain = (from_x0(x0, x, alpha, sigma, kind) for x0 in (out.x0, out.plain))
        return replace(out, x0=to_x0(_with_std_of(raw_plain, raw, phi), x, alpha, sigma, kind))

    return rescale


def _with_std_of(plain: Tensor, guided: Tensor, phi: float) -> Tensor:
    dims = _image_dims(guided)
    ratio = plain.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True).clamp(min=1e-12)
    return guided * (phi * ratio + 1 - phi)


class ClassifierGradient:
    """s grad log p(y | x_t) by x_t, for `ddpm(gradient=...)` (Algorithm 1) and `classifier` (Algorithm 2) of Dhariwal &
    Nichol 2021 (2105.05233).

    log_prob: any `(x_t, t) -> (B,)` that torch can differentiate: a classifier, a likelihood, a similarity. It gets t
        as the sampler has it, a scalar.
    scale: s; 0 is off. interval: outside these t the gradient is zero and log_prob is not called.
    skipped: how many images' gradients so far were not finite, and were taken as zero.
    """

    def __init__(self, log_prob: LogProb, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> None:
        self.log_prob, self.scale, self.interval = log_prob, scale, interval
        self.skipped = 0

    def acts(self, t: Tensor) -> bool:
        """Whether it is on for any of these t."""
        return self.scale != 0 and bool(_within(t, *self.interval).any())

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None, /) -> Tensor:
        if not self.acts(t):
            return torch.zeros_like(x)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()  # a clone: inference tensors cannot require gradients
            log_prob = self.log_prob(leaf, t)
            if log_prob.shape != (len(x),) or not log_prob.requires_grad:
                raise LimnerError(
                    f"log_prob returned {tuple(log_prob.shape)} for a batch of {len(x)}: "
                    f"should be ({len(x)},) and depend on x_t by differentiable operations"
                )
            (gradient,) = torch.autograd.grad(log_prob.sum(), leaf)
        bad = ~gradient.flatten(1).isfinite().all(dim=1)
        self.skipped += int(bad.sum())
        off = per_image(bad | ~_within(t, *self.interval).to(bad.device), x).bool()
        return self.scale * gradient.to(x.dtype).masked_fill(off, 0.0)


class ClassifierGuided:
    """The denoiser that `classifier` makes. skipped: as in `ClassifierGradient`."""

    def __init__(self, denoise: Denoise, gradient: ClassifierGradient, schedule: Schedule) -> None:
        self.denoise, self.gradient, self.schedule = denoise, gradient, schedule

    @property
    def skipped(self) -> int:
        return self.gradient.skipped

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        out = self.denoise(x, t, cond)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        if not self.gradient.acts(t) or bool((alpha == 0).all()):
            return out
        gradient = self.gradient(x, t, cond)
        # By way of eps, as the paper and its code have it: near alpha = 0 float32 then rounds as theirs does.
        inverse, ratio = per_image(1 / alpha, x), per_image(sigma / alpha, x)
        eps = (inverse * x - out.x0) / ratio - per_image(sigma, x) * gradient
        x0 = torch.where(per_image(alpha, x) == 0, out.x0, inverse * x - ratio * eps)
        return replace(out, x0=x0, plain=_plain(out))


def classifier(
    denoise: Denoise,
    log_prob: LogProb,
    scale: float,
    schedule: Schedule,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
) -> ClassifierGuided:
    """Classifier guidance by Dhariwal & Nichol 2021 (2105.05233), Algorithm 2, which serves every sampler: in terms of
    the noise eps - sigma s grad log p(y | x_t), and so of the clean image x0 + sigma^2 / alpha s grad log p(y | x_t).

    log_prob, scale, interval: as in `ClassifierGradient`. At alpha = 0, x_t says nothing of y: no gradient is taken.
    Wrap it around `clipped`, not inside: the peer clips x0 before the gradient is added, and not after.
    Around `classifier_free` the two add up.
    """
    return ClassifierGuided(denoise, ClassifierGradient(log_prob, scale, interval), schedule)


def consistent(denoise: Denoise, small: Tensor, reduce: Linear, enlarge: Linear) -> Denoise:
    """x0 made to agree with what is known of it, small = reduce(x0): x0 + enlarge(small - reduce(x0)). It is the
    null-space rule of DDNM, Wang et al. 2022 (2212.00490), eq. 13, where enlarge is the pseudo-inverse of reduce, and
    back-projection (Irani & Peleg 1991) where it is near to one; from step to step the rest vanishes.

    small: (B, C, h, w), such as the picture that is enlarged. reduce, enlarge: linear maps to and from its size.
    """

    def agree(x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        out = denoise(x, t, cond)
        return replace(out, x0=out.x0 + enlarge(small - reduce(out.x0)), plain=_plain(out))

    return agree


def clipped(denoise: Denoise, kind: Literal["static", "dynamic"] = "static", *, quantile: float = 0.995) -> Denoise:
    """x0 kept in [-1, 1]: by clamping ("static"), or by clamping to the `quantile` of its absolute values and dividing
    by that where it is above 1 ("dynamic": Saharia et al. 2022, 2205.11487, section 2.3). For pixels, not latents."""
    if kind not in ("static", "dynamic"):
        raise LimnerError(f"unknown clipping '{kind}'{suggest(kind, ['static', 'dynamic'])}")

    def clip(x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        out = denoise(x, t, cond)
        if kind == "static":
            return replace(out, x0=out.x0.clamp(-1, 1))
        limit = per_image(torch.quantile(out.x0.abs().flatten(1).float(), quantile, dim=1), x).clamp(min=1)
        return replace(out, x0=out.x0.clamp(-limit, limit) / limit)

    return clip


def _pair(denoise: Denoise, x: Tensor, t: Tensor, cond: Cond, null: Cond, join: Join | None) -> tuple[Denoised, Tensor]:
    """The conditional prediction, and the x0 of the null one."""
    if join is None:
        return denoise(x, t, cond), denoise(x, t, null).x0
    both = denoise(torch.cat([x, x]), torch.cat([t, t]) if t.dim() else t, join([cond, null]))
    fraction, plain = (None if part is None else part[: len(x)] for part in (both.variance_fraction, both.plain))
    return Denoised(both.x0[: len(x)], fraction, plain), both.x0[len(x) :]


def _all(denoise: Denoise, x: Tensor, t: Tensor, conds: Sequence[Cond], join: Join | None) -> list[Denoised]:
    """The predictions of several conditions, by one call where they can be joined."""
    if join is None:
        return [denoise(x, t, cond) for cond in conds]
    n = len(conds)
    out = denoise(torch.cat([x] * n), torch.cat([t] * n) if t.dim() else t, join(conds))
    chunks = [[None] * n if part is None else part.chunk(n) for part in (out.x0, out.variance_fraction, out.plain)]
    return [Denoised(x0, fraction, plain) for x0, fraction, plain in zip(*chunks, strict=True) if x0 is not None]


def _plain(out: Denoised) -> Tensor:
    return out.x0 if out.plain is None else out.plain


def _within(t: Tensor, lo: float, hi: float) -> Tensor:
    return (t >= lo) & (t <= hi)


def _image_dims(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.dim()))


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(dim=_image_dims(x), keepdim=True).sqrt()
