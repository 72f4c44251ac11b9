"""How the machine is used: compilation, and the average of gradients over processes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from limner import native
from limner.config import TrainingConfig
from limner.errors import LimnerError
from limner.rendezvous import INIT_METHOD

COMPILE_PAYS_S = 360.0
"""Budget from which compiling, which takes one to two minutes, pays on a GPU."""
COMPILE_PAYS_IMAGES = 300_000
_BUCKET_BYTES = 64 * 2**20

Result = TypeVar("Result")


def tune(device: torch.device, deterministic: bool = False) -> None:
    """Settings of the whole process: fast on a GPU, the same from run to run on a CPU, and with `deterministic` on a
    GPU too; PyTorch warns of an operation that can't be, by its name."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may add up in any order
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        native.keep_memory()
        # Until it is set, MKL chooses a number of threads for each product, and with it the order of its sums.
        torch.set_num_threads(torch.get_num_threads())


def wants_compile(config: TrainingConfig, device: torch.device) -> bool:
    """Whether to compile: as the recipe says; else on a GPU, where the whole budget is long enough to earn it back (on
    two CPU cores it took 103 s and gained nothing over `nn/norm.py`). It depends on the recipe and the machine alone,
    so that a resumed run computes as before."""
    if config.compile != "auto":
        return config.compile == "on"
    long_enough = (config.budget_s or 0) >= COMPILE_PAYS_S or (
        config.budget_s is None and (config.images or 0) >= COMPILE_PAYS_IMAGES
    )
    compiler = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
    return device.type == "cuda" and long_enough and compiler and sys.platform != "win32"


class Compiled:
    """Networks compiled in place, which leaves the names of their weights alone; taken back when it fails.

    The first step is the trial: whatever the compiler raises there is said in one line, and the plain networks go on.
    """

    def __init__(self, networks: Sequence[nn.Module], wanted: bool, say: Callable[[str], None]) -> None:
        self._networks = list(networks) if wanted else []
        self._on_trial = wanted
        self._say = say
        for network in self._networks:
            network.compile(dynamic=False)

    def attempt(self, step: Callable[[], Result]) -> Result:
        """What `step` returns. Where the first one fails with compiled networks it is run again with plain ones."""
        try:
            result = step()
        except LimnerError:
            raise
        except Exception as error:
            if not self._on_trial:
                raise
            self.undo()
            self._say(f"torch.compile failed ({' '.join(str(error).split())[:160]}); going on without it")
            result = step()
        self._on_trial = False
        return result

    def undo(self) -> None:
        """Plain networks again."""
        for network in self._networks:
            network._compiled_call_impl = None
        self._networks, self._on_trial = [], False


def average_over_processes(accelerator: Accelerator, tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, a few buffers at a time. Every process gives the same shapes.

    In place of a wrapper around the module: that would rename weights, allow one forward method only, and not permit
    a step in which two modules have losses of their own.
    """
    if accelerator.num_processes == 1:
        return
    for bucket in _buckets(tensors):
        mean = sum_over_processes(accelerator, torch.cat([t.flatten() for t in bucket])) / accelerator.num_processes
        for tensor, part in zip(bucket, mean.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def sum_over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of every process's tensor, for each of them. Raises LimnerError when another process is lost."""
    with together(accelerator):
        result = accelerator.reduce(tensor)
    assert isinstance(result, Tensor)
    return result


def agree_every(device: torch.device) -> int:
    """Steps between agreements of several processes: each one makes the host wait for the device."""
    return 1 if device.type == "cpu" else 16


def wait_for_processes(accelerator: Accelerator, group: Any = None) -> None:
    """Return when every process has come here; by a group of its own in another thread. Raises LimnerError when another
    process is lost."""
    with together(accelerator):
        accelerator.wait_for_everyone() if group is None else torch.distributed.barrier(group)


def patience(timeout_s: float) -> InitProcessGroupKwargs:
    """How long a process waits for the others."""
    return InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=timedelta(seconds=timeout_s))


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """What a process is told of when another one has died or hangs: this one can't go on without it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if accelerator.num_processes == 1:
            raise
        who = f"process {accelerator.process_index} of {accelerator.num_processes}"
        reason = " ".join(str(error).split())[:160]
        raise LimnerError(
            f"{who}: another one has died, or hasn't answered for training.timeout_s; go on with --resume ({reason})"
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() * t.element_size() for t in bucket) >= _BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
