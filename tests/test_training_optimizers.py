"""AdamW against torch's, Muon against the definition, and what a bad gradient must not do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from limner.config import TrainingConfig
from limner.errors import LimnerError
from limner.training.optimizers import MUON_MOMENTUM, Optimizer, orthogonalised


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.hidden1 = nn.Conv2d(8, 8, 3, padding=1)
        self.hidden2 = nn.Conv2d(8, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 4, 1)
        self.last = nn.Linear(4, 2)
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(self.hidden2(torch.tanh(self.hidden1(torch.tanh(self.first(x))))))
        return self.last(x.mean(dim=(2, 3)))


HIDDEN = ("hidden1.weight", "hidden2.weight", "narrow.weight", "hidden1.bias")


def backward(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = None
    x = torch.randn(4, 3, 6, 6, generator=generator)
    if next(module.parameters()).is_contiguous(memory_format=torch.channels_last):
        x = x.to(memory_format=torch.channels_last)
    module(x).pow(2).mean().backward()


def pair(**settings: object) -> tuple[Small, Small, TrainingConfig]:
    torch.manual_seed(0)
    one = Small()
    two = Small()
    two.load_state_dict(one.state_dict())
    return one, two, TrainingConfig.model_validate(settings)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_adamw_is_torchs(layout: torch.memory_format) -> None:
    ours, theirs, config = pair(lr=1e-2, weight_decay=0.1)
    ours = ours.to(memory_format=layout)
    optimizer = Optimizer(ours, config)
    decayed = [p for p in theirs.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in theirs.parameters() if p.requires_grad and p.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1
    )
    for seed in range(5):
        backward(ours, seed)
        backward(theirs, seed)
        optimizer.step()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 16, 144), (2, 48, 16), (1, 24, 24), (2, 10, 12)])
def test_orthogonalised_keeps_directions_and_flattens_singular_values(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = orthogonalised(matrices)
    assert result.shape == matrices.shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    core = u.mT @ result @ vh.mT
    off = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3


def test_the_short_way_for_wide_matrices_gives_the_plain_iteration() -> None:
    wide = torch.randn(2, 12, 108, generator=torch.Generator().manual_seed(2))
    x = wide / wide.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(orthogonalised(wide), x, rtol=1e-4, atol=1e-5)


def test_muon_by_its_definition_and_adamw_for_the_rest() -> None:
    ours, theirs, config = pair(lr=1e-2, muon_lr=0.03, optimizer="muon", weight_decay=0.1)
    optimizer = Optimizer(ours, config, HIDDEN)
    hidden = [n for n in HIDDEN if n.endswith("weight")]
    rest = [p for n, p in theirs.named_parameters() if p.requires_grad and n not in hidden]
    reference = torch.optim.AdamW(
        [{"params": [p for p in rest if p.ndim >= 2]}, {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0}],
        lr=1e-2,
        betas=(0.9, 0.99),
        weight_decay=0.1,
    )
    momenta = {name: torch.zeros(p.shape).flatten(1) for name, p in theirs.named_parameters() if name in hidden}
    for seed in range(4):
        backward(ours, seed)
        backward(theirs, seed)
        optimizer.step()
        reference.step()
        for name, p in theirs.named_parameters():
            if name not in hidden:
                continue
            assert p.grad is not None
            g = p.grad.flatten(1)
            momenta[name] = MUON_MOMENTUM * momenta[name] + (1 - MUON_MOMENTUM) * g
            nesterov = (1 - MUON_MOMENTUM) * g + MUON_MOMENTUM * momenta[name]
            scale = math.sqrt(max(1.0, nesterov.shape[0] / nesterov.shape[1]))
            update = 0.03 * scale * orthogonalised(nesterov[None])[0]
            p.data.mul_(1 - 0.03 * 0.1).sub_(update.view(p.shape))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_muon_trains_only_the_hidden_matrices() -> None:
    optimizer = Optimizer(Small(), TrainingConfig(optimizer="muon"), HIDDEN)
    slots = dict(optimizer.slots())
    assert {n.removesuffix(".momentum") for n in slots if n.endswith("momentum")} == {
        "hidden1.weight", "hidden2.weight", "narrow.weight"}  # fmt: skip
    assert "first.weight.mean" in slots
    assert "last.weight.square" in slots
    assert not any(n.startswith("fixed") for n in slots)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_gradient_leaves_weights_and_state(kind: str, poison: float) -> None:
    module, _, config = pair(optimizer=kind, weight_decay=0.1)
    optimizer = Optimizer(module, config, HIDDEN)
    backward(module, 0)
    optimizer.step()
    weights = {n: t.clone() for n, t in module.state_dict().items()}
    state = {n: t.clone() for n, t in optimizer.state_dict().items()}
    backward(module, 1)
    for gradient in optimizer.gradients():
        gradient.view(-1)[0] = poison
    optimizer.step(divisor=torch.tensor(poison), bad=torch.tensor(True))
    for bank in optimizer._banks:  # as on a GPU, which isn't asked
        with torch.no_grad():
            optimizer._step_muon(bank, 0.02, torch.tensor(poison), torch.tensor(True))
    assert all(torch.equal(t, weights[n]) for n, t in module.state_dict().items())
    assert all(torch.equal(t, state[n]) for n, t in optimizer.state_dict().items())
    backward(module, 1)
    optimizer.step()
    assert not torch.equal(module.hidden1.weight, weights["hidden1.weight"])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_divisor_scales_the_gradients(kind: str) -> None:
    one, two, config = pair(optimizer=kind)
    first, second = Optimizer(one, config, HIDDEN), Optimizer(two, config, HIDDEN)
    for seed in range(3):
        backward(one, seed)
        backward(two, seed)
        first.step(divisor=torch.tensor(4.0))
        for gradient in second.gradients():
            gradient.div_(4.0)
        second.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_goes_out_and_back_exactly(kind: str, layout: torch.memory_format) -> None:
    one, two, config = pair(optimizer=kind)
    one, two = one.to(memory_format=layout), two.to(memory_format=layout)
    first = Optimizer(one, config, HIDDEN)
    for seed in range(3):
        backward(one, seed)
        first.step()
    two.load_state_dict(one.state_dict())
    second = Optimizer(two, config, HIDDEN)
    second.load_state_dict({n: t.clone().contiguous() for n, t in first.state_dict().items()})
    for seed in range(3, 6):
        for module, optimizer in ((one, first), (two, second)):
            backward(module, seed)
            optimizer.step(0.5)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_foreign_state_is_refused_by_name() -> None:
    adam = Optimizer(Small(), TrainingConfig())
    muon = Optimizer(Small(), TrainingConfig(optimizer="muon"), HIDDEN)
    with pytest.raises(LimnerError, match=r"hidden1\.weight\.mean.*lacks"):
        adam.load_state_dict(muon.state_dict())
    wrong = adam.state_dict() | {"first.weight.mean": torch.zeros(1)}
    with pytest.raises(LimnerError, match=r"first\.weight\.mean.*\[1\].*\[8, 3, 3, 3\]"):
        adam.load_state_dict(wrong)


@pytest.mark.parametrize("shape", [(48, 432), (96, 96), (384, 192)])
def test_orthogonalisation_stays_bounded_for_gradients_of_low_rank(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    result = orthogonalised(low_rank[None])[0]
    assert torch.linalg.svdvals(result)[:3].min() > 0.5
    assert torch.linalg.svdvals(result).max() < 1.6
