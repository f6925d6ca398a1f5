"""Damaged and hostile DICOM files: whatever is changed in them, only an ImageError is raised, and memory stays bounded."""

import resource

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import HTJ2KLossless, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless
from radiographs import FILM, NATIVE, compressed, file_of, lut, radiograph, rle_frame

from cxr_ray.dicom_header import radiograph_header, read_dicom
from cxr_ray.dicom_pixels import decode_dicom
from cxr_ray.pixels import ImageError, OversizedImage, stored_square


def only_image_errors(data):
    try:
        dataset = read_dicom(data, "film.dcm")
        radiograph_header(dataset, "film.dcm")
        square = stored_square(decode_dicom(dataset, "film.dcm"), 16, "film.dcm")
    except ImageError as error:
        assert "\n" not in str(error)
        assert str(error).startswith("film.dcm: ")
    else:
        assert square.shape == (16, 16)


def mutated(whole, data, header_bytes):
    """`whole` with some bytes replaced, most of them in its header, and perhaps cut."""
    changed = bytearray(whole)
    places = st.one_of(st.integers(128, min(len(whole), header_bytes) - 1), st.integers(0, len(whole) - 1))
    for place in data.draw(st.lists(places, max_size=8)):
        changed[place] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b"\0\xff0129.\\")))
    return bytes(changed[: data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))])


def films_to_mutate():
    curve = lut(np.arange(256), 0, 8)
    rich = {
        "VOILUTSequence": curve,
        "WindowCenter": [128, 90],
        "WindowWidth": [256, 80],
        "PixelPaddingValue": 0,
        "RescaleSlope": 1,
        "RescaleIntercept": -2,
        "NumberOfFrames": 1,
    }
    films = [file_of(radiograph(FILM.astype(np.uint16), syntax, **rich)) for syntax in NATIVE]
    for syntax in (JPEGLSLossless, JPEG2000Lossless):
        dataset = radiograph(FILM.astype(np.uint16), BitsStored=12, ModalityLUTSequence=curve)
        dataset.compress(syntax, generate_instance_uid=False)
        films.append(file_of(dataset))
    frames = {
        RLELossless: rle_frame(FILM),
        JPEGBaseline8Bit: imagecodecs.jpeg8_encode(FILM),
        HTJ2KLossless: imagecodecs.htj2k_encode(FILM, reversible=True),
    }
    return films + [file_of(compressed(radiograph(), syntax, frame)) for syntax, frame in frames.items()]


FILMS = films_to_mutate()


@settings(max_examples=300, deadline=None)
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_raise_only_image_errors(data):
    whole = data.draw(st.sampled_from(FILMS))
    only_image_errors(mutated(whole, data, header_bytes=len(whole)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_mutations_of_a_real_file_raise_only_image_errors(real_data, data):
    whole = (real_data / "dicom" / "chest_cr_jpeg-baseline_mono2_8bit.dcm").read_bytes()
    only_image_errors(mutated(whole, data, header_bytes=2000))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
@pytest.mark.filterwarnings("ignore")
def test_random_bytes_raise_only_image_errors(data):
    only_image_errors(b"\0" * 128 + b"DICM" + data)


ATTRIBUTES = [
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "NumberOfFrames",
]


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(ATTRIBUTES), st.integers(0, 32767), min_size=1))
@pytest.mark.filterwarnings("ignore")
def test_any_numbers_raise_only_image_errors(changes):
    only_image_errors(file_of(radiograph(FILM.astype(np.uint16), **({"NumberOfFrames": 1, "HighBit": 15} | changes))))


@settings(max_examples=200, deadline=None)
@given(
    center=st.sampled_from(["1e308", "-1e308", "nan", "inf", "1e-320", "0", "\\", "5\\x"]),
    width=st.sampled_from(["1e308", "nan", "inf", "1e-300", "2", "-5", "\\"]),
    slope=st.sampled_from(["1e308", "1e-308", "nan", "0", "-1", "\\"]),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID", "CUBIC", ""]),
    with_lut=st.booleans(),
)
@pytest.mark.filterwarnings("ignore")
def test_any_window_raises_only_image_errors(center, width, slope, function, with_lut):
    dataset = radiograph(FILM.astype(np.uint16), VOILUTFunction=function)
    for name, value in {"WindowCenter": center, "WindowWidth": width, "RescaleSlope": slope, "RescaleIntercept": "0"}.items():
        dataset.add_new(name, "LO", value)
    if with_lut:
        dataset.ModalityLUTSequence = lut(np.arange(256), 0, 8)
    only_image_errors(file_of(dataset))


def test_an_announced_size_is_not_reserved():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rows, columns in ((65535, 65535), (8000, 7999)):
        with pytest.raises(ImageError):
            decode_dicom(radiograph(Rows=rows, Columns=columns), "film.dcm")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"


def test_too_many_pixels_are_oversized():
    with pytest.raises(OversizedImage, match=r"^film\.dcm: 10000x20000 is 200 megapixels; send at most 64 megapixels$"):
        decode_dicom(radiograph(Rows=20000, Columns=10000), "film.dcm")
