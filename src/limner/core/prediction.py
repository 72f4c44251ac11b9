"""Between what a network predicts, the clean image x0 and the noise eps; targets and loss weights.

With x = alpha x0 + sigma eps, and no need for q = alpha^2 + sigma^2 to be 1:

| kind | raw output | x0 | eps |
| --- | --- | --- | --- |
| epsilon | eps (Ho et al. 2020) | (x - sigma raw) / alpha | raw |
| sample | x0 | raw | (x - alpha raw) / sigma |
| v_prediction | alpha eps - sigma x0 (Salimans & Ho 2022) | (alpha x - sigma raw) / q | (sigma x + alpha raw) / q |
| flow | eps - x0 (Liu et al. 2023) | (x - sigma raw) / (alpha + sigma) | (x + alpha raw) / (alpha + sigma) |

alpha and sigma are floats, or tensors that broadcast with x. v_prediction and flow work at every SNR; epsilon says
nothing of x0 in pure noise (alpha = 0), and x0 nothing of eps in a clean image (sigma = 0): these are refused.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from limner.errors import LimnerError, suggest

PredictionKind = Literal["epsilon", "sample", "v_prediction", "flow"]
Weighting = Literal["simple", "truncated_snr", "min_snr", "sigmoid"]
Scalar = Tensor | float

KINDS: tuple[PredictionKind, ...] = ("epsilon", "sample", "v_prediction", "flow")
WEIGHTINGS: tuple[Weighting, ...] = ("simple", "truncated_snr", "min_snr", "sigmoid")
_LOG_SNR_CLAMP = 20.0


def to_x0(raw: Tensor, x: Tensor, alpha: Scalar, sigma: Scalar, kind: PredictionKind) -> Tensor:
    """The clean image that a raw output stands for. LimnerError for epsilon at alpha = 0, and an unknown kind."""
    if kind == "epsilon":
        if _any_zero(alpha):
            raise LimnerError(
                "epsilon prediction at alpha = 0 (zero terminal SNR) says nothing of the image; "
                "use v_prediction, sample or flow, or a schedule that keeps some signal"
            )
        return (x - sigma * raw) / alpha
    if kind == "sample":
        return raw
    if kind == "v_prediction":
        return (alpha * x - sigma * raw) / (alpha**2 + sigma**2)
    if kind == "flow":
        return (x - sigma * raw) / (alpha + sigma)
    raise _unknown(kind)


def to_eps(raw: Tensor, x: Tensor, alpha: Scalar, sigma: Scalar, kind: PredictionKind) -> Tensor:
    """The noise that a raw output stands for. LimnerError for sample at sigma = 0, and an unknown kind."""
    if kind == "epsilon":
        return raw
    if kind == "sample":
        _need_noise(sigma)
        return (x - alpha * raw) / sigma
    if kind == "v_prediction":
        return (sigma * x + alpha * raw) / (alpha**2 + sigma**2)
    if kind == "flow":
        return (x + alpha * raw) / (alpha + sigma)
    raise _unknown(kind)


def from_x0(x0: Tensor, x: Tensor, alpha: Scalar, sigma: Scalar, kind: PredictionKind) -> Tensor:
    """The raw output that stands for x0 at x, the inverse of `to_x0`. LimnerError at sigma = 0, except for sample."""
    if kind == "sample":
        return x0
    _need_noise(sigma)
    return target(x0, (x - alpha * x0) / sigma, alpha, sigma, kind)


def target(x0: Tensor, eps: Tensor, alpha: Scalar, sigma: Scalar, kind: PredictionKind) -> Tensor:
    """What the network should return at x = alpha x0 + sigma eps. LimnerError for an unknown kind."""
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return alpha * eps - sigma * x0
    if kind == "flow":
        return eps - x0
    raise _unknown(kind)


def weight(
    log_snr: Tensor, weighting: Weighting, kind: PredictionKind, *, gamma: float = 5.0, bias: float = 0.0
) -> Tensor:
    """Weight of the squared error of the raw output, shaped like log_snr; finite at SNR 0 and infinity.

    | weighting | on the squared error of x0 | source |
    | --- | --- | --- |
    | simple | whatever makes it 1 on the raw output | Ho et al. 2020, eq. 14 |
    | truncated_snr | max(SNR, 1) | Salimans & Ho 2022, section 4 |
    | min_snr | min(SNR, gamma) | Hang et al. 2023 (2303.09556) |
    | sigmoid | SNR sigmoid(bias - log SNR) | Hoogeboom et al. 2024 (2410.19324), without d(log SNR)/dt |

    The x0 error is the raw error times 1/SNR (epsilon), 1/(1 + SNR) (v, on a variance-preserving schedule) or
    1/(1 + sqrt SNR)^2 (flow). The log-SNR is clamped to +-20.
    """
    if kind not in KINDS:
        raise _unknown(kind)
    log_snr = log_snr.clamp(-_LOG_SNR_CLAMP, _LOG_SNR_CLAMP)
    if weighting == "simple":
        return torch.ones_like(log_snr)
    if weighting == "truncated_snr":
        on_x0 = log_snr.clamp(min=0).exp()
    elif weighting == "min_snr":
        on_x0 = log_snr.clamp(max=math.log(gamma)).exp()
    elif weighting == "sigmoid":
        on_x0 = log_snr.exp() * torch.sigmoid(bias - log_snr)
    else:
        raise LimnerError(f"unknown loss weighting '{weighting}'{suggest(weighting, WEIGHTINGS)}")
    if kind == "epsilon":
        return on_x0 * torch.exp(-log_snr)
    if kind == "v_prediction":
        return on_x0 * torch.sigmoid(-log_snr)
    if kind == "flow":
        return on_x0 * torch.sigmoid(-log_snr / 2) ** 2
    return on_x0


def _any_zero(value: Scalar) -> bool:
    return bool((value == 0).any()) if isinstance(value, Tensor) else value == 0


def _need_noise(sigma: Scalar) -> None:
    if _any_zero(sigma):
        raise LimnerError("sigma = 0: a clean image says nothing of the noise; stop before t = 0")


def _unknown(kind: str) -> LimnerError:
    return LimnerError(f"unknown prediction '{kind}'{suggest(kind, KINDS)}")
