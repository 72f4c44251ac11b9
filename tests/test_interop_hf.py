"""What is read from diffusers' folders gives what diffusers itself gives, with random weights; nothing is fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_networks as hf
import limner
from hf_networks import alike, load
from limner.errors import LimnerError

PROMPTS = ["A cat, it's 12 cats", "héllo   wörld"]
STEP = torch.tensor([3, 900])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def refusal(path: Path) -> str:
    with pytest.raises(LimnerError) as caught:
        limner.load(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- networks ---------------------------------------------------------------------------------------------------------

UNETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "AdaGN, residual resampling, classes, learned variance": {
        "block_out_channels": (32, 64, 64), "layers_per_block": 2, "attn_norm_num_groups": 32, "num_class_embeds": 5,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"), "out_channels": 6,
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"), "downsample_type": "resnet",
        "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 8,
    },
    "as google's DDPM": {
        "freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "attention_head_dim": None,
        "norm_eps": 1e-6,
    },
    "no attention in the middle": {"add_attention": False, "time_embedding_dim": 48, "norm_num_groups": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", UNETS)
def test_unet_2d(tmp_path: Path, name: str) -> None:
    theirs = hf.unet(**UNETS[name])
    theirs.save_pretrained(tmp_path)
    x, y = noise(2, 3, 16, 16), torch.tensor([1, 4])
    labels = {"label": y} if theirs.config["num_class_embeds"] else {}
    expected = theirs(x, STEP, y if labels else None).sample
    alike(load(tmp_path).raw(x, STEP, **labels), expected)


def test_a_single_file_with_its_settings_beside_it(tmp_path: Path) -> None:
    theirs = hf.unet()
    theirs.save_pretrained(tmp_path)
    x = noise(2, 3, 16, 16)
    mine = load(tmp_path / "diffusion_pytorch_model.safetensors")
    alike(mine.raw(x, STEP), theirs(x, STEP).sample)
    assert "no scheduler beside it" in mine.notes[0]
    (tmp_path / "config.json").unlink()
    assert "needs config.json beside it" in refusal(tmp_path / "diffusion_pytorch_model.safetensors")


def test_a_file_in_several_parts(tmp_path: Path) -> None:
    theirs = hf.unet()
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    x = noise(2, 3, 16, 16)
    alike(load(tmp_path).raw(x, STEP), theirs(x, STEP).sample)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    named = json.loads(index.read_text())
    named["weight_map"]["conv_in.bias"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(named))
    assert "names '../elsewhere.safetensors', which is no weights file of this folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    "theirs",
    [
        hf.autoencoder_kl(3, layers_per_block=2),
        hf.autoencoder_kl(2, attention=True, latent_channels=8, norm_num_groups=16, scaling_factor=0.5),
        hf.autoencoder_kl(2, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False),
    ],
    ids=["f = 4", "attention", "no quant_conv"],
)
def test_autoencoder_kl(tmp_path: Path, theirs: diffusers.AutoencoderKL) -> None:
    theirs.save_pretrained(tmp_path)
    mine, x, scale = load(tmp_path), noise(2, 3, 16, 16), theirs.config["scaling_factor"]
    z = theirs.encode(x).latent_dist.mode()  # pyright: ignore
    alike(mine.encode(x), z * scale)
    alike(mine.decode(z * scale), theirs.decode(z).sample.clamp(-1, 1))  # pyright: ignore


def test_the_mean_and_deviation_of_latents_are_taken(tmp_path: Path) -> None:
    mean, std = [0.5, -0.5, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0]
    theirs = hf.autoencoder_kl(latents_mean=mean, latents_std=std)
    theirs.save_pretrained(tmp_path)
    x = noise(1, 3, 16, 16)
    z = theirs.encode(x).latent_dist.mode()  # pyright: ignore
    alike(load(tmp_path).encode(x), (z - torch.tensor(mean).view(4, 1, 1)) / torch.tensor(std).view(4, 1, 1))


def test_vq_model(tmp_path: Path) -> None:
    theirs = hf.vq_model(vq_embed_dim=4)
    theirs.save_pretrained(tmp_path)
    mine, x = load(tmp_path), noise(2, 3, 16, 16)
    z = theirs.encode(x).latents  # pyright: ignore
    alike(mine.encode(x), z)
    alike(mine.decode(z), theirs.decode(z).sample.clamp(-1, 1))  # pyright: ignore


def test_autoencoder_tiny(tmp_path: Path) -> None:
    """There and back; what it doesn't have is named."""
    theirs = hf.autoencoder_tiny(scaling_factor=2.0)
    theirs.save_pretrained(tmp_path / "in")
    mine, x = load(tmp_path / "in"), noise(2, 3, 16, 16)
    z = theirs.encode(x).latents.detach()  # pyright: ignore
    alike(mine.encode(x), 2 * z)
    alike(mine.decode(2 * z), theirs.decode(z).sample.clamp(-1, 1).detach())  # pyright: ignore
    assert mine.config.data.size == (128, 128)
    limner.convert(tmp_path / "in", tmp_path / "out", to="diffusers")
    back = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "out")
    assert torch.equal(back.decode(z).sample, theirs.decode(z).sample)  # pyright: ignore
    assert back.config["scaling_factor"] == 2.0
    settings = json.loads((tmp_path / "in/config.json").read_text())
    for change, said in (
        ({"act_fn": "gelu"}, "act_fn: gelu has no counterpart; relu has"),
        ({"decoder_block_out_channels": [16, 32]}, "should be equally many, of one width"),
    ):
        (tmp_path / "in/config.json").write_text(json.dumps({**settings, **change}))
        assert said in refusal(tmp_path / "in")


def test_stable_diffusion_with_a_tiny_autoencoder(sd: Path, tmp_path: Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(sd, vae=hf.autoencoder_tiny())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    mine, x = load(tmp_path), noise(2, 4, 8, 8)
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    theirs = pipeline(["a cat", "zebra"], latents=x.clone(), **options).images
    drawn = mine.sample(text=["a cat", "zebra"], steps=3, guidance=3.0, initial_noise=x, output="tensor")
    alike(drawn / 2 + 0.5, theirs)


def test_names_of_old_versions_are_known(tmp_path: Path) -> None:
    theirs = hf.autoencoder_kl()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(file)
    for new_name, old_name in old.items():
        weights = {name.replace(f".{new_name}.", f".{old_name}."): x for name, x in weights.items()}
    save_file(weights, file)
    x = noise(1, 3, 16, 16)
    alike(load(tmp_path).encode(x), 0.18215 * theirs.encode(x).latent_dist.mode())  # pyright: ignore


# --- pipelines --------------------------------------------------------------------------------------------------------

STABLE: dict[str, dict[str, Any]] = {
    "1.x": {"layers_per_block": 2},
    "2.x": {"attention_head_dim": (2, 4), "use_linear_projection": True, "transformer_layers_per_block": (1, 2),
            "prediction": "v_prediction", "text": {"hidden_act": "gelu"}},
}  # fmt: skip


@pytest.mark.parametrize("name", STABLE)
def test_stable_diffusion(tmp_path: Path, name: str) -> None:
    pipeline = hf.stable_diffusion(tmp_path / "tokenizer", **STABLE[name])
    pipeline.save_pretrained(tmp_path / "sd")
    mine, x = load(tmp_path / "sd"), noise(2, 4, 8, 8)
    alike(mine.embed(text=PROMPTS).tokens, pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0], 1e-5)
    theirs = pipeline(PROMPTS, num_inference_steps=5, guidance_scale=3.0, latents=x.clone(), output_type="pt").images
    drawn = mine.sample(text=PROMPTS, steps=5, guidance=3.0, initial_noise=x, output="tensor")
    alike(drawn / 2 + 0.5, theirs)
    assert mine.config.sampling.spacing == "leading+1"
    assert (mine.config.process.prediction == "v_prediction") == (name == "2.x")


def test_stable_diffusion_from_files_of_an_older_transformers(tmp_path: Path) -> None:
    """Vocabulary and merges instead of tokenizer.json, weights below `text_model.`, positions among them."""
    pipeline = hf.stable_diffusion(tmp_path / "tokenizer")
    pipeline.save_pretrained(tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd/tokenizer")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "sd/tokenizer")
    file = tmp_path / "sd/text_encoder/model.safetensors"
    weights = {f"text_model.{name}": x for name, x in load_file(file).items()}
    save_file({**weights, "text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    expected = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    alike(load(tmp_path / "sd").embed(text=PROMPTS).tokens, expected, 1e-5)


def test_latent_diffusion_text_to_image(tmp_path: Path) -> None:
    pipeline = hf.latent_diffusion(tmp_path / "tokenizer")
    pipeline.save_pretrained(tmp_path / "ldm")
    mine, x = load(tmp_path / "ldm"), noise(2, 4, 8, 8)
    options: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 3.0, "eta": 0.0, "output_type": "pt"}
    theirs = pipeline(["a cat, cats", "zebra"], latents=x.clone(), **options).images
    drawn = mine.sample(text=["a cat, cats", "zebra"], steps=5, guidance=3.0, initial_noise=x, output="tensor")
    alike(drawn / 2 + 0.5, theirs)


# --- schedulers -------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": True}),
    "ddpm, large": (diffusers.DDPMScheduler, {"clip_sample": False, "variance_type": "fixed_large"}),
    "ddpm, learned range": (diffusers.DDPMScheduler, {"clip_sample": True, "variance_type": "learned_range"}),
    "euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "heun": (diffusers.HeunDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {"timestep_spacing": "trailing"}),
    "a table of betas": (diffusers.DDIMScheduler, {"trained_betas": [0.001 + 0.0001 * k for k in range(100)],
                                                   "num_train_timesteps": 100, "clip_sample": False}),
    "zero terminal SNR": (diffusers.DDIMScheduler, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
                                                    "timestep_spacing": "trailing", "clip_sample": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise gives the same picture by the folder's own sampler."""
    kind, options = SCHEDULERS[name]
    scheduler, learned = kind(**options), "learned" in name
    theirs = hf.unet(out_channels=6 if learned else 3)
    diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path)  # pyright: ignore
    mine, x, steps = load(tmp_path), noise(2, 3, 16, 16), 10
    noises = [noise(2, 3, 16, 16, seed=k + 1) for k in range(steps)]
    drawn = iter(noises)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_args, **_kwargs: next(drawn))
    scheduler.set_timesteps(steps)
    spacing = options.get("timestep_spacing", "leading")
    alpha = mine.schedule.path(steps, spacing)[0].alpha
    y = x / alpha if name in ("euler", "heun") else x  # these hold x / alpha
    for t in scheduler.timesteps:
        y = scheduler.step(theirs(scheduler.scale_model_input(y, t), t).sample, t, y).prev_sample
    alike(mine.sample(steps=steps, initial_noise=x, step_noise=noises, output="latent"), y)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"act_fn": "mish"}, "act_fn: mish has no counterpart; silu or swish has"),
        ({"mid_block_typ": None}, "mid_block_typ: unknown setting; did you mean 'mid_block_type'"),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "SkipDownBlock2D has no counterpart"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups: None in the middle"),
        ({"_class_name": "Transformer2DModel"}, "Transformer2DModel has no counterpart; UNet2DModel"),
        ({"block_out_channels": [32, 96]}, "gives the shape"),
        ({"in_channels": 12}, "pictures of 1, 3 or 4 channels"),
        ({"out_channels": 5}, "out_channels: 5 for 3 in; should be 3, or 6"),
        ({"downsample_type": "resnet"}, ""),
    ],
)
def test_settings_without_a_counterpart_are_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    hf.unet().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
    if said:
        message = refusal(tmp_path)
        assert message.startswith(str(tmp_path))
        assert said in message
    else:  # the last level resamples nothing, so it doesn't matter
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("model_index.json", {"text_encoder_2": ["transformers", "T5EncoderModel"]}, "text_encoder_2: T5EncoderModel"),
        ("model_index.json", {"vae": [None, None], "tokenizer": [None, None]}, ""),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscre"),
        (
            "scheduler/scheduler_config.json",
            {"beta_schedule": "sigmoid"},
            "beta_schedule: 'sigmoid' has no counterpart",
        ),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "activation 'relu' has no counterpart"),
        ("text_encoder/config.json", {"hidden_size": 64}, "cross_attention_dim: 32, but the text encoder gives 64"),
        ("tokenizer/tokenizer.json", {"model": {"type": "BPE"}}, "no tokenizer that can be read"),
        ("unet/config.json", {"in_channels": 8}, "in_channels: 8, of which the latent has 4"),
    ],
)
def test_parts_of_pipelines_without_a_counterpart_are_named(
    sd: Path, tmp_path: Path, file: str, change: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(sd, folder)
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    if said:
        assert said in refusal(folder)
    else:  # a U-Net of four channels without an autoencoder draws pictures of four, from tokens
        assert "give tokens" in load(folder).notes[0]


@pytest.mark.parametrize("part", ["unet", "unet/diffusion_pytorch_model.safetensors", ""])
def test_a_network_without_its_text_encoder_takes_its_output(sd: Path, tmp_path: Path, part: str) -> None:
    """The U-Net's folder, its file, or a pipeline whose encoder is left out: drawn from what encode_prompt gives."""
    folder = tmp_path / "sd"
    shutil.copytree(sd, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(sd)
    pipeline.set_progress_bar_config(disable=True)
    mine, x = load(folder / part), noise(2, 4, 8, 8)
    assert "without a text encoder" in mine.notes[0]
    told, null = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    alike(mine.raw(x, STEP, text=told), pipeline.unet(x, STEP, told).sample.detach())
    theirs = pipeline(prompt_embeds=told, negative_prompt_embeds=null, num_inference_steps=3, guidance_scale=3.0,
                      latents=x.clone(), output_type="latent").images  # fmt: skip
    drawn = mine.sample(text=told, negative_text=null, guidance=3.0, steps=3, initial_noise=x, output="latent")
    alike(drawn, theirs)
    for wrong in (PROMPTS, told[:, :, 1:], None):
        with pytest.raises(LimnerError, match="came without its text encoder; give its output"):
            mine.sample(text=wrong, guidance=1.0, num=2)
    with pytest.raises(LimnerError, match="as negative_text to guide"):
        mine.sample(text=told, guidance=2.0)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    hf.stable_diffusion(folder / "tokenizer").save_pretrained(folder / "sd")
    return folder / "sd"


@pytest.mark.parametrize("content", ["{", "[]", '{"a": ' + "[" * 100_000, "\x00"])
def test_damaged_settings_are_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert "config.json" in refusal(tmp_path)


def test_other_folders_are_told_apart(tmp_path: Path) -> None:
    assert "nor a folder of diffusers" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    assert "names unet, but there is no such folder" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert "neither a U-Net nor an autoencoder" in refusal(tmp_path)
