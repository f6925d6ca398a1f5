"""A DICOM archive through real Ray: what is taken, refused and quarantined, in which order, and what is not told on."""

import csv
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from chest_films import ingest, label_file, rows_of, uid, write

from cxr_ray.dataset import Dataset as Shards
from cxr_ray.decoding import Format, decode
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.findings import FINDINGS, NO_FINDING, names
from cxr_ray.records import SPLITS, pixel_array
from cxr_ray.settings import load_settings
from ingest.dicom import PATIENT_KEY_VARIABLE, DicomSettings
from ingest.splits import split_by_key

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SECRET = "a secret of the hospital"
REAL_CHESTS = ["chest_cr_jpeg-baseline_mono2_8bit.dcm", "chest_cr_jpeg2000-lossless_mono1_15bit.dcm"]


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv(PATIENT_KEY_VARIABLE, SECRET)


@pytest.fixture(scope="module")
def archive(tmp_path_factory, real_data):
    """Real chests and an extremity, a CT, a lateral, a text, a truncated file, a copy, and visits of three patients."""
    root = tmp_path_factory.mktemp("archive")
    for name in (*REAL_CHESTS, "extremity_cr_rle_mono1_10bit.dcm"):
        shutil.copy(real_data / "dicom" / name, root / name)
    write(root / "p1" / "b.dcm", "PAT0001", 11, 1, "20190301")
    write(root / "p1" / "a.dcm", "PAT0001", 12, 1, "20200301", ViewPosition="AP")
    write(root / "p1" / uid(12, 1, 2), "PAT0001", 12, 2, "20200301", "110000")
    write(root / "p1" / "c.DICOM", "PAT0001", 13, 1, "20180301")
    write(root / "p2" / "IM0001", "PAT0002", 21, 1, PatientSex="O", PatientAge=None, PatientBirthDate=None)
    write(root / "p3" / "unknown.dcm", "", 31, 1, ViewPosition="")
    write(root / "p3" / "ct.dcm", "PAT0003", 32, 1, Modality="CT")
    write(root / "p3" / "lateral.dcm", "PAT0003", 33, 1, ViewPosition="LL")
    shutil.copy(root / "p1" / "a.dcm", root / "p1" / "z_copy.dcm")
    (root / "p3" / "letter.dcm").write_text("dear colleague")
    whole = (root / "p1" / "b.dcm").read_bytes()
    (root / "p3" / "cut.dcm").write_bytes(whole[: whole.index(b"\x20\x00\x0d\x00UI") + 20])
    (root / "p3" / "half.dcm").write_bytes(whole[:-300].replace(uid(11, 1, 1).encode(), uid(11, 1, 9).encode()))
    (root / "DICOMDIR").write_bytes(whole)
    (root / "p1" / ".hidden.dcm").write_bytes(whole)
    (root / "notes.txt").write_text("other")
    return root


@pytest.fixture(scope="module")
def ingested(archive, tmp_path_factory, request):
    """The archive ingested with labels for the first patient; its manifest, rows and folder."""
    request.getfixturevalue("ray_cluster")
    folder = tmp_path_factory.mktemp("ingested")
    labels = {uid(13, 1, 1): "Effusion", uid(11, 1, 1): "Mass|Nodule", uid(12, 1, 1): NO_FINDING, uid(99): "Hernia"}
    labels |= {uid(12, 1, 2): "Edema", uid(11, 1, 9): "Nodule"}
    table = label_file(folder / "labels.csv", labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PATIENT_KEY_VARIABLE, SECRET)
        manifest = ingest(archive, folder / "out", labels=table)
    return manifest, rows_of(folder / "out"), folder / "out"


def test_the_manifest_counts_what_was_found(ingested):
    manifest, rows, _ = ingested
    assert manifest.source == "dicom"
    assert len(manifest.metadata_sha256) == 64
    assert manifest.counts == {
        "files": 15,
        "other_files": 3,
        "archives": 0,
        "duplicate_instances": 1,
        "without_patient_id": 1,
        "without_date": 0,
        "order_unknown": 0,
        "age_unknown": 1,
        "sex_unknown": 1,
        "view_unknown": 1,
        "labels_without_image": 1,
        "label_rows_unlabelled": 0,
        "ingested": 8,
        "quarantined": 3,
        "refused": 3,
    }
    assert len(rows) == sum(split.images for split in manifest.splits.values()) == 8
    assert sum(split.labelled for split in manifest.splits.values()) == 4


def left_out(out):
    with (out / "left-out.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_left_out_is_named_by_its_path_in_a_list_of_its_own(ingested):
    rows = sorted(left_out(ingested[2]), key=lambda row: row["file"])
    assert [(row["file"], row["outcome"]) for row in rows] == [
        ("extremity_cr_rle_mono1_10bit.dcm", "refused"),
        ("p3/ct.dcm", "refused"),
        ("p3/cut.dcm", "unreadable"),
        ("p3/half.dcm", "unreadable"),
        ("p3/lateral.dcm", "refused"),
        ("p3/letter.dcm", "unreadable"),
    ]
    patterns = [
        r"BodyPartExamined is EXTREMITY; only chest radiographs are read",
        r"Modality is CT; only radiographs \(CR, DX, DR\) are read",
        r"breaks off inside StudyInstanceUID; send the file again",
        r"pixels do not decode as Explicit VR Little Endian.*; send the file again",
        r"ViewPosition is LL; only frontal views \(PA, AP\) are read",
        r"not a DICOM file \(no DICM prefix\); send DICOM Part 10",
    ]
    for row, pattern in zip(rows, patterns, strict=True):
        assert re.fullmatch(pattern, row["reason"])
    told = sorted((entry.image, entry.reason) for entry in ingested[0].left_out)
    assert told == sorted((row["image"], row["reason"]) for row in rows)
    assert all(re.fullmatch("[0-9a-f]{32}", image) for image, _ in told)


def test_rows_say_what_the_headers_say(ingested):
    real = [row for row in ingested[1] if row["age_years"] in (62.0, 64.0)]
    assert sorted((row["age_years"], row["sex"], row["view"], row["labels"]) for row in real) == [
        (62.0, "M", "PA", None),
        (64.0, "F", "PA", None),
    ]
    unknown = [row for row in ingested[1] if row["age_years"] is None]
    assert [(row["sex"], row["view"]) for row in unknown] == [(None, "PA")]
    assert {row["source"] for row in ingested[1]} == {"dicom"}


def test_visits_follow_the_dates_and_history_what_was_seen_before(ingested):
    of_patient = {}
    for row in ingested[1]:
        of_patient.setdefault(row["patient_key"], []).append(row)
    rows = sorted(max(of_patient.values(), key=len), key=lambda row: (row["visit"], row["view"]))
    assert [(row["visit"], row["view"], names(row["labels"]), row["history_count"]) for row in rows] == [
        (0, "PA", ["Effusion"], 0),
        (1, "PA", ["Mass", "Nodule"], 1),
        (2, "AP", [], 2),
        (2, "PA", ["Edema"], 2),
    ]
    assert [names(row["history_ever"]) for row in rows] == [
        [],
        ["Effusion"],
        *[["Effusion", "Mass", "Nodule"]] * 2,
    ]
    assert [names(row["history_last"]) for row in rows] == [[], ["Effusion"], *[["Mass", "Nodule"]] * 2]
    share = dict(zip(FINDINGS, rows[2]["history_fraction"], strict=True))
    assert (share["Effusion"], share["Mass"], share["Hernia"]) == (0.5, 0.5, 0.0)


def test_pixels_are_those_that_serving_would_see(ingested, archive):
    from cxr_ray.pixels import stored_square

    manifest, _, out = ingested
    wanted = stored_square(decode(Format.DICOM, (archive / "p1" / "b.dcm").read_bytes(), "b.dcm"), 16)
    squares = [
        square
        for split in SPLITS
        if manifest.splits[split].images
        for square in pixel_array(Shards(str(out)).read(split, ["pixels"])["pixels"])
    ]
    assert sum(np.array_equal(square, wanted) for square in squares) == 1


def test_every_patient_is_in_one_split_given_by_its_key(ingested):
    keys = np.array([row["patient_key"] for row in ingested[1]])
    np.testing.assert_array_equal([row["split"] for row in ingested[1]], split_by_key(keys, 0.1, 0.2))


def test_no_identifier_uid_or_date_of_the_source_is_in_a_shard(ingested, archive):
    out = ingested[2]
    told = set()
    for path in archive.rglob("*"):
        if path.is_file():
            told |= identifying(path)
    assert {"PAT0001", "20190301", "9RG1", uid(11, 1, 1), "Muster^PAT0001", "19611224"} <= told
    shards = sorted(out.glob("shards-*/*.parquet"))
    assert shards
    for shard in shards:
        raw = shard.read_bytes()
        table = pq.read_table(shard)
        text = repr(table.drop_columns("pixels").to_pydict()) + str(table.schema) + str(table.schema.metadata)
        assert [value for value in told if value.encode() in raw or value in text] == []
        assert SECRET not in text


def identifying(path):
    """Every name, identifier, UID and date in a file's header that is long enough to be one."""
    import pydicom

    dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True)
    keywords = [f"{stem}{kind}" for stem in ("Study", "Series", "Acquisition", "Content") for kind in ("Date", "Time")]
    keywords += ["PatientID", "PatientName", "PatientBirthDate", "AccessionNumber"]
    keywords += ["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"]
    values = {str(dataset.get(keyword) or "") for keyword in keywords}
    return {value for value in values if len(value) >= 4 and value != "None"}


def test_keys_depend_on_the_secret_and_not_on_where_it_comes_from(archive, ingested, tmp_path, monkeypatch):
    folder = tmp_path / "p1"
    shutil.copytree(archive / "p1", folder)
    keys = {row["patient_key"] for row in ingested[1]}
    assert all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)
    monkeypatch.delenv(PATIENT_KEY_VARIABLE)
    key_file = tmp_path / "key"
    key_file.write_text(SECRET + "\n")
    ingest(folder, tmp_path / "same", patient_key_file=key_file)
    same = rows_of(tmp_path / "same")
    assert {row["patient_key"] for row in same} <= keys
    assert {row["image_id"] for row in same} <= {row["image_id"] for row in ingested[1]}
    key_file.write_text("another secret of the hospital")
    ingest(folder, tmp_path / "other", patient_key_file=key_file)
    assert not {row["patient_key"] for row in rows_of(tmp_path / "other")} & keys


@pytest.mark.parametrize("secret", ["123456789012345", " 12345678 "])
def test_a_secret_that_can_be_guessed_is_refused(tmp_path, monkeypatch, secret):
    monkeypatch.setenv(PATIENT_KEY_VARIABLE, secret)
    held = len(secret.strip())
    with pytest.raises(CxrRayError, match=rf"holds a secret of {held} bytes, which can be guessed.*openssl rand -hex 32") as e:
        ingest(tmp_path, tmp_path / "out")
    assert secret.strip() not in str(e.value)


@pytest.mark.parametrize("secret", ["", "  \n"])
def test_without_a_secret_nothing_is_read(archive, tmp_path, monkeypatch, secret):
    monkeypatch.setenv(PATIENT_KEY_VARIABLE, secret)
    with pytest.raises(CxrRayError, match=rf"^{PATIENT_KEY_VARIABLE}: holds no secret.*openssl rand -hex 32.*--patient-key"):
        ingest(archive, tmp_path / "out")
    key_file = tmp_path / "key"
    key_file.write_text(secret)
    with pytest.raises(CxrRayError, match=r"^--patient-key-file .*key: holds no secret"):
        ingest(archive, tmp_path / "out", patient_key_file=key_file)
    with pytest.raises(CxrRayError, match=r"^--patient-key-file .*absent: cannot be read \(No such file or directory\)"):
        ingest(archive, tmp_path / "out", patient_key_file=tmp_path / "absent")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("damage", ["header", "pixels", "both"])
def test_more_unreadable_files_than_allowed_stop_the_run_and_leave_no_dataset(tmp_path, damage):
    """Two of 100 are damaged, three of them refused: 1 % is too little, 2 % is enough."""
    for study in range(95):
        write(tmp_path / "in" / f"{study:03d}.dcm", f"P{study}", study, 1)
    for study in range(95, 98):
        write(tmp_path / "in" / f"ct{study}.dcm", "P", study, 1, Modality="CT")
    for study in (98, 99):
        path = tmp_path / "in" / f"bad{study}.dcm"
        write(path, "P", study, 1)
        in_header = damage == "header" or (damage == "both" and study == 98)
        path.write_bytes(b"no DICOM" if in_header else path.read_bytes()[:-300])
    message = r"^2 of 100 images are unreadable, more than 1\.0% \(first: .*\); repair them or raise"
    with pytest.raises(CxrRayError, match=message) as caught:
        ingest(tmp_path / "in", tmp_path / "out", max_quarantined=0.01)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = ingest(tmp_path / "in", tmp_path / "out", max_quarantined=0.02)
    assert {name: manifest.counts[name] for name in ("ingested", "quarantined", "refused")} == {
        "ingested": 95,
        "quarantined": 2,
        "refused": 3,
    }


def test_the_same_run_again_changes_nothing_and_another_needs_overwrite(tmp_path):
    out = tmp_path / "out"
    write(tmp_path / "in" / "1.dcm", "P", 1, 1)
    first = ingest(tmp_path / "in", out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert ingest(tmp_path / "in", out) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    write(tmp_path / "in" / "2.dcm", "P", 2, 1)
    with pytest.raises(CxrRayError, match=r"holds a dataset of other rows; choose another place or give --overwrite$"):
        ingest(tmp_path / "in", out)
    with pytest.raises(CxrRayError, match=r"holds a dataset made with size 16; choose another place or give --overwrite$"):
        ingest(tmp_path / "in", out, size=32)
    manifest = ingest(tmp_path / "in", out, overwrite=True)
    assert manifest.counts["ingested"] == len(rows_of(out)) == 2
    assert len(list(out.glob("shards-*"))) == 1


def test_an_instance_that_is_there_twice_is_taken_once_and_its_other_content_refused(tmp_path):
    write(tmp_path / "in" / "a" / "1.dcm", "P", 1, 1)
    shutil.copytree(tmp_path / "in" / "a", tmp_path / "in" / "b")
    edited = write(tmp_path / "in" / "c" / "1.dcm", "P", 1, 1, ViewPosition="AP")
    packed = zipfile.ZipFile(tmp_path / "in" / "d.zip", "w")
    with packed:
        packed.write(tmp_path / "in" / "a" / "1.dcm", "1.dcm")
    write(tmp_path / "in" / "e.dcm", "P", 2, 1)
    assert edited == uid(1, 1, 1)
    manifest = ingest(tmp_path / "in", tmp_path / "out")
    assert {name: manifest.counts[name] for name in ("files", "archives", "ingested", "duplicate_instances", "refused")} == {
        "files": 5,
        "archives": 1,
        "ingested": 2,
        "duplicate_instances": 2,
        "refused": 1,
    }
    assert [row["view"] for row in rows_of(tmp_path / "out")] == ["PA", "PA"]
    (row,) = left_out(tmp_path / "out")
    assert (row["file"], row["outcome"]) == ("c/1.dcm", "refused")
    assert row["reason"] == "same SOP Instance UID as another file, other content"


def test_a_source_without_radiographs_is_said_so(tmp_path):
    with pytest.raises(
        CxrRayError, match=r"^--source .*absent: cannot be listed \(No such file or directory\); check the path"
    ):
        ingest(tmp_path / "absent", tmp_path / "out")
    write(tmp_path / "in" / "1.dcm", "P", 1, 1, Modality="CT")
    with pytest.raises(CxrRayError, match=r"none of 1 DICOM files is a frontal chest radiograph \(first: Modality"):
        ingest(tmp_path / "in", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CxrRayError, match=r"none of 0 DICOM files is a frontal chest radiograph; give the folder"):
        ingest(tmp_path / "empty", tmp_path / "out")


def test_shares_of_more_than_all_patients_are_bad_usage():
    given = {"source": "in", "out": "out", "val_fraction": 0.9}
    with pytest.raises(UsageError, match=r"^setting 'test_fraction' is 0\.2: .*val_fraction 0\.9 the shares exceed 1"):
        load_settings(DicomSettings, None, given)
    assert load_settings(DicomSettings, None, given | {"val_fraction": 0.0, "test_fraction": 1.0}).test_fraction == 1.0


def test_the_command_prints_the_manifest(tmp_path):
    import json

    from typer.testing import CliRunner

    from ingest.cli import app

    write(tmp_path / "in" / "1.dcm", "P", 1, 1)
    arguments = ["dicom", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--size", "16", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout[result.stdout.index("{") :])["counts"]["ingested"] == 1
    assert Path(tmp_path / "out" / "manifest.json").is_file()
