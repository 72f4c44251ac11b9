"""The codebook: EMA against its closed form, both gradient estimators, restarts, round trips."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from limner.errors import LimnerError
from limner.nn.quantizer import VectorQuantizer, perplexity, rotated, straight_through


def quantizer(codes: int = 6, channels: int = 3, **options: object) -> VectorQuantizer:
    torch.manual_seed(0)
    made = VectorQuantizer(codes, channels, **options)  # pyright: ignore[reportArgumentType]
    made.idle.zero_()
    with torch.no_grad():
        made.codebook.copy_(made.prepare(torch.randn(codes, channels)))
    if made.ema:
        made.total.copy_(made.codebook)
    return made


def test_nearest_is_nearest() -> None:
    q, z = quantizer(), torch.randn(2, 3, 4, 5)
    codes, indices = q.quantise(z)
    distance = (z.movedim(1, -1)[..., None, :] - q.codebook).square().sum(-1)
    assert torch.equal(indices, distance.argmin(-1))
    assert torch.equal(codes, q.codebook[indices].movedim(-1, 1))


def test_distances_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, vectors = quantizer(), torch.randn(50, 3)
    whole = q.nearest(vectors)
    monkeypatch.setattr("limner.nn.quantizer.DISTANCES_AT_ONCE", 40)
    assert torch.equal(q.nearest(vectors), whole)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), normalised=st.booleans())
def test_indices_round_trip(seed: int, normalised: bool) -> None:
    q = quantizer(normalised=normalised)
    indices = torch.randint(0, 6, (2, 3, 4), generator=torch.Generator().manual_seed(seed))
    codes = q.lookup(indices)
    again, found = q.quantise(codes)
    assert torch.equal(found, indices)
    torch.testing.assert_close(again, codes)


def test_index_beyond_the_codebook() -> None:
    with pytest.raises(LimnerError, match="0 to 5"):
        quantizer().lookup(torch.tensor([[[6]]]))


def test_straight_through_gradient() -> None:
    q, z = quantizer().eval(), torch.randn(1, 3, 2, 2, requires_grad=True)
    out = q(z)
    pull = torch.randn_like(out.z)
    (grad,) = torch.autograd.grad((out.z * pull).sum(), z)
    torch.testing.assert_close(out.z, q.quantise(z)[0])
    torch.testing.assert_close(grad, pull)


def test_rotation_trick_keeps_the_angle_and_the_value() -> None:
    z, code = torch.randn(20, 5, requires_grad=True), torch.randn(20, 5)
    out = rotated(z, code)
    torch.testing.assert_close(out, code)
    pull = torch.randn(20, 5)
    (grad,) = torch.autograd.grad((out * pull).sum(), z)
    torch.testing.assert_close(F.cosine_similarity(grad, z), F.cosine_similarity(pull, code))
    torch.testing.assert_close(grad.norm(dim=1), pull.norm(dim=1) * code.norm(dim=1) / z.norm(dim=1))
    straight = torch.autograd.grad((straight_through(z, code) * pull).sum(), z)[0]
    assert not torch.allclose(straight, grad)


def test_rotation_trick_is_finite_where_rotation_is_not_defined() -> None:
    z = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], requires_grad=True)
    code = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    (grad,) = torch.autograd.grad(rotated(z, code).sum(), z)
    assert grad.isfinite().all()


def test_ema_closed_form() -> None:
    """After n batches N_k = d^n N_0 + (1 - d) sum_i d^(n-1-i) n_ki, the same for the sums, e_k = m_k / N_k."""
    d, q = 0.9, quantizer(codes=3, ema_decay=0.9, restart_after=100)
    count, total = torch.ones(3, dtype=torch.float64), q.codebook.detach().double().clone()
    for step in range(7):
        z = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        chosen = F.one_hot(q.quantise(z)[1].flatten(), 3).double()
        q(z)
        count = d * count + (1 - d) * chosen.sum(0)
        total = d * total + (1 - d) * chosen.T @ z.movedim(1, -1).reshape(-1, 3).double()
        torch.testing.assert_close(q.codebook.detach().double(), total / count[:, None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(q.count.double(), count, atol=1e-5, rtol=1e-5)


def test_evaluation_changes_nothing() -> None:
    q = quantizer().eval()
    before = {name: value.clone() for name, value in q.state_dict().items()}
    q(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in q.state_dict().items())


def test_losses() -> None:
    z = torch.randn(2, 3, 4, 4)
    error = F.mse_loss(z, quantizer().quantise(z)[0])
    torch.testing.assert_close(quantizer(update="ema", commitment=0.25).eval()(z).loss, 0.25 * error)
    learned = quantizer(update="gradient", commitment=0.25).eval()(z)
    torch.testing.assert_close(learned.loss, 1.25 * error)
    learned.loss.backward()


def test_gradient_update_moves_codes_to_their_vectors() -> None:
    q, z = quantizer(update="gradient", restart_after=10**6), torch.randn(8, 3, 4, 4)
    optimizer = torch.optim.Adam(q.parameters(), lr=0.05)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        out = q(z)
        out.loss.backward()
        optimizer.step()
        errors.append(F.mse_loss(z, q.quantise(z)[0]).item())
    assert errors[-1] < 0.8 * errors[0]


def test_dead_codes_revive() -> None:
    """Codes far from every vector are unused, restart after three batches, and are then chosen."""
    q = quantizer(codes=16, restart_after=3)
    with torch.no_grad():
        q.codebook[1:] += 100
        q.total.copy_(q.codebook)
    rng = torch.Generator().manual_seed(0)
    seen = [q(torch.randn(4, 3, 4, 4, generator=rng), rng).perplexity.item() for _ in range(6)]
    assert max(seen[:3]) == pytest.approx(1.0)
    assert min(seen[3:]) > 8
    assert q.idle.max() < 3


def test_a_new_codebook_starts_from_the_data_and_depends_on_the_generator_alone() -> None:
    z = 50 + torch.randn(4, 3, 8, 8)
    made = [VectorQuantizer(32, 3) for _ in range(2)]
    outs = [q(z, torch.Generator().manual_seed(5)) for q in made]
    assert outs[0].perplexity > 16
    assert torch.equal(outs[0].z, outs[1].z)
    assert not torch.equal(outs[0].indices, VectorQuantizer(32, 3)(z, torch.Generator().manual_seed(6)).indices)


def test_fewer_vectors_than_codes() -> None:
    q = VectorQuantizer(32, 3)
    q(torch.randn(1, 3, 2, 2))
    assert q.codebook.isfinite().all()


def test_normalised_codes_stay_on_the_sphere() -> None:
    q = quantizer(normalised=True, ema_decay=0.5)
    for _ in range(3):
        out = q(7 * torch.randn(2, 3, 4, 4))
    torch.testing.assert_close(q.codebook.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(out.z.norm(dim=1), torch.ones(2, 4, 4))


def test_perplexity() -> None:
    assert perplexity(torch.tensor([5, 5, 5, 5])).item() == pytest.approx(4)
    assert perplexity(torch.tensor([9, 0, 0, 0])).item() == pytest.approx(1)
