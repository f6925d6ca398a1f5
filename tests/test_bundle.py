"""Bundles: what is loaded is what was written, or it is refused."""

import json
import pickle
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cxr_ray import presets
from cxr_ray.bundle import (
    CARD,
    DESCRIPTION,
    PROBE,
    WEIGHTS,
    BundleDescription,
    describe,
    load_bundle,
    read_description,
    write_bundle,
    write_card,
)
from cxr_ray.clinical import ClinicalStatistics, encode
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.input_profile import InputProfile
from cxr_ray.probe import read_probe
from cxr_ray.training import probabilities

STATISTICS = {"age_mean": 47.0, "age_std": 16.5, "male_mean": 0.56, "ap_mean": 0.4, "ever_mean": [0.1] * 14}
COMPLETE = ClinicalStatistics.from_json(STATISTICS)


PAPER = presets.options(presets.find("multi-input"))
IMAGE_ALONE = presets.options(presets.find("multi-input"), meta=False, history=False)


def network(seed: int, chosen=PAPER) -> nn.Module:
    torch.manual_seed(seed)
    return presets.build("multi-input", chosen).eval()


def described(**changes) -> BundleDescription:
    description = describe(
        preset="multi-input",
        network=PAPER,
        size=32,
        input_size=32,
        statistics=STATISTICS,
        training_inputs=InputProfile(),
        thresholds={name: 0.1 + 0.2 * 0.1**place for place, name in enumerate(FINDINGS)},
        other_thresholds={"prevalence": dict.fromkeys(FINDINGS, 0.43)},
        validation={"auc": 0.71234, "epoch": 3, "auc_by_finding": {}},
        settings={"data": "somewhere", "epochs": 3},
        dataset_digest="d" * 64,
    )
    return description.model_copy(update=changes)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network(1)


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory) -> Path:
    """A bundle that the tests leave as it is."""
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    write_bundle(str(path), model, described())
    return path


@pytest.fixture
def own(bundle, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def refused(path, *expected, read=load_bundle) -> None:
    with pytest.raises(CxrRayError) as error:
        read(str(path))
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert str(part) in message


def outputs(of: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return of(torch.randn(2, 3, 32, 32, generator=generator), torch.randn(2, 17, generator=generator))


def test_what_is_loaded_is_what_was_written(bundle, model):
    loaded = load_bundle(str(bundle))
    assert not loaded.model.training
    torch.testing.assert_close(outputs(loaded.model), outputs(model), rtol=0, atol=0)
    assert loaded.statistics.age_std == 16.5
    description = loaded.description
    assert tuple(description.findings) == FINDINGS
    assert description.thresholds == described().thresholds
    assert description.validation["auc"] == 0.71234
    assert description.digest == description.computed_digest()
    assert read_description(str(bundle)) == description
    assert {path.name for path in bundle.iterdir()} == {DESCRIPTION, WEIGHTS, PROBE, CARD}


def test_the_probe_is_made_up_and_answered_by_the_network(bundle, model):
    probe = load_bundle(str(bundle)).probe
    given = torch.from_numpy(probe.pixels), torch.from_numpy(encode(probe.inputs, COMPLETE, PAPER.layout))
    torch.testing.assert_close(
        torch.from_numpy(probe.probabilities), probabilities(model, *given, "float32"), rtol=0, atol=1e-6
    )
    brightness, contrast = probe.pixels.mean(axis=(1, 2)), probe.pixels.std(axis=(1, 2))
    assert (brightness > 90).all() and (brightness < 150).all() and (contrast > 30).all()
    # All of them differ, and so do their answers.
    assert np.abs(np.corrcoef(probe.pixels.reshape(len(probe), -1)) - np.eye(len(probe))).max() < 0.9
    assert len(np.unique(probe.probabilities[:, 0])) == len(probe) > 1
    assert np.isnan(probe.inputs.age_years).any() and np.isfinite(probe.inputs.age_years).any()


def test_a_probe_that_does_not_fit_the_description_is_refused(bundle):
    content = (bundle / PROBE).read_bytes()
    for changes, named in (({"size": 64}, "pixels"), ({"size": None}, "pixels")):
        with pytest.raises(CxrRayError, match=f"^here: {named} does not fit a network of this description"):
            read_probe(content, described(**changes), "here")
    with pytest.raises(CxrRayError, match=r"^here: cannot be read"):
        read_probe(content[:-1], described(), "here")
    renamed = content.replace(b'"inputs.male"', b'"inputs.mane"')
    with pytest.raises(CxrRayError, match="does not fit a network"):
        read_probe(renamed, described(), "here")


def test_the_image_only_network_goes_the_same_way(tmp_path):
    model = network(2, IMAGE_ALONE)
    write_bundle(str(tmp_path / "b"), model, described(layout=IMAGE_ALONE.layout))
    torch.testing.assert_close(outputs(load_bundle(str(tmp_path / "b")).model), outputs(model), rtol=0, atol=0)
    assert "- Inputs: image of 32 x 32 pixels\n" in (tmp_path / "b" / CARD).read_text()


def test_the_card_warns_and_names_data_and_figures(bundle):
    card = (bundle / CARD).read_text()
    for part in ("Not a medical device", "d" * 64, "0.712", "32 x 32", "0.4300", "Not evaluated yet"):
        assert part in card
    assert all(f"| {name.replace('_', ' ')} | " in card for name in FINDINGS)


def evaluated(digest: str) -> dict:
    unknown = {"value": None, "low": None, "high": None}
    finding = {
        "positives": 1234,
        "prevalence": 0.1,
        "auc": {"value": 0.81, "low": 0.79, "high": 0.83},
        "average_precision": {"value": 0.4, "low": 0.3, "high": 0.5},
        "calibration_error": 0.01,
        "at_threshold": {"sensitivity": 0.7, "specificity": None},
    }
    return {
        "bundle": {"digest": digest},
        "title": "multi-input on test: 219 images",
        "interval": "95 %",
        "mean": {"auc": finding["auc"], "average_precision": finding["average_precision"]},
        "findings": dict.fromkeys(FINDINGS, finding),
        "subgroups": [{"by": "sex", "name": "F", "images": 5, "findings": 0, "auroc": unknown}],
        "ablations": [],
    }


def test_an_evaluation_changes_the_card_and_not_the_bundle(own):
    before = read_description(str(own))
    write_card(str(own), evaluated(before.digest))
    card = (own / CARD).read_text()
    assert "| Hernia | 1,234 | 0.810 (0.790 to 0.830) | 0.400 (0.100) | 0.700 | - | 0.010 |" in card
    assert "multi-input on test: 219 images" in card
    assert "| sex | F | 5 | 0 | - |" in card
    assert "Not evaluated yet" not in card
    assert load_bundle(str(own)).description == before


def test_the_card_of_another_bundle_is_refused(own, model, tmp_path):
    write_bundle(str(tmp_path / "other"), model, described(name="another"))
    with pytest.raises(CxrRayError, match=r"is not the bundle .* that was evaluated; evaluate this one"):
        write_card(str(own), evaluated(read_description(str(tmp_path / "other")).digest))
    shutil.copy(tmp_path / "other" / CARD, own / CARD)
    refused(own, own / CARD, "is of another bundle", read=read_description)


@contextmanager
def flipped(path: Path, position: int, mask: int):
    with path.open("r+b") as file:
        file.seek(position)
        before = file.read(1)[0]
        file.seek(position)
        file.write(bytes([before ^ mask]))
    yield
    with path.open("r+b") as file:
        file.seek(position)
        file.write(bytes([before]))


@pytest.mark.parametrize("mask", [0x01, 0x20])
def test_any_changed_byte_of_the_description_is_refused(own, mask):
    """0x20 changes the case of a letter, which a reader of times and numbers may not notice."""
    path = own / DESCRIPTION
    for position in range(path.stat().st_size):
        with flipped(path, position, mask):
            refused(own, path, read=read_description)
    read_description(str(own))


@pytest.mark.parametrize("name", [WEIGHTS, PROBE, CARD])
@pytest.mark.parametrize("place", [0.0, 0.0003, 0.1, 0.5, 0.9, 0.999999])
def test_a_changed_byte_of_another_file_is_refused(own, name, place):
    path = own / name
    with flipped(path, int(place * path.stat().st_size), 0x10):
        refused(own, path, "copy the bundle again")
        refused(own, path, read=read_description)
    load_bundle(str(own))


@pytest.mark.parametrize("name", [DESCRIPTION, WEIGHTS, PROBE, CARD])
def test_a_missing_or_truncated_file_is_named(own, name):
    path = own / name
    path.write_bytes(path.read_bytes()[:-1])
    refused(own, name, "copy the bundle again")
    path.unlink()
    refused(own, name)


def test_no_bundle_at_all(tmp_path):
    refused(tmp_path / "nothing", tmp_path / "nothing", DESCRIPTION, "cxr-ray train")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    for value in (float("nan"), float("inf")):
        broken = network(1)
        with torch.no_grad():
            broken.head.bias[5] = value
        write_bundle(str(tmp_path / "b"), broken, described())
        refused(tmp_path / "b", WEIGHTS, "head.bias", "not finite")


def test_weights_of_another_shape_are_refused(tmp_path):
    write_bundle(str(tmp_path / "b"), network(1, IMAGE_ALONE), described())
    refused(tmp_path / "b", WEIGHTS, "does not fit preset multi-input")


def test_other_findings_recipe_or_preset_are_refused(tmp_path, model):
    path = tmp_path / "b"
    write_bundle(str(path), model, described(findings=sorted(FINDINGS)))
    refused(path, "other findings", "train again")
    write_bundle(str(path), model, described(pixel_recipe={"version": 0}))
    refused(path, "another recipe", "train again")
    before = (path / DESCRIPTION).read_bytes()
    with pytest.raises(CxrRayError, match="statistics are incomplete"):
        write_bundle(str(path), model, described(statistics={"age_mean": 1.0}))
    assert (path / DESCRIPTION).read_bytes() == before


@pytest.mark.parametrize("change", [{"remark": "harmless"}, {"size": "large"}, {"size": 64}])
def test_an_edited_description_is_refused(own, change):
    path = own / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | change, indent=2))
    refused(own, path, "copy the bundle again")


def test_reformatted_or_foreign_json_is_refused(own):
    path = own / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text())))
    refused(own, path)
    for content in ("[]", "{}", "", "\x00"):
        path.write_text(content)
        refused(own, path, "copy the bundle again")
    path.write_bytes(b"\xff\xfe")
    refused(own, path, "copy the bundle again")


def test_a_description_that_lists_other_files_is_refused(own):
    """Even with a digest that fits: nothing but the two files is read into a model."""
    path = own / DESCRIPTION
    description = read_description(str(own))
    fewer = description.model_copy(update={"files": {CARD: description.files[WEIGHTS]}})
    fewer = fewer.model_copy(update={"digest": fewer.computed_digest()})
    path.write_text(fewer.model_dump_json(indent=2))
    refused(own, path, "copy the bundle again")


def test_rewriting_replaces(own):
    (own / "stray.txt").write_text("of an earlier release")
    other = network(9)
    written = write_bundle(str(own), other, described(name="another"))
    loaded = load_bundle(str(own))
    assert loaded.description == written
    assert loaded.description.name == "another"
    torch.testing.assert_close(outputs(loaded.model), outputs(other), rtol=0, atol=0)
    assert {path.name for path in own.iterdir()} == {DESCRIPTION, WEIGHTS, PROBE, CARD}


def test_the_digest_identifies_weights_and_description(tmp_path, model):
    first = described()
    one = write_bundle(str(tmp_path / "one"), model, first)
    assert write_bundle(str(tmp_path / "same"), model, first).digest == one.digest
    assert write_bundle(str(tmp_path / "weights"), network(9), first).digest != one.digest
    assert write_bundle(str(tmp_path / "name"), model, first.model_copy(update={"name": "b"})).digest != one.digest


def test_an_interrupted_write_disturbs_neither_the_old_nor_the_next(own, model):
    interrupted = own.with_name("bundle.partial")
    interrupted.mkdir()
    (interrupted / f"{WEIGHTS}.partial").write_bytes(b"half")
    (interrupted / DESCRIPTION).write_text("{")
    (interrupted / "weights.txt").write_text("of an earlier release")
    before = load_bundle(str(own)).description.digest
    assert read_description(str(own)).digest == before
    write_bundle(str(own), model, described(name="next"))
    assert load_bundle(str(own)).description.name == "next"
    assert {path.name for path in own.iterdir()} == {DESCRIPTION, WEIGHTS, PROBE, CARD}
    assert not interrupted.exists()


class UnpicklingWatch:
    """Notes the classes that pickle looks for; an audit hook cannot be taken off again, so it has a switch."""

    def __init__(self) -> None:
        self.on = False
        self.classes: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.on and event == "pickle.find_class":
            self.classes.append(str(arguments))


def test_nothing_is_unpickled(bundle):
    """The weights are safetensors (a length, then a JSON header), and loading asks pickle for no class."""
    content = (bundle / WEIGHTS).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["head.weight"]["shape"] == [14, 1040]
    watch = UnpicklingWatch()
    watch.on = True
    try:
        load_bundle(str(bundle))
        assert watch.classes == []
        # The watch sees what there is to see.
        pickle.loads(pickle.dumps(Path))
        assert len(watch.classes) == 1
    finally:
        watch.on = False


def test_a_bundle_of_another_release_is_told_as_such(own):
    path = own
    content = json.loads((path / DESCRIPTION).read_text())
    (path / DESCRIPTION).write_text(json.dumps(content | {"format_version": 1}))
    refused(path, "is a bundle of another release; use that release, or train again")
