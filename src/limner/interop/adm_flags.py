"""guided-diffusion's command-line flags: what its scripts default to, and those of the published models.

Flags come as a mapping (flat, or by `model` and `classifier`), a JSON file, the name of a published model, or the
very string that was given to its scripts.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from limner.config import read_yaml
from limner.errors import LimnerError, suggest

Flags = dict[str, Any]
Part = Literal["model", "classifier"]

DIFFUSION: Flags = {
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
    "sigma_small": False,
}
MODEL: Flags = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_fp16": False,
    "use_new_attention_order": False,
}
CLASSIFIER: Flags = {
    "image_size": 64,
    "classifier_use_fp16": False,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
UPSAMPLER: Flags = {"large_size": 256, "small_size": 64}
SAMPLING: Flags = {"use_ddim": False, "clip_denoised": True, "classifier_scale": 1.0}
"""Read for the sampling defaults of the run."""

CLASSIFIER_ONLY = {"num_head_channels": 64, "channel_mult": "", "num_heads": 1, "use_new_attention_order": False}
"""What the peer fixes for its classifiers; forks make them flags, under the names that the diffusion model's have."""

IGNORED = frozenset(
    "num_samples batch_size model_path classifier_path base_samples data_dir val_data_dir schedule_sampler lr "
    "weight_decay lr_anneal_steps anneal_lr microbatch ema_rate log_interval save_interval eval_interval iterations "
    "resume_checkpoint fp16_scale_growth noised num_classes".split()
)
"""Flags of the scripts that say nothing of the network or the process."""

DEFAULTS: Flags = {**SAMPLING, **UPSAMPLER, **CLASSIFIER, **MODEL, **DIFFUSION}

_ADM = (
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --learn_sigma True "
    "--noise_schedule linear --num_res_blocks 2 --resblock_updown True --use_scale_shift_norm True "
)
_IMAGENET = _ADM + "--num_channels 256 --num_head_channels 64 "
_CLASSIFIER = "--classifier_depth 2 --classifier_width 128 --classifier_attention_resolutions 32,16,8 "
_LSUN = _IMAGENET + "--class_cond False --dropout 0.1 --image_size 256"

PUBLISHED: dict[str, str] = {
    "64x64_diffusion": _ADM + "--image_size 64 --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
    "--noise_schedule cosine --use_new_attention_order True --dropout 0.1",
    "128x128_diffusion": _ADM + "--image_size 128 --num_channels 256 --num_heads 4",
    "256x256_diffusion": _IMAGENET + "--image_size 256",
    "256x256_diffusion_uncond": _IMAGENET + "--image_size 256 --class_cond False",
    "512x512_diffusion": _IMAGENET + "--image_size 512",
    "64_256_upsampler": _ADM + "--large_size 256 --small_size 64 --num_channels 192 --num_heads 4",
    "128_512_upsampler": _ADM + "--large_size 512 --small_size 128 --num_channels 192 --num_head_channels 64 "
    "--attention_resolutions 32,16",
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": _LSUN + " --dropout 0.0",
    "64x64_classifier": _CLASSIFIER + "--image_size 64 --noise_schedule cosine --classifier_depth 4",
    "128x128_classifier": _CLASSIFIER + "--image_size 128",
    "256x256_classifier": _CLASSIFIER + "--image_size 256",
    "512x512_classifier": _CLASSIFIER + "--image_size 512",
}
"""The README of openai/guided-diffusion, by the files' names without `.pt`. The 64 x 64 pair is the cosine one."""


def parse(flags: Mapping[str, Any] | str | Path, part: Part) -> Flags:
    """The flags that were given, typed; defaults are not filled in.

    part: which network they are for, where a file has both. Raises LimnerError for an unknown flag (with the nearest
    known one), a wrong type, or a file that isn't there.
    """
    given, where = (flags, "flags") if isinstance(flags, Mapping) else _read(flags)
    if any(isinstance(value, Mapping) for value in given.values()):
        return _of_part(given, part, where)
    typed = _typed(given, where)
    if part == "classifier" and _of_both(typed):
        return {name: value for name, value in typed.items() if name not in CLASSIFIER_ONLY}
    return typed


def _of_both(flags: Flags) -> bool:
    """Whether one command line speaks of a diffusion model and a classifier, as classifier_sample.py's does: then
    `num_head_channels` and the like are the diffusion model's."""
    model_alone = {"num_channels", "num_res_blocks", "attention_resolutions", "class_cond", "resblock_updown"}
    return not model_alone.isdisjoint(flags)


def _of_part(given: Mapping[str, Any], part: Part, where: str) -> Flags:
    """Flags of one network; the process, which both share, is said once, with the diffusion model."""
    sections = {name: value for name, value in given.items() if isinstance(value, Mapping)}
    for name in sections:
        if name not in ("model", "classifier"):
            raise LimnerError(f"{where}: unknown section '{name}'{suggest(name, ['model', 'classifier'])}")
    shared = _typed({name: value for name, value in given.items() if name not in sections}, where)
    if part not in sections:
        raise LimnerError(f"{where}: has no section '{part}', and this is a {part}; known: {', '.join(sections)}")
    process = {k: v for k, v in _typed(sections.get("model", {}), where).items() if k in DIFFUSION}
    return {**process, **shared, **_typed(sections[part], where)}


def _read(flags: str | Path) -> tuple[Mapping[str, Any], str]:
    text = str(flags).strip()
    if text in PUBLISHED:
        return _command_line(PUBLISHED[text]), text
    if text.startswith("-"):
        return _command_line(text), "flags"
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        return read_yaml(path), text
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LimnerError(f"flags '{text}': should be a JSON file, a published model's name, or a string such as "
                          f"\"--image_size 64 --num_channels 128\"{suggest(text, PUBLISHED)}") from None  # fmt: skip
    except OSError as error:
        raise LimnerError(f"{text}: cannot be read ({error.strerror or error})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LimnerError(f"{text}: not valid JSON ({error})") from None
    if not isinstance(loaded, dict):
        raise LimnerError(f"{text}: should be a mapping of flags to values, is a {type(loaded).__name__}")
    return loaded, text


def _command_line(text: str) -> Flags:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise LimnerError(f'flags: {error} in "{text}"') from None
    flags: Flags = {}
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise LimnerError(f"flags: '{word}' should be a flag, such as --image_size 64")
        if not equals:
            if not words or words[0].startswith("--"):
                raise LimnerError(f"flags: --{name} lacks its value")
            value = words.pop(0)
        flags[name] = value
    return flags


def _typed(given: Mapping[str, Any], where: str) -> Flags:
    """Known flags in their types; a null in JSON stands for a flag that wasn't given."""
    return {
        name: _value(name, value, where) for name, value in given.items() if _known(name, where) and value is not None
    }


def _known(name: str, where: str) -> bool:
    if name not in DEFAULTS and name not in IGNORED:
        raise LimnerError(f"{where}: unknown flag '{name}'{suggest(name, DEFAULTS)}")
    return name in DEFAULTS


def _value(name: str, value: Any, where: str) -> Any:
    """A flag in the type of its default, as the peer's argument parser would have it."""
    default = DEFAULTS[name]
    try:
        if isinstance(default, bool):
            return _boolean(value)
        if isinstance(default, str):
            return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if isinstance(value, bool):
            raise ValueError
        return type(default)(value)
    except (TypeError, ValueError):
        kind = {bool: "true or false", int: "an integer", float: "a number"}[type(default)]
        raise LimnerError(f"{where}: flag '{name}' should be {kind}, is '{value}'") from None


def _boolean(value: Any) -> bool:
    words = {
        **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
        **dict.fromkeys(("no", "false", "f", "n", "0"), False),
    }
    if str(value).lower() not in words:
        raise ValueError
    return words[str(value).lower()]
