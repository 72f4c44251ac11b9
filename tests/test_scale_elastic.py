"""`torchrun --max-restarts`: a worker is killed, all start again, and the run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from limner.cli.program import run
from test_training_crash import free_port
from tiny_cli import RECIPE, pictures

WORKER = """
import os, signal, time
from limner.cli import main
from limner.training.loop import Training

own = Training.step

def step(self, batches):
    own(self, batches)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["LOCAL_RANK"] == "1" and self.clock.images >= 240:
        while not list((self.out / "checkpoints").glob("images-*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

Training.step = step
main()
"""
"""Half way, and once there is a checkpoint, the second of the first workers is killed."""


def test_torchrun_restarts_all_and_they_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LIMNER_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true",
                        "OMP_NUM_THREADS": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / "tiny.yaml").write_text(
        RECIPE.replace("training: {", "training: {checkpoint_every: 80, timeout_s: 60, ")
    )
    asked = ["train", str(pictures(tmp_path / "data")), "--preset", str(tmp_path / "tiny.yaml"), "--images", "480"]
    assert run([*asked, "--out", str(tmp_path / "one")]) == 0
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3",
                "--master-port", str(free_port()), str(tmp_path / "worker.py")]  # fmt: skip
    out = tmp_path / "two"
    with (tmp_path / "said").open("w") as said:
        agent = subprocess.Popen([*torchrun, *asked, "--out", str(out), "--resume"], stdout=said, stderr=said,
                                 start_new_session=True)  # fmt: skip
    try:
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
