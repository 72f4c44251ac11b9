"""Against guided-diffusion's recorded outputs, and against diffusers' live schedulers where conventions coincide.

`fixtures/core/guided_diffusion.safetensors` holds what openai/guided-diffusion (commit 22e0df8) returned on a CPU in
float32 for the network and classifier below, respaced to "1,2,3,4", for both of its schedules and three variances.
"""

from pathlib import Path as File

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from safetensors.torch import load_file

from limner.core import guidance
from limner.core.denoiser import network_denoiser
from limner.core.losses import DiffusionLoss, bits_per_dim
from limner.core.samplers import SAMPLERS, ddim, ddpm, euler
from limner.core.schedule import DiscreteCosineSchedule, LinearSchedule, RectifiedFlowSchedule, ScaledLinearSchedule

RECORDED = load_file(File(__file__).parent / "fixtures" / "core" / "guided_diffusion.safetensors")
SPACING = "1,2,3,4"
ADM = {"linear": LinearSchedule(), "cosine": DiscreteCosineSchedule()}


def assert_relative(ours, theirs, tolerance):
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance


# --- guided-diffusion -------------------------------------------------------------------------------------------


def network(x, step, cond=None):
    convolved = torch.nn.functional.conv2d(x, RECORDED["weight"], padding=1)
    return torch.tanh(convolved + (step / 1000).reshape(-1, 1, 1, 1))


def log_prob(x, t):
    step = t.float() * 1000 - 1
    return -((x.mean((2, 3)) - torch.tensor([0.5, -0.2, 0.9])) ** 2).sum(1) * 20 * (1 - step / 1200)


def adm_denoiser(name, variance):
    learned = variance == "learned"
    raw = network if learned else lambda x, step, cond: network(x, step)[:, :3]
    return guidance.clipped(network_denoiser(raw, ADM[name], "epsilon", time_input="step", learned_variance=learned))


def recorded_noise(k):
    return RECORDED["noise"][k]


@pytest.mark.parametrize("name", ADM)
@pytest.mark.parametrize("variance", ["learned", "small", "large"])
def test_ddpm_and_algorithm_1(name, variance):
    denoise, path = adm_denoiser(name, variance), ADM[name].path(10, SPACING)
    options = {"noise": recorded_noise, "variance": variance}
    assert_relative(ddpm(denoise, RECORDED["x"], path, **options), RECORDED[f"{name}.{variance}.ddpm"], 1e-4)
    gradient = guidance.ClassifierGradient(log_prob, 3.0)
    guided = ddpm(denoise, RECORDED["x"], path, gradient=gradient, **options)
    assert_relative(guided, RECORDED[f"{name}.{variance}.ddpm_guided"], 1e-4)


@pytest.mark.parametrize("name", ADM)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_and_algorithm_2(name, eta):
    denoise, path = adm_denoiser(name, "learned"), ADM[name].path(10, SPACING)
    drawn = ddim(denoise, RECORDED["x"], path, noise=recorded_noise, eta=eta)
    assert_relative(drawn, RECORDED[f"{name}.learned.ddim_{eta}"], 1e-4)
    guided = guidance.classifier(denoise, log_prob, 3.0, ADM[name])
    drawn = ddim(guided, RECORDED["x"], path, noise=recorded_noise, eta=eta)
    assert_relative(drawn, RECORDED[f"{name}.learned.ddim_guided_{eta}"], 1e-3)


@pytest.mark.parametrize("name", ADM)
@pytest.mark.parametrize("step", [0, 1, 9])
def test_hybrid_loss(name, step):
    path = ADM[name].path(10, SPACING)
    loss = DiffusionLoss(ADM[name], "epsilon", time_input="step", path=path, decoder="tanh")
    t = torch.tensor([path[9 - step].t] * 2, dtype=torch.float64)
    terms = loss(network, RECORDED["x0"], RECORDED["noise"][0], t)
    for key, value in (("mse", terms.mse), ("vb", terms.vb), ("loss", terms.loss)):
        torch.testing.assert_close(value, RECORDED[f"{name}.learned.loss_{step}_{key}"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ADM)
@pytest.mark.parametrize("variance", ["learned", "small", "large"])
def test_bits_per_dim(name, variance):
    denoise, path = adm_denoiser(name, variance), ADM[name].path(10, SPACING)
    bits = bits_per_dim(denoise, RECORDED["x0"], path, recorded_noise, variance=variance, decoder="tanh")
    key = f"{name}.{variance}.bpd_"
    for field, ours in (
        ("total_bpd", bits.total),
        ("vb", bits.vb),
        ("xstart_mse", bits.x0_mse),
        ("mse", bits.eps_mse),
    ):
        torch.testing.assert_close(ours, RECORDED[key + field], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bits.prior, RECORDED[key + "prior_bpd"], rtol=1e-2, atol=1e-7)
    exact = bits_per_dim(denoise, RECORDED["x0"], path, recorded_noise, variance=variance)
    torch.testing.assert_close(exact.total, bits.total, rtol=1e-2, atol=0)


# --- diffusers --------------------------------------------------------------------------------------------------

HF = {
    "linear": (LinearSchedule(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (
        ScaledLinearSchedule(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
    ),
    "cosine": (DiscreteCosineSchedule(), {"beta_schedule": "squaredcos_cap_v2"}),
}
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NOISES = torch.randn(50, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def smooth(x, step, cond=None):
    """Any smooth function of x and the step will do for a network."""
    rolled = torch.roll(x, 1, dims=-1) - 0.5 * torch.roll(x, 1, dims=1)
    return torch.sin(0.7 * x + 0.4 * rolled + step.reshape(-1, 1, 1, 1) / 400)


def ours(sampler, schedule, steps, spacing, prediction="epsilon", **options):
    denoise = network_denoiser(smooth, schedule, prediction, time_input="step")
    path = schedule.path(steps, spacing)
    return SAMPLERS[sampler](denoise, IMAGES, path, noise=lambda k: NOISES[k], **options)


def theirs(scheduler, steps, *, start=1.0, **options):
    """diffusers' loop. start: what x_T / alpha_T must be multiplied with to start where the scheduler does."""
    scheduler.set_timesteps(steps)
    x = IMAGES * start
    for k, t in enumerate(scheduler.timesteps):
        named = {name: value[k] for name, value in options.items()}
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(smooth(scaled, t.float()), t, x, **named).prev_sample
    return x


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("zero", [False, True])
def test_tables(name, zero):
    kind, options = type(HF[name][0]), HF[name][1]
    table = diffusers.DDIMScheduler(rescale_betas_zero_snr=zero, **options).alphas_cumprod.double()
    torch.testing.assert_close(kind(zero_terminal_snr=zero).alphas_bar, table, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim(name, spacing, prediction):
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, timestep_spacing=spacing, prediction_type=prediction, **HF[name][1]
    )
    assert_relative(ours("ddim", HF[name][0], 20, spacing, prediction), theirs(scheduler, 20), 1e-4)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [2, 7, 30, 999])
def test_spacings(spacing, steps):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    path = LinearSchedule().path(steps, spacing)
    assert [round(knot.t * 1000) - 1 for knot in path[:-1]] == scheduler.timesteps.tolist()


def test_ddim_with_noise():
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **HF["linear"][1])
    expected = theirs(scheduler, 20, eta=[0.6] * 20, variance_noise=NOISES)
    assert_relative(ours("ddim", HF["linear"][0], 20, "trailing", eta=0.6), expected, 1e-4)


def test_ddim_with_zero_terminal_snr():
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        **HF["scaled_linear"][1],
    )
    schedule = ScaledLinearSchedule(zero_terminal_snr=True)
    assert_relative(ours("ddim", schedule, 20, "trailing", "v_prediction"), theirs(scheduler, 20), 1e-4)


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(name, variance, monkeypatch):
    """With "leading", since diffusers adds noise on the way to the clean image unless its last step is 0."""
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False, timestep_spacing="leading", variance_type=f"fixed_{variance}", **HF[name][1]
    )
    drawn = iter(NOISES)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(drawn))
    expected = theirs(scheduler, 50)
    assert_relative(ours("ddpm", HF[name][0], 50, "leading", variance=variance), expected, 1e-4)


MULTISTEP = {
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh2"}),
}


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
@pytest.mark.parametrize("sampler", MULTISTEP)
@pytest.mark.parametrize("steps", [10, 25])
def test_ode_samplers(sampler, name, steps):
    kind, options = MULTISTEP[sampler]
    scheduler = kind(timestep_spacing="trailing", **options, **HF[name][1])
    schedule = HF[name][0]
    start = 1 / schedule.path(steps, "trailing")[0].alpha if sampler in ("euler", "heun") else 1.0
    assert_relative(ours(sampler, schedule, steps, "trailing"), theirs(scheduler, steps, start=start), 1e-4)


def test_dpmpp_2m_sde():
    scheduler = diffusers.DPMSolverMultistepScheduler(
        timestep_spacing="trailing", algorithm_type="sde-dpmsolver++", solver_order=2, **HF["linear"][1]
    )
    expected = theirs(scheduler, 20, variance_noise=NOISES)
    assert_relative(ours("dpmpp_2m_sde", HF["linear"][0], 20, "trailing"), expected, 1e-4)


def test_flow_matching_euler():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12))
    x = IMAGES
    for t in scheduler.timesteps:
        x = scheduler.step(smooth(x, t.float()), t, x).prev_sample
    schedule = RectifiedFlowSchedule(shift=1 / 3)
    denoise = network_denoiser(lambda x, t, cond: smooth(x, 1000 * schedule.sigma(t)), schedule, "flow")
    assert_relative(euler(denoise, IMAGES, schedule.path(12, "trailing")), x, 1e-4)


def test_rescale_in_the_networks_space_is_the_pipelines():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    schedule, t = ScaledLinearSchedule(), torch.tensor(0.7, dtype=torch.float64)

    def conditional(x, step, cond):
        return smooth(x, step) * (1.0 if cond is None else cond)

    denoise = network_denoiser(conditional, schedule, "v_prediction", time_input="step")
    guided = guidance.classifier_free(denoise, 7.5)
    ours = guidance.rescaled(guided, 0.7, kind="v_prediction", schedule=schedule)(IMAGES, t, 1.3).x0
    step = torch.tensor(699.0)
    c, u = (conditional(IMAGES, step, cond) for cond in (1.3, None))
    raw = rescale_noise_cfg(u + 7.5 * (c - u), c, 0.7)
    alpha, sigma = float(schedule.alpha(0.7)), float(schedule.sigma(0.7))
    assert_relative(ours, alpha * IMAGES - sigma * raw, 1e-5)
