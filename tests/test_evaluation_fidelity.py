"""Fidelity to conditions: what shows the condition scores high, what doesn't scores low."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from limner.config import DataConfig
from limner.data.check import check
from limner.data.dataset import prepare
from limner.errors import LimnerError
from limner.evaluation.fidelity import consistency, fidelity, filled_boxes, judge, kept, mean_iou, nearness
from limner.nn.spatial import with_hole
from pictures import encode, metadata_folder, pixels, write
from tiny_conditions import map_folder


def test_a_judge_tells_the_right_map_from_another(tmp_path: Path) -> None:
    data = prepare(DataConfig(source=str(map_folder(tmp_path / "maps", 24)), held_out=0.25), {"semantic_map", "boxes"})
    network = judge(data, "semantic_map", steps=40)
    rows = data.held_out
    asked = {"semantic_map": data.batch(rows)["semantic_map"]}
    real = data.uint8(rows)
    found = fidelity(real, asked, data, real, {"semantic_map": network})
    assert found["map_miou"] == found["map_miou_real"] > 0.6
    assert found["map_miou_share"] == pytest.approx(1)
    other = fidelity(real, {"semantic_map": 1 - asked["semantic_map"]}, data, None, {"semantic_map": network})
    assert other["map_miou"] < found["map_miou"] / 2


def test_no_judge_without_maps(tmp_path: Path) -> None:
    data = prepare(DataConfig(source=str(metadata_folder(tmp_path, [{}, {}]))))
    with pytest.raises(LimnerError, match="the data set has no semantic map to judge by"):
        judge(data, "semantic_map")


def test_boxes_are_filled_the_smaller_on_top() -> None:
    boxes = np.array([[1, 0.5, 0, 0.25, 0.5], [0, 0, 0, 1, 1], [-1, 0, 0, 0, 0]], np.float32)
    assert filled_boxes(boxes, (2, 4), 9).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    assert filled_boxes(boxes[2:], (1, 2), 9).tolist() == [[9, 9]]


def test_mean_iou_by_hand() -> None:
    wanted = np.array([[[0, 0, 1, 255]]])
    assert mean_iou(np.array([[[0, 0, 1, 1]]]), wanted, 3) == 1
    assert mean_iou(np.array([[[0, 1, 1, 0]]]), wanted, 3) == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_consistency_and_known_pixels() -> None:
    picture = pixels(0, (16, 16))[None]
    image = torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 127.5 - 1
    small = torch.nn.functional.interpolate(image, (4, 4), mode="bicubic", antialias=True).clamp(-1, 1)
    assert consistency(picture, small) > 60
    assert consistency(255 - picture, small) < 20
    itself, other = nearness(picture, small, picture), nearness(255 - picture, small, picture)
    assert itself["perceptual"] == pytest.approx(0, abs=1e-5)
    assert other["perceptual"] > other["perceptual_bicubic"] == itself["perceptual_bicubic"] > 0.01
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    holes, changed = with_hole(image, mask), picture.copy()
    changed[:, :, :8] = 0
    assert kept(changed, holes) == 1
    changed[0, 0, 15] ^= 1
    assert kept(changed, holes) == pytest.approx(1 - 1 / 128)


def test_check_tells_of_maps_masks_and_boxes(tmp_path: Path) -> None:
    root = map_folder(tmp_path / "maps", 4)
    write(root / "images" / "0.mask.png", encode(np.eye(8, dtype=np.uint8) * 255))
    report = check(str(root))
    assert report.ok is False  # one picture has a mask and the others have none
    assert "images/1.png: has no mask beside it" in str(report.errors[0]).replace(str(root) + "/", "")
    assert report.roles["semantic_map"] == "semantic_map"
    assert sum(report.overlays.maps["train"].values()) == pytest.approx(1)
    assert any(line.startswith("semantic maps (train): red ") for line in report.lines())
    write(root / "semantic_maps" / "2.png", encode(np.full((8, 8), 57, np.uint8)))
    assert any("2.png: semantic map: class 57 at row 0, column 0" in str(e) for e in check(str(root)).errors)


def test_check_counts_boxes(tmp_path: Path) -> None:
    rows = [{"objects": {"bbox": [[0, 0, 4, 4], [6, 6, 4, 4]], "categories": ["cup", "pot"]}},
            {"objects": {"bbox": [], "categories": []}}]  # fmt: skip
    report = check(str(metadata_folder(tmp_path, rows)))
    assert report.ok
    assert report.to_json()["boxes"] == {"train": {"cup": 1, "pot": 1}}
    assert any("boxes that leave them" in note for note in report.notes)
