"""How a picture came to be: its way from noise, where words acted, its nearest training pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import limner
import tiny_cli
import tiny_studio
from limner.errors import LimnerError
from limner.studio.engine import Engine
from limner.studio.insight import Memory, attention, insight, overlaid, word_maps
from limner.studio.shelf import Shelf


def test_the_way_ends_in_the_picture_that_is_drawn_alone(tmp_path: Path) -> None:
    run = tiny_studio.write_run(tmp_path / "words", tiny_studio.text_recipe(), ["a red cat", "a blue dog"])
    engine = Engine(Shelf.open([run]))
    try:
        wanted = engine.request(seed=3, steps=12, conditions={"text": "a red cat"})
        found = engine.errand(None, lambda generator, tell: insight(generator, wanted, None, tell)).done.result()
    finally:
        engine.close()
    alone = limner.load(run).sample(text="a red cat", seed=3, steps=12, output="array")[0]
    np.testing.assert_array_equal(found.picture.pixels, alone)
    assert [frame.step for frame in found.frames] == list(range(1, 13))
    assert [frame.t for frame in found.frames] == sorted((frame.t for frame in found.frames), reverse=True)
    assert not np.array_equal(found.frames[0].x, found.frames[-1].x)
    assert [word for word, _ in found.words] == ["a", "red", "cat"]
    assert max(float(map_.max()) for _, map_ in found.words) == pytest.approx(1)
    assert all(map_.shape == (8, 8) and (map_ >= 0).all() for _, map_ in found.words)


@pytest.mark.parametrize("half", [False, True])
def test_each_pixel_spreads_its_attention_over_the_words_that_there_are(tmp_path: Path, half: bool) -> None:
    run = tiny_studio.write_run(tmp_path / "words", tiny_studio.text_recipe(), ["a red cat", "a blue dog"])
    generator = limner.load(run)
    with attention(generator.model.network, (8, 8)) as watched, torch.autocast("cpu", torch.bfloat16, enabled=half):
        generator.sample(text="a red cat", steps=4, guidance=1.0)
    assert watched.maps is not None
    whole = watched.maps.sum(0)
    torch.testing.assert_close(whole, torch.full((8, 8), float(whole[0, 0])), atol=1e-3, rtol=1e-4)
    assert float(whole[0, 0]) == pytest.approx(round(float(whole[0, 0])), abs=1e-3), "1 for each layer and step"
    assert watched.maps[-1].max() == 0, "padding"
    known = word_maps(generator, "a red cat", watched)
    assert [word for word, _ in known] == ["a", "red", "cat"]
    tau: Any = generator.model.conditioner
    tau.modalities["text"].reworded = lambda caption: caption.replace("extraordinary", "red")
    reworded = word_maps(generator, "a extraordinary cat", watched)
    assert [word for word, _ in reworded] == ["a", "extraordinary", "cat"]
    assert all(np.array_equal(map_, same) for (_, map_), (_, same) in zip(reworded, known, strict=True))
    after = watched.maps.clone()
    generator.sample(text="a red cat", steps=1, guidance=1.0)
    torch.testing.assert_close(watched.maps, after)


def test_a_picture_is_bright_where_the_word_acted() -> None:
    pixels = np.full((4, 4, 3), 200, np.uint8)
    half = np.repeat(np.array([[1.0, 0.0]], np.float32), 2, axis=0).repeat(1, axis=1)
    shown = overlaid(pixels, half)
    assert (shown[:, 0] == 200).all()
    assert (shown[:, -1] == 30).all()


def test_a_training_picture_is_nearest_to_itself(tmp_path: Path) -> None:
    source = str(tiny_cli.pictures(tmp_path / "data", each=3))
    recipe = tiny_studio.recipe(data={"size": 8, "source": source})
    generator = limner.load(tiny_studio.write_run(tmp_path / "run", recipe))
    memory = Memory(generator)
    known = memory.nearest(np.zeros((8, 8, 3), np.uint8), count=9)
    assert [far for _, far in known] == sorted(far for _, far in known)
    found = memory.nearest(known[4][0], count=2)
    np.testing.assert_array_equal(found[0][0], known[4][0])
    assert found[0][1] == pytest.approx(0, abs=1e-3)
    assert found[1][1] > 0.01


def test_without_its_training_pictures_it_says_so(tmp_path: Path) -> None:
    for data, said in (
        ({"size": 8, "source": None}, "says nothing"),
        ({"size": 8, "source": str(tmp_path / "no")}, "no"),
    ):
        generator = limner.load(tiny_studio.write_run(tmp_path / said[:3], tiny_studio.recipe(data=data)))
        with pytest.raises(LimnerError, match=said):
            Memory(generator).nearest(np.zeros((8, 8, 3), np.uint8))
