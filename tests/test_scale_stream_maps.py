"""Streams of more than labels: maps, masks and boxes as the cache has them, and latents of a stream."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from limner.cli.program import run as command
from limner.config import DataConfig, SemanticMapCondition
from limner.data import latents
from limner.data.dataset import prepare
from limner.data.latents import with_latents
from limner.errors import LimnerError
from limner.training.draws import Part
from limner.training.stream import CORRUPT, order_of
from test_autoencoder_latents import autoencoder
from test_scale_stream import settings_for, stream
from tiny_conditions import COLOURS
from tiny_stream import member, tar_shards
from tiny_training import exit_code, in_a_child

LATENT = """\
task: diffusion
data: {size: [8, 8], stream: true, held_out: 0.1}
space:
  kind: latent
  autoencoder: {kind: autoencoder, levels: [{channels: 8}, {channels: 8}], middle: none, norm_groups: 4}
  training: {batch: 8, compile: "off", precision: fp32, previews: 2}
model: {kind: unet, levels: [{channels: 8, cross_attention: 1}], middle: none, norm_groups: 4, head_dim: 8}
conditions: [{kind: semantic_map}, {kind: boxes, width: 16, depth: 1, head_dim: 8}]
training: {batch: 8, compile: "off", precision: fp32, previews: 2}
autoencoder_loss: {perceptual: 0}
sampling: {steps: 2}
"""


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def laid_out(folder: Path, form: str, rows: int = 200, corrupt: Collection[int] = (), *, boxes: bool = True) -> str:
    """Pictures of 12x8 with a semantic map, a mask and a box each, in two files; the map of a corrupt row is cut."""
    folder.mkdir(parents=True)
    (folder / "classes.txt").write_text("red\nblue\n")
    chance = np.random.default_rng(0)
    made = []
    for row in range(rows):
        numbers = chance.integers(0, 2, (8, 12), dtype=np.uint8)
        mask = np.zeros((8, 12), np.uint8)
        mask[2:5, : 1 + row % 10] = 255
        objects = {"bbox": [[row % 6, 1, 4, 5], [0, 0, 2, 2]], "categories": ["blue", "red"]}
        picture = png(COLOURS[numbers])
        seg = png(numbers)
        made.append((picture, seg[:50] if row in corrupt else seg, png(mask), objects))
    for shard in range(2):
        own = range(shard * rows // 2, (shard + 1) * rows // 2)
        if form == "tar":
            with open(folder / f"{shard}.tar", "wb") as file:
                for row in own:
                    parts = zip(("png", "seg.png", "mask.png"), made[row], strict=False)
                    file.writelines(member(f"{row:03d}.{suffix}", data) for suffix, data in parts)
                    file.write(
                        member(f"{row:03d}.json", json.dumps({"objects": made[row][3]}).encode()) if boxes else b""
                    )
                file.write(bytes(1024))
        else:
            columns = [[{"bytes": made[row][k], "path": None} for row in own] for k in range(3)]
            table = dict(zip(("image", "semantic_map", "mask"), columns, strict=True))
            table["objects"] = [made[row][3] for row in own]
            pq.write_table(pa.table(table), folder / f"train-{shard}.parquet", row_group_size=30)
    return str(folder)


SPATIAL = ("semantic_map", "mask", "boxes")


@pytest.mark.parametrize("form", ["tar", "parquet"])
@pytest.mark.parametrize("settings", [{"size": (8, 8), "crop": "random", "flip": True}, {"size": (4, 6)}, {}])
def test_maps_masks_and_boxes_are_those_of_the_cache(tmp_path: Path, form: str, settings: dict[str, Any]) -> None:
    """Batch by batch, mirrored and cropped by the same chance."""
    source = laid_out(tmp_path / "shards", form, 40)
    late = stream(source, SPATIAL, **settings)
    cached = prepare(DataConfig.model_validate({"source": source, "held_out": 0.0} | settings), SPATIAL)
    rows = np.array([33, 0, 7, 19, 20, 39])
    for seed in (None, 0, 1):
        found, wanted = ((data.batch(rows, None if seed is None else np.random.default_rng(seed)))
                         for data in (late, cached))  # fmt: skip
        assert found.keys() == wanted.keys() == {"image", "row", "mirror", *SPATIAL}
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name
    assert late.facts == cached.facts
    assert (late.batch(rows)["boxes"][:, :, 0] >= 0).any()


def test_boxes_of_streamed_maps_are_those_of_the_cache(tmp_path: Path) -> None:
    source = laid_out(tmp_path / "shards", "tar", 20, boxes=False)
    late, cached = (prepare(DataConfig(source=source, stream=flag, size=(8, 8)), ["boxes"]) for flag in (True, False))
    found, wanted = (data.batch(range(20))["boxes"] for data in (late, cached))
    assert torch.equal(found, wanted)
    assert (wanted[:, :, 0] >= 0).sum() > 40
    assert late.facts == cached.facts


def test_a_row_with_a_corrupt_map_or_box_is_skipped_and_listed(tmp_path: Path) -> None:
    source = laid_out(tmp_path / "shards", "tar", corrupt={150})
    file = tmp_path / "shards" / "1.tar"
    file.write_bytes(file.read_bytes().replace(b"[[5, 1, 4, 5]", b"[[5, 1, 4, 0]", 1))
    data = stream(source, SPATIAL)
    bad = {150, next(row for row in range(100, 200) if row % 6 == 5)}
    assert data.corrupt.keys() == bad
    assert "damaged" in data.corrupt[150].what
    order = order_of(data, settings_for(data, batch=8), tmp_path / "run")
    seen = {int(row) for k in range(26) for row in order.rows(Part(8 * k, 0, 8, 8))}
    assert seen == set(range(200)) - bad
    listed = [json.loads(line)["row"] for line in (tmp_path / "run" / CORRUPT).read_text().splitlines()]
    assert set(listed) == bad


def test_maps_without_names_are_refused(tmp_path: Path) -> None:
    source = laid_out(tmp_path / "shards", "tar", 20)
    (tmp_path / "shards" / "classes.txt").unlink()
    with pytest.raises(
        LimnerError, match=r"the classes of the maps should be known beforehand; name them in classes\.txt"
    ):
        stream(source, ("semantic_map",))
    named = prepare(DataConfig(source=source, stream=True), [SemanticMapCondition(classes=("red", "blue"))])
    assert named.facts["semantic_map"]["classes"] == ["red", "blue"]


# --- latents ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latents, "BATCH", 4)
    monkeypatch.setattr(latents, "SHARD_BYTES", 2000)


@pytest.mark.usefixtures("small_shards")
def test_latents_of_a_stream_are_those_of_the_cache_without_its_corrupt_rows(tmp_path: Path) -> None:
    """The second time nothing is encoded, and the same rows are left out; a label that is missing is no reason to leave
    out a picture for good."""
    whole = laid_out(tmp_path / "whole", "tar")
    source = laid_out(tmp_path / "shards", "tar", corrupt={150})
    cached = with_latents(prepare(DataConfig(source=whole, size=(8, 8))), autoencoder())
    for encodes in (True, False):
        late = stream(source, SPATIAL, size=(8, 8))
        late.corrupt.clear()  # as where row 150 isn't among those that are looked at beforehand
        late = replace(late, train=np.arange(200))
        told: list[int] = []
        found = with_latents(late, autoencoder(), progress=lambda done, rows, told=told: told.append(done))
        assert bool(told) == encodes
        assert len(found.shards) > 5
        assert found.train.tolist() == [row for row in range(200) if row != 150]
        assert "damaged" in late.corrupt[150].what
        batch, wanted = found.batch(found.train[:170]), cached.batch(found.train[:170])
        torch.testing.assert_close(batch["latent"], wanted["latent"], atol=2e-3, rtol=2e-3)
        assert batch.keys() == {"latent", "row", "mirror", *SPATIAL}


@pytest.mark.usefixtures("small_shards")
def test_too_many_corrupt_rows_stop_the_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "BATCH", 64)
    late = stream(tar_shards(tmp_path / "shards", 2, 600, range(1040, 1060)), size=(4, 4))
    assert not late.corrupt
    with pytest.raises(LimnerError, match="13 of 1,200 rows are corrupt by now, and more than 1% are refused"):
        with_latents(late, autoencoder())


def write_latents(folder: Path, pause_s: float) -> None:
    """A writer that is told of no other; it notes each shard that it makes."""
    torch.set_num_threads(1)
    original = latents._encode

    def slowly(*arguments: Any) -> Any:
        with (folder / f"made-{os.getpid()}").open("a") as file:
            file.write(f"{arguments[2].start}\n")
        time.sleep(pause_s)
        return original(*arguments)

    latents._encode = slowly
    with_latents(stream(str(folder / "shards"), size=(8, 8)), autoencoder(), directory=folder / "latents")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill them")
@pytest.mark.usefixtures("small_shards")
def test_many_writers_fill_a_cache_and_one_that_is_killed_is_made_good(tmp_path: Path) -> None:
    """Two writers without numbers divide the shards among them; a third that was killed within one left no half."""
    laid_out(tmp_path / "shards", "tar", 120)
    lost = in_a_child(lambda: write_latents(tmp_path, 60.0))
    while not (tmp_path / f"made-{lost}").is_file():
        assert os.waitpid(lost, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    others = [in_a_child(lambda: write_latents(tmp_path, 0.05)) for _ in range(2)]
    shards = tmp_path / "latents"
    while len(list(shards.glob("0*.safetensors"))) < 3:
        assert all(os.waitpid(child, os.WNOHANG) == (0, 0) for child in others)
        time.sleep(0.01)
    os.kill(lost, signal.SIGKILL)
    assert [exit_code(child) for child in (lost, *others)] == [-signal.SIGKILL, 0, 0]
    made = [(tmp_path / f"made-{child}").read_text().split() for child in (lost, *others)]
    assert made[0] == ["0"]
    assert all(made)
    assert len(made[1] + made[2]) == len({*made[1], *made[2]}) == len(list(shards.glob("0*.safetensors")))
    told: list[int] = []
    late = stream(str(tmp_path / "shards"), size=(8, 8))
    found = with_latents(late, autoencoder(), directory=tmp_path / "latents", progress=lambda d, n: told.append(d))
    assert not told
    fresh = with_latents(late, autoencoder(), directory=tmp_path / "fresh")
    rows = np.arange(120)
    torch.testing.assert_close(found.batch(rows)["latent"], fresh.batch(rows)["latent"], atol=2e-3, rtol=2e-3)


def test_a_latent_recipe_trains_from_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages, by the command line; what the stream skips is listed in the run."""
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "cache"))
    source = laid_out(tmp_path / "shards", "tar", corrupt={150})
    preset = tmp_path / "latent.yaml"
    preset.write_text(LATENT)
    asked = ["train", source, "--preset", str(preset), "--out", str(tmp_path / "run"), "--images", "16"]
    assert command(asked) == 0
    listed = [json.loads(line)["row"] for line in (tmp_path / "run" / CORRUPT).read_text().splitlines()]
    assert listed == [150]
    assert (tmp_path / "run" / "autoencoder" / "model.safetensors").is_file()
