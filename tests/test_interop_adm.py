"""guided-diffusion's checkpoints give what guided-diffusion's own code gave (see fixtures/README.md)."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import limner
from limner import build
from limner.core.losses import DiffusionLoss, LossTerms
from limner.errors import LimnerError
from limner.generator import Generator
from limner.guide import NoisyClassifier
from limner.interop import adm, adm_flags, safe
from limner.interop.adm_flags import PUBLISHED
from limner.interop.adm_shapes import structure
from limner.interop.imported import shapes
from limner.interop.keymap import convert

FIXTURES = Path(__file__).parent / "fixtures"
Recorded = dict[str, Tensor]


def recorded(name: str) -> Recorded:
    return load_file(FIXTURES / name / "io.safetensors")


def generator(name: str) -> Generator:
    loaded = limner.load(FIXTURES / name / "model.pt", flags=FIXTURES / name / "flags.json")
    assert isinstance(loaded, Generator)
    return loaded


def classifier(folder: str, file: str = "classifier.pt") -> NoisyClassifier:
    loaded = limner.load(FIXTURES / folder / file, flags=FIXTURES / folder / "flags.json")
    assert isinstance(loaded, NoisyClassifier)
    return loaded


def one_call(mine: Tensor, peer: Tensor) -> None:
    torch.testing.assert_close(mine, peer, atol=1e-4, rtol=0)


def whole_loop(mine: Tensor, peer: Tensor) -> None:
    torch.testing.assert_close(mine, peer, atol=1e-3 * float(peer.abs().max()), rtol=0)


def losses(gen: Generator, io: Recorded, network: Any = None, cond: Any = None) -> LossTerms:
    """training_losses at steps of the respaced process; its weight of the bound is 1 unless rescaled."""
    sampling, process = gen.config.sampling, gen.config.process
    path = gen.schedule.path(sampling.steps, sampling.spacing)
    loss = DiffusionLoss(
        gen.schedule, process.prediction, time_input="step", path=path if process.learned_variance else None,
        vlb_weight=1 / path.steps,
    )  # fmt: skip
    t = torch.tensor([path[path.steps - 1 - int(i)].t for i in io["loss_t"]], dtype=torch.float64)
    with torch.no_grad():
        return loss(network or gen.model.raw, io["x0"], io["eps"], t, cond)


def check_losses(mine: LossTerms, io: Recorded) -> None:
    torch.testing.assert_close(mine.mse, io["loss_mse"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(mine.loss, io["loss_loss"], atol=1e-4, rtol=1e-5)
    if "loss_vb" in io:
        assert mine.vb is not None
        torch.testing.assert_close(mine.vb, io["loss_vb"], atol=1e-4, rtol=1e-5)


# --- AdaGN, resblock_updown, learn_sigma, class_cond, legacy heads; classifier with attention pooling --------------


@pytest.fixture(scope="module")
def full() -> tuple[Generator, NoisyClassifier, Recorded]:
    return generator("adm"), classifier("adm"), recorded("adm")


def test_raw_network(full: tuple[Generator, NoisyClassifier, Recorded]) -> None:
    gen, _, io = full
    one_call(gen.raw(io["x"], io["t"], label=io["y"]), io["raw"])


def test_classifier_logits_and_gradient(full: tuple[Generator, NoisyClassifier, Recorded]) -> None:
    _, clf, io = full
    one_call(clf.logits(io["x"], io["t"]), io["classifier_logits"])
    x = io["x"].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(clf.log_prob(x, io["t"], io["guide_y"]).sum(), x)
    torch.testing.assert_close(gradient, io["classifier_grad"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_sampling(full: tuple[Generator, NoisyClassifier, Recorded], sampler: str, guided: bool) -> None:
    gen, clf, io = full
    name = f"{sampler}_guided" if guided else sampler
    scale = json.loads((FIXTURES / "adm" / "flags.json").read_text())["classifier_scale"]
    options: dict[str, Any] = {"classifier": clf, "classifier_scale": scale, "classifier_label": io["guide_y"]}
    noise = list(io[f"{name}_noise"]) if sampler == "ddpm" else None
    drawn = gen.sample(label=io["y"], sampler=sampler, initial_noise=io["x"], step_noise=noise, output="tensor",
                       **(options if guided else {}))  # fmt: skip
    whole_loop(drawn, io[name])


def test_three_loss_terms(full: tuple[Generator, NoisyClassifier, Recorded]) -> None:
    gen, _, io = full
    check_losses(losses(gen, io, cond=gen.embed(label=io["y"])), io)


# --- three levels, cosine, new heads, a number of heads, no AdaGN, fixed variance, unconditional, half precision ------


def guide(x: Tensor, _t: Tensor) -> Tensor:
    """The log probability whose gradient record_adm.py gave to the peer."""
    return -3 * (x.tanh() - 0.3).square().flatten(1).sum(1)


def test_cosine_model_with_new_heads_and_fixed_variance() -> None:
    gen, io = generator("adm_cosine"), recorded("adm_cosine")
    one_call(gen.raw(io["x"], io["t"]), io["raw"])
    for name, options in (("", {}), ("_guided", {"classifier": guide, "classifier_scale": 1.0})):
        drawn = gen.sample(sampler="ddim", initial_noise=io["x"], output="tensor", **options)
        whole_loop(drawn, io[f"ddim{name}"])
        noise = list(io[f"ddpm{name}_noise"])
        drawn = gen.sample(sampler="ddpm", initial_noise=io["x"], step_noise=noise, output="tensor", **options)
        whole_loop(drawn, io[f"ddpm{name}"])
    check_losses(losses(gen, io), io)


def test_classifier_with_spatial_pooling_and_convolutions() -> None:
    io = recorded("adm_spatial")
    one_call(classifier("adm_spatial", "model.pt").logits(io["x"], io["t"]), io["classifier_logits"])


# --- the architecture follows the weights, and flags must agree ------------------------------------------------------

MODEL = FIXTURES / "adm" / "model.pt"
CLASSIFIER = FIXTURES / "adm" / "classifier.pt"
FLAGS = json.loads((FIXTURES / "adm" / "flags.json").read_text())


def refusal(path: Path, flags: Any) -> str:
    with pytest.raises(LimnerError) as caught:
        limner.load(path, flags=flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def command_line(between: str) -> str:
    return " ".join(f"--{name}{between}{value}" for name, value in FLAGS["model"].items())


@pytest.mark.parametrize(
    "flags",
    [FLAGS, FLAGS["model"], command_line(" "), command_line("=")],
    ids=["both", "model", "string", "equals"],
)  # fmt: skip
def test_flags_may_be_given_in_any_form(flags: Any) -> None:
    io = recorded("adm")
    loaded = limner.load(MODEL, flags=flags)
    assert isinstance(loaded, Generator)
    one_call(loaded.raw(io["x"], io["t"], label=io["y"]), io["raw"])


def test_flags_that_the_weights_tell_may_be_left_out() -> None:
    io = recorded("adm")
    loaded = limner.load(MODEL, flags={"image_size": 32, "num_head_channels": 16})
    assert isinstance(loaded, Generator)
    assert loaded.config.sampling.steps == 1000
    one_call(loaded.raw(io["x"], io["t"], label=io["y"]), io["raw"])


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("num_channels", 64, "'num_channels' says 64, but the weights have 32"),
        ("num_res_blocks", 3, "'num_res_blocks' says 3, but the weights have 1"),
        ("channel_mult", "1,2,2", "'channel_mult' says 1,2,2, but the weights have levels of 32, 64 channels"),
        ("attention_resolutions", "32,16", "but the weights have attention at 16"),
        ("learn_sigma", False, "'learn_sigma' says False, but the weights have True"),
        ("class_cond", "False", "'class_cond' says False, but the weights have True"),
        ("resblock_updown", False, "'resblock_updown' says False"),
        ("use_scale_shift_norm", False, "'use_scale_shift_norm' says False"),
        ("num_head_channels", 48, "48, which doesn't divide the 64 channels"),
        ("num_head_channels", "many", "should be an integer, is 'many'"),
        ("class_cond", "perhaps", "should be true or false, is 'perhaps'"),
        ("noise_schedule", "sigmoid", "should be linear or cosine"),
        ("timestep_respacing", "fast", "should be such as 250, 10,15,20 or ddim25"),
        ("timestep_respacing", "ddim999", "no integer stride"),
        ("attention_resolutions", "16,x", "should be numbers such as 16,8"),
        ("img_size", 32, "unknown flag 'img_size'; did you mean 'image_size'"),
    ],
)
def test_a_wrong_flag_is_named(flag: str, value: Any, said: str) -> None:
    assert said in refusal(MODEL, {**FLAGS["model"], flag: value})


def test_missing_and_misplaced_flags_are_said() -> None:
    assert "needs flags" in refusal(MODEL, None)
    assert "has no section 'classifier'" in refusal(CLASSIFIER, {"model": FLAGS["model"]})
    assert "unknown section 'modle'" in refusal(MODEL, {"modle": FLAGS["model"]})
    assert "should be a JSON file" in refusal(MODEL, "nowhere.json")
    assert "'image_size' should be a flag" in refusal(MODEL, "--num_channels 32 image_size 32")
    assert "--image_size lacks its value" in refusal(MODEL, "--image_size --num_channels 32")


def test_a_wrong_head_order_is_another_picture() -> None:
    io = recorded("adm")
    loaded = limner.load(MODEL, flags={**FLAGS["model"], "use_new_attention_order": True})
    assert isinstance(loaded, Generator)
    assert (loaded.raw(io["x"], io["t"], label=io["y"]) - io["raw"]).abs().max() > 1e-2


def test_a_line_for_both_networks_keeps_the_classifier_as_the_peer_fixes_it() -> None:
    both = {**FLAGS["model"], **FLAGS["classifier"]}
    found = structure(safe.read(CLASSIFIER).weights, "classifier.pt")
    config = adm.plan(found, CLASSIFIER, {**both, "use_new_attention_order": True}).config
    assert config.model.kind == "classifier"
    assert config.model.head_dim == 64  # not the model's 16


def test_a_classifier_whose_flags_say_no_schedule_takes_the_models() -> None:
    gen = limner.load(MODEL, flags={**FLAGS["model"], "noise_schedule": "cosine", "diffusion_steps": 400})
    clf = limner.load(CLASSIFIER, flags=FLAGS["classifier"])
    assert isinstance(gen, Generator)
    assert isinstance(clf, NoisyClassifier)
    fitted = clf.fitted(gen.config)
    assert fitted.config.process.schedule == gen.config.process.schedule
    x, half = recorded("adm")["x"], torch.tensor(0.5)
    label = torch.tensor([1, 2])
    torch.testing.assert_close(fitted.log_prob_at(x, half, label), clf.log_prob(x, torch.tensor([199, 199]), label))
    other = limner.load(CLASSIFIER, flags={**FLAGS["classifier"], "noise_schedule": "linear"})
    with pytest.raises(LimnerError, match="its schedule is"):
        gen.sample(label=0, classifier=other, classifier_scale=1.0)


def test_scripts_flags_say_how_to_sample() -> None:
    flags = {**FLAGS["model"], "use_ddim": True, "batch_size": 4, "model_path": "x.pt", "timestep_respacing": "4,3"}
    loaded = limner.load(MODEL, flags=flags)
    assert isinstance(loaded, Generator)
    sampling = loaded.config.sampling
    assert (sampling.sampler, sampling.steps, sampling.spacing) == ("ddim", 7, "4,3")


def altered(tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    weights = torch.load(MODEL, weights_only=True)
    change(weights)
    torch.save(weights, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_weights_out_of_place_are_named(tmp_path: Path) -> None:
    def without(weights: dict[str, Tensor]) -> None:
        del weights["middle_block.1.qkv.bias"]

    def with_another(weights: dict[str, Tensor]) -> None:
        weights["middle_block.1.extra"] = torch.ones(3)

    def misshapen(weights: dict[str, Tensor]) -> None:
        weights["output_blocks.0.0.in_layers.2.weight"] = torch.ones(64, 127, 3, 3)

    assert "'middle_block.1.qkv.bias' is missing" in refusal(altered(tmp_path, without), FLAGS)
    assert "'middle_block.1.extra' is unknown" in refusal(altered(tmp_path, with_another), FLAGS)
    assert "'output_blocks.0.0.in_layers.2.weight' gives the shape" in refusal(altered(tmp_path, misshapen), FLAGS)


def test_nan_weights_are_warned_of(tmp_path: Path) -> None:
    path = altered(tmp_path, lambda weights: weights["out.2.bias"].fill_(float("nan")))
    with pytest.warns(UserWarning, match=r"NaN or infinity in 1 weights, first 'network\.out\.bias'"):
        limner.load(path, flags=FLAGS)


def test_ema_files_are_models_and_optimizer_files_are_not(tmp_path: Path) -> None:
    shutil.copy(MODEL, tmp_path / "ema_0.9999_000010.pt")
    assert isinstance(limner.load(tmp_path / "ema_0.9999_000010.pt", flags=FLAGS), Generator)
    torch.save({"state": {}, "param_groups": []}, tmp_path / "opt000010.pt")
    assert "an optimizer's state" in refusal(tmp_path / "opt000010.pt", FLAGS)


# --- super-resolution ------------------------------------------------------------------------------------------------


def test_upsampler() -> None:
    """Predicts x0, rescales its steps, is in half precision, and concatenates the enlarged picture."""
    gen, io = generator("adm_upsampler"), recorded("adm_upsampler")
    one_call(gen.raw(io["x"], io["t"], label=io["y"], image=io["low_res"]), io["raw"])
    given: dict[str, Any] = {"label": io["y"], "image": io["low_res"], "initial_noise": io["x"], "output": "tensor"}
    for name, options in (("", {}), ("_guided", {"classifier": guide, "classifier_scale": 1.0})):
        whole_loop(gen.sample(sampler="ddim", **given, **options), io[f"ddim{name}"])
        noise = list(io[f"ddpm{name}_noise"])
        whole_loop(gen.sample(sampler="ddpm", step_noise=noise, **given, **options), io[f"ddpm{name}"])
    check_losses(losses(gen, io, cond=gen.embed(label=io["y"], image=io["low_res"])), io)
    with pytest.raises(LimnerError, match="enlarges pictures of 8x8; give image"):
        gen.sample(label=0)


# --- the published models: names and shapes of their weights as the peer's code makes them --------------------------

COUNTS = {
    "64x64_diffusion": 295.9,
    "128x128_diffusion": 421.5,
    "256x256_diffusion": 553.8,
    "512x512_diffusion": 559.0,
}
UPSAMPLERS = ["64_256_upsampler", "128_512_upsampler"]
NAMES = ["256x256_diffusion_uncond", *UPSAMPLERS, *COUNTS, *(f"{n}x{n}_classifier" for n in (64, 128, 256, 512))]


@pytest.fixture(scope="module")
def weights_of() -> dict[str, dict[str, Tensor]]:
    with gzip.open(FIXTURES / "adm_published.json.gz") as file:
        shapes = json.load(file)
    return {name: {k: torch.empty(v, device="meta") for k, v in each.items()} for name, each in shapes.items()}


@pytest.mark.parametrize("name", NAMES)
def test_published_models_are_known_by_shape_and_fit(name: str, weights_of: dict[str, dict[str, Tensor]]) -> None:
    found = structure(weights_of[name], name)
    made = adm.plan(found, Path("model.pt"))
    assert f"the published {name}, known by its shape" in made.notes[0]
    state = convert(weights_of[name], made.rules, shapes(made.config), where=name)
    count = sum(x.numel() for x in state.values()) / 1e6
    assert round(count, 1) == COUNTS.get(name, round(count, 1))


def test_models_of_one_shape_are_told_by_name(weights_of: dict[str, dict[str, Tensor]]) -> None:
    found = structure(weights_of["256x256_diffusion_uncond"], "x")
    assert adm.published(found, "lsun_cat") == "lsun_cat"
    assert adm.published(found, "64x64_diffusion") == "256x256_diffusion_uncond"
    networks = [
        adm.recipe(name).model.model_copy(update={"dropout": 0}) for name in PUBLISHED if found == adm.described(name)
    ]
    assert len(networks) == 5
    assert all(network == networks[0] for network in networks)


def test_flags_may_be_a_published_name() -> None:
    assert adm.recipe("64x64_diffusion") == adm.recipe(adm_flags.PUBLISHED["64x64_diffusion"])
    with pytest.raises(LimnerError, match="did you mean '64x64_diffusion'"):
        adm.recipe("64x64_difusion")


@pytest.mark.parametrize("name", COUNTS)
def test_published_models_instantiate_with_their_number_of_weights(name: str) -> None:
    with torch.device("meta"):
        model = build.model(adm.recipe(name))
    assert round(sum(x.numel() for x in model.parameters()) / 1e6, 1) == COUNTS[name]
