"""The three ways to split the NIH release: its own lists, at random, and lists that are given."""

from pathlib import Path

import pytest
from nih_release import changed, ingest, make, refused

from cxr_ray.errors import UsageError
from cxr_ray.findings import FINDINGS, names
from cxr_ray.settings import load_settings
from ingest.nih import NihSettings

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

OFFICIAL = ("train_val_list.txt", "test_list.txt")


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "dataset"


@pytest.fixture
def release(tmp_path) -> Path:
    return make(tmp_path / "release")


def splits_of(made) -> dict[str, str]:
    return {row["image_id"]: row["split"] for row in made.rows("image_id", "split")}


# official


def test_official_lists_decide(release, out):
    made = ingest(release, out, metadata_only=True)
    splits = splits_of(made)
    assert {name for name, split in splits.items() if split == "test"} == {"d0.png", "d1.png"}
    assert set(splits.values()) == {"train", "val", "test"}
    assert (made.manifest.counts["official_train_val"], made.manifest.counts["official_test"]) == (4, 2)
    assert "in_no_list" not in made.manifest.counts


@pytest.mark.parametrize("name", OFFICIAL)
def test_missing_official_list(release, out, name):
    (release / name).unlink()
    refused(release, out, release / name, "check the path")


def test_official_list_names_unknown_images(release, out):
    with (release / "test_list.txt").open("a") as lines:
        lines.write("\nzz.png\n")
    refused(release, out, release / "test_list.txt", "1 images", "zz.png", "one release")


def test_image_in_both_official_lists(release, out):
    with (release / "test_list.txt").open("a") as lines:
        lines.write("\nb0.png")
    refused(release, out, *(release / name for name in OFFICIAL), "both", "b0.png", "correct the lists")


def test_image_in_no_official_list(release, out):
    (release / "test_list.txt").write_text("d0.png")
    refused(release, out, release, "d1.png", "no list", "train_val_list.txt or test_list.txt")


def test_patient_in_both_official_lists(tmp_path, out):
    release = make(tmp_path / "release", changed("d1.png", part="train_val"))
    refused(release, out, *(release / name for name in OFFICIAL), "first: 4", "one list")


# random


@pytest.fixture(scope="module")
def drawn(real_data, ray_cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    (folder / "release").mkdir()
    (folder / "release" / "Data_Entry_2017_v2020.csv").symlink_to(real_data / "nih" / "Data_Entry_2017_v2020.csv")
    settings = {"metadata_only": True, "split": "random", "val_fraction": 0.15, "test_fraction": 0.25, "seed": 7}
    return ingest(folder / "release", folder / "dataset", **settings)


def test_random_needs_no_lists_and_keeps_shares_and_prevalences(drawn):
    splits = drawn.manifest.splits
    for name, share in (("train", 0.6), ("val", 0.15), ("test", 0.25)):
        assert splits[name].images / 112_120 == pytest.approx(share, abs=1e-3)
        for finding in FINDINGS:
            positives = sum(split.prevalence[finding] * split.images for split in splits.values())
            # Half a patient more or less is as good as it gets where there are few.
            assert splits[name].prevalence[finding] * splits[name].images == pytest.approx(share * positives, rel=0.02, abs=2)
    assert "official_test" not in drawn.manifest.counts


def test_random_splits_hold_whole_patients(drawn):
    patients = {
        name: set(drawn.dataset.read(name, ["patient_key"])["patient_key"].to_pylist()) for name in drawn.manifest.splits
    }
    assert sum(map(len, patients.values())) == len(set().union(*patients.values())) == 30_805


def test_random_splits_follow_the_seed_and_may_have_no_test(release, tmp_path):
    def made(name, **settings):
        return ingest(release, tmp_path / name, metadata_only=True, split="random", **settings)

    assert splits_of(made("one", seed=1)) == splits_of(made("other", seed=1))
    assert set(splits_of(made("none", test_fraction=0, val_fraction=0.4)).values()) == {"train", "val"}


# lists


def write(path: Path, *images: str) -> str:
    path.write_text("\n".join(images) + "\n")
    return str(path)


def test_given_lists_decide_and_what_is_in_none_is_left_out_but_stays_history(release, out, tmp_path):
    for name in OFFICIAL:
        (release / name).unlink()
    train = write(tmp_path / "train.txt", "b0.png", "", " c0.png ")
    test = (tmp_path / "test.txt").as_uri()
    write(tmp_path / "test.txt", "a1.png")
    made = ingest(release, out, size=16, split="lists", train_list=train, test_list=test)
    assert splits_of(made) == {"b0.png": "train", "c0.png": "train", "a1.png": "test"}
    assert made.manifest.counts["in_no_list"] == 3
    assert (made.manifest.counts["rows"], made.manifest.counts["present"], made.manifest.counts["ingested"]) == (6, 6, 3)
    (second,) = (row for row in made.rows("image_id", "visit", "history_count", "history_ever") if row["image_id"] == "a1.png")
    assert (second["visit"], second["history_count"], names(second["history_ever"])) == (1, 1, ["Mass"])


def test_a_single_list_is_enough(release, out, tmp_path):
    made = ingest(release, out, metadata_only=True, split="lists", val_list=write(tmp_path / "val.txt", "c0.png"))
    assert splits_of(made) == {"c0.png": "val"}


def test_a_given_list_names_unknown_images(release, out, tmp_path):
    val = write(tmp_path / "val.txt", "c0.png", "zz.png", "yy.png")
    refused(release, out, val, "2 images", "first: zz.png", split="lists", val_list=val)


def test_an_image_in_two_given_lists(release, out, tmp_path):
    train, val = write(tmp_path / "train.txt", "b0.png", "c0.png"), write(tmp_path / "val.txt", "c0.png")
    refused(release, out, train, val, "both", "c0.png", split="lists", train_list=train, val_list=val)


def test_a_patient_in_two_given_lists(release, out, tmp_path):
    train, test = write(tmp_path / "train.txt", "a0.png"), write(tmp_path / "test.txt", "a1.png")
    refused(release, out, train, test, "1 patients", "first: 1", split="lists", train_list=train, test_list=test)


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty"), (b"\x89PNG\xff\xfe", "no text")])
def test_a_given_list_that_is_none(release, out, tmp_path, content, reason):
    (tmp_path / "val.txt").write_bytes(content)
    refused(release, out, tmp_path / "val.txt", reason, split="lists", val_list=str(tmp_path / "val.txt"))


def test_a_given_list_that_is_not_there(release, out, tmp_path):
    refused(release, out, tmp_path / "val.txt", "check the path", split="lists", val_list=str(tmp_path / "val.txt"))


# Options and the split that they belong to.


@pytest.mark.parametrize(
    ("settings", "named", "reason"),
    [
        ({"test_fraction": 0.2}, "test_fraction", "split official"),
        ({"train_list": "l"}, "train_list", "split official"),
        ({"split": "random", "val_list": "l"}, "val_list", "split random"),
        ({"split": "lists", "test_list": "l", "val_fraction": 0.1}, "val_fraction", "split lists"),
        ({"split": "lists", "test_list": "l", "test_fraction": 0.1}, "test_fraction", "split lists"),
        ({"split": "lists"}, "test_list", "at least one of train_list, val_list and test_list"),
        ({"split": "random", "val_fraction": 0.5, "test_fraction": 0.5}, "test_fraction", "nothing to train on"),
        ({"split": "random", "val_fraction": 0.9}, "test_fraction", "nothing to train on"),
        ({"split": "patients"}, "split", "'official', 'random' or 'lists'"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_named(settings, named, reason):
    with pytest.raises(UsageError, match=f"'{named}'") as error:
        load_settings(NihSettings, None, {"release": "r", "out": "o"} | settings)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_as_printed_are_settings_again():
    for settings in ({}, {"split": "random"}, {"split": "lists", "test_list": "l"}):
        made = NihSettings(release="r", out="o", **settings)
        assert NihSettings.model_validate(made.model_dump(mode="json")) == made
    assert NihSettings(release="r", out="o").val_fraction == 0.1
    assert NihSettings(release="r", out="o", split="random").test_fraction == 0.2
