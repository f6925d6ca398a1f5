"""Results of films whose headers are as archives have them: wrong lengths and dates, any character set, or nothing at all."""

import re
import struct
from io import BytesIO

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from phantom_films import VISITS, dicom, film
from pydicom import Dataset, dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.tag import Tag
from result_answers import image, study

from cxr_ray.dicom_header import radiograph_header, read_dicom_header
from cxr_ray.dicom_values import text
from cxr_ray.errors import CxrRayError
from serve.instance_names import instance_names
from serve.node.results.json_summary import json_summary
from serve.node.results.result_object import file_bytes
from serve.node.results.secondary_capture import secondary_capture
from serve.node.results.settings import ResultSettings
from serve.node.results.source import source_text
from serve.node.results.structured_report import structured_report

FILM = film(VISITS[0])[::4, ::4]
FILE = dicom(VISITS[0])
META_END = 144 + int.from_bytes(FILE[140:144], "little")
IDENTIFIERS = ("PatientName", "PatientID", "AccessionNumber", "StudyID", "ReferringPhysicianName", "StudyInstanceUID")
DESCRIPTIONS = (
    "StudyDescription",
    "IssuerOfPatientID",
    "PatientAge",
    "PatientSex",
    "PatientBirthDate",
    "StudyDate",
    "StudyTime",
)
OTHERS = ("SpecificCharacterSet", "TimezoneOffsetFromUTC", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID")
IMAGE = ("AcquisitionDate", "AcquisitionTime", "PatientOrientation", "LossyImageCompression", "LossyImageCompressionRatio")
NAMES = ["Müller^Jörg", "山田^太郎", "Иванов", "O'Neil^Ann\\B", "김^희중=金^喜中", "x" * 300, "\x1b$B;3", "A\nB", "\x00 ", "٣"]
VALUES = [
    "1.2.003.4",
    "0.1",
    "not a uid",
    "2020-01-31",
    "20200231",
    "12:30:00",
    "9",
    "+0530",
    "L\\F",
    "F\\L",
    "R\\H\\X",
    "01",
    "10",
]
CHARACTER_SETS = [
    "",
    "ISO_IR 100",
    "ISO_IR 192",
    "\\ISO 2022 IR 87",
    "ISO 2022 IR 6\\ISO 2022 IR 149",
    "ISO_IR 144",
    "latin1",
    "\\",
]
CODECS = ["utf-8", "latin-1", "iso2022_jp", "euc_kr", "iso8859_5", "shift_jis"]


def with_elements(elements: dict[str, bytes | None]) -> bytes:
    """The phantom's file with these values as they stand, whatever a writer would say to them; None leaves one out."""
    kept = dcmread(BytesIO(FILE))
    for keyword in elements:
        kept.pop(tag_for_keyword(keyword), None)
    written = BytesIO()
    kept.save_as(written, enforce_file_format=True)
    content = written.getvalue()
    given = {Tag(tag_for_keyword(keyword)): value for keyword, value in elements.items() if value is not None}
    raw = b"".join(_element(tag, given[tag]) for tag in sorted(given))
    return content[:META_END] + raw + content[META_END:]


def _element(tag: int, value: bytes) -> bytes:
    padded = value + b" " * (len(value) % 2)
    representation = dictionary_VR(tag).encode()
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, representation, len(padded)) + padded


def accepted(content: bytes) -> Dataset:
    """The header as the node and the service accept it.

    Raises
    ------
    CxrRayError
        Where they do not.
    """
    instance_names(content)
    header = read_dicom_header(BytesIO(content), "film")
    radiograph_header(header, "film")
    return header


def results(header: Dataset) -> list[Dataset]:
    answer = study(image(header))
    report = structured_report(answer, "comprehensive-3d", ResultSettings())
    shown = secondary_capture(answer, FILM, None, None, ResultSettings())
    json_summary(answer, {})
    return [dcmread(BytesIO(file_bytes(result))) for result in (report, shown)]


def plain(value: str) -> str:
    return re.sub(r"[\s\x00]+", "", value)


@st.composite
def raw_values(draw: st.DrawFn) -> bytes | None:
    kind = draw(st.sampled_from(["absent", "empty", "known", "encoded", "bytes"]))
    if kind == "absent":
        return None
    if kind == "empty":
        return b""
    if kind == "bytes":
        return draw(st.binary(max_size=90))
    words = draw(st.sampled_from(NAMES + VALUES) if kind == "known" else st.text(max_size=30))
    return words.encode(draw(st.sampled_from(CODECS)), "replace")


@st.composite
def damaged_headers(draw: st.DrawFn) -> dict[str, bytes | None]:
    chosen = draw(st.sets(st.sampled_from([*IDENTIFIERS, *DESCRIPTIONS, *OTHERS, *IMAGE]), max_size=8))
    elements = {keyword: draw(raw_values()) for keyword in sorted(chosen)}
    if draw(st.booleans()):
        elements["SpecificCharacterSet"] = draw(st.sampled_from(CHARACTER_SETS)).encode()
    return elements


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(damaged_headers())
def test_whatever_was_accepted_becomes_a_result(elements: dict[str, bytes | None]) -> None:
    try:
        header = accepted(with_elements(elements))
    except CxrRayError:
        assume(False)
    for result in results(header):
        for keyword in IDENTIFIERS:
            expected = source_text(header, keyword)
            assert plain(source_text(result, keyword)) == (plain(expected) if len(expected) <= 256 else "")
        for keyword, form in (("PatientBirthDate", r"(\d{8})?"), ("StudyDate", r"(\d{8})?"), ("StudyTime", r"[\d.]*")):
            assert re.fullmatch(form, text(result, keyword))
        assert text(result, "PatientSex") in {"", "M", "F", "O"}
        assert instance_names(file_bytes(result)).study_instance_uid


REPAIRED = [
    ("PatientBirthDate", b"1960.05.04", "19600504"),
    ("PatientBirthDate", b"1960", ""),
    ("StudyDate", b"20200231", ""),
    ("StudyTime", b"12:30:15", "123015"),
    ("StudyTime", b"2561", ""),
    ("StudyTime", b"083000.123456", "083000.123456"),
    ("PatientSex", b"female", ""),
    ("PatientSex", b"f", "F"),
    ("PatientAge", b"62", "062Y"),
    ("PatientAge", b"old", ""),
    ("PatientID", b"", ""),
    ("PatientID", None, ""),
    ("AccessionNumber", b"2020-01-31/A-000000000000004711", "2020-01-31/A-000000000000004711"),
    ("StudyInstanceUID", b"1.2.003.4", "1.2.003.4"),
    ("StudyID", None, ""),
    ("TimezoneOffsetFromUTC", b"CET", ""),
]


@pytest.mark.parametrize(("keyword", "value", "becomes"), REPAIRED)
def test_identifiers_stay_and_the_rest_is_repaired_or_left_empty(keyword: str, value: bytes | None, becomes: str) -> None:
    for result in results(accepted(with_elements({keyword: value}))):
        assert text(result, keyword) == becomes


@pytest.mark.parametrize(
    ("character_set", "codec", "name", "declared"),
    [
        ("", "ascii", "Doe^Jane", None),
        ("ISO_IR 100", "ascii", "Doe^Jane", None),
        ("ISO_IR 100", "latin-1", "Müller^Jörg", "ISO_IR 100"),
        ("ISO_IR 144", "iso8859_5", "Щукин^Илья", "ISO_IR 144"),
        ("ISO_IR 192", "utf-8", "Wang^XiaoDong=王^小東", "ISO_IR 192"),
        ("\\ISO 2022 IR 87", "iso2022_jp", "Yamada^Tarou=山田^太郎", "\\ISO 2022 IR 87"),
        ("ISO IR 100", "latin-1", "Müller^Jörg", "ISO_IR 192"),
        # Declared nowhere: the bytes are repeated, as the archive knows them.
        ("", "latin-1", "Müller^Jörg", None),
    ],
)
def test_names_keep_their_letters(character_set: str, codec: str, name: str, declared: str | None) -> None:
    given = {"SpecificCharacterSet": character_set.encode(), "PatientName": name.encode(codec)}
    for result in results(accepted(with_elements(given))):
        assert str(result.PatientName) == name
        said = result.get("SpecificCharacterSet")
        assert (said if said is None or isinstance(said, str) else "\\".join(said)) == declared


def test_words_of_the_installation_choose_a_character_set_where_the_source_has_none() -> None:
    answer = study(image(accepted(with_elements({"SpecificCharacterSet": None}))))
    report = structured_report(answer, "enhanced", ResultSettings(institution_name="Klinikum Köln"))
    assert report.SpecificCharacterSet == "ISO_IR 192"
    assert dcmread(BytesIO(file_bytes(report))).InstitutionName == "Klinikum Köln"


def test_an_image_without_class_is_referred_to_by_its_file_meta_information() -> None:
    header = accepted(with_elements({"SOPClassUID": None}))
    report, shown = results(header)
    reference = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert reference.ReferencedSOPClassUID == header.file_meta.MediaStorageSOPClassUID
    assert shown.SourceImageSequence[0].ReferencedSOPClassUID == reference.ReferencedSOPClassUID


def test_the_order_is_taken_over() -> None:
    asked = Dataset()
    asked.RequestedProcedureID, asked.RequestedProcedureDescription = "RP-1", "Thorax p.a."
    header = accepted(dicom(VISITS[0], AccessionNumber="A-4711", RequestAttributesSequence=[asked]))
    (request,) = results(header)[0].ReferencedRequestSequence
    assert (request.AccessionNumber, request.RequestedProcedureID) == ("A-4711", "RP-1")
    assert request.StudyInstanceUID == header.StudyInstanceUID
    assert "ReferencedRequestSequence" not in results(accepted(FILE))[0]
