"""Networks that don't fit on one device: weights, gradients, moments and average cut over the processes by FSDP2.

Each block's weights are gathered when it computes and let go of afterwards; its gradients arrive averaged and cut.
What is cut is a DTensor: `local` is this process's piece of it, on which an elementwise optimizer works as on the
whole. PyTorch's parts for this take a second to import, and are imported where something is cut.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limner import build
from limner.config import RunConfig
from limner.errors import LimnerError

BLOCKS = ("down", "middle", "up")
"""The parts of a network that are made of stages, each gathered by itself."""


def refuse_others(config: RunConfig) -> None:
    """Raise LimnerError for a recipe that can't be cut."""
    settings = config.training
    for wrong, what in ((config.task != "diffusion", f"task {config.task}"), (settings.lora is not None, "LoRA"),
                        (settings.align > 0, "training.align"),
                        (settings.optimizer != "adamw", f"training.optimizer {settings.optimizer}")):  # fmt: skip
        if wrong:
            raise LimnerError(f"training.shard: doesn't go with {what}; it is for diffusion by adamw, or leave it out")


class Sharding:
    """Cuts models over `processes` of a device type, and works on what is cut. writers: the same processes, which in it
    wait for one another by the CPU for `timeout_s`, beside what the devices exchange."""

    def __init__(self, device: torch.device, processes: int, timeout_s: float) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy

        self.mesh = init_device_mesh(device.type, (processes,))
        self.writers: Any = torch.distributed.new_group(timeout=timedelta(seconds=timeout_s), backend="gloo")
        # Weights are gathered as they are and cast by autocast, so that the numbers are those of one process. Inputs
        # stay: times in bf16 would be off.
        self.policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)

    def cut(self, model: nn.Module, whole: set[nn.Parameter]) -> None:
        """Cut a `build.Model` in place; `whole` are parameters that stay as they are: what isn't trained."""
        from torch.distributed.fsdp import fully_shard

        assert isinstance(model, build.Model)
        network, conditioner = model.network, model.conditioner
        stages = [stage for name in BLOCKS for stage in _stages(getattr(network, name, None))]
        for module in (*stages, network, *([] if conditioner is None else [conditioner])):
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True, mp_policy=self.policy, ignored_params=whole)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of cut gradients as if they were whole; every process calls it."""
        own = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
        torch.distributed.all_reduce(own, group=self.mesh.get_group())
        return own.sqrt()


def _stages(part: nn.Module | None) -> Iterator[nn.Module]:
    if isinstance(part, nn.ModuleList):
        yield from part
    elif part is not None:
        yield part


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor, sharing its memory; the tensor itself where it isn't cut."""
    return getattr(tensor, "_local_tensor", tensor)


def fill(own: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be cut."""
    mesh: Any = getattr(own, "device_mesh", None)
    if mesh is None:
        own.copy_(value)
        return
    pieces, rank = value.chunk(mesh.size(), dim=0), mesh.get_local_rank()
    if rank < len(pieces):  # FSDP2 cuts as `chunk` does; the last processes may have nothing
        local(own).copy_(pieces[rank])


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, one after the other; every process calls it, and is left with them where it is to
    `keep` them."""
    whole: dict[str, Tensor] = {}
    cut: dict[str, Any] = dict(tensors)
    for name, tensor in cut.items():
        full = tensor.full_tensor() if is_cut(tensor) else tensor
        whole |= {name: full.detach().cpu()} if keep else {}
    return whole


def flat(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's files under one name each, `file:tensor`."""
    return {f"{name}:{key}": tensor for name, content in tensors.items() for key, tensor in content.items()}


def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's pieces as they are now, in memory of their own on the CPU."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    return BlockingAsyncStager().stage(dict(tensors))  # pyright: ignore[reportReturnType]


def is_cut(tensor: Tensor) -> bool:
    """Whether a process has but its piece of it."""
    return hasattr(tensor, "_local_tensor")


# --- on disk ----------------------------------------------------------------------------------------------------------


def write(folder: Path, tensors: Mapping[str, Tensor], writers: Any) -> None:
    """Each process of `writers` its own pieces, as safetensors, by torch.distributed.checkpoint. Raises OSError with
    the reason."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(_contiguous(tensors), storage_writer=writer, process_group=writers)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise first if isinstance(first, OSError) else OSError(str(first)) from error


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, cut in any way, from the pieces of any number of processes. Raises LimnerError where one of them
    isn't there or has another shape."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        reason = " ".join(str(next(iter(error.failures.values()))[0]).split())[:160]
        raise LimnerError(f"{folder}: {reason}; resume with the run's own recipe") from error


def read_whole(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names begin with `prefix`, without it, for this process alone."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    known = reader.read_metadata().state_dict_metadata
    found = {name: torch.empty(about.size, dtype=about.properties.dtype)  # pyright: ignore[reportAttributeAccessIssue]
             for name, about in known.items() if name.startswith(prefix)}  # fmt: skip
    if found:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            reader = dcp.HuggingFaceStorageReader(str(folder))
            dcp.load(dict[str, Any](found), storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Frozen parts may lie channels last, which safetensors refuses."""
    return {name: tensor if is_cut(tensor) else tensor.detach().contiguous() for name, tensor in tensors.items()}
