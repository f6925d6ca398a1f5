"""DICOM files as a Ray Data source: folders, single files, DICOMDIRs and zips, whole or damaged."""

import io
import shutil
import zipfile

import numpy as np
import pyarrow as pa
import pydicom
import pytest
from chest_films import uid, write
from pydicom.fileset import FileSet

from cxr_ray.decoding import Format, decode
from cxr_ray.errors import CxrRayError
from cxr_ray.pixels import stored_square
from ingest.dicom_source import ACCEPTED, MAX_FILES_PER_TASK, REFUSED, UNREADABLE, DicomDatasource, header_schema
from ingest.files import list_files

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def rows(uri, size=None):
    """The rows of a source by name."""
    import ray.data

    found = ray.data.read_datasource(DicomDatasource(str(uri), size)).take_all()
    assert len({row["name"] for row in found}) == len(found)
    return {row["name"]: row for row in found}


def outcomes(found):
    return {name: row["reason"] or row["outcome"] for name, row in found.items()}


@pytest.fixture
def folder(tmp_path):
    """Accepted, refused, damaged, foreign and unlikely files."""
    root = tmp_path / "in"
    write(root / "a b" / "1.dcm", "P1", 1, 1, "20200131", "101112")
    write(root / "ct.dcm", "P1", 2, 1, Modality="CT")
    write(root / "half.dcm", "P1", 3, 1)
    (root / "half.dcm").write_bytes((root / "half.dcm").read_bytes()[:-300])
    (root / "letter.dcm").write_text("dear colleague")
    (root / "notes.txt").write_text("other")
    return root


def test_a_row_says_what_the_header_says(folder):
    found = rows(folder)
    assert set(found) == {"a b/1.dcm", "ct.dcm", "half.dcm", "letter.dcm"}
    (file,) = (file for file in list_files(str(folder), "--source")[2] if file.name == "a b/1.dcm")
    row = found["a b/1.dcm"]
    assert (row.pop("location"), row.pop("stamp"), str(row.pop("acquired"))) == (
        file.location,
        file.stamp,
        "2020-01-31 10:11:12",
    )
    assert row == {
        "name": "a b/1.dcm",
        "outcome": ACCEPTED,
        "reason": None,
        "instance": uid(1, 1, 1),
        "study": uid(1),
        "patient": "P1",
        "accession": "ACC1",
        "age_years": 58.0,
        "sex": "F",
        "view": "PA",
    }
    assert (found["ct.dcm"]["outcome"], found["ct.dcm"]["instance"]) == (REFUSED, None)
    assert found["ct.dcm"]["reason"] == "Modality is CT; only radiographs (CR, DX, DR) are read"
    assert (found["letter.dcm"]["outcome"], found["half.dcm"]["outcome"]) == (UNREADABLE, ACCEPTED)
    assert found["letter.dcm"]["reason"] == "not a DICOM file (no DICM prefix); send DICOM Part 10"


def test_with_a_size_accepted_rows_have_their_square(folder):
    with zipfile.ZipFile(folder / "z.zip", "w") as packed:
        packed.write(folder / "a b" / "1.dcm", "1.dcm")
    found = rows(folder, 16)
    assert {name: row["outcome"] for name, row in found.items()} == {
        "a b/1.dcm": ACCEPTED,
        "ct.dcm": REFUSED,
        "half.dcm": UNREADABLE,
        "letter.dcm": UNREADABLE,
        "z.zip!/1.dcm": ACCEPTED,
    }
    wanted = stored_square(decode(Format.DICOM, (folder / "a b" / "1.dcm").read_bytes(), ""), 16)
    for name in ("a b/1.dcm", "z.zip!/1.dcm"):
        np.testing.assert_array_equal(np.frombuffer(found[name].pop("pixels"), np.uint8).reshape(16, 16), wanted)
    assert {row.get("pixels") for row in found.values()} == {None}
    assert found["half.dcm"]["instance"] is None


def test_headers_are_read_without_the_pixels(tmp_path):
    """A file whose pixels are absent or huge costs no more than its header."""
    write(tmp_path / "big.dcm", "P", 1, 1)
    whole = (tmp_path / "big.dcm").read_bytes()
    with (tmp_path / "big.dcm").open("r+b") as file:
        file.seek(len(whole) - 576 - 4)
        file.write((1 << 31).to_bytes(4, "little"))
        file.truncate(1 << 31)
    assert outcomes(rows(tmp_path)) == {"big.dcm": ACCEPTED}
    (read,) = DicomDatasource(str(tmp_path)).get_read_tasks(1)
    assert [table.num_rows for table in read()] == [1]


def test_tasks_are_as_many_as_asked_for_and_never_too_large(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.dcm").write_bytes(b"")
    source = DicomDatasource(str(tmp_path))
    for parallelism, sizes in ((1, [10]), (3, [4, 4, 2]), (200, [1] * 10)):
        tasks = source.get_read_tasks(parallelism)
        assert [task.metadata.num_rows for task in tasks] == sizes
        assert all(task.schema == header_schema() for task in tasks)
        assert sum(task.metadata.size_bytes for task in tasks) == source.estimate_inmemory_data_size()
        tables = [table for task in tasks for table in task()]
        assert pa.concat_tables(tables)["name"].to_pylist() == [f"{number}.dcm" for number in range(10)]
    (whole,) = source.get_read_tasks(1, per_task_row_limit=4)
    assert sum(table.num_rows for table in whole()) == 4
    assert DicomDatasource(str(tmp_path), 64).estimate_inmemory_data_size() > 10 * 64 * 64
    assert MAX_FILES_PER_TASK >= 256


def test_a_single_file_is_read_whatever_its_name(tmp_path):
    write(tmp_path / "film.bin", "P", 1, 1)
    write(tmp_path / "other.dcm", "P", 2, 1)
    assert outcomes(rows(tmp_path / "film.bin")) == {"film.bin": ACCEPTED}
    assert outcomes(rows(f"file://{tmp_path}/film.bin")) == {"film.bin": ACCEPTED}
    with pytest.raises(CxrRayError, match=r"^--source .*absent: cannot be listed"):
        DicomDatasource(str(tmp_path / "absent"))


@pytest.fixture
def medium(tmp_path):
    """A medium written by pydicom: DICOMDIR and three files in folders; a fourth is not in the DICOMDIR."""
    files = FileSet()
    for study in (1, 2, 3):
        path = tmp_path / "films" / f"{study}.dcm"
        write(path, "P", study, 1, PatientID="P", StudyID="1", SeriesNumber=1, InstanceNumber=1)
        files.add(path)
    files.write(tmp_path / "medium")
    write(tmp_path / "medium" / "EXTRA.dcm", "P", 4, 1)
    return tmp_path / "medium"


def on_medium(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.suffix != ".dcm")[1:]


def test_a_dicomdir_is_exactly_the_files_that_it_references(medium):
    names = on_medium(medium)
    assert len(names) == 3
    assert outcomes(rows(medium / "DICOMDIR")) == dict.fromkeys(names, ACCEPTED)


def test_names_of_a_dicomdir_are_found_in_any_case_and_with_versions(medium):
    first, second, third = (medium / name for name in on_medium(medium))
    first.rename(first.with_name(first.name.lower() + ";1"))
    second.rename(second.with_name(second.name + "."))
    (medium / "DICOMDIR").rename(medium / "dicomdir;1")
    shutil.move(medium / "PT000000", medium / "pt000000")
    found = rows(medium / "dicomdir;1")
    assert set(outcomes(found).values()) == {ACCEPTED}
    assert {row["study"] for row in found.values()} == {uid(1), uid(2), uid(3)}
    assert third.name


def test_what_a_dicomdir_names_and_is_absent_is_unreadable(medium):
    gone = on_medium(medium)[1]
    (medium / gone).unlink()
    absent = "named in DICOMDIR, but absent; copy the medium again"
    found = rows(medium / "DICOMDIR")
    assert {name: row["outcome"] for name, row in found.items()} == {
        name: UNREADABLE if name == gone else ACCEPTED for name in (*on_medium(medium), gone)
    }
    assert found[gone]["reason"] == absent
    in_folder = rows(medium.parent / "medium")
    assert outcomes(in_folder) == outcomes(found) | {"EXTRA.dcm": ACCEPTED}
    source = DicomDatasource(str(medium))
    assert (source.count(), source.found.other_files) == (4, 1)


def test_records_that_are_no_longer_in_use_are_passed_over(medium):
    directory = pydicom.dcmread(medium / "DICOMDIR")
    gone = next(record for record in directory.DirectoryRecordSequence if "ReferencedFileID" in record)
    gone.RecordInUseFlag = 0
    directory.save_as(medium / "DICOMDIR")
    assert len(rows(medium / "DICOMDIR")) == 2


def test_a_damaged_dicomdir_is_said_so_and_costs_a_folder_nothing_else(medium):
    (medium / "DICOMDIR").write_bytes((medium / "DICOMDIR").read_bytes()[:700])
    with pytest.raises(CxrRayError, match=r"^--source DICOMDIR: "):
        DicomDatasource(str(medium / "DICOMDIR"))
    found = rows(medium)
    assert sorted(row["outcome"] for row in found.values()) == [ACCEPTED] * 4 + [UNREADABLE]
    assert found["DICOMDIR"]["outcome"] == UNREADABLE
    assert DicomDatasource(str(medium)).found.other_files == 0


def test_zips_are_read_without_being_unpacked_and_only_to_the_first_level(tmp_path):
    write(tmp_path / "1.dcm", "P", 1, 1)
    film = (tmp_path / "1.dcm").read_bytes()
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as packed:
        packed.writestr("deep.dcm", film)
    with zipfile.ZipFile(tmp_path / "Ä r.ZIP", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("Müller Hans/IM 1", film)
        packed.writestr("half.dcm", film[:200])
        packed.writestr("__MACOSX/._IM1", b"")
        packed.writestr("inner.zip", inner.getvalue())
        packed.writestr("readme.txt", b"")
    (tmp_path / "broken.zip").write_bytes((tmp_path / "Ä r.ZIP").read_bytes()[:-30])
    before = sorted(tmp_path.rglob("*"))
    found = rows(tmp_path)
    assert {name: row["outcome"] for name, row in found.items()} == {
        "1.dcm": ACCEPTED,
        "Ä r.ZIP!/Müller Hans/IM 1": ACCEPTED,
        "Ä r.ZIP!/half.dcm": UNREADABLE,
        "broken.zip": UNREADABLE,
    }
    assert found["broken.zip"]["reason"] == "breaks off after 0 files; download it again"
    assert sorted(tmp_path.rglob("*")) == before
    source = DicomDatasource(str(tmp_path)).found
    assert (source.archives, source.other_files) == (1, 3)
    assert set(rows(tmp_path / "Ä r.ZIP")) == {name for name in found if "!/" in name}
    with pytest.raises(CxrRayError, match=r"^--source broken\.zip: breaks off after 0 files; download it again$"):
        DicomDatasource(str(tmp_path / "broken.zip"))


def test_a_medium_in_a_zip_is_checked_against_its_dicomdir(medium, tmp_path):
    gone = on_medium(medium)[0]
    with zipfile.ZipFile(tmp_path / "cd.zip", "w") as packed:
        for path in medium.rglob("*"):
            if str(path.relative_to(medium)) != gone:
                packed.write(path, path.relative_to(medium))
    found = rows(tmp_path / "cd.zip")
    assert len(found) == 4
    assert found[f"cd.zip!/{gone}"]["outcome"] == UNREADABLE


def test_a_name_that_is_no_text_costs_itself_only(tmp_path):
    write(tmp_path / "in" / "1.dcm", "P", 1, 1)
    shutil.copy(tmp_path / "in" / "1.dcm", bytes(tmp_path / "in") + b"/\xff.dcm")
    assert outcomes(rows(tmp_path / "in")) == {
        "1.dcm": ACCEPTED,
        r"\xff.dcm": "cannot be read (No such file or directory); check the file",
    }
