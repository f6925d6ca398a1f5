"""NIH's file of boxes: as it is, as people save it, and with what can be wrong in it."""

import csv
import io
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_ray.boxes import RELEASED_EDGE, Box, read_boxes
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS

HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
ROW = "00013118_008.png,Atelectasis,256.0,512.0,128.0,64.0"


def read(tmp_path, text: str | bytes) -> tuple[Box, ...]:
    path = tmp_path / "BBox_List_2017.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_boxes(str(path))


def test_a_row_becomes_shares_of_the_image(tmp_path):
    (box,) = read(tmp_path, f"{HEADER}\n{ROW}\n")
    assert box == Box("00013118_008.png", "Atelectasis", 0.25, 0.5, 0.125, 0.0625)
    assert box.area == 0.125 * 0.0625


@pytest.mark.parametrize(
    "text",
    [
        f"{HEADER}\r\n{ROW}\r\n",
        f"\ufeff{HEADER}\n{ROW}",
        f"{HEADER}\n{ROW},,,\n\n,,,,,,\n",
        f"Image Index,Finding Label,Bbox [x,y,w,h]\n{ROW}\n",
        f"{HEADER}\n00013118_008.png , atelectasis, 256,512 ,128,6.4e1\n",
        'Finding Label,Image Index,h],w,y,Bbox [x\nAtelectasis,"00013118_008.png",64,128,512,256\n',
    ],
    ids=["CRLF", "byte order mark", "empty cells and rows", "no empty columns", "spaces", "other order"],
)
def test_the_same_file_as_people_save_it(tmp_path, text):
    assert read(tmp_path, text) == (Box("00013118_008.png", "Atelectasis", 0.25, 0.5, 0.125, 0.0625),)


def test_a_uri_is_taken(tmp_path):
    read(tmp_path, f"{HEADER}\n{ROW}\n")
    assert len(read_boxes((tmp_path / "BBox_List_2017.csv").as_uri())) == 1


def test_nih_writes_infiltrate(tmp_path):
    assert read(tmp_path, f"{HEADER}\n{ROW.replace('Atelectasis', 'Infiltrate')}\n")[0].finding == "Infiltration"


WRONG = [
    ("", "line 1: columns 'Image Index', .* are missing, has none; give NIH's BBox_List_2017.csv"),
    (f"{HEADER}\n", "holds no box; download it again"),
    (
        f"Image Index,Finding Label,x,y,w,h\n{ROW}\n",
        r"line 1: columns 'Bbox \[x', 'h\]' are missing, has 'Image Index', .*; give",
    ),
    (f"{HEADER}\n{ROW}\n{ROW.replace('512.0', 'abc')}\n", "line 3: y is 'abc'; a number of pixels is needed"),
    (f"{HEADER}\n{ROW.replace('128.0', 'nan')}\n", "line 2: w is 'nan'"),
    (f"{HEADER}\n{ROW.replace('128.0', 'inf')}\n", "line 2: w is 'inf'"),
    (f"{HEADER}\n00013118_008.png,Mass,1,2,3\n", "line 2: h is ''"),
    (
        f"{HEADER}\n{ROW.replace('128.0', '900')}\n",
        r"line 2: box 256.0, 512.0, 900, 64.0 is empty or leaves the image; give .* 1024",
    ),
    (f"{HEADER}\n{ROW.replace('64.0', '600')}\n", "line 2: box .* leaves the image"),
    (f"{HEADER}\n{ROW.replace('256.0', '-1')}\n", "line 2: box .* leaves the image"),
    (f"{HEADER}\n{ROW.replace('64.0', '0')}\n", "line 2: box .* is empty"),
    (
        f"{HEADER}\n{ROW.replace('Atelectasis', 'Fracture')}\n",
        "line 2: finding 'Fracture' is not known; use one of: Atelectasis",
    ),
    (f"{HEADER}\n{ROW.replace('00013118_008.png', '')}\n", "line 2: Image Index is empty; give the name of the image"),
    (f'{HEADER}\n"00013118_008.png,Mass\n', "is no readable CSV"),
    (b"\xff\xfe\x00", "is no text in UTF-8; download it again"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_is_named_in_one_line(tmp_path, text, message):
    with pytest.raises(CxrRayError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "BBox_List_2017.csv" in str(caught.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(CxrRayError, match=r"nowhere.csv: cannot be read .*; check the path"):
        read_boxes(str(tmp_path / "nowhere.csv"))


@given(
    st.lists(
        st.tuples(st.sampled_from(FINDINGS), *[st.floats(0, RELEASED_EDGE - 1)] * 2, st.floats(0, 1), st.floats(0, 1)),
        min_size=1,
    )
)
def test_boxes_within_the_image_come_back(tmp_path_factory, drawn):
    rows = [(finding, x, y, 1 + w * (RELEASED_EDGE - x - 1), 1 + h * (RELEASED_EDGE - y - 1)) for finding, x, y, w, h in drawn]
    content = io.StringIO()
    writer = csv.writer(content)
    writer.writerow(HEADER.split(","))
    writer.writerows((f"{number}.png", *row) for number, row in enumerate(rows))
    boxes = read(tmp_path_factory.mktemp("boxes"), content.getvalue())
    assert [(box.image_id, box.finding) for box in boxes] == [(f"{number}.png", row[0]) for number, row in enumerate(rows)]
    for box, (_, *numbers) in zip(boxes, rows, strict=True):
        assert [box.x, box.y, box.width, box.height] == pytest.approx([number / RELEASED_EDGE for number in numbers])


def test_the_released_file(real_data):
    path = real_data / "nih" / "BBox_List_2017.csv"
    if not path.exists():
        pytest.skip(f"no {path}")
    boxes = read_boxes(str(path))
    assert len(boxes) == 984
    assert len({box.image_id for box in boxes}) == 880
    assert len({(box.image_id, box.finding) for box in boxes}) == 984
    assert Counter(box.finding for box in boxes) == {
        "Atelectasis": 180,
        "Effusion": 153,
        "Cardiomegaly": 146,
        "Infiltration": 123,
        "Pneumonia": 120,
        "Pneumothorax": 98,
        "Mass": 85,
        "Nodule": 79,
    }
    listed = set((real_data / "nih" / "test_list.txt").read_text().split())
    assert all(box.image_id in listed for box in boxes)
