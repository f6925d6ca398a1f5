"""beyond: what is known of the patient scales and shifts the maps of the film, and at first leaves them as they are."""

import pytest
import torch
from phantom_batch import overfit, phantom_batch
from torch.nn import functional as F

from cxr_ray import presets, vision
from cxr_ray.clinical import ClinicalLayout
from cxr_ray.presets.beyond import PRESET, Beyond, Modulation

VARIANTS = ("convnext_tiny", "densenet121")
RICH, PAPER = ClinicalLayout("rich"), ClinicalLayout("paper")
IMAGE_ONLY = ClinicalLayout(meta=False, history=False)


def image(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def patients(layout: ClinicalLayout, n: int = 3) -> torch.Tensor:
    return torch.randn(n, layout.width, generator=torch.Generator().manual_seed(2))


def modulating(variant: str, layout: ClinicalLayout = RICH) -> Beyond:
    """A network whose modulations are no longer the identity."""
    torch.manual_seed(0)
    model = Beyond(layout, variant).eval()
    with torch.no_grad():
        for modulation in model.modulations.values():
            modulation.scale_and_shift.weight.normal_(0, 0.1)
    return model


def plain(model: Beyond, images: torch.Tensor) -> torch.Tensor:
    """The backbone's pooled features, as torchvision goes from its last maps to its classifier."""
    maps = model.features(images)
    if model.variant == "densenet121":
        return F.relu(maps).mean(dim=(2, 3))
    return F.layer_norm(maps.mean(dim=(2, 3)), (768,), model.norm.weight, model.norm.bias, eps=1e-6)


def test_the_defaults():
    chosen = presets.options(PRESET)
    assert chosen.variant == "convnext_tiny"
    assert chosen.layout == RICH
    assert PRESET.variants == VARIANTS


@pytest.mark.parametrize(
    ("variant", "backbone", "channels"),
    [
        # ConvNeXt-T has 28,589,128 parameters with its classifier of 1,000 classes; the norm before it is ours too.
        ("convnext_tiny", 28_589_128 - (768 * 1000 + 1000), (384, 768)),
        ("densenet121", 7_978_856 - (1024 * 1000 + 1000), (512, 1024)),
    ],
)
def test_parameters_by_arithmetic(variant, backbone, channels):
    perceptron = (69 * 128 + 128) + (128 * 128 + 128)
    gru = 3 * 128 * (16 + 128) + 2 * 3 * 128
    norm = 2 * 128
    modulations = sum((128 + 1) * 2 * width for width in channels)
    head = (channels[1] + 128) * 14 + 14
    model = presets.build("beyond", presets.options(PRESET, variant=variant))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == backbone + perceptron + gru + norm + modulations + head
    assert all(name in dict(model.named_modules()) for name in ("features", "clinical", "modulations", "head"))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_at_first_the_maps_are_the_backbones(variant):
    torch.manual_seed(0)
    model = Beyond(RICH, variant).eval()
    pooled = torch.cat([plain(model, image()), model.clinical(patients(RICH))], dim=1)
    torch.testing.assert_close(model(image(), patients(RICH)), model.head(pooled))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_without_clinical_numbers_it_is_the_backbone(variant):
    torch.manual_seed(0)
    model = Beyond(IMAGE_ONLY, variant).eval()
    torch.testing.assert_close(model(image(), patients(IMAGE_ONLY)), model.head(plain(model, image())))
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} <= {"features", "norm", "head"}


@torch.inference_mode()
def test_a_modulation_by_hand():
    modulation = Modulation(2, 3)
    modulation.scale_and_shift.weight[0, 0] = 0.5  # channel 0 grows by half of feature 0
    modulation.scale_and_shift.weight[3 + 1, 1] = 2.0  # channel 1 rises by twice feature 1
    maps = torch.arange(24.0).reshape(2, 3, 2, 2)
    modulated = modulation(maps, torch.tensor([[1.0, 10.0], [0.0, -1.0]]))
    torch.testing.assert_close(modulated[0, 0], maps[0, 0] * 1.5)
    torch.testing.assert_close(modulated[0, 1], maps[0, 1] + 20)
    torch.testing.assert_close(modulated[1, 1], maps[1, 1] - 2)
    torch.testing.assert_close(modulated[1, 0], maps[1, 0])
    torch.testing.assert_close(modulated[:, 2], maps[:, 2])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_maps_follow_the_patient_at_both_places(variant):
    model = modulating(variant)
    one, other = model.clinical(patients(RICH)), model.clinical(patients(RICH).flip(0))
    for alone in model.modulations:
        kept = [modulation for name, modulation in model.modulations.items() if name != alone]
        weights = [modulation.scale_and_shift.weight.clone() for modulation in kept]
        for modulation in kept:
            modulation.scale_and_shift.weight.zero_()
        moved = (model.feature_maps(image(), one) - model.feature_maps(image(), other)).abs()
        # The middle one of the three patients stayed where it was.
        assert moved[[0, 2]].mean() > 1e-3
        assert moved[1].max() == 0
        for modulation, weight in zip(kept, weights, strict=True):
            modulation.scale_and_shift.weight.copy_(weight)


@torch.inference_mode()
def test_visits_that_were_not_count_for_nothing_and_the_order_of_the_others_counts():
    model = modulating("densenet121")
    clinical = patients(RICH)
    first = 6 + 63
    clinical[:, [first, first + 16, first + 32]] = torch.tensor([1.0, 1.0, 0.0])
    absent, swapped = clinical.clone(), clinical.clone()
    absent[:, first + 33 : first + 48] = 5
    swapped[:, first : first + 16], swapped[:, first + 16 : first + 32] = (
        clinical[:, first + 16 : first + 32],
        clinical[:, first : first + 16],
    )
    straight = model(image(), clinical)
    torch.testing.assert_close(model(image(), absent), straight, rtol=0, atol=0)
    assert (model(image(), swapped) - straight).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns_from_the_first_step(variant):
    torch.manual_seed(0)
    model = Beyond(RICH, variant).train()
    model(image(), patients(RICH)).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    for modulation in model.modulations.values():
        assert modulation.scale_and_shift.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "layout", [PAPER, ClinicalLayout(history=False), ClinicalLayout("rich", meta=False), IMAGE_ONLY], ids=str
)
@torch.inference_mode()
def test_whatever_the_layout_the_order_of_the_batch_changes_nothing(layout):
    model, order = modulating("densenet121", layout), torch.tensor([2, 0, 1])
    clinical = patients(layout)
    straight = model(image(), clinical)
    torch.testing.assert_close(model(image()[order], clinical[order]), straight[order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(image()[:1], clinical[:1]), straight[:1], rtol=1e-4, atol=1e-4)
    assert straight.std(dim=0).min() > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_channels_last_is_kept_and_bfloat16_comes_near(variant):
    model = modulating(variant).to(memory_format=torch.channels_last)
    images = image().contiguous(memory_format=torch.channels_last)
    maps = model.feature_maps(images, model.clinical(patients(RICH)))
    assert maps.is_contiguous(memory_format=torch.channels_last)
    straight = model(images, patients(RICH))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(images, patients(RICH))
    torch.testing.assert_close(rounded.float(), straight, rtol=0.05, atol=0.05)


def test_the_prior_is_the_last_layers_bias():
    model = Beyond(IMAGE_ONLY, "densenet121").eval()
    prior = torch.linspace(-1, -6, 14)
    model.set_prior(prior)
    with torch.inference_mode():
        model.head.weight.zero_()
        torch.testing.assert_close(model(image(), patients(IMAGE_ONLY)), prior.expand(3, 14))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns_32_films(variant):
    torch.manual_seed(0)
    batch = phantom_batch()
    images = vision.as_input(batch.pixels, 32)
    model = presets.build("beyond", presets.options(PRESET, variant=variant, encoding="paper"))
    assert overfit(model, images, batch.clinical_paper, batch.labels, steps=30, rate=1e-3) == 1.0
