"""One picture's way through a recipe's networks, counted on the meta device: nothing is allocated, nothing computed.

Arithmetic is counted by PyTorch's FlopCounterMode, a multiply-add as two; what the backward pass keeps by the hooks
of saved tensors; memory traffic by the sizes of what every other operation reads and writes. Attention counts as the
fused kernel, which keeps no table of all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from limner import build
from limner.config import BoxesCondition, ConditionConfig, PixelSpace, RunConfig, VariationCondition
from limner.errors import LimnerError
from limner.nn.layout import TokenBoxesConditioner
from limner.nn.text import TextConditioner, TextTransformer
from limner.nn.unet import Stage
from limner.training.optimizers import Optimizer
from limner.training.tasks import hidden_weights

PRODUCTS = (nn.Linear, nn.Conv2d)
"""What autocast runs in bf16, with copies of the weights."""


@dataclass(frozen=True)
class Pass:
    """One picture forward and backward. flops. moved: bytes read and written by all but products and convolutions.
    kept: bytes that the backward pass needs. kept_again: the same with gradient checkpointing. condition_flops: the
    text encoder's share of the forward pass."""

    condition_flops: float
    forward_flops: float
    backward_flops: float
    forward_moved: float
    backward_moved: float
    kept: float
    kept_again: float


@dataclass(frozen=True)
class Counts:
    """parameters: by part. trained: those that learn. frozen_bytes: of the rest. cast: parameters that are copied to
    bf16 for use. moments: bytes of the optimizer's state. unit: parameters of the largest stage, what a sharded model
    gathers at a time. image: in training. encode_flops, decode_flops: of the autoencoder, for one picture."""

    parameters: dict[str, int]
    trained: int
    frozen_bytes: float
    cast: int
    moments: float
    unit: int
    image: Pass
    encode_flops: float
    decode_flops: float


def count(config: RunConfig, *, bf16: bool) -> Counts:
    """Count a recipe's networks. bf16: as under autocast, else in float32.

    Raises LimnerError for a recipe that can't be built, or a task other than diffusion.
    """
    if config.task != "diffusion":
        raise LimnerError(f"task {config.task}: only the training of diffusion models is planned")
    section = config.model.model_copy(update={"gradient_checkpointing": False})
    config = config.model_copy(update={"model": section})
    with torch.device("meta"):
        model = build.model(config)
        model.train()
        optimizer = Optimizer(model, config.training, hidden_weights(model))
    parts = {"network": model.network, "conditions": model.conditioner, "autoencoder": model.autoencoder}
    parameters = {name: _parameters(part) for name, part in parts.items() if part is not None}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    encode_flops, decode_flops = _autoencoder_flops(model, config)
    model.autoencoder = None  # training sees its latents alone
    cast = sum(m.weight.numel() for m in model.modules() if isinstance(m, PRODUCTS)) if bf16 else 0
    return Counts(
        parameters=parameters,
        trained=trained,
        frozen_bytes=4.0 * (sum(parameters.values()) - trained),
        cast=cast,
        moments=float(sum(t.numel() * t.element_size() for _, t in optimizer.slots())),
        unit=max(map(_parameters, _stages(model)), default=trained),
        image=_image(model, config, bf16),
        encode_flops=encode_flops,
        decode_flops=decode_flops,
    )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _stages(model: nn.Module) -> list[nn.Module]:
    """What gradient checkpointing computes again, piece by piece."""
    return [module for module in model.modules() if isinstance(module, Stage)]


def _autoencoder_flops(model: build.Model, config: RunConfig) -> tuple[float, float]:
    if model.autoencoder is None or isinstance(config.space, PixelSpace):
        return 0.0, 0.0
    assert config.data.size is not None
    picture = torch.empty(1, config.data.channels, *config.data.size, device="meta")
    latent = torch.empty(1, *build.space_shape(config), device="meta")
    autoencoder, counter = model.autoencoder, FlopCounterMode(display=False)
    with torch.no_grad(), _Fused(), counter:
        autoencoder.encode(picture)
        encoding = counter.get_total_flops()
        autoencoder.quantizer = None  # looking a code up is as good as free
        autoencoder.decode(latent)
    return float(encoding), float(counter.get_total_flops() - encoding)


# --- a picture in training ------------------------------------------------------------------------------------------


def _image(model: build.Model, config: RunConfig, bf16: bool) -> Pass:
    if bf16:
        _as_under_autocast(model)
    network = model.network
    channels, height, width = build.space_shape(config)
    tau = model.conditioner
    spatial = 0 if tau is None else tau.spatial_channels
    x = torch.empty(1, channels, height, width, device="meta")
    maps = torch.empty(1, spatial, height, width, device="meta") if spatial else None
    time = torch.empty(1, device="meta")
    vector = torch.empty(1, network.emb_channels, device="meta")  # pyright: ignore[reportArgumentType, reportCallIssue]
    ledger, traffic = _Ledger(model), _Traffic()
    with _Fused(), traffic, FlopCounterMode(display=False) as counter, ledger.watching(_stages(model)):
        tokens = _tokens(model, config)
        conditions = counter.get_total_flops()
        out = network(x, time, vector, tokens, None, maps)
        loss = out.float().square().mean()
        forward, moved = counter.get_total_flops(), traffic.bytes
        loss.backward()
    backward = counter.get_total_flops() - forward
    return Pass(float(conditions), float(forward), float(backward), moved, traffic.bytes - moved, ledger.all,
                ledger.again)  # fmt: skip


def _tokens(model: build.Model, config: RunConfig) -> Tensor | None:
    """What cross-attention sees: the text encoder's work is counted, other modalities' tokens are as good as free."""
    tau = model.conditioner
    if tau is None or tau.token_channels is None:
        return None
    parts = []
    for section in config.conditions:
        module = tau.modalities[section.kind]
        if isinstance(module, TextConditioner) and isinstance(module.encoder, TextTransformer):
            ids = torch.zeros(1, module.length, dtype=torch.long, device="meta")
            parts.append(module.encoder(ids, torch.ones_like(ids, dtype=torch.bool))[0])
        elif getattr(module, "token_channels", None) is not None:
            parts.append(torch.empty(1, _length(module, section), tau.token_channels, device="meta"))
    return torch.cat(parts, dim=1)


def _length(module: nn.Module, section: ConditionConfig) -> int:
    """Tokens that a modality gives."""
    if isinstance(module, TextConditioner):
        return module.length
    if isinstance(section, VariationCondition):
        return section.grid**2
    if isinstance(module, TokenBoxesConditioner):
        return module.encoder.length
    return section.most if isinstance(section, BoxesCondition) else 1


def _as_under_autocast(model: nn.Module) -> None:
    """Products and convolutions in bf16, layer norms in float32: autocast itself doesn't know the meta device."""
    for module in model.modules():
        if isinstance(module, PRODUCTS):
            module.bfloat16().register_forward_pre_hook(lambda _, given: (given[0].bfloat16(), *given[1:]))
        elif isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:]))


class _Fused(TorchFunctionMode):
    """Attention by a fused kernel, which the meta device wouldn't choose by itself. Masks change no count."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
        return func(*args, **(kwargs or {}))


class _Traffic(TorchDispatchMode):
    """Bytes read and written by operations that the flop counter doesn't count, each by itself, unfused."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in flop_registry and not func.is_view and "empty" not in func.__name__:
            self.bytes += sum(t.numel() * t.element_size() for t in _tensors((args, kwargs, out)))
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class _Ledger:
    """What a forward pass keeps for the backward pass, by the stage that keeps it; parameters aside."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {p.untyped_storage()._cdata for p in model.parameters()}
        self._alive: dict[int, Tensor] = {}  # so that no storage's address is used twice
        self._kept: set[int] = set()
        self._inputs: dict[int, float] = {}
        self._by_stage: dict[int | None, float] = {}
        self._stage: int | None = None

    @property
    def all(self) -> float:
        return sum(self._by_stage.values())

    @property
    def again(self) -> float:
        """With gradient checkpointing: stages keep their inputs, and all of theirs one at a time."""
        stages = [size for stage, size in self._by_stage.items() if stage is not None]
        return self._by_stage.get(None, 0.0) + sum(self._inputs.values()) + max(stages, default=0.0)

    @contextmanager
    def watching(self, stages: list[nn.Module]) -> Iterator[None]:
        handles = []
        for number, stage in enumerate(stages):
            handles += [stage.register_forward_pre_hook(self._enter(number)), stage.register_forward_hook(self._leave)]
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield
        for handle in handles:
            handle.remove()

    def _enter(self, number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            self._stage = number
            storage = given[0].untyped_storage()
            self._alive.setdefault(storage._cdata, given[0])
            self._inputs[storage._cdata] = float(storage.nbytes())

        return hook

    def _leave(self, *_: Any) -> None:
        self._stage = None

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own and storage._cdata not in self._kept:
            self._kept.add(storage._cdata)
            self._alive.setdefault(storage._cdata, tensor)
            self._by_stage[self._stage] = self._by_stage.get(self._stage, 0.0) + storage.nbytes()
        return tensor
