"""AdamW for every parameter, or Muon for the hidden matrices and AdamW for the rest: one optimizer, one state.

A step never asks a GPU for a number: clipping enters as a divisor of the gradients, and a bad gradient (NaN or
infinite) as a flag that leaves weights and state as they are, both as tensors.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from limner.config import TrainingConfig
from limner.errors import LimnerError
from limner.training.sharded import fill, local

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz coefficients of Muon (Jordan et al. 2024): steep at 0, singular values end within 0.7 to 1.2."""

NEWTON_SCHULZ_STEPS = 5
MUON_MOMENTUM = 0.95
ADAMW_EPS = 1e-8


def orthogonalised(matrices: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """The nearest semi-orthogonal matrices, U V^T of G = U S V^T, roughly: (..., m, n) -> (..., m, n), float32.

    Each step of the iteration is X <- (a + b A + c A^2) X with A = X X^T. For a wide X (the kernel of a 3x3
    convolution is nine times wider than high) the polynomials are multiplied up among the small matrices A, with which
    they commute, and meet X once at the end: the same result for about a third of the arithmetic. That needs float32:
    rounded to bfloat16, A has eigenvalues below 0, which the polynomials blow up.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    a, b, c = QUINTIC
    wide = x.shape[-1] >= 2 * x.shape[-2]
    if wide:
        gram = x @ x.mT
        product: Tensor | None = None
        for step in range(steps):
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
            product = polynomial if product is None else polynomial @ product
            if step + 1 < steps:
                gram = polynomial @ gram @ polynomial
        x = x if product is None else product @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@dataclass
class Bank:
    """Hidden weights of one shape, whose momenta live side by side: (k, rows, columns)."""

    parameters: list[nn.Parameter]
    momentum: Tensor

    @property
    def step_scale(self) -> float:
        """Makes the update's root mean square alike for matrices of all shapes (Jordan et al. 2024)."""
        rows, columns = self.momentum.shape[-2:]
        return math.sqrt(max(1.0, rows / columns))


class Optimizer:
    """Trains the parameters of one module that want a gradient.

    module: where they are found, by name. config: `optimizer`, `lr`, `muon_lr`, `betas`, `weight_decay` (decoupled;
    matrices and kernels only). hidden: with `optimizer: muon`, the names of the weights that Muon trains: matrices and
    kernels between the first layer and the last. Biases, norms, embeddings and the two ends stay with AdamW.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig, hidden: Collection[str] = ()) -> None:
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.config = config
        self.parameters = list(named.values())
        by_muon = [n for n in named if config.optimizer == "muon" and n in hidden and named[n].ndim >= 2]
        self._names = {p: name for name, p in named.items()}
        self._adamw = [p for name, p in named.items() if name not in set(by_muon)]
        self._moments = {p: _adamw_state(p) for p in self._adamw}
        self._banks = _banks([named[name] for name in by_muon])

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """What the last backward left; a parameter that took no part has none."""
        return [local(p.grad) for p in self.parameters if p.grad is not None]

    @torch.no_grad()
    def step(self, lr_share: float = 1.0, divisor: Tensor | None = None, bad: Tensor | None = None) -> None:
        """One update with learning rates times `lr_share`.

        divisor: scalar tensor >= 1 by which gradients are divided (clipping). bad: scalar tensor, 1 to leave weights
        and state untouched, 0 to update.
        """
        device = self.parameters[0].device
        divisor = torch.ones((), device=device) if divisor is None else divisor.float()
        bad = torch.zeros((), device=device) if bad is None else bad.float()
        known = device.type == "cpu"  # there the answer is at hand, and spares passes over all weights
        if known and bad > 0:
            return
        for bank in self._banks:
            self._step_muon(bank, self.config.muon_lr * lr_share, divisor, None if known else bad > 0)
        for decay, matrices in ((self.config.weight_decay, True), (0.0, False)):
            self._step_adamw([p for p in self._adamw if (p.ndim >= 2) == matrices and p.grad is not None],
                             self.config.lr * lr_share, decay, divisor, bad)  # fmt: skip

    def _step_adamw(
        self, parameters: list[nn.Parameter], lr: float, decay: float, divisor: Tensor, bad: Tensor
    ) -> None:
        states = [self._moments[p] for p in parameters]
        beta1, beta2 = self.config.betas
        adamw(
            [local(p) for p in parameters],
            [local(p.grad) for p in parameters if p.grad is not None],
            [local(s["mean"]) for s in states],
            [local(s["square"]) for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            grad_scale=divisor,
            found_inf=bad,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=decay,
            eps=ADAMW_EPS,
            maximize=False,
        )

    def _step_muon(self, bank: Bank, lr: float, divisor: Tensor, bad: Tensor | None) -> None:
        """Nesterov momentum, orthogonalised. A weight without a gradient counts as one with a gradient of zero."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bank.parameters]
        gradient = torch.stack([_matrix(g) for g in grads]).float().div_(divisor)
        gradient = gradient if bad is None else torch.where(bad, bank.momentum, gradient)
        bank.momentum.lerp_(gradient, 1.0 - MUON_MOMENTUM)
        update = orthogonalised(gradient.lerp_(bank.momentum, MUON_MOMENTUM)) * (-lr * bank.step_scale)
        update = update if bad is None else torch.where(bad, 0.0, update)
        weights = list[Tensor](bank.parameters)
        if self.config.weight_decay:
            left = 1.0 - lr * self.config.weight_decay
            torch._foreach_mul_(weights, left if bad is None else torch.where(bad, 1.0, left))
        views = [_last(w) for w in weights]
        torch._foreach_add_(views, [u.view(v.shape) for u, v in zip(update.unbind(), views, strict=True)])

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        """The state, live, as `parameter name.slot`: `mean`, `square` and `step` of AdamW, `momentum` of Muon."""
        for parameter, state in self._moments.items():
            for slot, tensor in state.items():
                yield f"{self._names[parameter]}.{slot}", tensor
        for bank in self._banks:
            for parameter, momentum in zip(bank.parameters, bank.momentum.unbind(), strict=True):
                yield f"{self._names[parameter]}.momentum", momentum

    def state_dict(self) -> dict[str, Tensor]:
        """The state by name, for a checkpoint."""
        return dict(self.slots())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back. Raises LimnerError naming the first entry that is missing, unknown or of another shape."""
        own = self.state_dict()
        for name in [*own, *state]:
            if name not in state or name not in own:
                whose = "the checkpoint lacks it" if name not in state else "this run's optimizer has none such"
                raise LimnerError(f"optimizer state '{name}': {whose}; resume with the run's own recipe")
            if own[name].shape != state[name].shape:
                raise LimnerError(
                    f"optimizer state '{name}': is {list(state[name].shape)} in the checkpoint and "
                    f"{list(own[name].shape)} here; resume with the run's own recipe"
                )
        for name, tensor in own.items():
            fill(tensor, state[name])


def _adamw_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Moments in the memory layout of their parameter, as the fused kernel wants them."""
    data = parameter.detach()
    step = torch.zeros((), dtype=torch.float32, device=data.device)
    return {"mean": torch.zeros_like(data), "square": torch.zeros_like(data), "step": step}


def _last(weight: Tensor) -> Tensor:
    """A view with a kernel's input channels last, which lie together in memory in channels_last."""
    return weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight


def _matrix(weight: Tensor) -> Tensor:
    """A matrix as it is, a kernel (out, in, h, w) as (out, h w in); the order of columns is all the same to Muon."""
    return _last(weight).flatten(1)


def _banks(parameters: list[nn.Parameter]) -> list[Bank]:
    by_shape: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault((tuple(parameter.flatten(1).shape), parameter.device), []).append(parameter)
    return [
        Bank(members, torch.zeros(len(members), *shape, dtype=torch.float32, device=device))
        for (shape, device), members in by_shape.items()
    ]
