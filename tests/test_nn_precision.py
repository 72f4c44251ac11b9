"""bf16 only where it is the faster way, which is measured once on a machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from limner.nn import precision, winograd

CPU = torch.device("cpu")


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A CPU that multiplies in bf16 and has the loops in C. Holds what the next measurements will find."""
    answers: list[bool] = []
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path))
    (tmp_path / "native").mkdir()
    monkeypatch.setattr(precision, "multiplies_bf16", lambda _: True)
    monkeypatch.setattr(winograd, "available", lambda: True)
    monkeypatch.setattr(precision, "measured_bf16_is_faster", lambda: answers.pop(0))
    precision.bf16_is_faster.cache_clear()
    yield answers
    precision.bf16_is_faster.cache_clear()


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_way_is_measured_once(faster: bool, measured: list[bool]) -> None:
    measured += [faster, not faster]
    for _ in range(3):
        assert precision.uses_bf16("auto", CPU) == faster
        precision.bf16_is_faster.cache_clear()  # as a later process would
    assert len(measured) == 1
    with precision.autocast("auto", CPU):
        assert torch.is_autocast_enabled("cpu") == faster


@pytest.mark.usefixtures("measured")
def test_nothing_is_measured_where_the_answer_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision.uses_bf16("bf16", CPU)
    assert not precision.uses_bf16("fp32", CPU)
    assert precision.uses_bf16("auto", torch.device("cuda"))
    with monkeypatch.context() as patch:
        patch.setattr(winograd, "available", lambda: False)
        assert precision.uses_bf16("auto", CPU)
    monkeypatch.setattr(precision, "multiplies_bf16", lambda _: False)
    assert not precision.uses_bf16("auto", CPU)


def test_what_cant_be_kept_is_measured_by_each_process(measured: list[bool], monkeypatch: pytest.MonkeyPatch,
                                                       tmp_path: Path) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "file"))
    measured += [False]
    assert not precision.uses_bf16("auto", CPU)


def test_measuring_leaves_chance_and_modes_alone() -> None:
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert precision.measured_bf16_is_faster() in (True, False)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), before)
