"""`torchrun --max-restarts`: a worker is killed, all start again, and the run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from limner.cli.program import run
from test_training_crash import free_port
from tiny_cli import RECIPE, pictures

CHILDREN = Path("/proc/self/task") / str(os.getpid()) / "children"


def children(of: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{of}/task/{of}/children").read_text().split()]


@pytest.mark.skipif(not CHILDREN.is_file(), reason="finds the workers in /proc")
def test_torchrun_restarts_all_and_they_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LIMNER_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true",
                        "OMP_NUM_THREADS": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / "tiny.yaml").write_text(
        RECIPE.replace("training: {", "training: {checkpoint_every: 80, timeout_s: 60, ")
    )
    asked = ["train", str(pictures(tmp_path / "data")), "--preset", str(tmp_path / "tiny.yaml"), "--images", "480"]
    assert run([*asked, "--out", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3",
                "--master-port", str(free_port()), "-m", "limner"]  # fmt: skip
    out = tmp_path / "two"
    with (tmp_path / "said").open("w") as said:
        agent = subprocess.Popen([*torchrun, *asked, "--out", str(out), "--resume"], stdout=said, stderr=said,
                                 start_new_session=True)  # fmt: skip
    try:
        while not list((out / "checkpoints").glob("images-*")):
            assert agent.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.01)
        os.kill(children(agent.pid)[1], signal.SIGKILL)
        assert agent.wait(400) == 0, (tmp_path / "said").read_text()
    finally:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
    told = (tmp_path / "said").read_text()
    assert "Signal 9 (SIGKILL)" in told or "exitcode: -9" in told
    assert "restored model, average and optimizer at" in told
    images = [json.loads(line)["images"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert images == list(range(8, 481, 8))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)
