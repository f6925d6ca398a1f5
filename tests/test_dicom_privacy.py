"""What `cxr-ray ingest dicom` tells of an archive: every identifier in it is searched for in all that the command leaves."""

import csv
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pydicom
import pytest
from chest_films import write
from pydicom.dataset import Dataset
from pydicom.fileset import FileSet

from ingest.dicom import PATIENT_KEY_VARIABLE

# In each name, number and text of the archive, and nowhere else.
MARK = "ZQXJK"
UIDS = "1.2.999.424242"
SECRET = "a secret of this hospital's own"
BORN, TAKEN, AT = "18930417", "19070823", "101112.987654"
TRACES = [MARK, MARK.lower(), UIDS, BORN, TAKEN, AT, "1893-04-17", "1907-08-23", SECRET]

# pydicom warns of values that are against the standard, which these are on purpose.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::UserWarning")]


def film(path, number, **attributes):
    """A film whose every attribute that could tell of the patient holds the mark."""
    named = {f"Patient{name}": f"{MARK}{name}" for name in ("ID", "Address", "Comments", "MotherBirthName")}
    named |= {name: f"{MARK}^{name}^{number}" for name in ("PatientName", "ReferringPhysicianName", "OperatorsName")}
    named |= {name: f"{MARK} {name}" for name in ("InstitutionName", "StationName", "AccessionNumber", "StudyID")}
    named |= dict.fromkeys(("StudyDescription", "SeriesDescription", "ImageComments", "ProtocolName"), f"film of {MARK}")
    named |= dict.fromkeys(("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"), TAKEN)
    named |= dict.fromkeys(("StudyTime", "SeriesTime", "AcquisitionTime", "ContentTime"), AT)
    named |= {"PatientBirthDate": BORN, "PatientAge": None, "SeriesNumber": 1, "InstanceNumber": number}
    named |= {"StudyInstanceUID": f"{UIDS}.{number}", "SeriesInstanceUID": f"{UIDS}.{number}.1"}
    write(path, "", 1, number, **named | {"SOPInstanceUID": f"{UIDS}.{number}.1.1"} | attributes)


def frames(count):
    """Number of Frames that is no number."""
    dataset = Dataset()
    dataset.add_new("NumberOfFrames", "LO", count)
    return dataset["NumberOfFrames"]


def make_archive(root):
    """Good, refused, damaged, undecodable, repeated, absent and foreign files, in folders, a zip and a medium."""
    folder = root / f"{MARK}^HANS"
    for number in range(1, 5):
        film(folder / f"{MARK}{number}.dcm", number)
    film(folder / f"{MARK}ct.dcm", 5, Modality="CT", BodyPartExamined=f"knee of {MARK}^HANS")
    film(folder / f"{MARK}knee.dcm", 6, BodyPartExamined=f"Knee of {MARK}")
    film(folder / f"{MARK}view.dcm", 7, ViewPosition=f"as {MARK} wished")
    film(folder / f"{MARK}half.dcm", 8)
    half = folder / f"{MARK}half.dcm"
    half.write_bytes(half.read_bytes()[:-300])
    film(folder / f"{MARK}cut.dcm", 9)
    cut = folder / f"{MARK}cut.dcm"
    cut.write_bytes(cut.read_bytes()[: cut.read_bytes().index(b"PatientName") + 3])
    (folder / f"{MARK}.dcm").write_text(f"dear {MARK}")
    film(folder / f"{MARK}again.dcm", 1, ViewPosition="AP")
    film(folder / f"{MARK}rows.dcm", 10, PhotometricInterpretation=f"{MARK}^HANS")
    film(folder / f"{MARK}undated.dcm", 11, StudyDate=f"{MARK}", SeriesDate="", AcquisitionDate="", ContentDate="")
    wrong = pydicom.dcmread(folder / f"{MARK}4.dcm")
    wrong.SOPInstanceUID = f"{UIDS}.12"
    wrong["NumberOfFrames"] = frames(f"{MARK} frames")
    wrong.save_as(folder / f"{MARK}frames.dcm")
    with zipfile.ZipFile(root / f"{MARK}.zip", "w") as packed:
        film(root / "13.dcm", 13)
        packed.write(root / "13.dcm", f"{MARK}/{MARK}13")
        (root / "13.dcm").unlink()
    (root / f"{MARK}broken.zip").write_bytes(f"PK{MARK}".encode())
    files = FileSet()
    film(root / "14.dcm", 14)
    files.add(root / "14.dcm")
    files.write(root / f"{MARK}medium")
    (root / "14.dcm").unlink()
    shutil.rmtree(root / f"{MARK}medium" / "PT000000")


def labels(path):
    path.write_text(
        f"SOPInstanceUID,AccessionNumber,Finding Labels,Name\n{UIDS}.1.1.1,,Mass,{MARK}\n{UIDS}.99,,Edema,{MARK}\n"
        f",{MARK} AccessionNumber,Nodule,{MARK}\n"
    )
    return path


def run(source, out, table, ray_folder):
    command = [sys.executable, "-m", "cxr_ray", "ingest", "dicom", "--source", source, "--out", out, "--labels", table]
    command += ["--size", "16", "--max-quarantined", "1"]
    environment = os.environ | {PATIENT_KEY_VARIABLE: SECRET, "RAY_TMPDIR": str(ray_folder)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.fixture(scope="module")
def ingested(tmp_path_factory):
    """The finished command, its dataset, and all that Ray left in its own folder."""
    root = tmp_path_factory.mktemp("private")
    make_archive(root / "in")
    # Ray's sockets need a short path.
    ray_folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    try:
        finished = run(root / "in", root / "out", labels(root / "labels.csv"), ray_folder)
        yield finished, root / "out", ray_folder
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


def told(text):
    """Which traces of the archive are in a text or in bytes."""
    data = text.encode() if isinstance(text, str) else text
    unkeyed = [hashlib.sha256(f"{MARK}ID".encode()).hexdigest()[:32], hashlib.sha256(f"{UIDS}.1.1.1".encode()).hexdigest()[:32]]
    return [trace for trace in (*TRACES, *unkeyed) if trace.encode() in data]


def test_the_archive_is_ingested_and_its_list_of_left_out_files_names_them(ingested):
    finished, out, _ = ingested
    assert finished.returncode == 0, finished.stderr
    names = (out / "left-out.csv").read_text()
    for name in ("ct.dcm", "knee.dcm", "half.dcm", "cut.dcm", ".dcm", "again.dcm", "rows.dcm", "frames.dcm", "broken.zip"):
        assert f"{MARK}{name}," in names
    assert f"{MARK}medium/PT000000/" in names
    with (out / "left-out.csv").open(newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    assert [reason for reason in reasons if told(reason)] == []


def test_shards_tell_nothing(ingested):
    shards = sorted(ingested[1].glob("shards-*/*.parquet"))
    assert shards
    rows = 0
    for shard in shards:
        table = pq.read_table(shard)
        rows += table.num_rows
        text = repr(table.to_pydict()) + str(table.schema) + str(table.schema.metadata)
        assert told(shard.read_bytes()) == []
        assert told(text) == []
        assert b"".join(table["pixels"].to_pylist()).find(MARK.encode()) < 0
    assert rows == 7


def test_the_rest_of_the_dataset_tells_nothing(ingested):
    out = ingested[1]
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "left-out.csv"]
    assert "manifest.json" in {path.name for path in files}
    assert [(path.name, told(path.read_bytes())) for path in files if told(path.read_bytes())] == []
    assert [path for path in files if told(str(path.relative_to(out)))] == []


def test_the_terminal_tells_nothing(ingested):
    finished = ingested[0]
    assert "headers:" in finished.stderr
    assert told(finished.stdout + finished.stderr) == []


def test_rays_logs_tell_nothing(ingested):
    files = [path for path in ingested[2].rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.suffix == ".log" for path in files)
    assert [(path.name, told(path.read_bytes())) for path in files if told(path.read_bytes())] == []
