"""The targets of scripts/fuzz.py read their seeds, and refuse damaged ones in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scripts.fuzz import TARGETS, attempt, seeds


def test_every_target_has_seeds() -> None:
    assert seeds().keys() == TARGETS.keys()


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_seeds_sound_and_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Each seed cut at a few places, and with a few bytes changed."""
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path))
    chance = np.random.default_rng(0)
    TARGETS[target](seeds()[target][0])
    for data in seeds()[target]:
        for _ in range(3):
            at = int(chance.integers(len(data)))
            attempt(target, data[:at])
            attempt(target, data[:at] + chance.bytes(2) + data[at + 2 :])
