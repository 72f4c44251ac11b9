"""What the README tells a newcomer to type works as written, with less training."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from limner.cli.program import run
from tiny_cli import pictures

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
SMALL = "model.levels=[{channels: 32}]"
LESS = {
    "--budget 1h": f"--images 16 --set '{SMALL}'",
    'budget="1h"': f"images=16, settings=['{SMALL}']",
    "--num 16": "--num 2",
    "num=16": "num=2",
    "num=8": "num=2",
    "steps=50": "steps=5",
}


def less(text: str) -> str:
    for long, short in LESS.items():
        text = text.replace(long, short)
    assert "budget" not in text
    return text


def test_the_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(Path("photos"), each=4)
    commands = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("limner ")]
    assert [command.split()[1] for command in commands] == ["check", "train", "sample", "sample"]
    for command in commands:
        assert run(shlex.split(less(command), comments=True)[1:]) == 0, command
    assert Path("all.png").is_file()
    assert Path("cats.png").is_file()
    (example,) = [block for language, block in BLOCKS if language == "python"]
    train = ["train", "photos", "--task", "classifier", "--for", "runs/photos", "--out", "runs/classifier"]
    assert run([*train, "--images", "16", "--set", SMALL]) == 0
    exec(less(example).replace('out="runs/photos"', 'out="runs/again"'), {})
    assert Path("cat.png").is_file()
