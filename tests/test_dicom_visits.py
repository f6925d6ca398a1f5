"""Visits of a DICOM archive: their order, what was seen before, and where one or the other is unknown."""

import pytest
from chest_films import ingest, label_file, rows_of, uid, visits_of, write

from cxr_ray.findings import FINDINGS, names
from ingest.dicom import PATIENT_KEY_VARIABLE

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv(PATIENT_KEY_VARIABLE, "a secret of the hospital")


def test_without_labels_history_is_unknown_and_its_length_is_not(tmp_path):
    for study, date in ((1, "20180301"), (2, "20190301")):
        write(tmp_path / "in" / f"{study}.dcm", "P", study, 1, date)
    manifest = ingest(tmp_path / "in", tmp_path / "out")
    assert manifest.metadata_sha256 is None
    assert visits_of(tmp_path / "out") == [(0, None, 0, None, None), (1, None, 1, None, None)]
    assert {row["history_fraction"] for row in rows_of(tmp_path / "out")} == {None}


def test_an_earlier_visit_without_labels_leaves_the_history_unknown(tmp_path):
    labels = {}
    for study, text in ((1, "Mass"), (2, None), (3, "Edema")):
        instance = write(tmp_path / "in" / f"{study}.dcm", "P", study, 1, f"201{study}0301")
        if text:
            labels[instance] = text
    ingest(tmp_path / "in", tmp_path / "out", labels=label_file(tmp_path / "labels.csv", labels))
    assert visits_of(tmp_path / "out") == [
        (0, ["Mass"], 0, [], []),
        (1, None, 1, ["Mass"], ["Mass"]),
        (2, ["Edema"], 2, None, None),
    ]


def test_images_of_a_study_are_one_visit_at_its_earliest_moment(tmp_path):
    """The second image of the first study is taken after the second study; its study still began before it."""
    labels = {
        write(tmp_path / "in" / "1.dcm", "P", 1, 1, "20200101", "080000"): "Mass",
        write(tmp_path / "in" / "2.dcm", "P", 1, 2, "20200101", "120000", ViewPosition="AP"): "Nodule",
        write(tmp_path / "in" / "3.dcm", "P", 2, 1, "20200101", "100000"): "Edema",
        write(tmp_path / "in" / "4.dcm", "P", 1, 3, None, None, ViewPosition=""): "Hernia",
    }
    manifest = ingest(tmp_path / "in", tmp_path / "out", labels=label_file(tmp_path / "labels.csv", labels))
    assert manifest.counts["without_date"] == 0
    assert visits_of(tmp_path / "out") == [
        (0, ["Hernia"], 0, [], []),
        (0, ["Nodule"], 0, [], []),
        (0, ["Mass"], 0, [], []),
        (1, ["Edema"], 1, *[["Mass", "Nodule", "Hernia"]] * 2),
    ]


def test_a_study_without_date_comes_first_and_leaves_every_history_of_its_patient_unknown(tmp_path):
    labels = {
        write(tmp_path / "in" / "1.dcm", "P", 1, 1, "20200101"): "Mass",
        write(tmp_path / "in" / "2.dcm", "P", 2, 1, "", ""): "Nodule",
        write(tmp_path / "in" / "3.dcm", "P", 3, 1, "20210101"): "Edema",
    }
    manifest = ingest(tmp_path / "in", tmp_path / "out", labels=label_file(tmp_path / "labels.csv", labels))
    assert manifest.counts["without_date"] == 1
    assert visits_of(tmp_path / "out") == [
        (0, ["Nodule"], None, None, None),
        (1, ["Mass"], None, None, None),
        (2, ["Edema"], None, None, None),
    ]


def test_a_label_for_a_study_is_that_of_each_of_its_images(tmp_path):
    write(tmp_path / "in" / "1.dcm", "P", 1, 1, "20180301")
    write(tmp_path / "in" / "2.dcm", "P", 1, 2, "20180301", ViewPosition="AP")
    instance = write(tmp_path / "in" / "3.dcm", "P", 2, 1, "20190301")
    write(tmp_path / "in" / "4.dcm", "P", 3, 1, "20200301")
    table = tmp_path / "labels.csv"
    table.write_text(
        "Accession Number,Study UID,SOPInstanceUID,Finding Labels\n"
        f"ACC1,,,Mass\n,{uid(2)},,Hernia\n,,{instance},Edema\n,{uid(3)},,Fibrosis\n,{uid(9)},,Fibrosis\nACC9,,,Mass\n"
    )
    manifest = ingest(tmp_path / "in", tmp_path / "out", labels=str(table))
    assert manifest.counts["labels_without_image"] == 2
    assert visits_of(tmp_path / "out") == [
        (0, ["Mass"], 0, [], []),
        (0, ["Mass"], 0, [], []),
        (1, ["Edema"], 1, ["Mass"], ["Mass"]),
        (2, ["Fibrosis"], 2, ["Mass", "Edema"], ["Edema"]),
    ]


def test_rows_that_leave_a_finding_open_and_tables_of_another_archive_are_told(tmp_path):
    instance = write(tmp_path / "in" / "1.dcm", "P", 1, 1)
    table = tmp_path / "labels.csv"
    table.write_text("SOPInstanceUID," + ",".join(FINDINGS) + f"\n{instance}" + ",0" * 13 + ",\n")
    manifest = ingest(tmp_path / "in", tmp_path / "out", labels=str(table))
    assert manifest.counts["label_rows_unlabelled"] == 1
    assert visits_of(tmp_path / "out") == [(0, None, 0, [], [])]
    assert [warning.partition(":")[0] for warning in manifest.warnings] == ["no image has labels"]


SAME_DAY = {
    "one without a time": ("080000", None, 3),
    "both without a time": (None, None, 3),
    "both with a time": ("080000", "070000", 0),
    "an image without a time beside one with it": (("080000", None), "070000", 0),
}


@pytest.mark.parametrize(("first", "second", "unknown"), SAME_DAY.values(), ids=SAME_DAY)
def test_studies_of_a_day_whose_times_are_missing_have_no_order(tmp_path, first, second, unknown):
    """The third study lies on another day; its history is unknown as well, because it includes the two."""
    firsts = first if isinstance(first, tuple) else (first,)
    labels = {write(tmp_path / "in" / f"1{n}.dcm", "P", 1, n, "20200101", time): "Mass" for n, time in enumerate(firsts)}
    labels[write(tmp_path / "in" / "2.dcm", "P", 2, 1, "20200101", second)] = "Nodule"
    labels[write(tmp_path / "in" / "3.dcm", "P", 3, 1, "20210101", None)] = "Edema"
    labels[write(tmp_path / "in" / "4.dcm", "Q", 4, 1, "20210101", None)] = "Edema"
    manifest = ingest(tmp_path / "in", tmp_path / "out", labels=label_file(tmp_path / "labels.csv", labels))
    assert manifest.counts["order_unknown"] == unknown
    assert manifest.counts["without_date"] == 0
    rows = rows_of(tmp_path / "out")
    histories = sorted(((names(row["labels"]), row["history_count"]) for row in rows), key=str)
    if unknown:
        assert histories == [(["Edema"], 0), (["Edema"], None), (["Mass"], None), (["Nodule"], None)]
        assert sum(row["history_ever"] is None for row in rows) == 3
    else:
        assert histories == [(["Edema"], 0), (["Edema"], 2), *[(["Mass"], 1)] * len(firsts), (["Nodule"], 0)]
        assert not any(row["history_ever"] is None for row in rows)
