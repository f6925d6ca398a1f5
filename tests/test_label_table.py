"""The CSV of labels: its keys, its two ways to write labels, and what is wrong in it told without identifiers."""

import hashlib

import numpy as np
import pytest

from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS, names
from ingest.label_table import KEYS, read_label_table


def table(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_label_table(str(path))


def given(labels):
    return {key: {name: names(row) for name, row in rows.items()} for key, rows in labels.labels.items() if rows}


def identifiers(*images):
    """(instance, study, accession) of each image."""
    return dict(zip(KEYS, zip(*images, strict=True), strict=True))


def shown(labels):
    return [None if np.isnan(row).all() else names(row) for row in labels]


SPELLINGS = {
    "SOPInstanceUID": ["SOPInstanceUID", "SOP Instance UID", "sop_instance_uid", "SOPinstanceUid", "instance-uid"],
    "StudyInstanceUID": ["StudyInstanceUID", "Study Instance UID", "Study UID", "study_instance_uid"],
    "AccessionNumber": ["AccessionNumber", "Accession Number", "accession_number", "ACCESSION"],
}


@pytest.mark.parametrize(("key", "column"), [(key, column) for key, columns in SPELLINGS.items() for column in columns])
def test_columns_are_found_however_they_are_spelt(tmp_path, key, column):
    assert given(table(tmp_path, f"{column},finding_labels\n1.2,Mass|Nodule\n1.3,No Finding\n")) == {
        key: {"1.2": ["Mass", "Nodule"], "1.3": []}
    }


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_as_spreadsheets_write_it(tmp_path, delimiter):
    rows = [["Reader", "Finding Labels", "SOPInstanceUID"], ["A", '"Mass|Edema"', " 1.2 "], [], ["B", "no finding", "1.3"]]
    text = "\ufeff" + "".join(delimiter.join(row) + "\r\n" for row in rows)
    read = table(tmp_path, text)
    assert given(read) == {"SOPInstanceUID": {"1.2": ["Mass", "Edema"], "1.3": []}}
    assert read.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_the_finest_key_that_a_row_fills_in_counts(tmp_path):
    text = "Accession,Study UID,SOPInstanceUID,Finding Labels\nA1,2.1,1.1,Mass\nA1,2.1,,Edema\nA1,,,Hernia\nA2,,,Nodule\n"
    read = table(tmp_path, text)
    assert given(read) == {
        "SOPInstanceUID": {"1.1": ["Mass"]},
        "StudyInstanceUID": {"2.1": ["Edema"]},
        "AccessionNumber": {"A1": ["Hernia"], "A2": ["Nodule"]},
    }
    images = identifiers(("1.1", "2.1", "A1"), ("1.2", "2.1", "A1"), ("1.3", "2.2", "A1"), ("1.4", "2.3", ""))
    assert shown(read.of_images(images)) == [["Mass"], ["Edema"], ["Hernia"], None]
    assert read.without_image(images) == 1
    assert read.of_images(images).dtype == np.float32


def wide(*rows, columns=FINDINGS, key="StudyInstanceUID"):
    return "\n".join([",".join([key, *columns]), *(",".join(map(str, row)) for row in rows)]) + "\n"


def test_one_column_a_finding(tmp_path):
    mass = [int(name == "Mass") for name in FINDINGS]
    spelt = [name.replace("_", " ").lower() for name in FINDINGS]
    read = table(tmp_path, wide(["2.1", *mass], ["2.2", *["0.0"] * 14], ["2.3", *mass[:-1], ""], columns=spelt))
    assert given(read) == {"StudyInstanceUID": {"2.1": ["Mass"], "2.2": []}}
    assert read.unlabelled_rows == 1


def test_columns_of_findings_may_stand_in_any_order(tmp_path):
    columns = [*reversed(FINDINGS), "No Finding"]
    read = table(tmp_path, wide(["2.1", *[int(name == "Hernia") for name in columns]], columns=columns))
    assert given(read) == {"StudyInstanceUID": {"2.1": ["Hernia"]}}


def test_a_row_may_be_there_twice_but_not_in_contradiction(tmp_path):
    text = "SOPInstanceUID,Finding Labels\n1.2,Mass|Edema\n1.3,Mass\n1.2,Edema|Mass\n"
    assert len(table(tmp_path, text).labels["SOPInstanceUID"]) == 2
    with pytest.raises(
        CxrRayError, match=r"labels\.csv lines 2 and 5: give the same SOPInstanceUID different labels; corr"
    ) as e:
        table(tmp_path, text + "1.2,Hernia\n")
    assert "1.2" not in str(e.value).replace(str(tmp_path), "")


ZEROS = [0] * 14
ERRORS = {
    "no label column": (
        "SOPInstanceUID,Labels\n1.2,Mass\n",
        r": has no column 'Finding Labels' and none a finding \(found: SO",
    ),
    "no key": ("Image,Finding Labels\n1.2,Mass\n", r": has no column SOPInstanceUID, StudyInstanceUID, AccessionNumber \(fou"),
    "empty": ("", r": has no column SOPInstanceUID, StudyInstanceUID, AccessionNumber \(found: \)"),
    "two keys": ("SOP UID,SOPInstanceUID,Finding Labels\n", r": has 2 columns for SOPInstanceUID \(SOP UID, SOPInstanceUID\)"),
    "unknown": (
        "SOPInstanceUID,Finding Labels\n1.2,Cold|Mass\n\n1.3,Flu|Cold\n1.4,Cold\n",
        r": labels are not known: 'Cold' \(3 rows\), 'Flu' \(1 rows\); use Atelectasis, .* or No Finding, with '\|' in bet",
    ),
    "beside": (
        "SOPInstanceUID,Finding Labels\n1.2,Mass|No Finding\n",
        r" line 2: labels 'Mass\|No Finding' hold 'No Finding' b",
    ),
    "no label": ("SOPInstanceUID,Finding Labels\n1.2,\n", r" line 2: the label text is empty; write 'No Finding'"),
    "no UID": ("SOPInstanceUID,Finding Labels\n ,Mass\n", r" line 2: SOPInstanceUID is empty; correct or remove the row"),
    "no key value": ("Study UID,SOP UID,Finding Labels\n,,Mass\n", r" line 2: SOPInstanceUID, StudyInstanceUID are empty; cor"),
    "short": ("SOPInstanceUID,Finding Labels\n1.2\n", r" line 2: has 1 values under 2 columns; correct the row"),
    "quote": ('SOPInstanceUID,Finding Labels\n1.2,"Mass\n', r": is no readable CSV \(unexpected end of data\); save it as CSV"),
    "bytes": (
        b"SOPInstanceUID,Finding Labels\n1.2,\xff\n",
        r": is no readable CSV \(invalid start byte at byte 34\); save it i",
    ),
    "value": (wide(["2.1", -1, *ZEROS[1:]]), r" line 2: Atelectasis is '-1'; write 0 or 1, or nothing where it is not known"),
    "not all": (
        wide(columns=FINDINGS[2:]),
        r": has no column Atelectasis, Cardiomegaly; give all 14 findings, or 'Finding Labe",
    ),
    "both": (
        wide(columns=[*FINDINGS, "Finding Labels"]),
        r": has several columns for the same labels \(.*\); remove all but one",
    ),
    "twice": (wide(columns=[*FINDINGS, "mass"]), r": has several columns for the same labels"),
}


@pytest.mark.parametrize(("content", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_file_line_and_remedy_in_one_line(tmp_path, content, message):
    with pytest.raises(CxrRayError, match=rf"^{tmp_path}/labels\.csv{message}") as caught:
        table(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(CxrRayError, match=r"absent\.csv: cannot be read"):
        read_label_table(str(tmp_path / "absent.csv"))
