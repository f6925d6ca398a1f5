"""Which images are frontal chest radiographs: what each attribute may say, what contradicts, and what stays open."""

import csv

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.sr import _cid_dict, _concepts_dict
from radiographs import radiograph

from cxr_ray.dicom_header import radiograph_header, read_dicom, read_dicom_header
from cxr_ray.frontal_chest import check_frontal_chest
from cxr_ray.pixels import DamagedImage, UnusableImage
from cxr_ray.radiograph_words import words


def code(value, meaning, scheme="SCT"):
    """A sequence of one code."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return Sequence([item])


def described(text, keyword="SeriesDescription", **attributes):
    """A film whose body part and view are told by a description alone."""
    return radiograph(**({"BodyPartExamined": None, "ViewPosition": None, keyword: text} | attributes))


FRONTAL_ONLY = r"only frontal views (PA, AP) are read"
CHEST_ONLY = "only chest radiographs are read"
REFUSED = {
    "CT": ({"Modality": "CT"}, "Modality is CT; only radiographs (CR, DX, DR) are read"),
    "no modality": ({"Modality": None}, "Modality is absent; only radiographs (CR, DX, DR) are read"),
    "presentation state": (
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.11.1"},
        "SOPClassUID is Grayscale Softcopy Presentation State Storage; only images of CR, DX and Secondary Capture are read",
    ),
    "report": (
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"},
        "SOPClassUID is Basic Text SR Storage; only images of CR, DX and Secondary Capture are read",
    ),
    "CT class": (
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"},
        "SOPClassUID is CT Image Storage; only images of CR, DX and Secondary Capture are read",
    ),
    "for processing": (
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1.1"},
        "PresentationIntentType is FOR PROCESSING, values of the bare detector; send the image FOR PRESENTATION",
    ),
    "intent": (
        {"PresentationIntentType": "FOR PROCESSING"},
        "PresentationIntentType is FOR PROCESSING, values of the bare detector; send the image FOR PRESENTATION",
    ),
    "localizer": ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "ImageType is LOCALIZER; only radiographs are read"),
    "frames": ({"NumberOfFrames": 12}, "NumberOfFrames is 12; only single images are read"),
    "hand": ({"BodyPartExamined": "HAND"}, f"BodyPartExamined is HAND; {CHEST_ONLY}"),
    "ribs": ({"BodyPartExamined": "RIB"}, f"BodyPartExamined is RIB; {CHEST_ONLY}"),
    "thoracic spine": ({"BodyPartExamined": "TSPINE"}, f"BodyPartExamined is TSPINE; {CHEST_ONLY}"),
    "free text": ({"BodyPartExamined": "Left hand of J. Doe"}, f"BodyPartExamined is free text; {CHEST_ONLY}"),
    "region": ({"AnatomicRegionSequence": code("72696002", "Knee")}, f"AnatomicRegionSequence says KNEE; {CHEST_ONLY}"),
    "series of the abdomen": ({"SeriesDescription": "Abdomen AP"}, f"SeriesDescription says ABDOMEN; {CHEST_ONLY}"),
    "protocol of the pelvis": ({"ProtocolName": "Becken a.p."}, f"ProtocolName says BECKEN; {CHEST_ONLY}"),
    "processed as a leg": (
        {"AcquisitionDeviceProcessingDescription": "[LOWER LEG         ]"},
        f"AcquisitionDeviceProcessingDescription says LEG; {CHEST_ONLY}",
    ),
    "LL": ({"ViewPosition": "LL"}, f"ViewPosition is LL; {FRONTAL_ONLY}"),
    "lateral": ({"ViewPosition": "LATERAL"}, f"ViewPosition is LATERAL; {FRONTAL_ONLY}"),
    "across the table": ({"ViewPosition": "XTABLE LATERAL"}, f"ViewPosition is LATERAL XTABLE; {FRONTAL_ONLY}"),
    "oblique": ({"ViewPosition": "LAO"}, f"ViewPosition is LAO; {FRONTAL_ONLY}"),
    "decubitus": ({"ViewPosition": "AP LLD"}, f"ViewPosition is LLD; {FRONTAL_ONLY}"),
    "lateral by code": (
        {"ViewPosition": None, "ViewCodeSequence": code("399067008", "lateral")},
        f"ViewCodeSequence says LATERAL; {FRONTAL_ONLY}",
    ),
    "lateral by a code in another language": (
        {"ViewPosition": None, "ViewCodeSequence": code("R-10236", "links anliegend", "SRT")},
        f"ViewCodeSequence says R-10236; {FRONTAL_ONLY}",
    ),
    "series described as lateral": ({"SeriesDescription": "Chest LAT"}, f"SeriesDescription says LAT; {FRONTAL_ONLY}"),
    "seitlich": ({"SeriesDescription": "Thorax seitl."}, f"SeriesDescription says SEITL; {FRONTAL_ONLY}"),
    "profil": ({"ProtocolName": "Thorax de profil"}, f"ProtocolName says PROFIL; {FRONTAL_ONLY}"),
    "oblicua": ({"SeriesDescription": "TÓRAX OBLÍCUA"}, f"SeriesDescription says OBLICUA; {FRONTAL_ONLY}"),
    "orientation": (
        {"PatientOrientation": ["A", "F"]},
        "PatientOrientation runs front to back; only frontal views are read",
    ),
    "icon": ({"Rows": 15, "Columns": 15}, "Rows and Columns are 15 and 15, an icon; send the image itself"),
    "strip": ({"Rows": 100, "Columns": 30}, "the image is 3.3 times as high as wide; a chest film is 0.5 to 2"),
    "strip by its pixels": (
        {"Rows": 100, "Columns": 60, "PixelSpacing": [0.4, 0.2]},
        "the image is 3.3 times as high as wide; a chest film is 0.5 to 2",
    ),
    "flat": ({"Rows": 30, "Columns": 100}, "the image is 0.3 times as high as wide; a chest film is 0.5 to 2"),
}


@pytest.mark.parametrize(("attributes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_contradicts_a_frontal_chest_radiograph_is_refused(attributes, message):
    with pytest.raises(UnusableImage) as caught:
        radiograph_header(radiograph(**attributes), "film.dcm")
    assert str(caught.value) == f"film.dcm: {message}"


ACCEPTED = {
    "plain": {},
    "Secondary Capture": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
    "DX": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1", "Modality": "DX", "PresentationIntentType": "FOR PRESENTATION"},
    "derived": {"ImageType": ["DERIVED", "SECONDARY"]},
    "study of two views": {"StudyDescription": "CHEST PA AND LATERAL"},
    "study of more than the chest": {"StudyDescription": "Abdomen series"},
    "series of two views": {"SeriesDescription": "Chest PA + LAT"},
    "chest and more": {"SeriesDescription": "Chest and abdomen"},
    "THORAX": {"BodyPartExamined": "THORAX"},
    "Tórax": {"BodyPartExamined": "Tórax"},
    "PORTCHEST": {"BodyPartExamined": "PORTCHEST"},
    "small letters": {"Modality": "cr", "BodyPartExamined": "chest", "ViewPosition": "pa"},
    "region by code": {"AnatomicRegionSequence": code("51185008", "Brust")},
    "view by code": {"ViewCodeSequence": code("272479007", "postero-anterior")},
    "no lateral by a part of a word": {"SeriesDescription": "Collateral platform", "ProtocolName": "Handheld"},
    "bilateral": {"SeriesDescription": "Bilateral effusion?"},
    "orientation": {"PatientOrientation": ["L", "F"]},
    "lying across": {"Rows": 100, "Columns": 190},
    "made square by its pixels": {"Rows": 300, "Columns": 100, "PixelAspectRatio": [1, 2]},
    "a spacing that is none": {"Rows": 100, "Columns": 100, "ImagerPixelSpacing": [0, 0.2]},
    "a frame": {"NumberOfFrames": 1},
}


@pytest.mark.parametrize("attributes", ACCEPTED.values(), ids=ACCEPTED)
def test_what_does_not_contradict_is_accepted_without_a_warning(attributes):
    header = radiograph_header(radiograph(**attributes), "film.dcm")
    assert (header.view, header.warnings) == ("PA", ())


def test_the_study_tells_the_part_of_the_body_only_where_nothing_else_does():
    knee = {"StudyDescription": "XR knee left", "ViewPosition": "AP"}
    with pytest.raises(UnusableImage, match=r"^film\.dcm: StudyDescription says KNEE and nothing says chest; only chest"):
        check_frontal_chest(radiograph(BodyPartExamined="", **knee), "film.dcm")
    for attributes in ({}, {"BodyPartExamined": "", "SeriesDescription": "Thorax"}):
        assert check_frontal_chest(radiograph(**(knee | attributes)), "film.dcm") == []


def test_descriptions_are_never_quoted():
    for keyword in ("SeriesDescription", "ProtocolName", "AcquisitionDeviceProcessingDescription", "StudyDescription"):
        with pytest.raises(UnusableImage) as caught:
            check_frontal_chest(described("knee of Jane Doe", keyword), "film.dcm")
        assert "KNEE" in str(caught.value)
        assert "DOE" not in str(caught.value).upper()
    warnings = check_frontal_chest(described("Jane Doe, chest p.a."), "film.dcm")
    assert "DOE" not in " ".join(warnings).upper()


NO_PART = "BodyPartExamined is empty: taken as a chest radiograph"


@pytest.mark.parametrize(
    ("attributes", "view", "warnings"),
    [
        ({"ViewPosition": "", "BodyPartExamined": None}, None, (NO_PART, "ViewPosition is empty: view unknown")),
        ({"BodyPartExamined": "UNKNOWN"}, "PA", (NO_PART,)),
        ({"BodyPartExamined": "", "SeriesDescription": "Thorax"}, "PA", ()),
        ({"BodyPartExamined": "", "AnatomicRegionSequence": code("T-D3000", "")}, "PA", ()),
        ({"BodyPartExamined": "", "StudyDescription": "Chest"}, "PA", (NO_PART,)),
        ({"SOPClassUID": "1.3.46.670589"}, "PA", ("SOPClassUID is absent or private: taken as a radiograph",)),
        ({"ViewPosition": "AP AXIAL"}, "AP", ()),
        ({"ViewPosition": "postero-anterior"}, "PA", ()),
        ({"ViewPosition": "LORDOTIC"}, None, ("ViewPosition is LORDOTIC: view unknown",)),
        ({"ViewPosition": "Doe^Jane"}, None, ("ViewPosition is free text: view unknown",)),
        (
            {"ViewPosition": "", "ViewCodeSequence": code("399348003", "")},
            "AP",
            ("ViewPosition is empty: view AP taken from ViewCodeSequence",),
        ),
        (
            {"ViewPosition": "PA", "ViewCodeSequence": code("399348003", "")},
            None,
            ("ViewPosition and ViewCodeSequence disagree: view unknown",),
        ),
        (
            {"ViewPosition": "", "SeriesDescription": "Chest PA"},
            "PA",
            ("ViewPosition is empty: view PA taken from SeriesDescription",),
        ),
        (
            {"ViewPosition": "", "ProtocolName": "Thorax a.p. liegend"},
            "AP",
            ("ViewPosition is empty: view AP taken from ProtocolName",),
        ),
        ({"ViewPosition": "", "SeriesDescription": "Chest AP/PA"}, None, ("ViewPosition is empty: view unknown",)),
        ({"ViewPosition": "", "SeriesDescription": "Chest PA and lateral"}, None, ("ViewPosition is empty: view unknown",)),
        ({"ViewPosition": "", "SeriesDescription": "PA", "ProtocolName": "AP"}, None, ("ViewPosition is empty: view unknown",)),
        ({"ViewPosition": "", "StudyDescription": "Chest PA"}, None, ("ViewPosition is empty: view unknown",)),
        ({"ViewPosition": "PA", "SeriesDescription": "Chest AP"}, "PA", ()),
        (
            {"PatientOrientation": ["R", "F"]},
            "PA",
            ("PatientOrientation is R\\F, not L\\F: mirrored or turned, and read as it is stored",),
        ),
        ({"PatientOrientation": ["AP", ""]}, "PA", ()),
        ({"PatientOrientation": ["PA", "AP"]}, "PA", ()),
    ],
)
def test_what_is_open_is_warned_of_and_what_is_told_elsewhere_is_used(attributes, view, warnings):
    header = radiograph_header(radiograph(**attributes), "film.dcm")
    assert (header.view, header.warnings) == (view, warnings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Thorax p.a./seitl.", {"THORAX", "PA", "SEITL"}),
        ("Poumon face (A-P)", {"POUMON", "FACE", "AP"}),
        ("chest_pa-lat", {"CHEST", "PA", "LAT"}),
        ("Antero-posterior, posteroanterior", {"AP", "PA"}),
        ("Hüfte", {"HUFTE"}),
        ("Grapa map", {"GRAPA", "MAP"}),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def concepts(cid):
    """Value and meaning of each concept of a context group, from pydicom's copy of PS3.16."""
    for scheme, names in _cid_dict.cid_concepts[cid].items():
        for name in names:
            for value, (meaning, groups) in _concepts_dict.concepts[scheme][name].items():
                if cid in groups:
                    yield value, meaning


def test_every_view_of_the_standard_is_frontal_or_refused():
    """CID 4010 "DX View": only PA, AP and frontal pass, and what is of another part of the body is refused by that part."""
    passed = set()
    for value, meaning in concepts(4010):
        try:
            view = radiograph_header(radiograph(ViewPosition="", ViewCodeSequence=code(value, meaning)), "film.dcm").view
        except UnusableImage:
            continue
        passed.add((meaning, view))
    assert {("postero-anterior", "PA"), ("antero-posterior", "AP"), ("frontal", None)} <= passed
    lateral_or_oblique = {meaning for meaning, _ in passed if {"LATERAL", "OBLIQUE", "SAGITTAL"} & words(meaning)}
    assert lateral_or_oblique == set()


def test_regions_of_the_standard_far_from_the_chest_are_refused():
    """CID 4009 "DX Anatomy Imaged"."""
    refused = set()
    regions = dict(concepts(4009))
    for value, meaning in regions.items():
        try:
            check_frontal_chest(radiograph(BodyPartExamined="", AnatomicRegionSequence=code(value, meaning)), "film.dcm")
        except UnusableImage:
            refused.add(meaning)
    assert not any({"CHEST", "LUNG", "MEDIASTINUM"} & words(meaning) for meaning in refused)
    assert len(refused) > 0.5 * len(regions)
    assert {"Knee", "Hand", "Abdomen", "Pelvis", "Skull", "Lumbar spine", "Thoracic spine", "Rib", "Shoulder"} <= refused


def test_no_shape_of_the_nih_originals_is_refused(real_data):
    with (real_data / "nih" / "Data_Entry_2017_v2020.csv").open(newline="") as table:
        shapes = {(int(row["Height]"]), int(row["OriginalImage[Width"])) for row in csv.DictReader(table)}
    assert len(shapes) > 1000
    tallest = max(shapes, key=lambda shape: shape[0] / shape[1])
    widest = min(shapes, key=lambda shape: shape[0] / shape[1])
    for rows, columns in (tallest, widest):
        assert check_frontal_chest(radiograph(Rows=rows, Columns=columns), "film.dcm") == []


def test_a_number_that_is_none_is_damage():
    with pytest.raises(DamagedImage, match=r"^film\.dcm: Rows is no whole number; send the file again$"):
        check_frontal_chest(radiograph(np.zeros((20, 20), dtype=np.uint8), Rows=[20, 20]), "film.dcm")


def test_a_code_sequence_that_is_none_says_nothing():
    dataset = radiograph()
    dataset.add_new("ViewCodeSequence", "LO", "LATERAL")
    assert check_frontal_chest(dataset, "film.dcm") == []


def test_the_real_chests_are_accepted_and_the_extremity_is_refused(real_data):
    accepted, refused = [], []
    for path in sorted((real_data / "dicom").glob("*.dcm")):
        with path.open("rb") as stream:
            dataset = read_dicom_header(stream, path.name)
        try:
            accepted.append(radiograph_header(dataset, path.name).warnings)
        except UnusableImage as error:
            refused.append(str(error))
            assert str(error) == f"{path.name}: BodyPartExamined is EXTREMITY; only chest radiographs are read"
            del dataset.BodyPartExamined
            with pytest.raises(UnusableImage, match="AcquisitionDeviceProcessingDescription says LEG; only chest"):
                check_frontal_chest(dataset, path.name)
    assert accepted == [(), ()]
    assert len(refused) == 5


def test_the_header_of_a_whole_file_says_the_same(real_data):
    path = real_data / "dicom" / "chest_cr_jpeg-baseline_mono2_8bit.dcm"
    with path.open("rb") as stream:
        of_header = radiograph_header(read_dicom_header(stream, path.name), path.name)
    assert radiograph_header(read_dicom(path.read_bytes(), path.name), path.name) == of_header
