"""A run as a folder of diffusers: diffusers loads it and draws what the run draws; and it comes back the same."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import hf_networks as hf
import limner.interop
from hf_networks import alike, load, noise, raw_network, run_of
from limner import config as c
from limner.api import convert
from limner.errors import LimnerError
from limner.interop import hf_out
from limner.interop.conversion import read_run

STEP = torch.tensor([3, 900])
LABEL = torch.tensor([0, 2])


PIXELS: dict[str, Any] = {
    "data": {"size": [16, 16]},
    "process": {"schedule": {"kind": "cosine"}, "prediction": "v_prediction"},
    "model": {"kind": "unet", "head_dim": 32,
              "levels": [{"channels": 32}, {"channels": 64, "attention": True}]},
    "conditions": [{"kind": "label"}],
    "classes": ["cat", "dog", "owl"],
    "sampling": {"sampler": "ddim", "steps": 8, "spacing": "trailing", "guidance": 1.0},
}  # fmt: skip
STAGE: dict[str, Any] = {"kind": "autoencoder", "levels": [{"channels": 32}, {"channels": 64}], "latent_channels": 4}
LATENTS: dict[str, Any] = {**PIXELS, "space": {"kind": "latent", "autoencoder": STAGE}, "conditions": [],
                           "classes": None}  # fmt: skip


def changed(raw: dict[str, Any], *settings: str) -> dict[str, Any]:
    return c.override(raw, list(settings))


# --- from pixels ------------------------------------------------------------------------------------------------------

RUNS = {
    "AdaGN, continuous cosine": [],
    "one head, sin before cos": ["model.head_dim=null", "model.heads=1", "model.time_order=sin_cos"],
    "convolutions, steps": ["model.resample=conv", "model.modulation=add", "process.time_input=step",
                            "model.time_scale=1", "process.schedule={kind: linear, steps: 480}"],
    "asymmetric, no middle": ["model.resample=conv", "model.asymmetric=true", "model.middle=none"],
    "epsilon, cosine table": ["process.schedule={kind: discrete_cosine}", "process.prediction=epsilon"],
    "zero terminal SNR": ["process.schedule={kind: scaled_linear, zero_terminal_snr: true}"],
    "shifted": ["process.schedule={kind: cosine, shift: 0.5}"],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_pixels(tmp_path: Path, name: str) -> None:
    run = run_of(changed(PIXELS, *RUNS[name]), tmp_path / "run")
    made = convert(run, tmp_path / "out", to="diffusers")
    assert "no pipeline of diffusers passes them" in made.notes[-1]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    mine, back, x = load(run), load(tmp_path / "out"), noise(2, 3, 16, 16)
    step = STEP if mine.schedule.steps != 480 else STEP // 2
    expected = raw_network(mine, x, step, label=LABEL)
    with torch.no_grad():
        alike(pipeline.unet(x, step, LABEL).sample, expected)
        pipeline.scheduler.set_timesteps(8)
        y = x
        for t in pipeline.scheduler.timesteps:
            raw = pipeline.unet(y, t, LABEL).sample
            y = pipeline.scheduler.step(raw, t, y, use_clipped_model_output=True).prev_sample
    alike(back.raw(x, step, label=LABEL), expected)
    drawn = mine.sample(label=LABEL, initial_noise=x, output="latent")
    alike(y, drawn, 1e-3 if name == "zero terminal SNR" else 1e-4)
    alike(back.sample(label=LABEL, initial_noise=x, output="latent"), drawn, 1e-3)
    assert back.classes == mine.classes
    assert back.config.conditions == mine.config.conditions  # the null row among them
    alike(back.sample(label=LABEL, initial_noise=x, output="latent", guidance=2.0),
          mine.sample(label=LABEL, initial_noise=x, output="latent", guidance=2.0), 1e-3)  # fmt: skip


def test_a_learned_variance(tmp_path: Path) -> None:
    raw = changed(PIXELS, "process={schedule: {kind: linear}, prediction: epsilon, learned_variance: true}",
                  "conditions=[]", "classes=null")  # fmt: skip
    run = run_of(raw, tmp_path / "run")
    assert "DDPM instead of ddim" in convert(run, tmp_path / "out", to="diffusers").notes[0]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline, diffusers.DDPMPipeline)
    assert pipeline.scheduler.config["variance_type"] == "learned_range"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    x = noise(2, 3, 16, 16)
    alike(load(tmp_path / "out").raw(x, STEP), raw_network(load(run), x, STEP))


# --- from latents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [[], ["space.autoencoder.quant_conv=false"], ["space.autoencoder.levels.1.attention=true"]],
    ids=["KL", "no quant_conv", "attention"],
)
def test_latents_normalised_by_channel(tmp_path: Path, settings: list[str]) -> None:
    """diffusers' pipelines know one factor; mean and deviation of each channel go into the autoencoder's weights."""
    run = run_of(changed(LATENTS, *settings), tmp_path / "run")
    convert(run, tmp_path / "out", to="diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline, diffusers.LDMPipeline)
    mine, back, image, z = load(run), load(tmp_path / "out"), noise(2, 3, 16, 16), noise(2, 4, 8, 8)
    with torch.no_grad():
        posterior = pipeline.vqvae.encode(image).latent_dist
        alike(posterior.mode(), mine.encode(image))
        alike(pipeline.vqvae.decode(z).sample.clamp(-1, 1), mine.decode(z))
        own = mine.model.autoencoder
        assert own is not None
        alike(posterior.std, own.encode(image).std / own.latent_std[:, None, None])
    alike(back.encode(image), mine.encode(image))
    alike(back.decode(z), mine.decode(z))


def test_a_codebook(tmp_path: Path) -> None:
    raw = changed(LATENTS, "space.autoencoder.regulariser={kind: vq, codes: 16, update: gradient}")
    run = run_of(raw, tmp_path / "run")
    with pytest.raises(LimnerError, match=r"autoencoder\.latent_std: one deviation a channel"):
        convert(run, tmp_path / "out", to="diffusers")
    assert not (tmp_path / "out").exists()
    weights = dict(read_run(run).state)
    weights["autoencoder.latent_std"] = torch.full((4,), 2.0)
    save_file({name: x.clone() for name, x in weights.items()}, run / "model.safetensors")
    convert(run, tmp_path / "out", to="diffusers")
    theirs = diffusers.VQModel.from_pretrained(tmp_path / "out/vqvae")
    mine, image, z = load(run), noise(2, 3, 16, 16), noise(2, 4, 8, 8)
    with torch.no_grad():
        alike(theirs.encode(image).latents, mine.encode(image))  # pyright: ignore
        alike(theirs.decode(z).sample.clamp(-1, 1), mine.decode(z))  # pyright: ignore


def test_an_autoencoder_alone(tmp_path: Path) -> None:
    run = run_of({"task": "autoencoder", "data": {"size": [16, 16]}, "model": STAGE}, tmp_path / "run")
    convert(run, tmp_path / "out", to="diffusers")
    theirs, image = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out"), noise(2, 3, 16, 16)
    with torch.no_grad():
        alike(theirs.encode(image).latent_dist.mode(), load(run).encode(image))  # pyright: ignore
    alike(load(tmp_path / "out").encode(image), load(run).encode(image))


# --- from text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stable diffusion", "latent diffusion"])
def test_from_text_there_and_back(tmp_path: Path, kind: str) -> None:
    made = (hf.stable_diffusion if kind == "stable diffusion" else hf.latent_diffusion)(tmp_path / "tokenizer")
    made.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "out", to="diffusers")
    back = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(back) is type(made)
    back.set_progress_bar_config(disable=True)
    x, options = noise(2, 4, 8, 8), {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    prompts = ["a cat, it's 12 cats", "zebra"]
    pictures = [one(prompts, latents=x.clone(), **options).images for one in (made, back)]
    assert torch.equal(pictures[0], pictures[1])
    again = load(tmp_path / "out")
    drawn = again.sample(text=prompts, steps=3, guidance=2.0, initial_noise=x, output="tensor")
    alike(drawn / 2 + 0.5, pictures[0])


def test_old_files_of_a_tokenizer_are_written_too(tmp_path: Path) -> None:
    """So that the folder loads where tokenizer.json isn't known."""
    for number, make in enumerate((hf.stable_diffusion, hf.latent_diffusion)):
        pipeline = make(tmp_path / f"tokenizer{number}")
        pipeline.save_pretrained(tmp_path / f"in{number}")
        convert(tmp_path / f"in{number}", tmp_path / f"out{number}", to="diffusers")
        (tmp_path / f"out{number}/tokenizer/tokenizer.json").unlink()
        again = load(tmp_path / f"out{number}")
        text = ["A cat, it's 12 cats"]
        assert torch.equal(again.embed(text=text).tokens, load(tmp_path / f"in{number}").embed(text=text).tokens)


class Watched(Mapping[str, Tensor]):
    """Weights that are copied for whoever asks, and whether the copies are still there."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.given = state, list[weakref.ref[Tensor]]()

    def __getitem__(self, name: str) -> Tensor:
        copy = self.state[name].clone()
        self.given.append(weakref.ref(copy))
        return copy

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_a_plan_holds_no_weights(tmp_path: Path) -> None:
    """Each is made when it is written, so that memory holds one of them; what is folded into others is small."""
    hf.stable_diffusion(tmp_path / "tokenizer").save_pretrained(tmp_path / "sd")
    found = limner.interop.read(tmp_path / "sd")
    watched = Watched(found.state)
    written = hf_out.plan(found.config, watched, "test")
    assert sum(map(len, written.weights.values())) > 300
    held = [x.numel() for x in (ref() for ref in watched.given) if x is not None]
    assert sum(held) < 100


def test_a_text_encoder_without_its_words_is_refused(tmp_path: Path) -> None:
    hf.stable_diffusion(tmp_path / "tokenizer").save_pretrained(tmp_path / "sd")
    index = json.loads((tmp_path / "sd/model_index.json").read_text())
    (tmp_path / "sd/model_index.json").write_text(json.dumps({**index, "tokenizer": [None, None]}))
    with pytest.raises(LimnerError, match=r"conditions\.text\.tokenizer: the words of its tokens aren't in it"):
        convert(tmp_path / "sd", tmp_path / "out", to="diffusers")


# --- refusals, cards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.patch=2"], "model.patch 2: diffusers has no U-Net of patches; train with model.patch=1"),
        (["model.resample=pool"], "model.resample pool"),
        (["model.levels.0.blocks=2"], "model.levels: diffusers' UNet2DModel has as many blocks at each level"),
        (["model.levels.0.channels=48"], "model.norm_groups 32: norms of 16, 32 groups"),
        (["model.levels.1.channels=96", "model.head_dim=64", "model.levels.0.attention=true",
          "model.levels.0.channels=192"], "model.head_dim: heads of 96 and 64 channels"),
        (["model.time_scale=500"], "model.time_scale 500"),
        (["model.time_period=5000"], "model.time_period 5000"),
        (["process.prediction=flow"], "flow: no pipeline of diffusers"),
        (["process.schedule={kind: rectified_flow}"], "rectified_flow"),
        (["conditions=[{kind: image}]"], "conditions.image: diffusers has no network for it"),
        (["conditions=[{kind: label}, {kind: text}]"], "conditions label and text"),
        (["conditions=[{kind: text}]"], "conditions.text.pooled"),
        (["conditions=[{kind: text, pooled: false}]"], "conditions.text.null learned"),
        (["conditions=[{kind: text, pooled: false, 'null': empty}]"], "conditions.text.encoder.masked"),
    ],
)  # fmt: skip
def test_what_diffusers_lacks_is_named(tmp_path: Path, settings: list[str], said: str) -> None:
    run = run_of(changed(PIXELS, *settings), tmp_path / "run")
    with pytest.raises(LimnerError) as caught:
        convert(run, tmp_path / "out", to="diffusers")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_card(tmp_path: Path) -> None:
    run = run_of(changed(PIXELS, "sampling.guidance=3", "data.source=photos"), tmp_path / "run")
    (run / "previews").mkdir()
    (run / "previews/images-000002000.png").write_bytes(b"a picture")
    (run / "metrics.jsonl").write_text('{"images": 2000, "loss": 0.25}\n{"images": 4000, "los')
    convert(run, tmp_path / "owls", to="diffusers", licence="cc-by-4.0")
    text = (tmp_path / "owls/README.md").read_text()
    assert text.startswith("---\nlibrary_name: diffusers\nlicense: cc-by-4.0\n")
    for part in ("# owls\n", "![Samples](samples.png)", "| images | 2,000 |", "| loss | 0.25 |", "- Data: photos",
                 "- Classes: cat, dog, owl", "torch.tensor([0]), torch.tensor([3])"):  # fmt: skip
        assert part in text
    assert (tmp_path / "owls/samples.png").read_bytes() == b"a picture"
    code = text.split("```python\n")[1].split("```")[0].replace('"PATH"', repr(str(tmp_path / "owls")))
    known: dict[str, Any] = {}
    exec(code.replace("set_timesteps(8)", "set_timesteps(2)"), known)
    assert known["x"].shape == (1, 3, 16, 16)


def test_nothing_is_left_where_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(PIXELS, tmp_path / "run")

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("limner.interop.hf_out.write_weights", full)
    with pytest.raises(LimnerError, match=r"out: cannot be written .No space left"):
        convert(run, tmp_path / "out", to="diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(LimnerError, match="holds something already"):
        convert(run, tmp_path / "out", to="diffusers")
    with pytest.raises(LimnerError, match="is a run already"):
        convert(run, tmp_path / "other")
    with pytest.raises(LimnerError, match="did you mean 'diffusers'"):
        convert(run, tmp_path / "other", to="difusers")  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
