"""What `limner bench` makes of its rounds; nothing here depends on how fast the machine is."""

from __future__ import annotations

import json

import pytest
import torch

from limner.bench import measure as measuring
from limner.bench import own, peer
from limner.bench.rounds import alternate, fastest, ratio
from limner.cli import bench as command
from limner.cli.program import run
from limner.nn import int8


def test_contenders_take_turns() -> None:
    order: list[str] = []
    rates = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, 0.0)
    assert order == ["a", "a", "b", "b", *"ababab"]
    assert {name: len(values) for name, values in rates.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_taken_round_by_round() -> None:
    assert ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0


def test_the_fastest_rival_is_the_one_compared_with() -> None:
    assert (
        fastest({"limner": [9.0], "diffusers a": [1.0, 1.0], "diffusers b": [2.0, 0.5]}, "diffusers") == "diffusers b"
    )


def test_both_networks_are_one() -> None:
    made = peer.pair(torch.device("cpu"))
    assert made.difference() < 1e-4
    assert made.parameters == sum(p.numel() for p in made.own.parameters())
    assert made.flops(2) == 2 * made.flops(1)
    with torch.no_grad():
        next(made.peer.parameters()).add_(1.0)
    assert made.difference() > 1e-2


def test_every_contender_does_its_work() -> None:
    made = peer.pair(torch.device("cpu"))
    before = [p.clone() for p in made.own.parameters()]
    with peer.steps(made, 2) as training:
        assert set(training) == {"limner", "diffusers fp32", "diffusers bf16 autocast, channels_last"}
        for step in training.values():
            step()
    assert all(torch.equal(a, b) for a, b in zip(before, made.own.parameters(), strict=True))
    calls = {name: call() for name, call in peer.calls(made, 2).items()}
    assert all(isinstance(out, torch.Tensor) and out.shape == (2, 3, 32, 32) for out in calls.values())
    reference = calls["diffusers fp32"]
    assert isinstance(reference, torch.Tensor)
    assert (peer.INT8 in calls) == int8.available()
    for out in calls.values():
        assert isinstance(out, torch.Tensor)
        assert (out.float() - reference).abs().max() < 0.05 * reference.abs().max()


@pytest.mark.skipif(not int8.available(), reason="this PyTorch has no 8-bit convolutions")
def test_eight_bits_are_another_contender_and_told_apart() -> None:
    made = peer.pair(torch.device("cpu"))
    drawn = {name: work() for name, work in peer.guided(made, 1).items() if name.startswith("limner")}
    exact, near = drawn["limner"], drawn[peer.INT8]
    assert isinstance(exact, torch.Tensor)
    assert isinstance(near, torch.Tensor)
    assert 0 < (near - exact).norm() < 0.2 * exact.norm()
    assert 0 < (made.int8_error() or 0) < 0.1
    assert fastest({"limner": [1.0], peer.INT8: [9.0], "diffusers": [2.0]}, "diffusers") == "diffusers"


def test_pictures_are_read_alike() -> None:
    with own.loading(4) as contenders:
        shapes = {tuple(found["image"].shape if isinstance(found, dict) else found.shape)
                  for found in (work() for work in contenders.values())
                  if isinstance(found, dict | torch.Tensor)}  # fmt: skip
    assert shapes == {(4, 3, 64, 64)}


def test_without_a_peer_there_are_no_ratios(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peer, "installed", lambda: False)
    monkeypatch.setattr(measuring.machine, "SIDE", 8)
    monkeypatch.setattr(measuring.machine, "COPIED", 64)
    monkeypatch.setattr(measuring, "SAMPLE_BATCH", 1)
    assert run(["bench", "--rounds", "2", "--seconds", "0", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["train_ratio"] is None
    assert len(figures["raw"]["autoencoder"]["decode"]) == 2
    assert "nothing to compare with" in command._lines(figures)[-1]
