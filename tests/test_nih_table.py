"""The release's table in every form in which people have it, and every way in which it can be wrong."""

import csv

import numpy as np
import pytest

from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS, names, parse
from ingest.nih_table import NihTable, read_table

HEADER_2020 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
HEADER_KAGGLE = (
    "ImageIndex,FindingLabels,Follow-up#,PatientID,PatientAge,PatientGender,ViewPosition,"
    "OriginalImageWidth,OriginalImageHeight,OriginalImagePixelSpacing_x,OriginalImagePixelSpacing_y"
)
EXTENT = "2682,2749,0.143,0.143"
PLACES = ("image", "labels", "follow_up", "patient", "age", "sex", "view")
ROW = ("a.png", "Mass", "0", "1", "57", "M", "PA")


def text(*rows, header=HEADER_2020, extent=EXTENT) -> str:
    return "\n".join([header, *(",".join([*map(str, row), extent]) for row in rows)]) + "\n"


def read(*rows, **form) -> NihTable:
    return read_table(text(*rows, **form).encode(), "release/table.csv")


def row(**values) -> tuple:
    return tuple(values.get(place, value) for place, value in zip(PLACES, ROW, strict=True))


def ages(*values) -> NihTable:
    return read(*(row(image=f"{number}.png", follow_up=number, age=value) for number, value in enumerate(values)))


def refused(content: str | bytes) -> str:
    with pytest.raises(CxrRayError) as error:
        read_table(content if isinstance(content, bytes) else content.encode(), "release/table.csv")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("release/table.csv")
    return message


@pytest.fixture(scope="module")
def content_2020(real_data) -> bytes:
    return (real_data / "nih" / "Data_Entry_2017_v2020.csv").read_bytes()


@pytest.fixture(scope="module")
def table_2020(content_2020) -> NihTable:
    return read_table(content_2020, "Data_Entry_2017_v2020.csv")


@pytest.fixture(scope="module")
def rows_2020(content_2020) -> list[list[str]]:
    return list(csv.reader(content_2020.decode().splitlines()))[1:]


# The forms.


def test_the_table_of_2020_as_a_plain_reader_sees_it(table_2020, rows_2020):
    assert table_2020.image.tolist() == [fields[0] for fields in rows_2020]
    assert table_2020.patient.tolist() == [int(fields[3]) for fields in rows_2020]
    assert table_2020.age_years.tolist() == [int(fields[4]) for fields in rows_2020]
    assert table_2020.sex.tolist() == [fields[5] for fields in rows_2020]
    assert table_2020.view.tolist() == [fields[6] for fields in rows_2020]
    assert [tuple(names(labels)) for labels in table_2020.labels] == [
        tuple(name for name in FINDINGS if name in fields[1].split("|")) for fields in rows_2020
    ]
    assert table_2020.counts == {"age_unknown": 0, "ages_impossible": 0, "ages_converted": 0, "patients_reordered": 0}
    assert table_2020.warnings == ()


def test_the_table_of_2020_is_ordered_by_follow_up(table_2020, rows_2020):
    follow_up = np.array([int(fields[2]) for fields in rows_2020])
    by_follow_up = np.lexsort((follow_up, table_2020.patient))
    np.testing.assert_array_equal(by_follow_up, np.lexsort((table_2020.order, table_2020.patient)))


def test_the_whole_table_in_the_form_of_2017_is_put_in_the_order_of_age(table_2020, rows_2020):
    """Follow-up # is there the number in the file's name, the header ends with a comma, and some are 414 years old."""
    lines = [f"{HEADER_2020},"]
    for number, fields in enumerate(rows_2020):
        suffix = fields[0].removesuffix(".png").split("_")[1]
        age = "414" if number == 7 else fields[4]
        lines.append(",".join([*fields[:2], str(int(suffix)), fields[3], age, *fields[5:], ""]))
    table = read_table("\n".join(lines).encode(), "Data_Entry_2017.csv")
    assert table.counts["ages_impossible"] == table.counts["age_unknown"] == 1
    assert table.counts["patients_reordered"] > 2000
    assert len(table.warnings) == 1
    assert f"({table.counts['patients_reordered']} patients grow younger)" in table.warnings[0]
    assert "Data_Entry_2017_v2020.csv" in table.warnings[0]
    in_time = np.lexsort((table.order, table.patient))
    same_patient = np.diff(table.patient[in_time]) == 0
    assert not (np.diff(table_2020.age_years[in_time])[same_patient] < 0).any()
    # The published example: by its names, patient 18388 is 76, 77, 78, 73, 74 and 74 years old.
    named = [table.image[at] for at in in_time if table.patient[at] == 18388]
    assert named == [f"00018388_00{suffix}.png" for suffix in (3, 4, 5, 0, 1, 2)]


def test_kaggle_copies():
    table = read(row(), header=HEADER_KAGGLE)
    assert (table.image[0], table.patient[0], table.age_years[0], table.sex[0], table.view[0]) == ("a.png", 1, 57, "M", "PA")


@pytest.mark.parametrize(
    "header",
    [
        "Image_Index,Finding_Labels,Follow_Up,Patient_ID,Patient_Age,Patient_Gender,View_Position",
        "image index,finding labels,follow-up number,patient id,Age,Patient Sex,View",
        "IMAGE,LABELS,FOLLOWUP,PATIENT,PATIENT AGE,SEX,VIEW POSITION",
        "\ufeffImage Index, Finding Labels, Follow-up #, Patient ID, Patient Age, Gender, View Position",
    ],
)
def test_columns_are_matched_by_meaning(header):
    table = read(row(labels="Edema|Mass"), header=f"{header},width,height,,")
    assert (table.image[0], table.patient[0], table.age_years[0], table.sex[0], table.view[0]) == ("a.png", 1, 57, "M", "PA")
    assert names(table.labels[0]) == ["Mass", "Edema"]


def test_a_byte_order_mark_is_no_part_of_a_name():
    assert "line 3: Image Index a.png stands" in refused("\ufeff" + text(row(), row(follow_up=1)))


def test_columns_may_stand_in_any_order():
    table = read_table(
        b'View,Patient ID,Sex,Note,Age,Follow-up #,Image Index,Finding Labels\nap,7,Female,"a, b",041Y,3,x.png,No Finding\n',
        "t.csv",
    )
    assert (table.view[0], table.patient[0], table.sex[0], table.age_years[0], table.image[0]) == ("AP", 7, "F", 41, "x.png")


def test_two_columns_of_one_meaning():
    message = refused(text(row(), header=HEADER_2020.replace("OriginalImage[Width", "Sex")))
    assert "columns 'Patient Gender' and 'Sex' both mean 'Patient Gender'" in message


def test_a_missing_column_is_named_beside_what_was_found():
    header = HEADER_2020.replace("Patient Age", "Born").replace("View Position", "Direction")
    message = refused(text(row(), header=header))
    assert "no column 'Patient Age', 'View Position'" in message
    assert "'Born', 'Patient Gender', 'Direction'" in message


@pytest.mark.parametrize(("given", "meant"), [("M", "M"), ("male", "M"), ("FEMALE", "F"), (" f ", "F"), ("", None)])
def test_sex(given, meant):
    assert read(row(sex=given)).sex[0] == meant


@pytest.mark.parametrize(("given", "meant"), [("PA", "PA"), ("ap", "AP"), (" Pa", "PA"), ("", None)])
def test_view(given, meant):
    assert read(row(view=given)).view[0] == meant


def test_ages_with_units():
    table = ages("058Y", "013M", "002W", "001D", "58", "058y", "58.0", "")
    expected = [58, 13 / 12, 14 / 365.25, 1 / 365.25, 58, 58, 58, np.nan]
    np.testing.assert_allclose(table.age_years, np.array(expected, dtype=np.float32))
    assert (table.counts["ages_converted"], table.counts["age_unknown"], table.counts["ages_impossible"]) == (3, 1, 0)


@pytest.mark.parametrize("age", ["121", "414", "-1", "150Y", "1500M", "9" * 30])
def test_impossible_ages_are_unknown(age):
    table = ages(age, "50")
    assert np.isnan(table.age_years[0])
    assert (table.counts["ages_impossible"], table.counts["age_unknown"]) == (1, 1)


def test_possible_ages_stay():
    assert ages("0", "95", "120").age_years.tolist() == [0, 95, 120]


# Order of time.


def order_of(*visits) -> tuple[list[int], int]:
    """Follow-ups in the order of time, of (follow-up, age), and how many patients were put in another order."""
    table = read(*(row(image=f"{number}.png", follow_up=number, age=age) for number, age in visits))
    return [visits[at][0] for at in np.argsort(table.order)], table.counts["patients_reordered"]


def test_ages_that_never_fall_leave_the_order_alone():
    assert order_of((2, 50), (0, 49), (3, 50), (1, 50)) == ([0, 1, 2, 3], 0)


def test_an_age_that_falls_puts_age_first():
    assert order_of((0, 76), (1, 77), (2, 73), (3, 77), (4, 74)) == ([2, 4, 0, 1, 3], 1)


@pytest.mark.parametrize("unknown", ["", "414"])
def test_visits_without_an_age_stand_where_their_follow_up_puts_them(unknown):
    assert order_of((0, unknown), (1, 50), (2, unknown), (3, 51), (4, unknown)) == ([0, 1, 2, 3, 4], 0)
    assert order_of((0, unknown), (1, 60), (2, unknown), (3, 51), (4, unknown)) == ([3, 4, 0, 1, 2], 1)
    assert order_of((1, unknown), (0, unknown)) == ([0, 1], 0)


def test_a_fall_between_patients_is_none():
    table = read(row(), row(image="b.png", patient=2, age=20))
    assert table.counts["patients_reordered"] == 0


# Labels.


def test_spellings_of_findings():
    table = read(row(labels="Pleural Thickening|Infiltrate"))
    assert table.labels[0].tolist() == parse("Pleural_Thickening|Infiltration").tolist()


def test_all_unknown_labels_are_listed_with_their_rows():
    labels = ["Mass|Mss", "Mss", "Fracture|Edema", "Mss|Fracture", "Hernia", "Mss"]
    message = refused(text(*(row(image=f"{number}.png", follow_up=number, labels=text) for number, text in enumerate(labels))))
    assert "2 unknown labels: 'Mss' (4 rows, first in line 2), 'Fracture' (2 rows, first in line 4)" in message
    assert ", ".join(FINDINGS) in message


def test_a_table_without_any_known_finding_has_another_set():
    message = refused(text(row(labels="Fracture"), row(image="b.png", follow_up=1, labels="Lung Opacity|No Finding")))
    assert "another set of labels" in message
    assert "'Fracture' (1 rows, first in line 2), 'Lung Opacity' (1 rows, first in line 3)" in message
    assert "unknown labels" not in message


def eight_findings(rows):
    return [row(image=f"{number}.png", follow_up=number, labels=FINDINGS[number % 8]) for number in range(rows)]


def test_the_eight_findings_of_chest_xray8_are_told_from_the_fourteen():
    message = refused(text(*eight_findings(1000)))
    assert "eight findings of ChestX-ray8" in message
    assert "Consolidation, Edema, Emphysema, Fibrosis, Pleural_Thickening, Hernia" in message
    assert len(read(*eight_findings(999))) == 999
    assert len(read(*eight_findings(1000), row(image="h.png", follow_up=1000, labels="Hernia"))) == 1001
    healthy = [row(image=f"{number}.png", follow_up=number, labels="No Finding") for number in range(1000)]
    assert len(read(*healthy)) == 1000


# Wrong values, and where they stand.


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": ""}, ("empty", "'No Finding'")),
        ({"labels": "Mass|No Finding"}, ("'Mass|No Finding'", "remove one")),
        ({"age": "old"}, ("Patient Age", "'old'", "Y, M, W or D")),
        ({"age": "inf"}, ("Patient Age", "'inf'")),
        ({"age": "4.5"}, ("Patient Age", "'4.5'")),
        ({"age": "058X"}, ("Patient Age", "'058X'")),
        ({"follow_up": "first"}, ("Follow-up #", "'first'", "whole number")),
        ({"follow_up": "1.5"}, ("Follow-up #", "'1.5'", "whole number")),
        ({"patient": ""}, ("Patient ID", "''", "whole number")),
        ({"patient": "9" * 17}, ("Patient ID", "9" * 17, "whole number")),
        ({"sex": "X"}, ("Patient Gender", "'X'", "Male or Female")),
        ({"view": "LL"}, ("View Position", "'LL'", "PA or AP")),
        ({"image": "a.png"}, ("Image Index", "a.png", "remove one of the rows")),
        ({"patient": 1, "follow_up": 0}, ("Patient ID and Follow-up #", "1, 0", "remove one of the rows")),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_with_its_line(change, expected):
    rows = [row(), row(image="b.png", patient=2), row(**{"image": "c.png", "patient": 3} | change)]
    message = refused(text(*rows))
    assert message.startswith("release/table.csv line 4:")
    for part in expected:
        assert part in message


def test_line_numbers_count_blank_lines_and_line_breaks_in_quotes():
    lines = [
        f"Note,{HEADER_2020}",
        "",
        f'"one, ""two""\nand three",a.png,Mass,0,1,57,M,PA,{EXTENT}',
        ",,,,,,,",
        "   ",
        f"x,b.png,Mass,0,2,57,M,PA,{EXTENT}",
        f"x,c.png,Mass,0,3,57,M,LL,{EXTENT}",
    ]
    for ending in ("\n", "\r\n"):
        assert refused(ending.join(lines)).startswith("release/table.csv line 8: View Position is 'LL'")
    lines[-1] = lines[-1].replace("LL", "PA").replace("Mass", "Mss")
    assert "first in line 8" in refused("\n".join(lines))
    assert read_table("\n".join(lines[:-1]).encode(), "t.csv").image.tolist() == ["a.png", "b.png"]


def test_a_row_that_breaks_off():
    assert "line 3: has 5 fields, needs 7" in refused(text(row()) + "b.png,Mass,1,1,58\n")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89PNG\r\n\xff\xfe\x00", "no text in UTF-8"),
        (b"", "has no column"),
        (HEADER_2020.encode() + b"\n", "no rows"),
        (text(row()).encode() + b'"b.png,Mass', "line 3: is no readable CSV"),
        (text(row()).replace(",", ";").encode(), "has no column"),
    ],
    ids=["picture", "empty", "header", "quote", "semicolons"],
)
def test_a_table_that_is_none(content, reason):
    message = refused(content)
    assert reason in message
    assert "download" in message
