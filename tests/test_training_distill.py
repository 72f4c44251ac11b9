"""Distillation: students of an exact teacher, whose map is known, and whole rounds by the command line."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import limner
from limner import api, build, config
from limner.cli.program import run
from limner.core import guidance
from limner.core.denoiser import network_denoiser, per_image
from limner.core.distill import DistillationLoss, Strides
from limner.core.losses import stratified_times
from limner.core.path import Path
from limner.core.samplers import ddim, dpmpp_2m
from limner.core.schedule import CosineSchedule, DiscreteCosineSchedule, LinearSchedule
from limner.errors import LimnerError
from limner.nn.conditioners import Embedded
from limner.training import distill_rounds as rounds
from limner.training.distill import DistillTask
from mixture import Mixture
from tiny_cli import Workshop

SCHEDULE = CosineSchedule()
MIXTURE = Mixture(SCHEDULE)


# --- the target -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [SCHEDULE, LinearSchedule(), DiscreteCosineSchedule(zero_terminal_snr=True)])
@pytest.mark.parametrize("second_order", [False, True])
def test_one_step_with_the_target_lands_where_the_teachers_steps_do(schedule, second_order):
    strides = Strides.of(schedule, 4, 12, second_order=second_order)
    teacher = Mixture(schedule).denoise
    x = torch.randn(4, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([2, 0, 3, 1])
    target = strides.target(teacher, x, steps)
    own = schedule.path(4, "trailing")
    assert strides.starts(steps).tolist() == [own[int(k)].t for k in steps]
    for row, k in enumerate(steps.tolist()):
        within = Path(strides.path[3 * k : 3 * k + 4])
        landed = (dpmpp_2m if second_order else ddim)(teacher, x[row : row + 1], within)
        here, there = own[k], own[k + 1]
        eps = (x[row] - here.alpha * target[row]) / here.sigma
        torch.testing.assert_close(there.alpha * target[row] + there.sigma * eps, landed[0], rtol=1e-9, atol=1e-9)


def test_steps_that_do_not_divide_the_teachers_are_refused():
    with pytest.raises(LimnerError, match="3 steps don't divide the teacher's 32"):
        Strides.of(SCHEDULE, 3, 32)


# --- students of an exact teacher ---------------------------------------------------------------------------------


class Student(nn.Module):
    """v at x (B, 2, 1, 1) and time (B,), told (labels, scales)."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(21, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip
        self.waves = 0.8 * 2.0 ** torch.arange(8)

    def forward(self, x, time, cond):
        label, scale = cond
        angles = time[:, None] * self.waves
        told = torch.stack([label.float(), scale, (scale - 1) * label], dim=1)
        return self.layers(torch.cat([x.flatten(1), angles.sin(), angles.cos(), told], dim=1)).reshape(x.shape)


def exact(scale):
    """The guided mixture, for scales (B,) or one for all."""
    s = scale.double() if isinstance(scale, torch.Tensor) else scale
    both = guidance.classifier_free(MIXTURE.denoise, s)
    return lambda x, t, cond=None, /: both(x.double(), t, cond)


def drawn(student, x, steps, cond):
    with torch.no_grad():
        denoise = network_denoiser(student, SCHEDULE, "v_prediction")
        return ddim(denoise, x, SCHEDULE.path(steps, "trailing"), cond=cond)


def taught(student, target, updates, lr=5e-3):
    """The student after `updates` batches of 128; target(x0, eps, u, labels, scales) -> x, t, the x0 to predict."""
    generator = torch.Generator().manual_seed(0)
    data = torch.stack([MIXTURE.sample(2000, 5, label=k).float() for k in (0, 1)])
    loss, optimizer = DistillationLoss(SCHEDULE, "v_prediction"), torch.optim.Adam(student.parameters(), lr=lr)
    for k in range(updates):
        optimizer.param_groups[0]["lr"] = lr * (1 - k / updates)
        labels = torch.randint(2, (128,), generator=generator)
        x0 = data[labels, torch.randint(2000, (128,), generator=generator)]
        scales = 1 + 3 * torch.rand(128, generator=generator)
        eps, u = torch.randn(x0.shape, generator=generator), stratified_times(128, generator)
        with torch.no_grad():
            x, t, y = target(x0, eps, u, labels, scales)
        optimizer.zero_grad()
        loss(student, x, t, y.float(), (labels, scales)).loss.mean().backward()
        optimizer.step()
    return student


def noised(x0, eps, t):
    return per_image(SCHEDULE.alpha(t), x0) * x0 + per_image(SCHEDULE.sigma(t), x0) * eps


def guided_target(x0, eps, u, labels, scales):
    x = noised(x0, eps, u)
    return x, u, exact(scales)(x, u, labels).x0


def stride_target(strides):
    def target(x0, eps, u, labels, scales):
        step = (strides.steps * (1 - u)).long()
        x = noised(x0, eps, strides.starts(step))
        return x, strides.starts(step), strides.target(exact(scales), x, step, labels)

    return target


@pytest.fixture(scope="module")
def guided():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return taught(Student(), guided_target, 400)


def rms(a, b):
    return float((a.double() - b.double()).square().mean().sqrt())


def test_a_guidance_student_equals_guidance_by_two_calls(guided):
    x, labels = torch.randn(1000, 2, 1, 1, generator=torch.Generator().manual_seed(3)), torch.arange(1000) % 2
    student = network_denoiser(guided, SCHEDULE, "v_prediction")
    for t in (0.3, 0.6, 0.9):
        time = torch.tensor(t, dtype=torch.float64)
        x_t = noised(MIXTURE.sample(1000, 7).float(), x, time)
        for scale in (2.0, 3.0, 4.0):
            with torch.no_grad():
                told = student(x_t, time, (labels, torch.full((1000,), scale))).x0
            both = exact(scale)(x_t, time, labels).x0
            unguided = exact(1.0)(x_t, time, labels).x0
            assert rms(told, both) < 0.6 * rms(unguided, both)


def test_a_few_step_student_follows_the_teachers_many_steps(guided):
    x, labels = torch.randn(1000, 2, 1, 1, generator=torch.Generator().manual_seed(4)), torch.arange(1000) % 2
    many = dpmpp_2m(exact(3.0), x.double(), SCHEDULE.path(60), cond=labels)
    few = ddim(exact(3.0), x.double(), SCHEDULE.path(2, "trailing"), cond=labels)
    student = taught(copy.deepcopy(guided), stride_target(Strides.of(SCHEDULE, 2, 8, second_order=True)), 250)
    own = drawn(student, x, 2, (labels, torch.full((1000,), 3.0)))
    before = drawn(guided, x, 2, (labels, torch.full((1000,), 3.0)))
    assert rms(own, many) < 0.5 * rms(few, many)
    assert rms(own, many) < 0.5 * rms(before, many)


# --- guidance that is told, and guidance that is reused -----------------------------------------------------------


class Counted:
    """The mixture with what it was asked, call by call."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, cond=None, /):
        self.calls.append((float(t), cond))
        return MIXTURE.denoise(x, t, cond)


def at(t):
    return torch.tensor(t, dtype=torch.float64)


NOISE = torch.randn(6, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_scale_for_each_image_is_that_scale():
    scales = torch.tensor([1.0, 2.0, 3.5, 1.0, 0.0, 4.0], dtype=torch.float64)
    together = guidance.classifier_free(MIXTURE.denoise, scales)(NOISE, at(0.5), 1).x0
    alone = [guidance.classifier_free(MIXTURE.denoise, float(s))(NOISE[k : k + 1], at(0.5), 1) for k, s in
             enumerate(scales)]  # fmt: skip
    torch.testing.assert_close(together, torch.cat([each.x0 for each in alone]))


def test_the_unconditional_half_is_computed_every_so_many_steps():
    counted = Counted()
    reused = guidance.classifier_free(counted, 3.0, every=3)
    each = guidance.classifier_free(MIXTURE.denoise, 3.0)
    for k, t in enumerate((0.9, 0.8, 0.7, 0.6, 0.5)):
        own, true = reused(NOISE, at(t), 1).x0, each(NOISE, at(t), 1).x0
        assert torch.equal(own, true) == (k % 3 == 0)
    assert [t for t, cond in counted.calls if cond is None] == [0.9, 0.6]
    kept = MIXTURE.denoise(NOISE, at(0.6), 1).x0 - MIXTURE.denoise(NOISE, at(0.6)).x0
    torch.testing.assert_close(own, MIXTURE.denoise(NOISE, at(0.5), 1).x0 + 2 * kept)


def test_what_guidance_remembers_is_forgotten_by_another_drawing():
    reused = guidance.classifier_free(MIXTURE.denoise, 3.0, every=9)
    each = guidance.classifier_free(MIXTURE.denoise, 3.0)
    reused(NOISE, at(0.5), 1)
    for x, t in ((NOISE, 0.9), (NOISE[:2], 0.4)):
        assert torch.equal(reused(x, at(t), 1).x0, each(x, at(t), 1).x0)
    with pytest.raises(LimnerError, match="every 0 steps"):
        guidance.classifier_free(MIXTURE.denoise, 3.0, every=0)


def test_a_condition_without_a_null_holds_in_both_halves():
    """A picture to enlarge, which must always be given, beside a label to guide by."""
    conditions = [{"kind": "label"}, {"kind": "image", "null": False, "size": [4, 4]}]
    raw = {"data": {"size": 8}, "classes": ["a", "b"], "conditions": conditions, "sampling": {"clip": False},
           "model": {"kind": "unet", "levels": [{"channels": 32}]}}  # fmt: skip
    recipe = config.parse(raw, "recipe")
    teacher = build.model(recipe).eval()
    for weight in teacher.network.parameters():
        nn.init.normal_(weight, std=0.1)
    x, t, scale = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([1.5, 3.0])
    cond = {"label": torch.tensor([0, 1]), "image": torch.randn(2, 3, 4, 4)}
    rows = np.arange(2)
    data = SimpleNamespace(train=rows, held_out=rows[:0], batch=lambda _: {**cond, "small": cond["image"]})
    student = recipe.model_copy(update={"distillation": section(guidance=(1, 4), steps=None)})
    task = DistillTask(teacher, student, data, teacher, recipe, None)
    found = task._target(x, t, torch.zeros(2), cond, {}, scale)
    denoise = build.denoiser(teacher, recipe)
    with torch.no_grad():
        guided, plain = (denoise(x, t, teacher.embed({**cond, "label": label}, 2)) for label in (cond["label"], None))
        x0 = plain.x0 + scale[:, None, None, None] * (guided.x0 - plain.x0)
    assert (guided.x0 - plain.x0).abs().max() > 1e-2
    torch.testing.assert_close(found, x0, atol=1e-4, rtol=1e-4)


# --- rounds ------------------------------------------------------------------------------------------------------


def section(**given):
    return config.DistillationConfig(teacher="t", **given)


def test_rounds_share_the_budget():
    found = rounds.rounds(section(guidance=(1, 4), steps=2, guidance_share=0.4))
    assert [(r.name, r.steps, r.teacher_steps) for r in found] == [
        ("guidance", None, 32), ("8-steps", 8, 32), ("4-steps", 4, 8), ("2-steps", 2, 4)]  # fmt: skip
    assert [r.share for r in found] == pytest.approx([0.4, 0.2, 0.2, 0.2])
    for alone, name in (({"steps": 1, "first_steps": 1}, "1-step"), ({"guidance": (1, 4), "steps": None}, "guidance")):
        assert [(r.name, r.share) for r in rounds.rounds(section(**alone))] == [(name, 1)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": None}, "nothing to learn"),
        ({"steps": 3}, "8 steps cannot be made 4|4 steps cannot be made 3"),
        ({"guidance": (3, 2)}, "least scale and the greatest"),
    ],
)
def test_rounds_that_cannot_be_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        section(**given)


# --- by the command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        found = Workshop(tmp_path_factory.mktemp("shop"), patch)
        assert run([*distil(found, "student"), "--images", "24", "--steps", "2", *SHORT]) == 0
        yield found


SHORT = ["--set", "distillation.first_steps=4"]


def distil(shop, out, teacher="run"):
    return ["train", "--task", "distill", "--teacher", str(shop.folder / teacher), "--out", str(shop.folder / out)]


def test_a_student_is_a_run_that_draws_in_few_calls(shop, capsys):
    student = shop.folder / "student"
    recipe = config.load(student / "config.yaml")
    assert recipe.task == "diffusion"
    assert (recipe.sampling.sampler, recipe.sampling.steps, recipe.sampling.spacing) == ("ddim", 2, "trailing")
    assert recipe.distillation.guidance == (1, 3)  # around the teacher's 2
    assert sorted(path.name for path in (student / "rounds").iterdir()) == ["4-steps", "guidance"]
    assert config.load(student / "rounds/guidance/config.yaml").sampling.sampler == "dpmpp_2m"
    capsys.readouterr()
    assert run(["sample", str(student), "--num", "3", "--out", str(shop.folder / "few.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    calls = []
    model = limner.load(student)
    model.model.network.register_forward_hook(lambda *given: calls.append(len(given[1][0])))
    model.sample(num=4)
    assert calls == [4, 4]


def test_a_student_begins_as_its_teacher_whatever_scale_it_is_told(shop):
    teacher = api._initial(shop.run, None, None)
    raw = rounds.budgeted(rounds.raw_recipe(teacher) | {"training": {"images": 8}})
    own = rounds.of_round(config.parse(raw, "test"), teacher.config, rounds.Round(None, 32, 1.0))
    task = rounds._task(own, teacher, rounds.Round(None, 32, 1.0), api.prepare(own.data, ("label",)))
    x, time = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
    tau = Embedded(torch.randn(2, task.model.network.emb_channels))
    plain = task.teacher.raw(x, time, tau)
    for scale in (1.0, 3.0):
        told = task.model.raw(x, time, Embedded(tau.vector, guidance=torch.full((2,), scale)))
        assert torch.equal(told, plain)
    torch.nn.init.normal_(task.model.network.time.guidance.weight)
    assert not torch.allclose(task.model.raw(x, time, Embedded(tau.vector, guidance=torch.full((2,), 2.0))),
                              task.model.raw(x, time, tau))  # fmt: skip


def test_a_student_goes_on_by_itself_and_needs_no_teacher(shop, capsys):
    run_dir = shop.folder / "alone"
    shutil.copytree(shop.folder / "student", run_dir)
    before = (run_dir / "model.safetensors").read_bytes()
    assert run(["train", "--out", str(run_dir), "--resume", "--images", "48", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] >= 48
    assert (run_dir / "model.safetensors").read_bytes() != before
    assert config.load(run_dir / "config.yaml").distillation.images == 48


def test_a_stopped_distillation_takes_up_the_round_it_was_in(shop, capsys):
    run_dir = shop.folder / "stopped"
    shutil.copytree(shop.folder / "student", run_dir)
    for left in ("checkpoints", "model.safetensors", "metrics.jsonl"):
        path = run_dir / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = (run_dir / "rounds/4-steps/checkpoints").stat().st_mtime_ns
    assert run(["train", "--out", str(run_dir), "--resume"]) == 0
    assert (run_dir / "rounds/4-steps/checkpoints").stat().st_mtime_ns == kept
    whole, again = ((shop.folder / name / "model.safetensors").read_bytes() for name in ("student", "stopped"))
    assert whole == again


def test_a_student_can_be_a_teacher(shop):
    assert run([*distil(shop, "faster", "student"), "--images", "16"]) == 0
    recipe = config.load(shop.folder / "faster/config.yaml")
    assert recipe.sampling.steps == 1
    assert recipe.distillation.guidance == (1, 3)
    assert [r.name for r in rounds.rounds(recipe.distillation)] == ["1-step"]


def test_guidance_alone_leaves_solver_and_steps_free(shop):
    assert run([*distil(shop, "told"), "--images", "16", "--set", "distillation.steps=null"]) == 0
    model = limner.load(shop.folder / "told")
    settings = model.settings()
    assert (settings.sampler, settings.steps, settings.guidance) == ("dpmpp_2m", 2, 2.0)
    assert model.sample(num=2, steps=3, sampler="heun", interval=(0.2, 0.8), output="array").shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance": 9.0}, "guidance 9: this model was distilled for 1 to 3"),
        ({"guidance": 0.5}, "guidance 0.5: this model was distilled for 1 to 3"),
        ({"guidance": {"label": 2.0}}, "guidance by modality: this model was distilled"),
        ({"rescale": 0.5}, "rescale: this model was distilled"),
        ({"guidance_every": 2}, "guidance_every: this model was distilled"),
    ],
)
def test_what_a_student_does_not_know_is_refused(shop, options, words):
    with pytest.raises(LimnerError, match=words):
        limner.load(shop.folder / "student").sample(num=1, **options)


def refusal(capsys, arguments):
    capsys.readouterr()
    code, said = run(arguments), capsys.readouterr().err
    assert code == 2, said
    assert said.startswith("limner: ")
    assert said.count("\n") == 1, said
    return said


def test_what_cannot_be_distilled_is_said_in_a_line(shop, tmp_path, capsys):
    guide = str(tmp_path / "guide")
    small = ["--set", "model.levels=[{channels: 8}]", "--set", "model.norm_groups=4", "--set", "model.patch=1"]
    judge = ["train", str(shop.data), "--task", "classifier", "--for", str(shop.run), "--out", guide, "--images", "16"]
    assert run([*judge, *small]) == 0
    plain = str(tmp_path / "plain")
    assert shop.train(tmp_path / "plain", "--set", "conditions=[]", "--set", "sampling.guidance=1") == 0
    to = ["--out", str(tmp_path / "no"), "--images", "16"]
    task = ["train", "--task", "distill"]
    for arguments, words in (
        ([*task, "--teacher", guide, *to], "holds a classifier, which draws nothing"),
        ([*task, "--teacher", plain, "--set", "distillation.guidance=[1, 4]", *to], "is unconditional"),
        ([*task, "--teacher", plain, "--set", "distillation.steps=null", *to], "nothing to learn"),
        ([*task, *to], "with --teacher RUN"),
        ([*task, "--teacher", str(tmp_path / "none"), *to], "no such file or directory"),
        (["train", "--teacher", plain, *to], "goes with --task distill"),
        ([*task, "--teacher", plain, "--preset", "emoji", *to], "--preset: doesn't go with --task distill"),
        (["train", str(shop.data), "--steps", "4", *to], "--steps: goes with --task distill"),
        ([*task, "--teacher", plain, "--steps", "3", *to], "should be a multiple"),
        ([*task, "--teacher", plain, "--out", plain, "--images", "16"], "holds a run already"),
        ([*task, "--teacher", plain, "--set", "training.lora=4", *to], "a student is trained whole"),
        (["train", str(shop.data), "--init", str(shop.folder / "student"), *to], "was distilled"),
        ([*distil(shop, "no", "student"), "--set", "distillation.guidance=[1, 7]", *to], "for guidance 1 to 3"),
    ):
        assert words in refusal(capsys, arguments)
    assert not (tmp_path / "no").exists()


def test_an_epsilon_teacher_needs_a_student_of_another_prediction(shop, capsys):
    assert shop.train(shop.folder / "epsilon", "--set", "process.prediction=epsilon") == 0
    own = [*distil(shop, "v", "epsilon"), "--images", "8", *SHORT]
    assert "--set process.prediction=v_prediction" in refusal(capsys, own)
    assert run([*own, "--set", "process.prediction=v_prediction"]) == 0


def test_an_unconditional_student_learns_steps_alone(shop, tmp_path):
    assert shop.train(tmp_path / "plain", "--set", "conditions=[]", "--set", "sampling.guidance=1") == 0
    own = ["train", "--task", "distill", "--teacher", str(tmp_path / "plain"), "--out", str(tmp_path / "s")]
    assert run([*own, "--images", "8", *SHORT]) == 0
    student = limner.load(tmp_path / "s")
    assert student.guidance_range is None
    assert not student.config.model.guided
    assert student.sample(num=2, output="array").shape == (2, 8, 8, 3)


def test_diffusers_is_told_no_student():
    from limner.interop import hf_settings

    network = {"kind": "unet", "levels": [{"channels": 8}], "guided": True}
    recipe = config.parse({"data": {"size": 8}, "model": network}, "test")
    assert build.model(recipe).network.time.guidance is not None
    with pytest.raises(LimnerError, match=r"model\.guided"):
        hf_settings.unet(recipe)
