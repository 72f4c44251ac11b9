"""guided-diffusion's diffusion models, upsamplers and classifiers (Dhariwal & Nichol 2021, arXiv:2105.05233).

The architecture is read off the weights, and the flags that were given must agree with it. What the weights don't
tell (heads and their order, schedule, picture size, what is predicted) comes from the flags, else from the peer's
defaults; for the published models the flags are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from limner import config as c
from limner.core import path as spacings
from limner.errors import LimnerError
from limner.interop import unet_keys
from limner.interop.adm_flags import CLASSIFIER_ONLY, DEFAULTS, PUBLISHED, Flags, Part, parse
from limner.interop.adm_shapes import Structure, structure
from limner.interop.imported import Imported, imported
from limner.interop.keymap import TRANSPOSED, Rule, pointwise, rule, under

CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
"""Channels of the levels by picture size, where `channel_mult` isn't given."""
UPSAMPLER_512_MULT = (1, 1, 2, 2, 4, 4)
IMAGENET = 1000
SCHEDULE = {"noise_schedule", "diffusion_steps"}


@dataclass(frozen=True)
class Plan:
    """How a checkpoint is to be read: its recipe, and the table from its weights' names to ours."""

    config: c.RunConfig
    rules: list[Rule]
    notes: tuple[str, ...]


def read(weights: Mapping[str, Tensor], path: Path, flags: Mapping[str, Any] | str | Path | None = None) -> Imported:
    """Import a checkpoint whose weights are already read.

    flags: see `adm_flags.parse`. None is enough for the published models, which are known by file name or by shape.
    Raises LimnerError where flags are needed, unknown, or contradict the weights.
    """
    made = plan(structure(weights, str(path)), path, flags)
    return imported(made.config, weights, made.rules, str(path), notes=made.notes)


def plan(found: Structure, path: Path, flags: Mapping[str, Any] | str | Path | None = None) -> Plan:
    """What flags make of a network that was read off its weights; `read` says the rest."""
    where, part = str(path), _part(found)
    notes: list[str] = []
    if flags is None:
        name = published(found, path.stem)
        if name is None:
            raise LimnerError(f"{where}: a guided-diffusion {part}; heads and schedule aren't in the weights: needs "
                              'flags (--flags), a JSON file or "--image_size 64 ..." as given to its '
                              'scripts')  # fmt: skip
        notes.append(f"{where}: read as the published {name}, known by its {'name' if name == path.stem else 'shape'}")
        flags = name
    given = parse(flags, part)
    levels = _layout(found, given, where)
    for flag, right in _disagreements(found, levels, given):
        said = "nothing" if given[flag] == "" else given[flag]
        raise LimnerError(f"{where}: flag '{flag}' says {said}, but the weights have {right}")
    settled = _settled(found, given)
    if settled["use_kl"]:
        notes.append(f"{where}: use_kl is a training loss that Limner lacks; fine-tuning uses the hybrid loss")
    known = not found.is_classifier or not SCHEDULE.isdisjoint(given)
    config = _recipe(found, levels, settled, where, known=known)
    model = config.model
    assert isinstance(model, c.UNetConfig | c.ClassifierConfig)
    return Plan(config, table(found, model, legacy=not settled["use_new_attention_order"]), tuple(notes))


def _settled(found: Structure, given: Flags) -> Flags:
    """Every flag: given, or the peer's default. Forks call an upsampler's size `image_size`; all enlarge by four."""
    settled = {**DEFAULTS, **(CLASSIFIER_ONLY if found.is_classifier else {}), **given}
    if found.is_upsampler and "large_size" not in given and "image_size" in given:
        settled["large_size"] = given["image_size"]
    if "small_size" not in given:
        settled["small_size"] = max(1, settled["large_size"] // 4)
    return settled


def recipe(flags: Mapping[str, Any] | str | Path, part: Part = "model") -> c.RunConfig:
    """The recipe of the network that flags alone describe, as the peer's scripts would make it: for the published
    models without their weights, say. Raises LimnerError for flags that describe none."""
    return plan(described(flags, part), Path("flags"), flags).config


def described(flags: Mapping[str, Any] | str | Path, part: Part = "model") -> Structure:
    """The network that flags alone describe, for ImageNet's classes."""
    given = parse(flags, part)
    classifier, upsampler = part == "classifier", "large_size" in given
    every = {**DEFAULTS, **given}
    prefix = "classifier_" if classifier else ""
    size = every["large_size" if upsampler else "image_size"]
    width = every["classifier_width" if classifier else "num_channels"]
    factors = {size // pixels for pixels in _integers(every[f"{prefix}attention_resolutions"], "attention_resolutions")}
    blocks = every["classifier_depth" if classifier else "num_res_blocks"]
    mult = _multipliers(every) if every["channel_mult"] else _default_multipliers(size, upsampler)
    levels = tuple(
        c.Level(channels=int(m * width), blocks=blocks, attention=2**i in factors, cross_attention=0)
        for i, m in enumerate(mult)
    )
    pool = every["classifier_pool"] if classifier else None
    if pool not in (None, *HEADS):
        raise LimnerError(f"flag 'classifier_pool' is '{pool}'; should be {', '.join(HEADS)}")
    return Structure(
        width=width,
        in_channels=6 if upsampler else 3,
        out_channels=None if classifier else 6 if every["learn_sigma"] else 3,
        layouts=(levels,),
        resample="block" if every[f"{prefix}resblock_updown"] else "conv",
        scale_shift=every[f"{prefix}use_scale_shift_norm"],
        classes=IMAGENET if classifier or every["class_cond"] else None,
        pool=pool,
        pool_pixels=(size // 2 ** (len(mult) - 1)) ** 2 if pool == "attention" else None,
    )


def _default_multipliers(size: int, upsampler: bool) -> Sequence[float]:
    known = {**CHANNEL_MULT, 512: UPSAMPLER_512_MULT} if upsampler else CHANNEL_MULT
    if size not in known:
        raise LimnerError(
            f"flags: pictures of {size} need channel_mult; without it should be of {', '.join(map(str, known))}"
        )
    return known[size]


def _part(found: Structure) -> Part:
    return "classifier" if found.is_classifier else "model"


def published(found: Structure, stem: str) -> str | None:
    """The published model that a network is: by its file's name where the shapes agree, else by shape alone."""
    agreeing = [name for name in PUBLISHED if _is_published(found, name)]
    return stem if stem in agreeing else agreeing[0] if agreeing else None


def _is_published(found: Structure, name: str) -> bool:
    part: Part = "classifier" if name.endswith("classifier") else "model"
    wanted = described(name, part)
    return any(replace(found, layouts=(layout,)) == wanted for layout in found.layouts)


def _size(found: Structure, flags: Flags) -> int:
    return flags["large_size" if found.is_upsampler else "image_size"]


# --- flags against weights ----------------------------------------------------------------------------------------


def _layout(found: Structure, given: Flags, where: str) -> tuple[c.Level, ...]:
    """The levels; where a classifier's weights leave a choice, the one that the flags describe."""
    if len(found.layouts) == 1:
        return found.layouts[0]
    fitting = [layout for layout in found.layouts if _fits(found, layout, given)]
    if len(fitting) > 1:
        usual = [layout for layout in fitting if layout[0].blocks == DEFAULTS["classifier_depth"]]
        fitting = usual or fitting
    if len(fitting) != 1:
        ways = "; ".join(f"{layout[0].blocks} with {len(layout)} levels" for layout in found.layouts)
        raise LimnerError(f"{where}: needs the flags classifier_depth, image_size and channel_mult that fit its "
                          f"weights; possible depths: {ways}")  # fmt: skip
    return fitting[0]


def _fits(found: Structure, layout: tuple[c.Level, ...], given: Flags) -> bool:
    known = {"classifier_depth", "classifier_attention_resolutions", "channel_mult"} & given.keys()
    if any(flag in known for flag, _ in _disagreements(found, layout, given)):
        return False
    if found.pool_pixels is None or "image_size" not in given:
        return True
    return (given["image_size"] // 2 ** (len(layout) - 1)) ** 2 == found.pool_pixels


def _disagreements(found: Structure, levels: tuple[c.Level, ...], given: Flags) -> Iterator[tuple[str, str]]:
    """Flags that were given and contradict the weights, and what the weights say, in words."""
    widths = [level.channels for level in levels]
    blocks = sorted({level.blocks for level in levels})
    prefix = "classifier_" if found.is_classifier else ""
    facts: dict[str, Any] = {
        "classifier_width" if prefix else "num_channels": found.width,
        "classifier_depth" if prefix else "num_res_blocks": blocks[0] if len(blocks) == 1 else blocks,
        f"{prefix}use_scale_shift_norm": found.scale_shift,
    }
    if len(levels) > 1:
        facts[f"{prefix}resblock_updown"] = found.resample == "block"
    if found.is_classifier:
        facts["classifier_pool"] = found.pool
    else:
        facts["class_cond"] = found.classes is not None
        facts["learn_sigma"] = found.learns_variance
    for flag, fact in facts.items():
        if flag in given and given[flag] != fact:
            yield flag, str(fact)
    if given.get("channel_mult") and [int(m * found.width) for m in _multipliers(given)] != widths:
        yield "channel_mult", f"levels of {', '.join(map(str, widths))} channels"
    yield from _attention_disagreement(found, levels, given, f"{prefix}attention_resolutions")
    side = _size(found, _settled(found, given)) // 2 ** (len(levels) - 1)
    if found.pool_pixels and "image_size" in given and side**2 != found.pool_pixels:
        yield "image_size", f"attention pooling over {found.pool_pixels} places after {len(levels)} levels"


def _attention_disagreement(found: Structure, levels: tuple[c.Level, ...], given: Flags,
                            flag: str) -> Iterator[tuple[str, str]]:  # fmt: skip
    """`attention_resolutions` are in pixels: a level has attention where the size over one of them is its factor."""
    if flag not in given:
        return
    size = _size(found, _settled(found, given))
    factors = {size // pixels for pixels in _integers(given[flag], flag)}
    if [2**i in factors for i in range(len(levels))] != [level.attention for level in levels]:
        having = [str(size // 2**i) for i, level in enumerate(levels) if level.attention]
        yield flag, f"attention at {', '.join(having) or 'none'} (of a picture of {size})"


def _integers(text: str, flag: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise LimnerError(f"flag '{flag}' should be numbers such as 16,8, is '{text}'") from None
    if any(number < 1 for number in numbers):
        raise LimnerError(f"flag '{flag}' should be numbers of 1 or more, is '{text}'")
    return numbers


def _multipliers(flags: Flags) -> list[float]:
    try:
        return [float(part) for part in flags["channel_mult"].split(",")]
    except ValueError:
        raise LimnerError(
            f"flag 'channel_mult' should be numbers such as 1,2,4, is '{flags['channel_mult']}'"
        ) from None


# --- the recipe ----------------------------------------------------------------------------------------------------


def _recipe(found: Structure, levels: tuple[c.Level, ...], flags: Flags, where: str, *, known: bool) -> c.RunConfig:
    """known: whether the flags said the schedule; those of a classifier's script needn't."""
    if found.is_classifier and found.pool_pixels:
        size = round(found.pool_pixels**0.5) * 2 ** (len(levels) - 1)
    else:
        size = _size(found, flags)
    conditions: list[dict[str, Any]] = []
    if found.classes and not found.is_classifier:
        conditions.append({"kind": "label", "dropout": 0.0, "null": False})
    if found.is_upsampler:
        conditions.append({"kind": "image", "dropout": 0.0, "null": False, "size": [flags["small_size"]] * 2})
    kind: dict[str, Any] = {"kind": "classifier", "pool": found.pool} if found.is_classifier else {"kind": "unet"}
    recipe = {
        "task": "classifier" if found.is_classifier else "diffusion",
        "data": {"size": [size, size], "channels": _checked_channels(found, where)},
        "process": _process(found, flags, where, known=known),
        "model": {**kind, **_network(found, levels, flags, where)},
        "conditions": conditions,
        "sampling": _sampling(flags, learned=found.learns_variance),
        "classes": [str(number) for number in range(found.classes)] if found.classes else None,
        "training": {"precision": "fp32"},
        "provenance": {"format": "guided-diffusion", "file": Path(where).name, "flags": flags},
    }
    return c.parse(recipe, where)


def _checked_channels(found: Structure, where: str) -> Any:
    channels = found.channels
    if channels not in (1, 3, 4):
        raise LimnerError(f"{where}: pictures of {channels} channels; Limner has pictures of 1, 3 or 4")
    if not found.is_classifier and found.out_channels not in (channels, 2 * channels):
        raise LimnerError(f"{where}: {found.out_channels} channels out for {channels} in; should be {channels}, or "
                          f"{2 * channels} with a learned variance")  # fmt: skip
    return channels


def _network(found: Structure, levels: tuple[c.Level, ...], flags: Flags, where: str) -> dict[str, Any]:
    """What U-Net and classifier share. `time_scale` is the peer's rescaling of steps to 0..1000."""
    rescaled = flags["rescale_timesteps"]
    return {
        "levels": [level.model_dump() for level in levels],
        "modulation": "scale_shift" if found.scale_shift else "add",
        "resample": found.resample,
        "time_channels": found.width,
        "time_scale": 1000.0 / flags["diffusion_steps"] if rescaled else 1.0,
        "dropout": 0.0 if found.is_classifier else flags["dropout"],
        "gradient_checkpointing": False if found.is_classifier else flags["use_checkpoint"],
        **_heads(found, levels, flags, where),
    }


def _heads(found: Structure, levels: tuple[c.Level, ...], flags: Flags, where: str) -> dict[str, int | None]:
    fixed_width = flags["num_head_channels"] != -1
    name = "num_head_channels" if fixed_width else "num_heads"
    number, above = flags[name], flags["num_heads_upsample"]
    for channels in {level.channels for level in levels if level.attention} | {levels[-1].channels}:
        if number < 1 or channels % number:
            raise LimnerError(f"{where}: flag '{name}' is {number}, which doesn't divide the {channels} channels of "
                              "its attention")  # fmt: skip
    if fixed_width:
        return {"head_dim": number, "heads": None}
    if found.pool == "attention":
        raise LimnerError(f"{where}: attention pooling needs the flag num_head_channels, such as 64")
    if above not in (-1, number) and not found.is_classifier:
        raise LimnerError(f"{where}: flag 'num_heads_upsample' is {above}, num_heads {number}: Limner's U-Net has one "
                          "number of heads for both ways")  # fmt: skip
    return {"head_dim": None, "heads": number}


def _process(found: Structure, flags: Flags, where: str, *, known: bool) -> dict[str, Any]:
    schedules = {"linear": "linear", "cosine": "discrete_cosine"}
    name, steps = flags["noise_schedule"], flags["diffusion_steps"]
    if name not in schedules:
        raise LimnerError(f"{where}: flag 'noise_schedule' is '{name}'; should be {' or '.join(schedules)}")
    if steps < 1:
        raise LimnerError(f"{where}: flag 'diffusion_steps' is {steps}; should be 1 or more")
    return {
        "schedule": {"kind": schedules[name], "steps": steps},
        "schedule_known": known,
        "prediction": "sample" if flags["predict_xstart"] else "epsilon",
        "learned_variance": found.learns_variance,
        "time_input": "step",
        # The peer's hybrid loss weighs the bound by T / 1000 (rescaled), or by 1; ours by T times this.
        "vlb_weight": 0.001 if flags["rescale_learned_sigmas"] else 1 / steps,
    }


def _sampling(flags: Flags, *, learned: bool) -> dict[str, Any]:
    """Sampling as the peer's scripts would: ancestral (or DDIM with use_ddim), over the respaced steps."""
    total, respacing = flags["diffusion_steps"], flags["timestep_respacing"].replace(" ", "")
    if respacing and not spacings.is_respacing(respacing):
        raise LimnerError(f"flag 'timestep_respacing' should be such as 250, 10,15,20 or ddim25, is '{respacing}'")
    return {
        "sampler": "ddim" if flags["use_ddim"] else "ddpm",
        "steps": len(spacings.step_indices(total, total, respacing)) if respacing else total,
        "spacing": respacing or "leading",
        "guidance": 1.0,
        "clip": flags["clip_denoised"],
        "variance": None if learned else "small" if flags["sigma_small"] else "large",
    }


# --- the weights ---------------------------------------------------------------------------------------------------

HEADS: dict[str, tuple[Rule, ...]] = {
    "attention": (
        rule("out.0", "norm"),
        Rule(("out.2.positional_embedding",), ("head.position",), TRANSPOSED),
        rule("out.2.qkv_proj", "head.qkv", pointwise(1)),
        rule("out.2.c_proj", "head.out", pointwise(1)),
    ),
    "adaptive": (rule("out.0", "norm"), rule("out.3", "head", pointwise(2))),
    "spatial": (rule("out.0", "head.0"), rule("out.2", "head.2")),
    "spatial_v2": (rule("out.0", "head.0"), rule("out.1", "head.1"), rule("out.3", "head.3")),
}
"""The classifier's head by its pooling. Its own attention has the new order of rows, whatever the body's."""


def table(found: Structure, model: c.UNetConfig | c.ClassifierConfig, *, legacy: bool) -> list[Rule]:
    """From the peer's names to those of `build.model`. legacy: the body's attention has its rows head by head."""
    attention = unet_keys.self_attention(unet_keys.heads_of(model), heads_outside=legacy)
    ends = unet_keys.ENDS if found.pool is None else (*unet_keys.STEM, *HEADS[found.pool])
    network = under("", "network.", [*ends, *unet_keys.blocks(attention)])
    return [*network, rule("label_emb", "conditioner.modalities.label.table")]
