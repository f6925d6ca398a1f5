"""Presets: the published network to the last parameter, and weights from wherever they come."""

import os
import pickle
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cxr_ray import presets
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.findings import FINDINGS
from cxr_ray.presets import NetworkOptions
from cxr_ray.train_settings import TrainSettings

# DenseNet-121's convolutions and batch-norms, and their running means and variances.
FEATURES, STATISTICS = 6_953_856, 83_648


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def running(model: nn.Module) -> int:
    return sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var")))


def image_only() -> NetworkOptions:
    """`multi-input` with both clinical switches off."""
    return presets.options(presets.find("multi-input"), meta=False, history=False)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network that differs from every new one."""
    torch.manual_seed(7)
    model = presets.build("multi-input")
    model.features.norm5.running_mean.fill_(0.25)
    return model


def test_published_parameter_counts():
    model = presets.build("multi-input")
    assert trainable(model) == 6_969_534
    assert trainable(model) + running(model) == 7_053_182


def test_image_only_counts_by_arithmetic():
    model = presets.build("multi-input", image_only())
    assert trainable(model.features) == FEATURES
    assert running(model) == STATISTICS
    assert trainable(model) == FEATURES + 1024 * 14 + 14
    clinical_branch = (17 * 32 + 32) + (32 * 16 + 16)
    assert trainable(presets.build("multi-input")) == FEATURES + clinical_branch + (1024 + 16) * 14 + 14


def test_published_aucs():
    (printed,) = presets.find("multi-input").published
    published = printed.auc
    assert list(published) == list(FINDINGS)
    # The mean that the paper prints.
    assert np.mean(list(published.values())) == pytest.approx(0.863, abs=5e-4)
    assert printed.mean == pytest.approx(np.mean(list(published.values())))
    assert (published["Hernia"], published["Infiltration"]) == (0.963, 0.731)


def test_unknown_preset():
    with pytest.raises(UsageError, match=r"'multi-imput' is not known; use one of: .*multi-input"):
        presets.build("multi-imput")


def test_switches_replace_what_the_source_has_and_nothing_else():
    preset = presets.find("multi-input")
    assert presets.options(preset) == NetworkOptions(preset.layout, "default")
    assert presets.options(preset, history=False).layout == replace(preset.layout, history=False)
    assert presets.options(preset, meta=False, encoding="rich").layout == replace(preset.layout, meta=False, encoding="rich")
    blind = presets.options(presets.find("chexnet"))
    assert blind.layout.width == 0
    assert presets.options(presets.find("chexnet"), meta=True).layout.width == 3


def test_a_variant_that_a_preset_has_not():
    with pytest.raises(UsageError, match=r"'variant' is 'resnet34': preset wang2017 has resnet50, .*; use one of them"):
        presets.options(presets.find("wang2017"), variant="resnet34")


def test_a_preset_without_images_keeps_something_to_read():
    textual = replace(presets.find("multi-input"), name="textual", published_size=None)
    with pytest.raises(UsageError, match="preset textual reads no image: leave it meta or history"):
        presets.options(textual, meta=False, history=False)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_describes_itself_in_terms_that_training_knows(name):
    preset = presets.find(name)
    assert preset.name == name
    TrainSettings(data="d", out="o", **{"preset": name, **preset.recipe})
    assert not set(preset.recipe) & {"data", "out", "preset", "variant", "meta", "history"}
    for printed in preset.published:
        assert set(printed.auc) <= set(FINDINGS)
        assert all(0.5 < auc < 1 for auc in printed.auc.values())


@pytest.mark.parametrize("clinical_inputs", [True, False])
def test_output_follows_a_permutation_of_the_batch(clinical_inputs):
    torch.manual_seed(0)
    model = presets.build("multi-input", None if clinical_inputs else image_only()).eval()
    images, clinical = torch.randn(4, 3, 32, 32), torch.randn(4, 17)
    order = torch.tensor([2, 0, 3, 1])
    with torch.inference_mode():
        straight, permuted = model(images, clinical), model(images[order], clinical[order])
        alone = model(images[1:2], clinical[1:2])
    assert straight.shape == (4, 14)
    torch.testing.assert_close(permuted, straight[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, straight[1:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(straight[0], straight[1])


def test_clinical_numbers_count_only_where_there_is_a_branch():
    images, one, other = torch.randn(2, 3, 32, 32), torch.zeros(2, 17), torch.ones(2, 17)
    with torch.inference_mode():
        model = presets.build("multi-input").eval()
        assert not torch.allclose(model(images, one), model(images, other))
        blind = presets.build("multi-input", image_only()).eval()
        torch.testing.assert_close(blind(images, one), blind(images, other))


def test_feature_maps_are_a_thirty_second_of_the_image():
    model = presets.build("multi-input").eval()
    with torch.inference_mode():
        maps = model.feature_maps(torch.randn(1, 3, 96, 64))
    assert maps.shape == (1, 1024, 3, 2)
    assert maps.min() >= 0


def test_random_weights_follow_the_seed():
    def weights(seed):
        torch.manual_seed(seed)
        return presets.build("multi-input").features.conv0.weight

    torch.testing.assert_close(weights(1), weights(1), rtol=0, atol=0)
    assert not torch.equal(weights(1), weights(2))


def saved(model: nn.Module, folder, form: str) -> str:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if form == "pth":
        torch.save(state, folder / "weights.pth")
        return str(folder / "weights.pth")
    save_file(state, folder / "model.safetensors")
    return str(folder if form == "bundle" else folder / "model.safetensors")


@pytest.mark.parametrize("form", ["bundle", "safetensors", "pth"])
def test_weights_from_a_path(tmp_path, trained, form):
    model = presets.build("multi-input", init=saved(trained, tmp_path, form))
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)


def test_the_backbone_moves_to_a_network_without_clinical_branch(tmp_path, trained):
    model = presets.build("multi-input", image_only(), init=saved(trained, tmp_path, "pth"))
    for name, tensor in trained.features.state_dict().items():
        torch.testing.assert_close(model.features.state_dict()[name], tensor, rtol=0, atol=0)
    assert model.head.weight.shape == (14, 1024)


class Intruder:
    """Unpickling this object would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def wrong_files(folder):
    for name in ("note.pth", "note.safetensors"):
        (folder / name).write_text("these are not the weights")
    for name in ("empty.pth", "empty.safetensors"):
        (folder / name).write_bytes(b"")
    torch.save([1, 2, 3], folder / "list.pth")
    (folder / "pickle.pth").write_bytes(pickle.dumps(Intruder(folder / "written")))
    torch.save({"features.conv0.weight": Intruder(folder / "written")}, folder / "intruder.pth")
    (folder / "folder").mkdir()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "name",
    [
        *("note.pth", "note.safetensors", "empty.pth", "empty.safetensors", "list.pth"),
        *("pickle.pth", "intruder.pth", "folder", "absent.pth", "absent"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused_and_not_executed(tmp_path, name):
    wrong_files(tmp_path)
    with pytest.raises(CxrRayError, match=f"^init .*{name}: .*; give a") as refused:
        presets.build("multi-input", init=str(tmp_path / name))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("change", ["other network", "wider", "one tensor short"])
def test_weights_of_another_backbone_are_refused(tmp_path, trained, change):
    state = dict(trained.state_dict())
    if change == "other network":
        state = {"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}
    elif change == "wider":
        # DenseNet-161 begins with 96 maps.
        state["features.conv0.weight"] = torch.zeros(96, 3, 7, 7)
    else:
        del state["features.norm5.weight"]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(
        CxrRayError, match=r"of the 725 tensors that the network starts from \(first absent: features\."
    ) as refused:
        presets.build("multi-input", init=str(tmp_path / "other.pth"))
    assert "\n" not in str(refused.value)


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing listens on the discard port, and nothing is cached in an empty folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # urllib keeps the proxies of its first call for as long as the process lives.
    urllib.request.install_opener(None)
    yield
    urllib.request.install_opener(None)


@pytest.mark.usefixtures("no_network")
def test_imagenet_weights_without_a_network_name_the_other_ways():
    with pytest.raises(CxrRayError, match=r"init 'imagenet': .*cannot be downloaded.*--init PATH.*--init random") as refused:
        presets.build("multi-input", init="imagenet")
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", [name for name, preset in presets.PRESETS.items() if preset.reads_images])
def test_imagenet_weights_are_asked_for_where_there_are_some(name):
    """Whoever has such weights fails to download them; the others say that there are none."""
    with pytest.raises(CxrRayError) as refused:
        presets.build(name, init="imagenet")
    assert ("cannot be downloaded" in str(refused.value)) is presets.find(name).pretrained
