"""`limner plan`: what it counts is what PyTorch counts and keeps; what it assumes is said."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from limner import build
from limner import config as c
from limner.cli.program import run
from limner.errors import LimnerError
from limner.plan import STRATEGIES, cluster, count, estimate, plan, with_classes

GIGA = 1e9


def recipe(**changes: Any) -> c.RunConfig:
    """A U-Net with self-attention over more than 256 pixels: there a CPU takes the fused kernel too."""
    raw = {
        "data": {"size": 40},
        "model": {"kind": "unet", "levels": [{"channels": 16, "attention": True}, {"channels": 32}], "head_dim": 8},
        "conditions": [{"kind": "label"}],
        "classes": ["a", "b"],
        "training": {"batch": 8, "images": 8000, "precision": "fp32"},
    }
    return c.parse(raw | changes, "recipe")


def test_arithmetic_and_what_is_kept_are_those_of_a_real_pass() -> None:
    """The same network on the CPU: operations, and the storages that autograd holds between the two passes."""
    config = recipe()
    counts = count(config, bf16=False)
    model = build.model(config)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    inputs = torch.randn(1, 3, 40, 40), torch.rand(1), torch.randn(1, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.network(*inputs)
        loss = out.square().mean()
    kept = sum(t.untyped_storage().nbytes() for place, t in held.items() if place not in own)
    assert counts.image.kept == pytest.approx(kept, rel=0.05)
    with FlopCounterMode(display=False) as forward, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.network(*inputs)
    assert counts.image.forward_flops == forward.get_total_flops()
    assert counts.image.backward_flops > 1.9 * counts.image.forward_flops
    loss.backward()


def test_parts_and_the_optimizers_state() -> None:
    config = recipe()
    counts = count(config, bf16=False)
    model = build.model(config)
    total = sum(p.numel() for p in model.parameters())
    assert sum(counts.parameters.values()) == counts.trained == total
    assert counts.moments == pytest.approx(8 * total, rel=0.01)
    assert counts.frozen_bytes == 0
    by_muon = count(recipe(training={"optimizer": "muon"}), bf16=False)
    assert 4 * total < by_muon.moments < counts.moments


def test_checkpointing_keeps_less_and_bf16_half() -> None:
    exact, half = count(recipe(), bf16=False), count(recipe(), bf16=True)
    assert exact.image.kept_again < 0.7 * exact.image.kept
    assert half.image.kept == pytest.approx(exact.image.kept / 2, rel=0.05)
    assert half.image.forward_flops == exact.image.forward_flops
    assert half.cast > 0.9 * half.trained
    assert exact.cast == 0


@pytest.mark.parametrize(
    "condition",
    [
        {"kind": "text", "encoder": {"kind": "bpe", "width": 16, "depth": 1, "head_dim": 8}},
        {"kind": "boxes", "width": 16, "depth": 1, "head_dim": 8},
        {"kind": "label", "enters": "token", "width": 16},
        {"kind": "semantic_map"},
        {"kind": "mask"},
        {"kind": "image", "size": [6, 6]},
    ],
)
def test_every_condition_is_counted(condition: dict[str, Any]) -> None:
    levels = [{"channels": 16}, {"channels": 32, "cross_attention": int("enters" in condition or "width" in condition)}]
    if condition["kind"] == "text":
        levels[1]["cross_attention"] = 1
    config = recipe(model={"kind": "unet", "levels": levels}, conditions=[condition], classes=None)
    counts = count(with_classes(config, 7), bf16=True)
    assert counts.parameters["network"] > 0
    assert (counts.image.condition_flops > 0) == (condition["kind"] == "text")


def test_boxes_as_tokens_have_numbers_for_classes() -> None:
    """Imported layout models name none; the tokens leave room for 99."""
    section = {"kind": "boxes", "width": 8, "depth": 1, "most": 4, "tokens": {"vocabulary": 100}}
    model = {"kind": "unet", "levels": [{"channels": 32, "cross_attention": 1}], "heads": 1}
    config = with_classes(recipe(conditions=[section], classes=None, model=model), 1000)
    assert config.conditions[0] == c.BoxesCondition(**section)
    assert count(config, bf16=False).image.forward_flops > 0


def test_published_arithmetic_of_adm_and_ldm() -> None:
    """Peebles & Xie 2023, table 9, count multiply-adds: ADM at 256 pixels 1,120 G, LDM-4 103.6 G."""

    def forward(name: str) -> float:
        config = with_classes(c.parse(build.preset(name), name), 1000)
        return count(config, bf16=True).image.forward_flops / 2e9

    assert forward("imagenet256-adm") == pytest.approx(1120, rel=0.005)
    assert forward("imagenet256-ldm4") == pytest.approx(103.6, rel=0.01)


def test_memory_of_a_device_by_strategy() -> None:
    counts = count(recipe(), bf16=False)
    where = cluster("4xA100")
    whole, again, sharded, _ = (estimate(counts, each, where, batch=32, images=3200, bf16=False) for each in STRATEGIES)
    weights = 4.0 * counts.trained
    assert whole.memory["weights"] == whole.memory["gradients"] == whole.memory["average"] == weights
    assert sharded.memory["weights"] == weights / 4
    assert sharded.memory["moments"] == counts.moments / 4
    assert whole.memory["activations"] == 8 * counts.image.kept
    assert again.memory["activations"] == 8 * counts.image.kept_again
    assert whole.fits
    assert whole.days is not None
    assert whole.unfused_days is not None
    assert whole.days <= whole.unfused_days
    assert whole.seconds["interconnect"] == pytest.approx(2 * 0.75 * weights / (0.8 * 300 * GIGA))
    assert again.seconds["arithmetic"] > whole.seconds["arithmetic"]


def test_what_does_not_fit_is_taken_in_parts_or_refused() -> None:
    counts = count(recipe(), bf16=False)
    large = estimate(counts, STRATEGIES[0], cluster("CPU2"), batch=2**20, images=2**21, bf16=False)
    assert large.accumulate > 1
    assert large.micro_batch * large.accumulate >= 2**20
    assert large.total < 16 * GIGA
    text = c.parse(build.preset("text256-ldm8"), "text256-ldm8")
    made = plan(text, cluster("8xRTX4090"), "text256-ldm8")
    fits = {each.strategy.name: each.fits for each in made.estimates}
    assert fits == {"DDP": False, "DDP, checkpointing": False, "FSDP2": True, "FSDP2, checkpointing": True}
    assert "doesn't fit" in "\n".join(made.lines())


@pytest.mark.parametrize("asked", ["tpu", "0xH100", "8x", "", "x", "8x8xH100"])
def test_unknown_devices_are_refused(asked: str) -> None:
    with pytest.raises(LimnerError, match="should be"):
        cluster(asked)


@pytest.mark.parametrize(("asked", "number", "name"), [("8xH100", 8, "H100"), ("h200", 1, "H200"),
                                                       ("64 x rtx 4090", 64, "RTX4090")])  # fmt: skip
def test_devices_are_found(asked: str, number: int, name: str) -> None:
    found = cluster(asked)
    assert (found.number, found.device.name) == (number, name)


def test_the_wire_is_the_slowest_link() -> None:
    assert cluster("8xA100").wire > cluster("16xA100").wire
    assert cluster("16xA100").wire_name == "network between machines"
    assert cluster("H100").wire_name == "none"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "cifar10", "--devices", "CPU2", "--images", "2M", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 2_000_000
    assert facts["devices"]["name"] == "CPU2"
    assert [each["strategy"]["name"] for each in facts["strategies"]] == ["DDP", "DDP, checkpointing"]
    assert facts["strategies"][0]["days"] > 0
    assert run(["plan", "cifar10", "--devices", "2xH100"]) == 0
    out = capsys.readouterr().out
    assert "| network " in out
    assert "a million pictures" in out
    assert run(["plan", "cifar10", "--devices", "3xH100"]) == 2
    assert capsys.readouterr().err == "limner: batch 64: should be a multiple of the 3 devices, such as 63 or 66\n"
    assert run(["plan", "cifar10-classifier"]) == 2
    assert "only the training of diffusion models is planned" in capsys.readouterr().err
