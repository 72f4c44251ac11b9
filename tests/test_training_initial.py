"""Training that begins with a trained model: what is kept, new and dropped, adapters, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import limner
from limner import build, config, interop, recipe
from limner.cli.program import run
from limner.errors import LimnerError
from limner.generator import Generator
from limner.training.checkpoint import Checkpoints, read_model
from limner.training.initial import MODALITIES, Initial, Taken, begin, raw_recipe, take
from tiny_cli import Workshop, pictures

FIXTURES = Path(__file__).parent / "fixtures"
TABLE = "conditioner.modalities.label.table.weight"
OFTEN = ("--set", "training.batch=8", "--set", "training.compile=off", "--set", "training.precision=fp32",
         "--set", "training.previews=2")  # fmt: skip

FAST = ("--set", "training.lr=0.05", "--set", "training.warmup_images=1")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        shop = Workshop(tmp_path_factory.mktemp("initial"), patch)
        pictures(shop.folder / "others")
        (shop.folder / "others" / "cat").rename(shop.folder / "others" / "zebra")
        yield shop


def tune(shop: Workshop, out: Path, *more: str, init: Path | None = None, data: str = "others") -> int:
    """`limner train DATA --init RUN`; its exit code."""
    asked = ["train", str(shop.folder / data), "--init", str(init or shop.run), "--out", str(out), "--images", "16"]
    return run([*asked, *OFTEN, *more])


def provenance(out: Path) -> dict[str, Any]:
    return config.load(out / "config.yaml").provenance["init"]


def begun(initial: Initial, raw: dict[str, Any]) -> tuple[dict[str, Tensor], Taken, dict[str, Tensor]]:
    """A fresh model's weights after it has taken what it could, what was said, and its weights before."""
    wanted = config.parse(raw, "test")
    torch.manual_seed(5)
    model = build.model(wanted)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taken = take(model, wanted, initial)
    return model.state_dict(), taken, before


def initial_of(where: Path) -> Initial:
    return Initial(config.load(where / "config.yaml"), read_model(where), str(where))


# --- what is taken over ---------------------------------------------------------------------------------------------


def test_rows_of_the_same_name_are_kept_to_the_bit(workshop: Workshop) -> None:
    initial = initial_of(workshop.run)
    raw = initial.config.model_dump(mode="json") | {"classes": ["dog", "zebra", "cat", "owl"]}
    own, taken, before = begun(initial, raw)
    old = initial.weights[TABLE]
    assert own[TABLE][[0, 2, 4]].equal(old[[1, 0, 3]])  # dog, cat, and the null row
    assert own[TABLE][[1, 3]].equal(before[TABLE][[1, 3]])
    assert all(own[name].equal(weight) for name, weight in initial.weights.items() if name != TABLE)
    assert taken.fresh == [TABLE]
    said = "\n".join(taken.lines)
    assert "kept conditions.label: 2 classes (dog, cat) and the null row" in said
    assert "new conditions.label: 2 classes (zebra, owl)" in said
    assert "dropped conditions.label: 1 class (fish)" in said


def test_a_new_condition_begins_without_changing_anything(workshop: Workshop) -> None:
    initial = initial_of(workshop.run)
    raw = initial.config.model_dump(mode="json")
    raw["conditions"] = [{"kind": "mask"}]
    own, taken, _ = begun(initial, raw)
    stem = own["network.stem.weight"]
    assert stem.shape[1] == 3 + 4
    assert stem[:, :3].equal(initial.weights["network.stem.weight"])
    assert not stem[:, 3:].any()
    assert taken.fresh == ["network.stem.weight"]
    assert "conditions.label" in taken.dropped
    masked = Initial(config.parse(raw, "test"), own, "masked")
    back, _, _ = begun(masked, initial.config.model_dump(mode="json"))
    assert back["network.stem.weight"].equal(initial.weights["network.stem.weight"])


def crossing(**condition: Any) -> dict[str, Any]:
    return {
        "data": {"size": [8, 8]},
        "model": {"kind": "unet", "norm_groups": 4, "head_dim": 8, "middle": "none",
                  "levels": [{"channels": 8, "cross_attention": 1}]},
        "conditions": [condition],
    }  # fmt: skip


def test_tokens_of_another_width_get_new_keys_and_values() -> None:
    text = crossing(kind="text", encoder={"kind": "bpe", "width": 16, "depth": 1, "head_dim": 8})
    trained = build.model(config.parse(text, "text"))
    initial = Initial(config.parse(text, "text"), trained.state_dict(), "text")
    own, taken, before = begun(initial, crossing(kind="boxes", classes=["a", "b"], width=24, depth=1, head_dim=8))
    keys = [name for name in own if name.endswith("cross_attention.kv.weight")]
    assert keys
    assert all(own[name].equal(before[name]) for name in keys)
    rest = [name for name in own if name.startswith("network.") and name not in keys]
    assert all(own[name].equal(initial.weights[name]) for name in rest)
    assert any("tokens 24 wide" in line for line in taken.new)


@pytest.mark.parametrize(
    ("kind", "weight", "dim"), [("boxes", "table.weight", 0), ("semantic_map", "rescale.weight", 1)]
)
def test_classes_of_boxes_and_maps(kind: str, weight: str, dim: int) -> None:
    def of(classes: list[str]) -> dict[str, Any]:
        return crossing(kind="boxes", classes=classes, width=16, depth=1, head_dim=8) if kind == "boxes" else {
            **crossing(kind="semantic_map", classes=classes, width=4),
            "model": {"kind": "unet", "norm_groups": 4, "levels": [{"channels": 8}], "middle": "none"},
        }  # fmt: skip

    old = config.parse(of(["a", "b", "c"]), "old")
    initial = Initial(old, build.model(old).state_dict(), "old")
    own, taken, before = begun(initial, of(["c", "d"]))
    name = f"conditioner.modalities.{kind}.{weight}"
    assert own[name].select(dim, 0).equal(initial.weights[name].select(dim, 2))
    assert own[name].select(dim, 1).equal(before[name].select(dim, 1))
    if kind == "boxes":  # the row of an empty layout stays last
        assert own[name][-1].equal(initial.weights[name][-1])
    assert taken.fresh == [name]


@pytest.mark.parametrize(
    ("path", "options", "fresh"),
    [
        ("adm/model.pt", {"flags": "adm/flags.json"}, [TABLE]),
        ("adm/classifier.pt", {"flags": "adm/flags.json"}, ["network.head.out.weight", "network.head.out.bias"]),
        ("compvis_vq_class/model.ckpt", {"config": "compvis_vq_class/config.yaml"}, [TABLE]),
    ],
)
def test_checkpoints_of_other_projects(path: str, options: dict[str, str], fresh: list[str]) -> None:
    found = interop.read(FIXTURES / path, **{name: FIXTURES / file for name, file in options.items()})
    initial = Initial(found.config, found.state, path)
    own, taken, _ = begun(initial, raw_recipe(initial) | {"classes": ["7", "owl"]})
    assert taken.fresh == fresh
    assert own[fresh[0]][0].equal(found.state[fresh[0]][7])
    shared = [name for name in own if name not in fresh and not name.startswith("autoencoder.")]
    assert all(own[name].equal(found.state[name]) for name in shared)


def test_a_vocabulary_is_kept_and_a_new_one_learnt(tmp_path: Path) -> None:
    data = f"{MODALITIES}text.tokenizer.data"
    text = config.parse(crossing(kind="text", encoder={"kind": "bpe", "width": 16, "depth": 1, "head_dim": 8}), "text")
    trained, onwards = build.model(text), build.model(text)
    assert trained.conditioner is not None
    trained.conditioner.learn({"text": ["a red tile", "a blue tile"]})
    initial = Initial(text, trained.state_dict(), "text")
    quiet = Console(quiet=True)
    knowing = Initial(text.model_copy(update={"words": "a red tile"}), initial.weights, "text")
    kept = begin(onwards, text, knowing, tmp_path, ["Something else altogether"], quiet)
    assert onwards.state_dict()[data].equal(initial.weights[data])
    assert kept.words == "a altogether else red something tile"
    assert begin(onwards, text, initial, tmp_path, ["Something else"], quiet).words is None  # it knows who knows what
    wider = config.parse(crossing(kind="text", encoder={"kind": "bpe", "width": 24, "depth": 1, "head_dim": 8}), "text")
    other = build.model(wider)
    made = begin(other, wider, knowing, tmp_path, ["something else altogether"], quiet)
    assert made.words == "altogether else something"
    assert other.state_dict()[data].any()
    assert not other.state_dict()[data].equal(initial.weights[data])
    assert "conditions.text, with fresh weights: it is another than the checkpoint's" in made.provenance["init"]["new"]


def test_a_run_that_goes_on_keeps_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = config.parse(crossing(kind="text", encoder={"kind": "bpe", "width": 16, "depth": 1, "head_dim": 8}), "text")
    config.dump(text.model_copy(update={"words": "red tile"}), tmp_path / "config.yaml")
    monkeypatch.setattr(Checkpoints, "newest", lambda _: tmp_path)
    assert begin(build.model(text), text, None, tmp_path, ["others"], Console(quiet=True)).words == "red tile"


# --- training on ----------------------------------------------------------------------------------------------------


def test_a_run_is_trained_on_and_resumed_without_init(workshop: Workshop, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    moved, out = tmp_path / "moved", tmp_path / "out"
    shutil.copytree(workshop.run, moved)
    assert tune(workshop, out, init=moved) == 0
    assert "new conditions.label: 1 class (zebra)" in capsys.readouterr().err
    shutil.rmtree(moved)
    made = config.load(out / "config.yaml")
    assert made.classes == ("dog", "fish", "zebra")
    assert made.training.lr == pytest.approx(1e-4)
    assert made.model == config.load(workshop.run / "config.yaml").model
    facts = provenance(out)
    assert facts["from"] == str(moved)
    assert facts["kept"] == ["network", "conditions.label: 2 classes (dog, fish) and the null row"]
    assert facts["dropped"] == ["conditions.label: 1 class (cat)"]
    assert run(["train", "--out", str(out), "--resume", "--images", "32"]) == 0
    newest = Checkpoints(out).latest()
    assert newest is not None
    assert newest.images == 32
    assert provenance(out) == facts
    drift = (read_model(out)["network.stem.weight"] - read_model(workshop.run)["network.stem.weight"]).abs().max()
    assert 0 < float(drift) < 0.01
    assert limner.load(out).sample(num=1, label="zebra", steps=1, output="array").shape == (1, 8, 8, 3)


def test_resuming_without_a_checkpoint_asks_for_init(workshop: Workshop, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert tune(workshop, tmp_path / "out") == 0
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    assert run(["train", "--out", str(tmp_path / "out"), "--resume"]) == 2
    assert f"--init {workshop.run}" in capsys.readouterr().err
    assert tune(workshop, tmp_path / "out", "--resume") == 0


def test_a_preset_is_taken_for_recipe_and_training(workshop: Workshop, tmp_path: Path) -> None:
    assert tune(workshop, tmp_path / "out", "--preset", str(workshop.recipe), data="data") == 0
    made = config.load(tmp_path / "out" / "config.yaml")
    assert made.training.warmup_images == 8
    assert provenance(tmp_path / "out")["new"] == []


def test_a_classifier_gets_new_classes(workshop: Workshop, tmp_path: Path) -> None:
    guide, out = tmp_path / "guide", tmp_path / "out"
    network = ("--set", "model.levels=[{channels: 32}]", "--set", "model.patch=1")
    asked = ["train", str(workshop.data), "--task", "classifier", "--for", str(workshop.run), "--out", str(guide)]
    assert run([*asked, "--images", "16", *OFTEN, *network]) == 0
    assert tune(workshop, out, init=guide) == 0
    assert config.load(out / "config.yaml").classes == ("dog", "fish", "zebra")
    assert provenance(out)["kept"] == ["network but for what is new", "classes: 2 classes (dog, fish)"]
    initial = initial_of(guide)
    own, _, _ = begun(initial, initial.config.model_dump(mode="json") | {"classes": ["fish", "owl"]})
    assert own["network.head.out.weight"][0].equal(initial.weights["network.head.out.weight"][2])
    assert own["network.head.out.bias"][0].equal(initial.weights["network.head.out.bias"][2])
    assert tune(workshop, tmp_path / "refused", "--set", "data.size=[16, 16]", init=guide) == 2
    assert not (tmp_path / "refused").exists()


# --- adapters -------------------------------------------------------------------------------------------------------


def test_adapters_alone_are_trained_and_added_in(workshop: Workshop, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert tune(workshop, out, "--lora", "2", *FAST) == 0
    assert "diffusers loads no adapters into UNet2DModel" in capsys.readouterr().err
    before, after = read_model(workshop.run), read_model(out)
    assert set(before) == set(after)
    changed = {
        name for name in before if before[name].shape != after[name].shape or not before[name].equal(after[name])
    }
    adapted = {name for name in changed if name != TABLE}
    assert adapted
    assert all(".qkv.weight" in name or ".out.weight" in name for name in adapted)
    for name in adapted:
        strengths = torch.linalg.svdvals(after[name] - before[name])
        assert strengths[2] < 1e-3 * strengths[0]
    assert TABLE in changed  # a row is new
    newest = Checkpoints(out).latest()
    assert newest is not None
    slots = {name.rpartition(".")[0] for name in newest.tensors("optimizer")}
    assert all("lora_" in name or name == f"model.{TABLE}" for name in slots)
    assert run(["train", "--out", str(out), "--resume", "--images", "32"]) == 0
    assert set(read_model(out)) == set(before)


def test_diffusers_loads_the_adapters(tmp_path: Path, workshop: Workshop) -> None:
    diffusers = pytest.importorskip("diffusers")
    from hf_networks import stable_diffusion

    captioned = tmp_path / "captioned"
    shutil.copytree(workshop.data / "cat", captioned)
    rows = [{"file_name": file.name, "text": f"tile {file.stem}"} for file in sorted(captioned.glob("*.png"))]
    (captioned / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source, out = tmp_path / "source", tmp_path / "out"
    pipeline = stable_diffusion(tmp_path / "words")
    pipeline.save_pretrained(source)
    asked = ["train", str(captioned), "--init", str(source), "--lora", "2", "--out", str(out), "--images", "16", *OFTEN]
    assert run([*asked, *FAST, "--set", "data.size=[16, 16]"]) == 0
    gen, whole = limner.load(out), read_model(out)
    assert isinstance(gen, Generator)
    first = read_model(out / "autoencoder")
    assert all(whole[name].equal(first[name]) for name in first)
    x, step, tokens = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 32)
    theirs: Any = pipeline.unet
    with torch.no_grad():
        plain = theirs(x, step, tokens).sample
        pipeline.load_lora_weights(out / "lora")
        adapted = theirs(x, step, tokens).sample
        mine = gen.model.network(x, step.float(), None, tokens, None, None)
    assert isinstance(theirs, diffusers.UNet2DConditionModel)
    assert (adapted - plain).abs().max() > 1e-3 * plain.abs().max()
    assert (mine - adapted).abs().max() < 1e-4 * adapted.abs().max()


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "data.channels=1"], "set data.channels=3"),
        (["--set", "model.levels.0.channels=16"], "weight 'network.time.linear1.weight' is [32, 8], in the recipe's"),
        (["--set", "model.levels=[{channels: 8}]"], "in the recipe's network"),
        (["--set", "model.levels.0.blocks=2"], "which the recipe's network needs"),
        (["--task", "classifier"], "needs model.kind classifier"),
        (["--preset", "autoencoder"], "was trained for the task diffusion"),
        (["--lora", "0"], "training.lora"),
        (["--flags", "x"], "a run needs neither flags nor a config"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(workshop: Workshop, tmp_path: Path, more: list[str],
                                              words: str, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert tune(workshop, tmp_path / "out", *more) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_goes_with_init_alone(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--lora", "4"], ["--flags", "x"]):
        assert workshop.train(tmp_path / "out", *option) == 2
        assert "--init" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_recipe_of_a_checkpoint_leaves_its_data_behind(workshop: Workshop) -> None:
    raw = recipe.raw_recipe(raw_recipe(initial_of(workshop.run)), source="x", settings=["training.batch=4"],
                            budget=None, images=None, seed=None)  # fmt: skip
    made = config.parse(raw, "test")
    assert made.classes is None
    assert made.data.size == (8, 8)
    assert made.training.batch == 4
    with pytest.raises(LimnerError, match="classes"):
        build.model(made)
