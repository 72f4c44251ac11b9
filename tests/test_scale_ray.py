"""The Ray example: its worker draws what `limner sample` would, with or without Ray."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import limner
from limner.data.transforms import array, decoded
from tiny_cli import Workshop

FILE = Path(__file__).parents[1] / "examples" / "ray_generate.py"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(tmp_path_factory.mktemp("shop"), patch)


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_generate", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_worker_draws_the_numbers_that_it_is_handed(shop: Workshop) -> None:
    """In any order, with gaps."""
    drawer = example().Drawer(str(shop.run), 9, 3, steps=2)
    found = drawer({"id": np.array([7, 2, 3])})
    generator: Any = limner.load(shop.run)
    whole = generator.sample(num=9, seed=3, steps=2, output="array")
    assert found["number"].tolist() == [2, 3, 7]
    pictures = np.stack([array(decoded(data)).transpose(1, 2, 0) for data in found["image"]])
    assert np.abs(pictures.astype(int) - whole[[2, 3, 7]].astype(int)).max() <= 1


def test_without_ray_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert example().main(["runs/x", "out"]) == 2
    assert capsys.readouterr().err == "ray_generate: Ray is not installed; `pip install 'ray[data]'`\n"


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_through_ray(shop: Workshop, tmp_path: Path) -> None:
    from limner.config import DataConfig
    from limner.data.dataset import prepare

    assert example().main([str(shop.run), str(tmp_path / "out"), "--num", "5", "--steps", "2"]) == 0
    assert len(prepare(DataConfig(source=str(tmp_path / "out"), size=(8, 8)))) == 5
