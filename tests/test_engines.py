"""The engine: a bundle's network on the numbers and pixels that the bundle asks for."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from cxr_ray import vision
from cxr_ray.bundle import Bundle, describe
from cxr_ray.clinical import ClinicalInputs, ClinicalLayout, ClinicalStatistics, PastVisits, encode, from_request, withheld
from cxr_ray.engines import TorchEngine
from cxr_ray.presets import clinical_only, multi_input
from cxr_ray.presets.preset import NetworkOptions, Preset

STATISTICS = ClinicalStatistics(48.0, 16.5, 0.56, 0.4, (0.1,) * 14, (0.2,) * 111)
SIZE = 64
# The engine's own precision on a GPU is bf16.
TOLERANCE = 0.02 if torch.cuda.is_available() else 1e-5


def bundle(layout: ClinicalLayout, preset: Preset = multi_input.PRESET, *, input_size: int | None = SIZE) -> Bundle:
    options = NetworkOptions(layout, preset.variants[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = preset.make(options).eval()
    description = describe(
        preset=preset.name,
        network=options,
        size=None if input_size is None else SIZE,
        input_size=input_size,
        statistics=asdict(STATISTICS),
        thresholds={},
        validation={},
        settings={},
        dataset_digest="0" * 64,
    )
    return Bundle(description, STATISTICS, model)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a batch is slower on several, and much slower beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def films() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE), dtype=np.uint8)


@pytest.fixture(scope="module")
def inputs() -> ClinicalInputs:
    """A man of whom two visits are known, one of whom the findings are, a first visit, and nothing at all."""
    first, _ = from_request(63.0, "F", "PA", [])
    seen, _ = from_request(31.0, "M", "AP", ["Mass", "Hernia"])
    nothing, _ = from_request(None, None, None, None)
    latest = np.zeros((1, 3, 14), dtype=np.float32)
    latest[0, 0, 4] = 1
    past = replace(PastVisits.none_before(1), count=np.float32([2]), last=latest)
    return ClinicalInputs.concatenate([replace(seen, past=past), seen, first, nothing])


def by_hand(chosen: Bundle, images: torch.Tensor, numbers: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return chosen.model(images, torch.from_numpy(numbers)).sigmoid().numpy()


@pytest.mark.parametrize("encoding", ["paper", "rich"])
@pytest.mark.parametrize("history", [True, False])
def test_answers_are_those_of_the_network_on_the_bundle_s_layout(films, inputs, encoding, history):
    layout = ClinicalLayout(encoding, history=history)
    chosen = bundle(layout)
    expected = by_hand(chosen, vision.as_input(torch.from_numpy(films)), encode(inputs, STATISTICS, layout))
    answered = TorchEngine(chosen).predict(films, inputs)
    assert answered.dtype == np.float32
    np.testing.assert_allclose(answered, expected, atol=TOLERANCE)
    # That the network hears of the patient at all, or the comparison would be empty.
    assert np.abs(TorchEngine(chosen).predict(films, withheld(inputs)) - answered).max() > 10 * TOLERANCE


def test_a_smaller_input_is_scaled_down(films, inputs):
    layout = ClinicalLayout()
    chosen = bundle(layout, input_size=32)
    images = vision.as_input(torch.from_numpy(films), 32)
    assert images.shape[2:] == (32, 32)
    expected = by_hand(chosen, images, encode(inputs, STATISTICS, layout))
    np.testing.assert_allclose(TorchEngine(chosen).predict(films, inputs), expected, atol=TOLERANCE)


def test_mirror_images_are_averaged(films, inputs):
    chosen = bundle(ClinicalLayout())
    straight = TorchEngine(chosen).predict(films, inputs)
    mirrored = TorchEngine(chosen).predict(films[:, :, ::-1], inputs)
    both = TorchEngine(chosen, tta="flip").predict(films, inputs)
    np.testing.assert_allclose(both, (straight + mirrored) / 2, atol=TOLERANCE)
    assert np.abs(both - straight).max() > TOLERANCE


def test_a_network_without_images_reads_none(inputs):
    layout = ClinicalLayout("rich")
    chosen = bundle(layout, clinical_only.PRESET, input_size=None)
    expected = by_hand(chosen, torch.empty(4, 3, 0, 0), encode(inputs, STATISTICS, layout))
    answered = TorchEngine(chosen).predict(np.empty((4, 0, 0), dtype=np.uint8), inputs)
    np.testing.assert_allclose(answered, expected, atol=TOLERANCE)
    assert np.ptp(answered, axis=0).min() > 0
