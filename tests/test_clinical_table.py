"""The table of what is known of the patients of many files: every value as over HTTP, every mistake told by its line."""

import pytest

from cxr_ray.errors import CxrRayError
from serve.clinical_table import read_clinical_table
from serve.uploads import NOTHING_STATED, Stated

FILES = {"a.png", "ward 3/b.dcm", "c.png", "d.png", "e.png"}


def read(tmp_path, text):
    path = tmp_path / "clinical.csv"
    path.write_text(text)
    return read_clinical_table(str(path), FILES)


def test_values_are_those_of_the_form(tmp_path):
    table = read(
        tmp_path,
        "file,age,sex,view,history\n"
        "a.png,62.5,M,PA,Nodule|mass\n"
        "ward 3/b.dcm,0,F,AP,No Finding\n"
        "c.png,,,,\n"
        "d.png,120,,,Pleural Thickening\n",
    )
    assert table == {
        "a.png": Stated(62.5, "M", "PA", ["Mass", "Nodule"]),
        "ward 3/b.dcm": Stated(0.0, "F", "AP", []),
        "c.png": NOTHING_STATED,
        "d.png": Stated(120.0, None, None, ["Pleural_Thickening"]),
    }


def test_columns_may_be_fewer_and_in_any_order(tmp_path):
    assert read(tmp_path, "view;file\nAP;a.png\n") == {"a.png": Stated(view="AP")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: no column 'file'; write the columns file, age, sex, view, history"),
        ("file,gender\na.png,M\n", "line 1: column 'gender' is not known; write the columns file, age"),
        ("file,age,age\na.png,1,2\n", "line 1: column 'age' comes twice"),
        ("file,age\na.png,1\nmueller.png,2\n", "line 3: names a file that --input does not hold; correct"),
        ("file,age\na.png,1\nc.png,2\na.png,2\n", "line 4: names a file for the second time"),
        ("file,age\na.png,121\n", "line 2: age is '121'; write years from 0 to 120"),
        ("file,age\na.png,nan\n", "line 2: age is 'nan'"),
        ("file,age\na.png,old\n", "line 2: age is 'old'"),
        ("file,sex\na.png,m\n", "line 2: sex is 'm'; write M or F"),
        ("file,view\na.png,LL\n", "line 2: view is 'LL'; write PA or AP"),
        ("file,history\na.png,Mass|Cough\n", "line 2: history: finding 'Cough' is not known"),
        ("file,history\na.png,Mass|No Finding\n", "line 2: history: labels 'Mass|No Finding' hold 'No Finding' beside"),
        ("file,age\na.png\n", "line 2: has 1 values under 2 columns"),
    ],
)
def test_mistakes_are_told_by_line_and_name_no_file(tmp_path, text, said):
    with pytest.raises(CxrRayError) as error:
        read(tmp_path, text)
    told = str(error.value)
    assert told.startswith(f"{tmp_path}/clinical.csv ")
    assert said in told
    assert "\n" not in told
    assert not any(name in told for name in (*FILES, "mueller"))
