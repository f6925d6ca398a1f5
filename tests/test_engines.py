"""The engines: a bundle's network on the numbers and pixels that the bundle asks for, and the check that it is that network."""

import logging
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr_ray import openvino_engine, presets, vision
from cxr_ray.bundle import Bundle, describe
from cxr_ray.clinical import ClinicalInputs, ClinicalLayout, ClinicalStatistics, PastVisits, encode, from_request, withheld
from cxr_ray.engines import check, open_engine
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.input_profile import InputProfile
from cxr_ray.presets import PRESETS, baltruschat2018, clinical_only, multi_input
from cxr_ray.presets.preset import NetworkOptions, Preset
from cxr_ray.probe import TOLERANCE, make_probe
from cxr_ray.torch_engine import TorchEngine

STATISTICS = ClinicalStatistics(48.0, 16.5, 0.56, 0.4, (0.1,) * 14, (0.2,) * 111)
SIZE = 64
# A GPU convolves in TF32.
CLOSE = 1e-3 if torch.cuda.is_available() else 1e-5
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU torch is chosen")
FILM_READERS = [name for name, preset in PRESETS.items() if preset.reads_images]


def bundle(
    layout: ClinicalLayout, preset: Preset = multi_input.PRESET, *, input_size: int | None = SIZE, seed: int = 0
) -> Bundle:
    options = NetworkOptions(layout, preset.variants[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = preset.make(options).eval()
    description = describe(
        preset=preset.name,
        network=options,
        size=None if input_size is None else SIZE,
        input_size=input_size,
        statistics=asdict(STATISTICS),
        training_inputs=InputProfile(),
        thresholds={},
        other_thresholds={},
        validation={},
        settings={},
        dataset_digest="0" * 64,
    )
    return Bundle(description, STATISTICS, model, make_probe(model, description))


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
    np.testing.assert_allclose(answered, expected, atol=CLOSE)
    # That the network hears of the patient at all, or the comparison would be empty.
    assert np.abs(TorchEngine(chosen).predict(films, withheld(inputs)) - answered).max() > 10 * CLOSE


def test_a_smaller_input_is_scaled_down(films, inputs):
    layout = ClinicalLayout()
    chosen = bundle(layout, input_size=32)
    images = vision.as_input(torch.from_numpy(films), 32)
    assert images.shape[2:] == (32, 32)
    expected = by_hand(chosen, images, encode(inputs, STATISTICS, layout))
    np.testing.assert_allclose(TorchEngine(chosen).predict(films, inputs), expected, atol=CLOSE)


def test_mirror_images_are_averaged(films, inputs):
    chosen = bundle(ClinicalLayout())
    straight = TorchEngine(chosen).predict(films, inputs)
    mirrored = TorchEngine(chosen).predict(films[:, :, ::-1], inputs)
    both = TorchEngine(chosen, tta="flip").predict(films, inputs)
    np.testing.assert_allclose(both, (straight + mirrored) / 2, atol=CLOSE)
    assert np.abs(both - straight).max() > CLOSE


def test_a_network_without_images_reads_none(inputs):
    layout = ClinicalLayout("rich")
    chosen = bundle(layout, clinical_only.PRESET, input_size=None)
    expected = by_hand(chosen, torch.empty(4, 3, 0, 0), encode(inputs, STATISTICS, layout))
    answered = TorchEngine(chosen).predict(np.empty((4, 0, 0), dtype=np.uint8), inputs)
    np.testing.assert_allclose(answered, expected, atol=CLOSE)
    assert np.ptp(answered, axis=0).min() > 0


def light(seed: int = 0) -> Bundle:
    """A bundle that OpenVINO converts in a second."""
    preset = baltruschat2018.PRESET
    return bundle(preset.layout, preset, seed=seed)


def many(n: int) -> tuple[np.ndarray, ClinicalInputs]:
    pixels = np.random.default_rng(n).integers(0, 256, (n, SIZE, SIZE), dtype=np.uint8)
    known = [from_request(5.0 * number, "MF"[number % 2], "PA", ["Mass"] * (number % 3))[0] for number in range(n)]
    return pixels, ClinicalInputs.concatenate(known)


@ON_CPU
@pytest.mark.parametrize("name", FILM_READERS)
def test_openvino_answers_as_torch_does_for_batches_of_any_size(name):
    preset = presets.find(name)
    chosen = bundle(preset.layout, preset, input_size=48 if name == "multi-input" else SIZE)
    engine = open_engine(chosen, threads=1, batch_size=2)
    assert (engine.name, engine.device) == ("openvino", f"CPU by OpenVINO, threads: 1 ({engine.precision})")
    # bf16 wherever the processor has it, unless that is too coarse for the network.
    assert (engine.precision == openvino_engine.precisions()[0]) == (engine.warnings == ())
    exact = openvino_engine.OpenVinoEngine(chosen, precision="float32", threads=1)
    for n in (1, openvino_engine.IMAGES_AT_ONCE + 3):
        pixels, inputs = many(n)
        answered = engine.predict(pixels, inputs)
        assert (answered.dtype, answered.shape) == (np.float32, (n, 14))
        np.testing.assert_allclose(exact.predict(pixels, inputs), TorchEngine(chosen).predict(pixels, inputs), atol=CLOSE * 10)
    # What bf16 rounds is up to the processor, what an image is answered is not up to its neighbours.
    alone = [engine.predict(pixels[i : i + 1], inputs.taken(np.array([i]))) for i in range(n)]
    np.testing.assert_allclose(answered, np.concatenate(alone), atol=TOLERANCE)
    assert engine.predict(pixels[:0], inputs.taken(np.arange(0))).shape == (0, 14)


@ON_CPU
@pytest.mark.skipif(len(openvino_engine.precisions()) == 1, reason="the processor has no bfloat16")
def test_a_network_too_steep_for_bfloat16_is_computed_in_float32(caplog):
    chosen = light()
    with torch.no_grad():
        # Steep around an image of the probe, whose answers become a half: elsewhere they would be 0 or 1 in any arithmetic.
        film = torch.from_numpy(chosen.probe.pixels[:1])
        numbers = torch.from_numpy(encode(chosen.probe.inputs.taken(np.array([0])), STATISTICS, chosen.description.layout))
        chosen.model.head.weight.mul_(100)
        chosen.model.head.bias.sub_(chosen.model(vision.as_input(film), numbers)[0])
    chosen = replace(chosen, probe=make_probe(chosen.model, chosen.description))
    engine = open_engine(chosen, threads=1, batch_size=1)
    assert (engine.name, engine.precision) == ("openvino", "float32")
    assert check(engine, chosen) < 1e-3
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == list(engine.warnings)
    assert "openvino in bf16 answers its probe with a difference of up to" in engine.warnings[0]


def test_torch_answers_what_openvino_does_not_compute(inputs):
    clinical = bundle(ClinicalLayout("rich"), clinical_only.PRESET, input_size=None)
    trees = bundle(ClinicalLayout("rich"), replace(clinical_only.PRESET, variants=("ensemble",)), input_size=None)
    for chosen, tta in ((clinical, "none"), (trees, "none"), (light(), "flip")):
        engine = open_engine(chosen, threads=1, tta=tta, batch_size=1)
        assert (engine.name, engine.warnings) == ("torch", ())
        with pytest.raises(UsageError, match=r"engine 'openvino' does not compute .*; use engine torch"):
            open_engine(chosen, "openvino", tta=tta)
    pixels, known = many(2)
    np.testing.assert_allclose(
        engine.predict(pixels, known), TorchEngine(light(), tta="flip").predict(pixels, known), atol=TOLERANCE
    )
    assert open_engine(light(), "torch", threads=1, batch_size=1).name == "torch"


def test_no_engine_answers_for_a_bundle_whose_probe_is_of_other_weights():
    chosen, other = light(0), light(1)
    mixed = replace(chosen, probe=other.probe)
    difference = np.abs(chosen.probe.probabilities - other.probe.probabilities).max()
    for name in ("torch", "auto"):
        with pytest.raises(CxrRayError) as error:
            open_engine(mixed, name, threads=1)
        assert f"torch in float32 answers its probe with a difference of up to {difference:.3f}" in str(error.value)
        assert "\n" not in str(error.value)
    broken = chosen.probe.probabilities.copy()
    broken[2, 3] = np.nan
    with pytest.raises(CxrRayError, match="difference of up to inf"):
        open_engine(replace(chosen, probe=replace(chosen.probe, probabilities=broken)), "torch", threads=1)


@ON_CPU
def test_an_openvino_model_of_another_network_is_found_out(monkeypatch, caplog):
    chosen, other = light(0), light(1)
    convert = openvino_engine.convert
    monkeypatch.setattr(openvino_engine, "convert", lambda _: convert(other))
    engine = open_engine(chosen, threads=1, batch_size=1)
    assert (engine.name, engine.precision) == ("torch", "float32")
    assert len(engine.warnings) == len(openvino_engine.precisions())
    assert list(engine.warnings) == [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    with pytest.raises(CxrRayError, match="openvino in float32 answers its probe with a difference of up to"):
        open_engine(chosen, "openvino", threads=1)


@ON_CPU
def test_without_openvino_torch_answers_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    engine = open_engine(light(), threads=1, batch_size=1)
    assert engine.name == "torch"
    assert "openvino cannot be imported" in engine.warnings[0]
    assert "pip install openvino" in engine.warnings[0]


def test_openvino_reports_nothing_to_its_makers(tmp_path):
    """Its telemetry would leave an identity in the home folder before it sends anything."""
    asked = "from cxr_ray.openvino_engine import runtime; runtime().convert_model"
    environment = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(openvino_engine.__file__).parent.parent),
    }
    subprocess.run([sys.executable, "-c", asked], env=environment, check=True, timeout=120)
    assert list(tmp_path.rglob("*ga_cid*")) == []
