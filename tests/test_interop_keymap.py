"""The rename engine: every weight once, every shape checked, every table reversible."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limner.errors import LimnerError
from limner.interop.keymap import (
    TRANSPOSED,
    Rule,
    convert,
    heads_inside,
    joined,
    pointwise,
    reverse,
    rule,
    under,
)

TABLE = [
    rule("in.0.0", "stem"),
    *under("in.{i}.{j}.", "down.{i-1}.{j}.", [rule("norm", "norm"), rule(("q", "k", "v"), "qkv", joined(3))]),
    Rule(("position",), ("head.position",), TRANSPOSED),
]


def weights() -> dict[str, torch.Tensor]:
    shapes = {"in.0.0.weight": (4, 3), "in.1.0.norm.weight": (4,), "in.1.0.norm.bias": (4,), "position": (4, 5)}
    shapes |= {f"in.1.0.{name}.weight": (4, 4) for name in "qkv"}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def targets() -> dict[str, tuple[int, ...]]:
    return {
        "stem.weight": (4, 3), "down.0.0.norm.weight": (4,), "down.0.0.norm.bias": (4,), "head.position": (5, 4),
        "down.0.0.qkv.weight": (12, 4),
    }  # fmt: skip


def test_names_are_renamed_joined_and_changed() -> None:
    source = weights()
    result = convert(source, TABLE, targets(), where="file")
    assert result["stem.weight"] is source["in.0.0.weight"]  # a rename copies nothing
    torch.testing.assert_close(result["down.0.0.qkv.weight"], torch.cat([source[f"in.1.0.{n}.weight"] for n in "qkv"]))
    torch.testing.assert_close(result["head.position"], source["position"].T)


def test_a_table_reversed_undoes_it() -> None:
    source = weights()
    there = convert(source, TABLE, targets(), where="file")
    back = convert(there, reverse(TABLE), {name: tuple(x.shape) for name, x in source.items()}, where="file")
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], source[name]) for name in source)


def refused(change: dict[str, torch.Tensor | None], rules: list[Rule] = TABLE, **options: object) -> str:
    changed = {**weights(), **change}
    source = {name: x for name, x in changed.items() if x is not None}
    with pytest.raises(LimnerError) as caught:
        convert(source, rules, targets(), where="file", **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith("file: ")
    assert "\n" not in message
    return message


def test_every_fault_names_the_weight() -> None:
    assert "'in.1.0.norm.bias' is missing" in refused({"in.1.0.norm.bias": None})
    assert "'in.1.0.k.weight' is missing" in refused({"in.1.0.k.weight": None})
    assert "'extra' is unknown (and 1 more)" in refused({"extra": torch.ones(1), "other": torch.ones(1)})
    assert "'in.2.0.norm.weight' has no place" in refused({"in.2.0.norm.weight": torch.ones(4)})
    assert "(5,), the network has (4,)" in refused({"in.1.0.norm.bias": torch.ones(5)})
    assert "claimed by two rules" in refused({}, [*TABLE, rule("in.0.0", "other")])
    assert "already taken" in refused({"again.weight": torch.ones(4, 3)}, [*TABLE, rule("again", "stem")])


def test_an_allow_list_lets_weights_go_unused() -> None:
    source = {**weights(), "loss.a": torch.ones(1), "loss.b": torch.ones(1)}
    assert convert(source, TABLE, targets(), where="file", ignore=["loss.*"]).keys() == targets().keys()


@given(heads=st.integers(1, 4), width=st.integers(1, 4), bias=st.booleans())
def test_legacy_heads_are_reordered_by_definition(heads: int, width: int, bias: bool) -> None:
    rows = 3 * heads * width
    x = torch.arange(rows) if bias else torch.arange(rows * 2).reshape(rows, 2)
    change = heads_inside(lambda channels: channels // width)
    (ours,) = change.forward([x])
    for head in range(heads):
        for part in range(3):
            for channel in range(width):
                legacy = (head * 3 + part) * width + channel
                assert torch.equal(ours[(part * heads + head) * width + channel], x[legacy])
    assert torch.equal(change.backward([ours])[0], x)


def test_a_pointwise_convolution_becomes_linear_and_a_bias_stays() -> None:
    weight, bias = pointwise(2).forward([torch.ones(4, 3, 1, 1), torch.ones(4)])
    assert (weight.shape, bias.shape) == ((4, 3), (4,))
    assert pointwise(2).backward([weight])[0].shape == (4, 3, 1, 1)
