"""Exports: what other runtimes compute is what the bundle computes, for any number of images, or nothing is written."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from test_console import call
from test_engines import SIZE, bundle

from cxr_ray import presets
from cxr_ray.bundle import Bundle, write_bundle
from cxr_ray.clinical import ClinicalInputs, encode, from_request
from cxr_ray.errors import CxrRayError
from cxr_ray.export import FORMATS, SIDECAR, export
from cxr_ray.findings import FINDINGS
from cxr_ray.openvino_engine import runtime
from cxr_ray.probe import TOLERANCE
from cxr_ray.torch_engine import TorchEngine

# Light ones: films and patients, films alone, patients alone.
KINDS = [pytest.param("baltruschat2018", marks=pytest.mark.long), "wang2017", "clinical"]


def of(name: str, variant: int = 0, input_size: int = SIZE) -> Bundle:
    preset = presets.find(name)
    layout, variants = preset.layout, (preset.variants[variant],)
    return bundle(layout, replace(preset, variants=variants), input_size=input_size if preset.reads_images else None)


def answered(form: str, folder: Path, given: dict[str, np.ndarray]) -> np.ndarray:
    """As somebody without cxr-ray would: by the names of the sidecar."""
    if form == "onnx":
        return onnxruntime.InferenceSession(folder / "model.onnx").run(["probabilities"], given)[0]
    if form == "openvino":
        return runtime().Core().compile_model(folder / "model.xml", "CPU")(given)["probabilities"]
    module = torch.export.load(folder / "model.pt2").module()
    return module(*map(torch.from_numpy, given.values())).detach().numpy()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", KINDS)
def test_an_export_answers_as_the_bundle_does(name, form, tmp_path):
    chosen = of(name, input_size=48)
    exported = export(chosen, form, str(tmp_path / "out"))
    assert exported.difference < 1e-5
    told = json.loads((tmp_path / "out" / SIDECAR).read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*told["files"], SIDECAR} == set(exported.files)
    for file, digest in told["files"].items():
        assert hashlib.sha256((tmp_path / "out" / file).read_bytes()).hexdigest() == digest
    assert told["bundle"]["digest"] == chosen.description.digest
    assert told["findings"] == list(FINDINGS)
    size = chosen.description.size or 0
    for images in (1, 5):
        pixels = np.random.default_rng(images).integers(0, 256, (images, size, size), dtype=np.uint8)
        inputs = ClinicalInputs.concatenate([from_request(20.0 * number, "F", "AP", ["Mass"])[0] for number in range(images)])
        both = {"pixels": pixels, "clinical": encode(inputs, chosen.statistics, chosen.layout)}
        given = {port["name"]: both[port["name"]] for port in told["inputs"]}
        for port in told["inputs"]:
            assert (port["dtype"], port["shape"]) == (str(both[port["name"]].dtype), ["N", *both[port["name"]].shape[1:]])
        expected = TorchEngine(chosen).predict(pixels, inputs)
        np.testing.assert_allclose(answered(form, tmp_path / "out", given), expected, atol=TOLERANCE)
        # Not one answer to everything.
        assert images == 1 or np.ptp(expected, axis=0).max() > 1e-4


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_that_answers_otherwise_is_not_written(form, tmp_path):
    chosen = of("clinical")
    other = replace(chosen, probe=replace(chosen.probe, probabilities=1 - chosen.probe.probabilities))
    with pytest.raises(CxrRayError, match=r"differ by up to 0\.\d+, and 0\.01 is allowed; nothing was written") as error:
        export(other, form, str(tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_told_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(CxrRayError, match="boosted trees"):
        export(of("clinical", variant=1), "onnx", str(tmp_path / "out"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(CxrRayError, match=r"needs onnxruntime .* pip install 'cxr-ray\[export\]'"):
        export(of("clinical"), "onnx", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command_exports_or_says_why_not(tmp_path):
    chosen = of("clinical")
    write_bundle(str(tmp_path / "bundle"), chosen.model, chosen.description)
    unknown = call("bundle", "export", tmp_path / "bundle", "--format", "tflite", "--out", tmp_path / "out")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "cxr-ray: format 'tflite' is not known; use one of: onnx, openvino, torch-export\n"
    ran = call("bundle", "export", tmp_path / "bundle", "--format", "onnx", "--out", tmp_path / "out", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["files"] == ["model.onnx", SIDECAR]
    assert ran.stderr == ""
    assert (tmp_path / "out" / "model.onnx").exists()
