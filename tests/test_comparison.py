"""Comparing networks: what is planned and refused, paired differences, what the tables say, and one comparison through Ray."""

import csv
import io
import json
import shutil
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from rich.console import Console

from cxr_ray import comparison_tables as tables
from cxr_ray import presets
from cxr_ray.bundle import read_description, write_bundle
from cxr_ray.bundle_description import BundleDescription
from cxr_ray.clinical import ClinicalLayout, fit_statistics
from cxr_ray.compare_settings import CompareSettings
from cxr_ray.comparison import Comparison, Lead, NetworkScores, compare, leads_over_first
from cxr_ray.comparison_files import as_csv, as_json, as_markdown, write_files
from cxr_ray.comparison_plan import make_plan
from cxr_ray.completeness import extent, published_of
from cxr_ray.dataset import Dataset
from cxr_ray.delong import areas
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.findings import FINDINGS
from cxr_ray.input_profile import InputProfile
from cxr_ray.pixels import PIXEL_RECIPE
from cxr_ray.predictions import Predictions, Speed, _speed
from cxr_ray.records import clinical_columns, clinical_inputs
from cxr_ray.resampling import Interval
from cxr_ray.run_folder import begin_run
from cxr_ray.settings import as_yaml, load_settings, without_credentials
from cxr_ray.split_scores import difference, score
from cxr_ray.train_settings import TrainSettings
from ingest.nih import NihSettings, ingest_nih
from ingest.phantom import simulate_patients
from ingest.phantom_release import write_tables

DIGEST = "d" * 64
RESAMPLES = 200
PART = "219 of the 25,596 images of the official test split: NOT comparable with published figures"


def settings(**chosen) -> CompareSettings:
    return CompareSettings.model_validate({"data": "d", "out": "o"} | chosen)


def described(preset: str, **changes) -> BundleDescription:
    network = presets.options(presets.find(preset))
    size = 64 if presets.find(preset).reads_images else None
    known = BundleDescription(
        name=preset,
        version="1",
        created=datetime(2026, 1, 1, tzinfo=UTC),
        code_version="0",
        preset=preset,
        variant=network.variant,
        layout=network.layout,
        size=size,
        input_size=size,
        findings=list(FINDINGS),
        statistics={},
        training_inputs=InputProfile().to_json(),
        pixel_recipe={},
        thresholds={},
        other_thresholds={},
        validation={},
        settings={},
        dataset_digest=DIGEST,
        files={},
    )
    return known.model_copy(update=changes)


def predictions(skill: float, seed: int, *, patients: int = 40, images: int = 3) -> Predictions:
    """The same labels for every seed of the scores; the last finding has no positive."""
    truth = np.random.default_rng(0)
    labels = (truth.random((patients * images, 14)) < 0.3).astype(np.float32)
    labels[truth.random(labels.shape) < 0.05] = np.nan
    labels[:, 13] = 0
    noise = np.random.default_rng(seed).normal(size=labels.shape)
    scores = 1 / (1 + np.exp(-noise - skill * np.nan_to_num(labels)))
    return Predictions(
        np.array([f"film{number:03}" for number in range(len(labels))], dtype=object),
        np.repeat([f"p{number}" for number in range(patients)], images),
        scores.astype(np.float32),
        labels,
    )


def comparison_of(*names: str, split: str = "test", bases: str = PART) -> Comparison:
    """Networks of these presets, the later ones the better."""
    scored = [predictions(0.3 + 0.2 * number, number) for number in range(len(names))]
    leads: list[Lead | None] = [None, *leads_over_first(scored, resamples=RESAMPLES)]
    networks = [
        NetworkScores(
            name=name,
            uri=f"/runs/{name}/bundle",
            trained_here=True,
            bundle=described(name.partition("_")[0]),
            parameters=1_342 if name == "clinical" else 6_969_534,
            scores=score(each.probabilities, each.labels, each.patient_keys, resamples=RESAMPLES),
            speed=None if name == "clinical" else Speed(1234.5, 64, "CPU, threads: 2 (float32)"),
            published=published_of(described(name.partition("_")[0])),
            lead=lead,
        )
        for name, each, lead in zip(names, scored, leads, strict=True)
    ]
    asked = settings(split=split, resamples=RESAMPLES)
    return Comparison(asked, DIGEST, bases, tuple(networks), {})


def at_80_columns(shown: object) -> list[str]:
    console = Console(width=80, file=io.StringIO(), highlight=False, markup=False, soft_wrap=True)
    console.print(shown)
    return console.file.getvalue().splitlines()


# What is asked


@pytest.mark.parametrize(
    ("given", "names"),
    [("all", None), ("none", ()), ("clinical", ("clinical",)), (" chexnet, clinical", ("chexnet", "clinical"))],
)
def test_presets_are_named_or_all_or_none(given, names):
    assert settings(presets=given).named_presets == names


def test_bundles_are_named_by_themselves_or_by_their_folder():
    given = "mine=runs/a/bundle,runs/first/bundle,s3://store/second?region=eu=1,../third/"
    assert settings(bundles=given).bundles == {
        "mine": "runs/a/bundle",
        "first": "runs/first/bundle",
        "second": "s3://store/second?region=eu=1",
        "third": "../third/",
    }
    assert settings(bundles=given.split(",")).bundles == settings(bundles=given).bundles


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("presets", "chexnet,,clinical", "names no preset between commas"),
        ("presets", "chexnet,chexnet", "names chexnet twice"),
        ("presets", "chexnet,all", "gives all or none beside others"),
        ("bundles", "runs/a,other/a", "has two bundles named a; write NAME=URI"),
        ("bundles", "..", "has '..', which gives no name; write NAME=URI"),
        ("bundles", {"a/b": "runs"}, "has a bundle named 'a/b'; use letters"),
        ("workers", "0", "give a number of at least 1, or a range such as 2..8"),
        ("epochs", "0", "Input should be greater than or equal to 1"),
        ("split", "train", "Input should be 'val' or 'test'"),
    ],
)
def test_other_values_are_refused_by_name(name, value, said):
    with pytest.raises(UsageError) as refused:
        load_settings(CompareSettings, None, {"data": "d", "out": "o", name: value})
    assert str(refused.value).startswith(f"setting {name!r} is {value!r}: {said}")


def test_keys_of_bundles_are_not_printed():
    shown = as_yaml(without_credentials(settings(bundles="mine=s3://key:hidden@store/bundle,plain/x")))
    assert "hidden" not in shown
    assert "mine: s3://store/bundle" in shown
    assert "x: plain/x" in shown


def test_only_what_was_given_is_handed_to_a_training():
    assert settings().handed_on() == {"gpu": False, "seed": 0}
    given = settings(epochs=2, workers=3, batch_size=8, threads=1, cpus_per_worker=1, gpu=True, seed=5)
    training = TrainSettings.model_validate({"data": "d", "out": "o", **given.handed_on()})
    assert (training.epochs, training.workers, training.batch_size, training.threads) == (2, "3", 8, 1)
    assert (training.cpus_per_worker, training.gpu, training.seed) == (1.0, True, 5)


# What is computed


def test_differences_are_those_of_the_paired_bootstrap_and_of_obuchowski():
    first, second, third = (predictions(skill, seed) for seed, skill in enumerate((0.5, 0.7, 1.5)))
    leads = leads_over_first([first, second, third], resamples=RESAMPLES, seed=3)
    assert len(leads) == 2
    for lead, each in zip(leads, (second, third), strict=True):
        _, mean = difference(
            each.probabilities, first.probabilities, first.labels, first.patient_keys, resamples=RESAMPLES, seed=3
        )
        assert lead.mean == mean
        pair = areas(np.stack([each.probabilities[:, 4], first.probabilities[:, 4]]), first.labels[:, 4], first.patient_keys)
        expected = pair.difference(0, 1)
        assert lead.findings[4].interval.value == pytest.approx(expected.interval.value)
        assert lead.findings[4].p_value == pytest.approx(expected.p_value)
        # Hernia has no positive.
        assert np.isnan(lead.findings[13].p_value)
    assert leads[1].mean.low > 0
    assert leads[1].p_value == pytest.approx(2 / (RESAMPLES + 1))


@pytest.mark.parametrize("seed", range(6))
def test_p_goes_with_the_interval(seed):
    """Below 5 % where the interval leaves 0 out, above where it holds it; a resample or two may lie between."""
    (lead,) = leads_over_first([predictions(0.5, 10 + seed), predictions(0.5 + 0.05 * seed, 20 + seed)], resamples=1000)
    if lead.mean.low > 0 or lead.mean.high < 0:
        assert lead.p_value < 0.06
    else:
        assert lead.p_value > 0.04


def test_a_network_is_not_different_from_itself():
    (lead,) = leads_over_first([predictions(0.5, 0)] * 2, resamples=RESAMPLES)
    assert lead.mean == Interval(0.0, 0.0, 0.0)
    assert lead.p_value == 1.0
    assert lead.findings[0].p_value == 1.0


def test_findings_of_a_single_patient_have_no_p():
    one = predictions(0.5, 0)
    one.labels[:, 5] = 0
    one.labels[:3, 5] = 1
    other = replace(predictions(2.0, 1), labels=one.labels)
    (lead,) = leads_over_first([one, other], resamples=RESAMPLES)
    assert np.isfinite(lead.findings[5].interval.value)
    assert np.isnan(lead.findings[5].p_value)


def test_images_a_second_are_without_the_first_batch():
    nan = float("nan")
    table = pa.table({"seconds": [nan] * 64 + [0.01] * 64 + [0.02] * 32, "device": ["CPU"] * 160})
    assert _speed(table, 64) == Speed(pytest.approx(96 / 1.28), 64, "CPU")
    assert _speed(table.slice(0, 64), 64) is None


def test_published_figures_are_those_of_the_published_network():
    assert [each.split for each in published_of(described("chexnet"))] == ["random 70/10/20 by patient"]
    assert published_of(described("chexnet", layout=ClinicalLayout())) == ()
    assert published_of(described("wang2017", variant="alexnet")) == ()
    assert published_of(described("clinical")) == ()
    splits = [each.split for each in published_of(described("wang2017"))]
    assert splits[0] == "official"
    assert len(splits) == 3


@pytest.mark.parametrize(
    ("split", "rule", "listed", "images", "said"),
    [
        ("test", "official", 25_596, 25_596, "the whole official test split"),
        ("test", "official", 25_596, 219, PART),
        ("test", "random", 25_596, 25_596, "not the official test split: NOT comparable with published figures"),
        ("test", "official", 60, 60, "not the official test split: NOT comparable with published figures"),
        ("val", "official", 25_596, 8_648, "not the official test split: NOT comparable with published figures"),
    ],
)
def test_the_basis_says_what_the_split_is(metadata, split, rule, listed, images, said):
    manifest = Dataset(str(metadata)).manifest
    held = {split: manifest.splits["test"].model_copy(update={"images": images})}
    other = manifest.model_copy(update={"settings": {"split": rule}, "counts": {"official_test": listed}, "splits": held})
    assert extent(other, split).in_words() == said


# What is shown


def test_the_tables_of_all_presets_fit_a_terminal():
    comparison = comparison_of(*presets.PRESETS)
    for shown in (tables.networks_table, tables.differences_table, tables.findings_table):
        lines = at_80_columns(shown(comparison))
        assert max(map(len, lines)) <= 80
        text = "\n".join(lines)
        assert "…" not in text
        for name in presets.PRESETS:
            assert name in text


def test_published_figures_stand_with_their_split_and_mark():
    text = "\n".join(at_80_columns(tables.networks_table(comparison_of(*presets.PRESETS))))
    assert "219 of the 25,596 images of the official test split:\nNOT comparable with published figures" in text
    lines = text.splitlines()
    (chexnet,) = [line for line in lines if line.split()[:1] == ["chexnet"]]
    assert "0.841" in chexnet
    assert "random" in chexnet
    start = next(number for number, line in enumerate(lines) if line.split()[:1] == ["wang2017"])
    assert "0.745*" in lines[start]
    assert lines[start].split()[-1] == "official"
    assert "0.738" in lines[start + 1]
    assert "before" in lines[start + 1]
    (clinical,) = [line for line in lines if line.split()[:1] == ["clinical"]]
    assert clinical.count("0.") == 3


def test_columns_that_would_be_empty_are_left_out():
    alone = comparison_of("clinical")
    text = "\n".join(at_80_columns(tables.networks_table(alone)) + at_80_columns(tables.differences_table(alone)))
    assert "published" not in text.replace("comparable with published figures", "")
    assert "difference" not in text
    assert not any("paired" in note for note in tables.notes(alone))


def test_the_differences_are_of_the_first():
    comparison = comparison_of("clinical", "chexnet")
    lines = at_80_columns(tables.differences_table(comparison))
    assert lines[0].strip() == "Size, speed, and mean AUC less that of clinical on the same images"
    clinical = next(line for line in lines if line.startswith(" clinical"))
    assert clinical.split() == ["clinical", "1,342", "-"]
    chexnet = next(line for line in lines if line.startswith(" chexnet"))
    lead = comparison.networks[1].lead
    assert chexnet.split()[:4] == ["chexnet", "7.0", "M", "1,230"]
    assert f"{lead.mean.value:+.3f} ({lead.mean.low:+.3f} to {lead.mean.high:+.3f})" in chexnet


def test_findings_are_by_name_by_number_or_only_in_the_file():
    few = at_80_columns(tables.findings_table(comparison_of("clinical", "chexnet")))
    assert next(line for line in few if "finding " in line).split() == ["finding", "clinical", "chexnet"]
    assert next(line for line in few if "Hernia" in line).split() == ["Hernia", "-", "-"]
    many = at_80_columns(tables.findings_table(comparison_of(*presets.PRESETS)))
    assert next(line for line in many if line.startswith(" finding ")).split()[:3] == ["finding", "(1)", "(2)"]
    assert tables.findings_table(comparison_of(*(f"clinical_{number}" for number in range(9)))) is None


def test_notes_say_what_a_reader_would_get_wrong():
    comparison = comparison_of("chexnet", "wang2017")
    said = "\n".join(tables.notes(comparison))
    assert "Published figures of another split" in said
    assert "* the mean was read in a public source" in said
    assert "one process, CPU, threads: 2 (float32), batches of 64" in said
    assert "200 resamples of patients" in said
    assert "another dataset" not in said
    assert "Checkpoints" not in said
    elsewhere = replace(comparison.networks[1], bundle=described("wang2017", dataset_digest="e" * 64))
    left_out = {"beyond": "the dataset is small", "clinical": "it is dull", "yao2017": "the dataset is small"}
    changed = replace(
        comparison, settings=settings(split="val"), networks=(comparison.networks[0], elsewhere), left_out=left_out
    )
    lines = tables.notes(changed)
    assert "wang2017 was trained on another dataset: whether it has seen these patients is not known." in lines
    assert "Checkpoints and thresholds were chosen on split val: AUCs on it are too high." in lines
    assert lines[-2:] == ["Left out, as the dataset is small: beyond, yao2017.", "Left out, as it is dull: clinical."]


def test_files_hold_every_finding_and_nothing_that_is_no_number(tmp_path):
    comparison = comparison_of("clinical", "wang2017")
    write_files(comparison, str(tmp_path / "new"))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"comparison.json", "comparison.csv", "comparison.md"}
    written = json.loads((tmp_path / "new" / "comparison.json").read_text())
    assert written == json.loads(json.dumps(as_json(comparison), allow_nan=False))
    first, second = written["networks"]
    assert written["basis"] == PART
    assert (first["difference"], first["speed"], first["published"]) == (None, None, [])
    lead = comparison.networks[1].lead
    assert second["difference"]["value"] == pytest.approx(lead.mean.value, abs=1e-6)
    assert second["findings"]["Hernia"]["auc"]["value"] is None
    assert second["findings"]["Mass"]["difference"]["p_value"] == pytest.approx(lead.findings[4].p_value, abs=1e-6)
    assert [published["verified"] for published in second["published"]] == [False, True, True]
    assert second["parameters"] == 6_969_534


def test_the_csv_has_a_row_a_network_and_finding():
    comparison = comparison_of("clinical", "wang2017")
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert [(row["network"], row["finding"]) for row in rows] == [
        (name, finding) for name in ("clinical", "wang2017") for finding in (*FINDINGS, "mean")
    ]
    hernia, mean = rows[28], rows[29]
    assert (hernia["auc"], hernia["p"], hernia["positives"]) == ("", "", "0")
    assert float(mean["auc"]) == pytest.approx(comparison.networks[1].scores.auroc.value, abs=1e-6)
    assert float(mean["difference_low"]) == pytest.approx(comparison.networks[1].lead.mean.low, abs=1e-6)
    assert (mean["published_auc"], mean["published_mark"], mean["published_split"]) == ("0.745143", "*", "official")
    assert (rows[0]["difference"], rows[0]["published_auc"], rows[0]["images_per_second"]) == ("", "", "")
    assert {row["basis"] for row in rows} == {PART}


def test_the_markdown_is_whole_tables():
    text = as_markdown(comparison_of(*presets.PRESETS))
    assert text.startswith("# Networks on split test, 120 images of 40 patients: 219 of the 25,596 images")
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(block) for block in blocks] == [2 + 8, 2 + 15]
    for block in blocks:
        assert len({line.count("|") for line in block}) == 1
    assert "0.745\\* (official); 0.738 (before the official lists, as printed by CheXNet)" in text


# What is planned


@pytest.fixture(scope="module")
def metadata(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Visits of made-up patients, without films."""
    root = tmp_path_factory.mktemp("visits")
    write_tables(root, simulate_patients(150, 0), size=1)
    ingest_nih(NihSettings(release=str(root), out=str(root / "dataset"), metadata_only=True))
    return root / "dataset"


def with_pixels(metadata: Path, folder: Path, size: int) -> Path:
    """The manifest alone, as if there were films of this size; what is planned reads no more."""
    manifest = json.loads((metadata / "manifest.json").read_text())
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "size": size}))
    return folder


def test_a_dataset_without_films_feeds_the_network_without_films(metadata, tmp_path):
    plan = make_plan(settings(data=str(metadata), out=str(tmp_path / "out")))
    (entry,) = plan.entries
    assert (entry.name, entry.trained_here) == ("clinical", True)
    assert (entry.training.preset, entry.training.epochs, entry.training.resume) == ("clinical", 15, False)
    assert entry.bundle == str(tmp_path / "out" / "clinical" / "bundle")
    assert set(plan.left_out) == presets.PRESETS.keys() - {"clinical"}
    assert set(plan.left_out.values()) == {"the dataset holds metadata only"}
    assert not (tmp_path / "out").exists()


def test_presets_that_need_larger_films_are_left_out_and_the_others_planned(metadata, tmp_path):
    data = with_pixels(metadata, tmp_path / "films", 48)
    plan = make_plan(settings(data=str(data), out=str(tmp_path / "out"), epochs=2, init="imagenet"))
    assert plan.left_out == {"wang2017": "the dataset's 48 pixels are fewer than 63"}
    trainings = {entry.name: entry.training for entry in plan.entries}
    assert list(trainings) == [name for name in presets.PRESETS if name != "wang2017"]
    assert {training.epochs for training in trainings.values()} == {2}
    # What the user left open is the recipe's.
    assert (trainings["chexnet"].batch_size, trainings["beyond"].batch_size) == (16, 128)
    of_imagenet = {name for name, training in trainings.items() if training.init == "imagenet"}
    assert of_imagenet == {"multi-input", "chexnet", "guendel2018", "beyond"}


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"presets": "alexnet"}, "preset 'alexnet' is not known; use one of: multi-input"),
        ({"presets": "chexnet"}, r"holds metadata only; ingest without --metadata-only"),
        ({"presets": "none"}, "setting 'presets' is 'none' and there are no bundles: name what to compare"),
        ({"bundles": "clinical=elsewhere"}, "setting 'bundles' names 'clinical' as a preset is named; write NAME=URI"),
        ({"bundles": "elsewhere"}, r"elsewhere: holds no bundle\.json"),
        ({"data": "nowhere"}, r"nowhere: holds no manifest\.json; make a dataset"),
        ({"workers": "1000000"}, r"split train has \d+ images for 1000000 workers; lower workers"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_trained(metadata, tmp_path, monkeypatch, chosen, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CxrRayError, match=said) as refused:
        make_plan(settings(**{"data": str(metadata), "out": "out", **chosen}))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_bundles_of_other_films_are_refused(metadata, tmp_path, untrained_bundle):
    data = with_pixels(metadata, tmp_path / "films", 48)
    with pytest.raises(CxrRayError, match=r"reads images of 64 pixels, .* holds 48; ingest with --size 64, or leave it out"):
        make_plan(settings(data=str(data), out=str(tmp_path / "out"), presets="none", bundles=f"old={untrained_bundle}"))
    fitting = with_pixels(metadata, tmp_path / "larger", 64)
    (entry,) = make_plan(settings(data=str(fitting), out="out", presets="none", bundles=f"old={untrained_bundle}")).entries
    assert (entry.name, entry.bundle, entry.training) == ("old", str(untrained_bundle), None)


# The whole way


@pytest.fixture
def given_bundle(metadata, tmp_path) -> str:
    """A bundle of random weights that says it was trained on another dataset."""
    dataset = Dataset(str(metadata))
    statistics = fit_statistics(clinical_inputs(dataset.read("train", list(clinical_columns("paper"))), "paper"))
    chances = dict.fromkeys(FINDINGS, 0.5)
    known = described("clinical", statistics=asdict(statistics), thresholds=chances, pixel_recipe=PIXEL_RECIPE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_bundle(str(tmp_path / "given" / "bundle"), presets.build("clinical"), known)
    return str(tmp_path / "given" / "bundle")


def test_runs_with_other_settings_are_refused(metadata, tmp_path):
    asked = settings(data=str(metadata), out=str(tmp_path / "out"), epochs=1, presets="clinical")
    (entry,) = make_plan(asked).entries
    begin_run(entry.training)
    # Where and with how many processes may change; what is learnt may not.
    (entry,) = make_plan(asked.model_copy(update={"workers": "2", "threads": 1})).entries
    assert (entry.training.resume, entry.training.workers) == (True, "2")
    for changed, said in (
        ({"epochs": 2}, r"setting 'epochs' is 2, the run there has 1; give the same, or choose another --out"),
        ({"seed": 7}, "setting 'seed' is 7, the run there has 0; give the same, or choose another --out"),
        ({"batch_size": 9}, "setting 'batch_size' is 9, the run there has 512; give the same, or choose another --out"),
    ):
        with pytest.raises(CxrRayError, match=rf"--out .*/out/clinical: {said}"):
            make_plan(asked.model_copy(update=changed))
    moved = shutil.copytree(metadata, tmp_path / "moved")
    with pytest.raises(CxrRayError, match=r"setting 'data' is '.*moved', the run there has '.*dataset'; give the same"):
        make_plan(asked.model_copy(update={"data": str(moved)}))


@pytest.mark.ray
@pytest.mark.long
def test_a_comparison_trains_what_is_left_to_train_and_scores_everything(metadata, given_bundle, tmp_path):
    out = tmp_path / "out"
    asked = settings(data=str(metadata), out=str(out), epochs=1, bundles=given_bundle, resamples=RESAMPLES)
    # As an interruption leaves it: begun, and without a bundle.
    begin_run(make_plan(asked).entries[0].training)
    told: list[str] = []
    comparison = compare(make_plan(asked), told.append)
    assert told[0].startswith("left out, as the dataset holds metadata only: multi-input, ")
    assert told[1:] == [
        "clinical: going on with its training",
        "clinical: scoring split test",
        "given: scoring split test",
    ]
    trained, given = comparison.networks
    assert (trained.name, trained.trained_here, given.name, given.trained_here) == ("clinical", True, "given", False)
    assert given.bundle == read_description(given_bundle)
    assert trained.bundle.settings["epochs"] == 1
    assert trained.bundle.dataset_digest == comparison.dataset_digest
    assert trained.parameters == given.parameters == presets.build("clinical").trainable_parameters
    assert trained.speed.images_per_second > 0
    assert trained.speed.device.startswith(("CPU, threads: ", "NVIDIA"))
    assert trained.scores.images == Dataset(str(metadata)).split("test").images > trained.speed.batch_size
    assert given.lead.mean.value == pytest.approx(given.scores.auroc.value - trained.scores.auroc.value)
    assert any(note.startswith("given was trained on another dataset") for note in tables.notes(comparison))
    # It is what `cxr-ray evaluate` writes.
    evaluated = json.loads((out / "given" / "evaluation" / "evaluation.json").read_text())
    assert evaluated["mean"]["auc"]["value"] == pytest.approx(given.scores.auroc.value, abs=1e-6)
    assert (out / "clinical" / "evaluation" / "scores.parquet").exists()

    # The same command again trains nothing, and finds the same.
    told.clear()
    plan = make_plan(asked)
    assert [entry.training for entry in plan.entries] == [None, None]
    again = compare(replace(plan, entries=plan.entries[:1]), told.append)
    assert told[1:] == ["clinical: is trained already", "clinical: scoring split test"]
    assert again.networks[0].bundle == trained.bundle
    # Rows come in another order and in other batches, and the last digits of a float32 product depend on both.
    assert again.networks[0].scores.auroc.value == pytest.approx(trained.scores.auroc.value, abs=1e-3)

    # A finished run is that of its dataset, wherever this lies now, and of no other.
    moved = shutil.copytree(metadata, tmp_path / "moved")
    elsewhere = asked.model_copy(update={"data": str(moved)})
    assert make_plan(elsewhere).entries[0].training is None
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps({**manifest, "warnings": ["another"]}))
    with pytest.raises(CxrRayError, match=r"is not the dataset that .*/out/clinical was trained on; give that one"):
        make_plan(elsewhere)
