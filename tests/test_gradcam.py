"""Class maps on networks whose reason is known, on every preset, and against the same networks with other weights."""

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cxr_ray import presets
from cxr_ray.bundle import Bundle, describe
from cxr_ray.clinical import ClinicalInputs, ClinicalLayout, ClinicalStatistics
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.gradcam import CELLS, activation_maps, class_maps, grad_cam
from cxr_ray.heatmap import explain, explain_all, occlusion
from cxr_ray.input_profile import InputProfile
from cxr_ray.presets import PRESETS, NetworkOptions
from cxr_ray.presets.preset import Network
from cxr_ray.presets.wang2017 import Wang
from cxr_ray.probe import Probe
from cxr_ray.torch_engine import TorchEngine

SIZE = 64
IMAGE_ONLY = ClinicalLayout("paper", meta=False, history=False)
STATISTICS = ClinicalStatistics(48.0, 16.5, 0.56, 0.4, (0.1,) * 14, (0.2,) * 111)
BRIGHT, BRIGHT_REVERSED, STRIPED, OLD = 2, 3, 7, 9
SQUARE, STRIPES = (slice(8, 24), slice(40, 56)), (slice(40, 56), slice(8, 24))
NETWORKS = [(name, variant) for name, preset in PRESETS.items() if preset.reads_images for variant in preset.variants]
# The same kinds of modules as others of the list, only more of them.
NETWORKS = [(name, variant) for name, variant in NETWORKS if variant not in ("resnet101", "dnet-loc")]


class KnownReason(Network):
    """Logits of a few findings from two channels: how far a place is brighter than grey, and how striped it is."""

    def __init__(self) -> None:
        super().__init__()
        measure = nn.Conv2d(3, 2, kernel_size=3, padding=1)
        self.features = nn.Sequential(
            measure, nn.ReLU(inplace=True), nn.AvgPool2d(4), nn.Sequential(nn.AvgPool2d(2)), nn.Identity()
        )
        self.head = nn.Linear(2 + 1, len(FINDINGS))
        with torch.no_grad():
            measure.weight.zero_()
            measure.weight[0, 0] = 1 / 9
            measure.weight[1, 0] = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 2.0, -1.0], [0.0, 0.0, 0.0]])
            measure.bias.copy_(torch.tensor([-1.0, -2.5]))
            self.head.weight.zero_()
            self.head.weight[BRIGHT, 0], self.head.weight[BRIGHT_REVERSED, 0] = 40.0, -40.0
            self.head.weight[STRIPED, 1], self.head.weight[OLD, 2] = 10.0, 1.0

    def forward(self, images: torch.Tensor, clinical: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(torch.cat([self.features(images).mean(dim=(2, 3)), clinical[:, :1]], dim=1))


def known_film() -> np.ndarray:
    film = np.full((SIZE, SIZE), 90, dtype=np.uint8)
    film[SQUARE] = 230
    film[STRIPES] = 20
    film[STRIPES[0], STRIPES[1].start : STRIPES[1].stop : 2] = 200
    return film


def inputs_of(n: int) -> ClinicalInputs:
    """Ages and sexes that differ, the rest unknown."""
    unknown = np.full(n, np.nan, dtype=np.float32)
    age, male = np.linspace(20, 90, n, dtype=np.float32), (np.arange(n) % 2).astype(np.float32)
    return ClinicalInputs(age, male, unknown, np.full((n, 14), np.nan, dtype=np.float32))


# No engine is opened here.
NOT_ASKED = Probe(np.empty((0, SIZE, SIZE), np.uint8), inputs_of(0), np.empty((0, 14), np.float32))


def bundle_of(
    model: Network, layout: ClinicalLayout, *, preset: str = "chexnet", size: int | None = SIZE, seen: int | None = None
):
    description = describe(
        preset=preset,
        network=NetworkOptions(layout, "default"),
        size=size,
        input_size=seen or size,
        statistics={},
        training_inputs=InputProfile(),
        thresholds=dict.fromkeys(FINDINGS, 0.5),
        other_thresholds={},
        validation={},
        settings={},
        dataset_digest="0" * 64,
    )
    return Bundle(description, STATISTICS, model.eval(), NOT_ASKED)


def make(name: str, variant: str | None = None, seed: int = 0) -> Bundle:
    """A preset with random weights, and with batch norms that know the films, so that the maps do not fade."""
    preset = presets.find(name)
    chosen = NetworkOptions(preset.layout, variant or preset.variants[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = presets.build(name, chosen)
        model.train()
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
        if preset.reads_images:
            images = torch.randn(8, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3) + torch.randn(8, 1, SIZE, SIZE) / 4
            with torch.no_grad():
                model(images.expand(-1, 3, -1, -1), torch.randn(8, chosen.layout.width))
    return bundle_of(model, chosen.layout, preset=name, size=SIZE if preset.reads_images else None)


def films(n: int, seed: int = 0, size: int = SIZE) -> np.ndarray:
    """Blots of any brightness; uint8, shape (n, size, size)."""
    rng = np.random.default_rng(seed)
    blots = rng.integers(0, 256, (n, 8, 8)).repeat(size // 8, axis=1).repeat(size // 8, axis=2)
    return np.clip(blots + rng.normal(0, 20, blots.shape), 0, 255).astype(np.uint8)


def tensors(n: int, size: int, width: int = 0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, size, size, generator=generator).expand(-1, 3, -1, -1), torch.randn(n, width, generator=generator)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    ranks = [values.ravel().argsort().argsort() for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def place(heat: np.ndarray) -> tuple[int, int]:
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    return int(row), int(column)


def lies_in(heat: np.ndarray, part: tuple[slice, slice]) -> bool:
    return all(side.start <= at < side.stop for side, at in zip(part, place(heat), strict=True))


@pytest.fixture(scope="module")
def known() -> Bundle:
    return bundle_of(KnownReason(), ClinicalLayout("paper"))


@pytest.fixture(scope="module")
def untrained() -> Bundle:
    return make("multi-input")


# A reason that is known


def test_the_map_is_highest_where_the_reason_is(known):
    heat = explain_all(known, np.stack([known_film()] * 2), inputs_of(2), [BRIGHT, STRIPED])
    assert heat.shape == (2, SIZE, SIZE)
    assert heat.dtype == np.float32
    assert lies_in(heat[0], SQUARE)
    assert lies_in(heat[1], STRIPES)
    assert heat[0][STRIPES].max() < heat[0].max() / 10
    assert heat[1][SQUARE].max() < heat[1].max() / 10


def test_occlusion_and_the_map_point_at_the_same_place(known):
    engine = TorchEngine(known)
    for finding, part in ((BRIGHT, SQUARE), (STRIPED, STRIPES)):
        assert lies_in(occlusion(engine, known_film(), inputs_of(1), finding), part)
        assert lies_in(explain(known, known_film(), inputs_of(1), finding), part)


def test_what_speaks_against_is_negative(known):
    against = explain(known, known_film(), inputs_of(1), BRIGHT_REVERSED)
    assert against[SQUARE].mean() < 0
    np.testing.assert_allclose(against, -explain(known, known_film(), inputs_of(1), BRIGHT), rtol=1e-5)


def test_what_only_clinical_numbers_decide_has_an_even_map(known):
    assert not explain(known, known_film(), inputs_of(1), OLD).any()


def test_the_map_moves_with_its_reason(known):
    moved = np.roll(known_film(), (24, -16), axis=(0, 1))
    heat = explain(known, moved, inputs_of(1), BRIGHT)
    assert lies_in(heat, (slice(32, 48), slice(24, 40)))


def test_a_film_that_is_scaled_down_for_the_network_has_a_map_of_its_own_size(known):
    scaled = bundle_of(known.model, ClinicalLayout("paper"), size=2 * SIZE, seen=SIZE)
    film = known_film().repeat(2, axis=0).repeat(2, axis=1)
    heat = explain(scaled, film, inputs_of(1), BRIGHT)
    assert heat.shape == (2 * SIZE, 2 * SIZE)
    assert lies_in(heat, tuple(slice(2 * side.start, 2 * side.stop) for side in SQUARE))


# Units


def test_grad_cam_of_averaged_maps_adds_up_to_the_logit():
    layout = ClinicalLayout("paper", meta=True, history=False)
    model = presets.build("baltruschat2018", NetworkOptions(layout, "resnet38")).eval()
    images, clinical = tensors(1, 224, layout.width)
    with torch.no_grad():
        logits = model(images, clinical)
        elsewhere = model.head.bias + clinical @ model.head.weight[:, 2048:].T
    heat = grad_cam(model, images, clinical, torch.tensor([4]))
    assert heat.shape == (1, 7, 7)
    np.testing.assert_allclose(heat.sum(), (logits - elsewhere)[0, 4], rtol=1e-3)


class MeanWang(Wang):
    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.mean(dim=(2, 3))


def test_activation_maps_average_to_the_logit_where_the_network_averages():
    torch.manual_seed(0)
    model = MeanWang("alexnet", IMAGE_ONLY).eval()
    images, clinical = tensors(2, 256)
    findings = torch.tensor([0, 13])
    maps = class_maps(model, images, clinical, findings)
    assert maps.shape == (2, 7, 7)
    with torch.no_grad():
        expected = model(images, clinical)[torch.arange(2), findings] - model.head.bias[findings]
    torch.testing.assert_close(maps.mean(dim=(1, 2)), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(maps, activation_maps(model, images, findings))


def test_activation_maps_that_are_too_coarse_give_way_to_grad_cam():
    torch.manual_seed(0)
    model = Wang("alexnet", IMAGE_ONLY).eval()
    images, clinical = tensors(1, 224)
    findings = torch.tensor([5])
    assert activation_maps(model, images, findings).shape == (1, 6, 6)
    maps = class_maps(model, images, clinical, findings)
    assert maps.shape == (1, 13, 13)
    torch.testing.assert_close(maps, grad_cam(model, images, clinical, findings))


@pytest.mark.parametrize(("size", "cells"), [(32, 8), (64, 8), (96, 12), (224, 7), (256, 8)])
def test_the_maps_are_those_of_the_deepest_stage_that_is_fine_enough(untrained, size, cells):
    images, clinical = tensors(1, size, 17)
    assert grad_cam(untrained.model, images, clinical, torch.tensor([0])).shape == (1, cells, cells)


# Every preset


@pytest.mark.parametrize(("name", "variant"), NETWORKS, ids=["-".join(each) for each in NETWORKS])
def test_every_network_that_reads_images_has_maps(name, variant):
    bundle = make(name, variant)
    before = {key: tensor.clone() for key, tensor in bundle.model.state_dict().items()}
    shown, inputs = films(3), inputs_of(3)
    heat = explain_all(bundle, shown, inputs, [0, 6, 6])
    assert heat.shape == (3, SIZE, SIZE)
    assert heat.dtype == np.float32
    assert np.isfinite(heat).all()
    assert (np.ptp(heat, axis=(1, 2)) > 0).all()
    # The same film, asked for something else, has another map.
    assert rank_correlation(heat[0], explain(bundle, shown[0], inputs.taken(np.array([0])), 6)) < 0.99
    for index, finding in ((0, 0), (2, 6)):
        alone = explain(bundle, shown[index], inputs.taken(np.array([index])), finding)
        # A ReLU near 0 may fall the other way in another batch, which untrained layers make large.
        np.testing.assert_allclose(heat[index], alone, atol=0.02 * np.abs(alone).max())
    assert nothing_left(bundle.model)
    for key, tensor in bundle.model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)


def nothing_left(model: nn.Module) -> bool:
    hooks = [
        module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    ]
    return not hooks and not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_a_network_without_images_has_no_maps():
    with pytest.raises(CxrRayError, match="reads no image; give one that does"):
        explain(make("clinical"), np.empty((0, 0), dtype=np.uint8), inputs_of(1), 0)


def test_more_images_than_are_taken_at_once():
    bundle = make("beyond", "densenet121")
    shown, inputs, asked = films(19), inputs_of(19), np.arange(19) % 14
    heat = explain_all(bundle, shown, inputs, asked)
    alone = explain(bundle, shown[17], inputs.taken(np.array([17])), int(asked[17]))
    np.testing.assert_allclose(heat[17], alone, atol=0.02 * np.abs(alone).max())
    assert explain_all(bundle, shown[:0], inputs.taken(np.arange(0)), []).shape == (0, SIZE, SIZE)


# Other weights, other maps (Adebayo et al. 2018)


@pytest.mark.parametrize("name", ["chexnet", "yao2017"])
def test_other_weights_give_other_maps_of_the_same_films(name):
    shown, inputs = films(4), inputs_of(4)
    maps = [explain_all(make(name, seed=seed), shown, inputs, [1] * 4) for seed in range(4)]
    pairs = [(one, other) for one in range(4) for other in range(one)]
    alike = [rank_correlation(maps[one][k], maps[other][k]) for one, other in pairs for k in range(4)]
    # Edges are where they are, whatever the weights: a map that only traced them would score 1 throughout.
    assert np.mean(alike) < 0.5
    assert min(alike) < 0.2


def test_the_last_layer_alone_decides_between_two_maps(untrained):
    heat = explain(untrained, films(1)[0], inputs_of(1), 3)
    other = make("multi-input")
    with torch.no_grad():
        other.model.head.weight.copy_(other.model.head.weight.flip(0))
    np.testing.assert_allclose(explain(other, films(1)[0], inputs_of(1), 10), heat, rtol=1e-5, atol=1e-9)
    assert rank_correlation(explain(other, films(1)[0], inputs_of(1), 3), heat) < 0.9


def test_another_film_has_another_map(untrained):
    heat = explain_all(untrained, films(2), inputs_of(1).repeated(2), [3, 3])
    assert abs(rank_correlation(heat[0], heat[1])) < 0.8


# A server


def test_another_thread_in_the_same_network_changes_nothing(untrained):
    shown, inputs = films(2), inputs_of(2)
    expected = explain(untrained, shown[0], inputs.taken(np.array([0])), 3)
    engine = TorchEngine(untrained)
    probabilities = engine.predict(shown, inputs)
    begun, answers = threading.Event(), []

    def other() -> None:
        answers.append(engine.predict(shown, inputs))
        answers.append(explain(untrained, shown[1], inputs.taken(np.array([1])), 5))

    def in_between(module: nn.Module, given: object) -> None:
        if begun.is_set():
            return
        begun.set()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    handle = untrained.model.head.register_forward_pre_hook(in_between)
    try:
        heat = explain(untrained, shown[0], inputs.taken(np.array([0])), 3)
    finally:
        handle.remove()
    np.testing.assert_array_equal(heat, expected)
    np.testing.assert_array_equal(answers[0], probabilities)
    np.testing.assert_array_equal(answers[1], explain(untrained, shown[1], inputs.taken(np.array([1])), 5))
    assert nothing_left(untrained.model)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_works_where_gradients_are_off(untrained, mode):
    expected = explain(untrained, films(1)[0], inputs_of(1), 3)
    with mode():
        np.testing.assert_array_equal(explain(untrained, films(1)[0], inputs_of(1), 3), expected)


def test_frozen_weights_stay_frozen():
    bundle = make("chexnet")
    bundle.model.requires_grad_(requires_grad=False)
    assert np.ptp(explain(bundle, films(1)[0], inputs_of(1), 3)) > 0
    assert not any(parameter.requires_grad for parameter in bundle.model.parameters())


def test_read_only_pixels_are_taken(untrained):
    shown = films(1)
    shown.setflags(write=False)
    assert np.ptp(explain(untrained, shown[0], inputs_of(1), 3)) > 0


def test_hooks_are_taken_off_when_the_network_fails(untrained):
    with pytest.raises(RuntimeError):
        grad_cam(untrained.model, *tensors(1, SIZE, width=3), torch.tensor([0]))
    assert nothing_left(untrained.model)


def test_images_too_small_for_any_map_are_refused(untrained):
    images, clinical = tensors(1, CELLS - 1, 17)
    model = KnownReason().eval()
    model.features = model.features[:2]
    with pytest.raises(CxrRayError, match="6 x 6 pixels leave the network no maps of 7 x 7 cells; give larger ones"):
        grad_cam(model, images, clinical, torch.tensor([0]))


WRONG: list[tuple[Callable[[Bundle], object], str]] = [
    (lambda bundle: explain(bundle, films(1, size=32)[0], inputs_of(1), 0), r"the bundle needs \(N, 64, 64\)"),
    (lambda bundle: explain(bundle, films(1)[0], inputs_of(2), 0), "give N of each"),
    (lambda bundle: explain_all(bundle, films(2), inputs_of(2), [0]), "give N of each"),
    (lambda bundle: explain(bundle, films(1)[0], inputs_of(1), 14), "0 to 13"),
    (lambda bundle: explain(bundle, films(1)[0], inputs_of(1), -1), "0 to 13"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_what_does_not_fit_is_refused(untrained, call, message):
    with pytest.raises(ValueError, match=message):
        call(untrained)


def test_clinical_numbers_are_read_by_the_networks_that_have_them():
    """FiLM lets what is known of the patient change where a network looks."""
    bundle = make("beyond", "densenet121")
    with torch.no_grad():
        for modulation in bundle.model.modulations.values():
            nn.init.normal_(modulation.scale_and_shift.weight, std=0.2)
    young, old = (replace(inputs_of(1), age_years=np.array([age], dtype=np.float32)) for age in (20, 90))
    one, other = (explain(bundle, films(1)[0], inputs, 3) for inputs in (young, old))
    assert np.abs(one - other).max() > 1e-3 * np.abs(one).max()
