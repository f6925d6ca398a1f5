"""DICOM headers: ages, dates, identifiers, and files that break off, are no DICOM or inflate without end."""

import io
import re
import tracemalloc
import zlib
from datetime import datetime

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian
from radiographs import FILM, NATIVE, file_of, png, radiograph

from cxr_ray.dicom_header import age_in_years, looks_like_dicom, radiograph_header, read_dicom, read_dicom_header
from cxr_ray.dicom_pixels import decode_dicom
from cxr_ray.pixels import DamagedImage, OversizedImage, UnsupportedImage

AGES = [
    ("062Y", 62.0),
    ("62", 62.0),
    ("013M", 13 / 12),
    ("002W", 14 / 365.25),
    ("001D", 1 / 365.25),
    ("62y", 62.0),
    ("000Y", 0.0),
    ("121Y", None),
    ("411", None),
    ("Y62", 33.0),
    ("", 33.0),
    (None, 33.0),
]


@pytest.mark.parametrize(("text", "years"), AGES)
def test_ages_with_and_without_a_unit(text, years):
    dataset = Dataset()
    if text is not None:
        dataset.add_new("PatientAge", "LO", text)
    dataset.PatientBirthDate, dataset.StudyDate = "19861201", "20200131"
    assert age_in_years(dataset) == pytest.approx(years)


@pytest.mark.parametrize(
    ("born", "studied", "years"),
    [
        ("19400305", "20040304", 63.0),
        ("19400305", "20040305", 64.0),
        ("20200131", "20200131", 0.0),
        ("20200201", "20200131", None),
        ("18500101", "20200131", None),
        ("", "20200131", None),
        ("19400305", "", None),
        ("1940", "20040305", None),
        ("19400230", "20040305", None),
    ],
)
def test_ages_from_dates(born, studied, years):
    dataset = Dataset()
    dataset.PatientBirthDate, dataset.StudyDate = born, studied
    assert age_in_years(dataset) == years


@pytest.mark.parametrize(
    ("attributes", "acquired"),
    [
        ({}, datetime(2020, 1, 31, 10, 11, 12)),
        ({"StudyTime": "101112.345678"}, datetime(2020, 1, 31, 10, 11, 12)),
        ({"StudyTime": None}, datetime(2020, 1, 31)),
        ({"StudyTime": "1011"}, datetime(2020, 1, 31, 10, 11)),
        ({"StudyTime": "10"}, datetime(2020, 1, 31, 10)),
        ({"StudyTime": "10:11:12"}, datetime(2020, 1, 31, 10, 11, 12)),
        ({"StudyTime": "2511"}, datetime(2020, 1, 31)),
        ({"SeriesDate": "20200201", "SeriesTime": "080000"}, datetime(2020, 2, 1, 8)),
        ({"AcquisitionDate": "20200202", "SeriesDate": "20200201"}, datetime(2020, 2, 2)),
        ({"AcquisitionDate": "", "StudyDate": "20200131"}, datetime(2020, 1, 31, 10, 11, 12)),
        ({"StudyDate": "unknown"}, None),
        ({"StudyDate": None}, None),
    ],
)
def test_the_moment_of_acquisition(attributes, acquired):
    assert radiograph_header(radiograph(**attributes), "film.dcm").acquired == acquired


def test_identifiers():
    header = radiograph_header(radiograph(AccessionNumber=" A-1 "), "film.dcm")
    assert (header.sop_instance_uid, header.study_instance_uid, header.series_instance_uid) == ("1.2.3.1", "1.2.3.2", "1.2.3.3")
    assert (header.patient_id, header.accession_number) == ("P1", "A-1")


def test_what_is_empty_is_unknown():
    header = radiograph_header(radiograph(PatientSex="O", PatientID="", PatientAge=""), "film")
    assert (header.sex, header.patient_id, header.accession_number, header.age_years) == (None, "", "", None)


def test_a_header_without_uids_is_damage():
    with pytest.raises(DamagedImage, match=r"^film\.dcm: StudyInstanceUID is absent; send a complete DICOM instance$"):
        radiograph_header(radiograph(StudyInstanceUID=None), "film.dcm")


def test_what_is_no_dicom_is_unsupported():
    for data in (b"", b"dear colleague", png(FILM), b"\0" * 132):
        assert not looks_like_dicom(data)
        with pytest.raises(UnsupportedImage, match=r"^film\.dcm: not a DICOM file \(no DICM prefix\); send"):
            read_dicom(data, "film.dcm")
    assert looks_like_dicom(file_of(radiograph()))


@pytest.mark.parametrize("syntax", NATIVE)
def test_a_header_cut_anywhere_before_its_last_uid_is_never_taken_for_another_kind_of_file(syntax):
    whole = file_of(radiograph(syntax=syntax))
    end = len(whole) - FILM.size if syntax == DeflatedExplicitVRLittleEndian else whole.index(b"1.2.3.3")
    for length in range(len(whole) if end > len(whole) else end):
        with pytest.raises((DamagedImage, UnsupportedImage)):
            radiograph_header(read_dicom_header(io.BytesIO(whole[:length]), "film.dcm"), "film.dcm")


def test_a_deflated_file_that_inflates_without_end_is_not_inflated():
    """Half a gigabyte and more out of half a megabyte."""
    deflated = file_of(radiograph(syntax=DeflatedExplicitVRLittleEndian))
    assert read_dicom(deflated, "film.dcm").Rows == FILM.shape[0]
    start = 144 + int.from_bytes(deflated[140:144], "little")
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = b"".join(deflater.compress(bytes(1 << 20)) for _ in range(600)) + deflater.flush()
    data = deflated[:start] + bomb
    assert len(data) < 1 << 20
    tracemalloc.start()
    with pytest.raises(OversizedImage, match=r"^film\.dcm: inflates to more than 488 MiB; send at most 64 megapixels$"):
        read_dicom(data, "film.dcm")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20


def test_an_error_of_the_parser_is_not_repeated():
    """It quotes the value that it could not read."""
    data = file_of(radiograph(StationName="Jane")).replace(b"SH\4\0Jane", b"FD\4\0Jane")
    with pytest.raises(DamagedImage) as caught:
        radiograph_header(read_dicom(data, "film.dcm"), "film.dcm")
    assert re.fullmatch(r"film\.dcm: damaged DICOM \(\w+\); send the file again", str(caught.value))


def test_a_number_that_is_none_is_not_repeated():
    data = file_of(radiograph(WindowCenter=1234, WindowWidth=10)).replace(b"1234", b"Jane")
    with pytest.raises(DamagedImage, match=r"^film\.dcm: WindowCenter is no number; correct the header$"):
        decode_dicom(read_dicom(data, "film.dcm"), "film.dcm")


def test_odd_values_are_not_told_to_the_log(recwarn, caplog):
    """They may be a patient's."""
    with_odd_values = file_of(radiograph(PatientID="P" * 65)).replace(b"20200131", b"Mustermn")
    header = radiograph_header(read_dicom(with_odd_values, "film.dcm"), "film.dcm")
    assert (header.patient_id, header.acquired) == ("P" * 65, None)
    assert [*recwarn, *caplog.records] == []
