"""DICOM files as radiographs: windows, LUTs, transfer syntaxes, ages, refusals, and files that are damaged."""

import io
import shutil
import subprocess
from datetime import datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from cxr_ray.dicom_image import (
    age_in_years,
    check_frontal_chest,
    decode_dicom,
    looks_like_dicom,
    radiograph_header,
    read_dicom,
    read_dicom_header,
)
from cxr_ray.pixels import (
    DamagedImage,
    ImageError,
    OversizedImage,
    UnsupportedImage,
    UnusableImage,
    decode_picture,
    stored_square,
)

SYNTAXES = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
COMPRESSED = [RLELossless, JPEGLSLossless, JPEG2000Lossless]
EXTREMITIES = ["uncompressed", "rle", "jpeg-lossless", "jpeg-ls-lossless", "jpeg2000-lossless"]
FILM = np.random.default_rng(1).permutation(np.repeat(np.arange(256, dtype=np.uint8), 6)).reshape(48, 32)


def radiograph(pixels=FILM, syntax=ExplicitVRLittleEndian, **attributes):
    """A chest film of `pixels`; attributes that are None are removed."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.SOPInstanceUID, dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3.1", "1.2.3.2", "1.2.3.3"
    dataset.PatientID, dataset.PatientSex, dataset.PatientAge = "P1", "F", "062Y"
    dataset.StudyDate, dataset.StudyTime = "20200131", "101112"
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = "CR", "CHEST", "PA"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    order = "<" if syntax.is_little_endian else ">"
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    dataset["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 and not syntax.is_implicit_VR else "OW"
    for name, value in attributes.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    dataset.HighBit = dataset.BitsStored - 1
    return dataset


def file_of(dataset):
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def shown(dataset):
    """What a display of 256 greys shows of a dataset that was written and read again; uint8."""
    grey = decode_dicom(read_dicom(file_of(dataset), "film.dcm"), "film.dcm")
    share = (grey.values.astype(np.float64) - grey.black) / (grey.white - grey.black)
    return np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)


def square_of(data, name, size=64):
    return stored_square(decode_dicom(read_dicom(data, name), name), size, name)


def lut(entries, first, bits, representation="US"):
    """A Modality or VOI LUT item; `first` is the stored value that the first entry belongs to."""
    item = Dataset()
    item.add_new("LUTDescriptor", representation, [len(entries) % 65536, first, bits])
    item.add_new("LUTData", "US", [int(entry) for entry in entries])
    return Sequence([item])


def png(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("size", [16, 24, 64])
def test_the_same_film_as_png_and_as_dicom_gives_the_same_square(size):
    expected = stored_square(decode_picture(png(FILM), "film.png"), size)
    inverted = radiograph(255 - FILM, PhotometricInterpretation="MONOCHROME1")
    for dataset in (radiograph(), inverted, radiograph(RescaleSlope=1, RescaleIntercept=0)):
        np.testing.assert_array_equal(square_of(file_of(dataset), "film.dcm", size), expected)


def test_the_same_film_of_16_bits_as_png_and_as_dicom_gives_the_same_square():
    values = FILM.astype(np.uint16) * 200 + 77
    expected = stored_square(decode_picture(png(values), "film.png"), 24)
    inverted = radiograph(np.uint16(65535) - values, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(square_of(file_of(radiograph(values)), "film.dcm", 24), expected)
    np.testing.assert_allclose(square_of(file_of(inverted), "film.dcm", 24).astype(int), expected, atol=1)


def test_a_linear_window_is_that_of_the_standard():
    """PS3.3 C.11.2.1.2.1: a center of 2048 and a width of 4096 show 0 as black and 4095 as white."""
    grey = decode_dicom(radiograph(FILM.astype(np.uint16), WindowCenter=2048, WindowWidth=4096), "film.dcm")
    assert (grey.black, grey.white) == (0, 4095)


def test_a_linear_exact_window_is_that_of_the_standard():
    """PS3.3 C.11.2.1.3.2: center minus and plus half of the width."""
    exact = {"WindowCenter": 2048, "WindowWidth": 4096, "VOILUTFunction": "LINEAR_EXACT"}
    grey = decode_dicom(radiograph(FILM.astype(np.uint16), **exact), "film.dcm")
    assert (grey.black, grey.white) == (0, 4096)


def test_of_several_windows_the_first_counts():
    several = radiograph(WindowCenter=[100.5, 7], WindowWidth=[101, 9])
    np.testing.assert_array_equal(shown(several), shown(radiograph(WindowCenter=100.5, WindowWidth=101)))
    assert not np.array_equal(shown(several), FILM)


@pytest.mark.parametrize("width", [0, 1])
def test_a_window_without_width_is_none(width):
    np.testing.assert_array_equal(shown(radiograph(WindowCenter=0, WindowWidth=width)), FILM)


def test_a_window_applies_to_rescaled_values():
    values = FILM.astype(np.uint16)
    rescaled = radiograph(values, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=155.5, WindowWidth=511)
    expected = np.clip((values * 2.0 - 100 + 100) / 510, 0, 1) * 255
    np.testing.assert_array_equal(shown(rescaled), np.rint(expected).astype(np.uint8))


def test_a_rescale_with_negative_slope_turns_black_and_white_round():
    values = FILM.astype(np.uint16)
    turned = radiograph(values, RescaleSlope=-1, RescaleIntercept=255)
    np.testing.assert_array_equal(shown(turned), 255 - FILM)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_a_voi_lut_is_applied_whatever_its_depth(bits):
    curve = np.rint(np.linspace(0, 1, 1024) ** 2 * (2**bits - 1))
    values = FILM.astype(np.uint16) * 4
    expected = np.rint(curve[values] / (2**bits - 1) * 255)
    dataset = radiograph(values, BitsStored=10, VOILUTSequence=lut(curve, 0, bits), WindowCenter=5, WindowWidth=5)
    np.testing.assert_array_equal(shown(dataset), expected)


def test_beyond_a_voi_lut_its_ends_hold():
    values = np.array([[0, 99, 100, 101], [102, 103, 104, 60000]], dtype=np.uint16)
    dataset = radiograph(values, VOILUTSequence=lut([10, 80, 160, 240], 100, 8))
    np.testing.assert_array_equal(shown(dataset), [[10, 10, 10, 80], [160, 240, 240, 240]])


def test_a_voi_lut_takes_rescaled_negative_values():
    values = np.array([[0, 1], [2, 3]], dtype=np.uint16)
    dataset = radiograph(values, RescaleSlope=1, RescaleIntercept=-2, VOILUTSequence=lut([5, 50, 150, 250], -2, 8, "SS"))
    np.testing.assert_array_equal(shown(dataset), [[5, 50], [150, 250]])


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_lut_data_as_words_follow_the_byte_order(syntax):
    curve = np.arange(256, dtype=np.uint16)[::-1] * 16
    sequence = lut(curve, 0, 12)
    words = curve.astype("<u2" if syntax.is_little_endian else ">u2").tobytes()
    sequence[0].add_new("LUTData", "OW", words)
    dataset = radiograph(FILM, syntax, VOILUTSequence=sequence)
    np.testing.assert_array_equal(shown(dataset), np.rint(curve[FILM] / 4095 * 255))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_modality_lut_comes_before_the_window(bits):
    curve = np.arange(256)[::-1] * (2 ** (bits - 8))
    dataset = radiograph(ModalityLUTSequence=lut(curve, 0, bits))
    dataset.ModalityLUTSequence[0].ModalityLUTType = "OD"
    dataset.WindowCenter, dataset.WindowWidth = 2 ** (bits - 1), 2**bits
    expected = np.rint(curve[FILM] / (2**bits - 1) * 255)
    np.testing.assert_array_equal(shown(dataset), expected)


def test_signed_pixels_keep_their_order():
    values = FILM.astype(np.int16) * 10 - 1200
    np.testing.assert_array_equal(shown(radiograph(values)), FILM)
    inverted = radiograph(-values, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(shown(inverted), FILM)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("padding", "limit"), [(0, None), (60000, None), (0, 20), (60020, 60000)])
def test_padding_is_dark_and_does_not_widen_the_range(photometric, padding, limit):
    values = FILM.astype(np.uint16) + 3000
    expected = FILM.copy() if photometric == "MONOCHROME2" else 255 - FILM
    values[:5], expected[:5] = padding, 0
    attributes = {"PixelPaddingValue": padding, "PhotometricInterpretation": photometric}
    if limit is not None:
        attributes["PixelPaddingRangeLimit"] = limit
        values[0] = min(padding, limit) + 5
    kept = expected[5:]
    assert (kept.min(), kept.max()) == (0, 255)
    np.testing.assert_array_equal(shown(radiograph(values, **attributes)), expected)


def test_padding_outside_the_window_is_dark():
    values = FILM.astype(np.uint16) + 3000
    values[:5] = 65535
    dataset = radiograph(values, PixelPaddingValue=65535, WindowCenter=3128, WindowWidth=256)
    expected = FILM.copy()
    expected[:5] = 0
    np.testing.assert_array_equal(shown(dataset), expected)


def test_bits_above_those_stored_are_ignored():
    """Older files keep overlays in the bits above HighBit (retired in PS3.5 2004)."""
    values = FILM.astype(np.uint16) * 4
    overlaid = values | 0xF000
    np.testing.assert_array_equal(shown(radiograph(overlaid, BitsStored=10)), shown(radiograph(values, BitsStored=10)))


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_native_syntaxes_decode_to_the_same_values(syntax, dtype):
    values = FILM.astype(dtype) * (1 if dtype == np.uint8 else 100)
    np.testing.assert_array_equal(shown(radiograph(values, syntax)), FILM)


@pytest.mark.parametrize("syntax", COMPRESSED)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_lossless_syntaxes_decode_to_the_same_values(syntax, bits):
    values = FILM if bits == 8 else FILM.astype(np.uint16) * (2 ** (bits - 8))
    dataset = radiograph(values, BitsStored=bits)
    expected = shown(dataset)
    dataset.compress(syntax, generate_instance_uid=False)
    assert dataset.file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(shown(dataset), expected)


@pytest.mark.parametrize(("syntax", "options"), [(JPEG2000, {"j2k_cr": [4]}), (JPEGLSNearLossless, {"jls_error": 2})])
def test_lossy_syntaxes_decode_to_nearly_the_same_values(syntax, options):
    values = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    dataset = radiograph(values)
    dataset.compress(syntax, generate_instance_uid=False, **options)
    np.testing.assert_allclose(shown(dataset).astype(int), values, atol=4)


def test_a_grey_film_sent_in_colour_is_read_and_a_colour_picture_is_not():
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    np.testing.assert_array_equal(shown(radiograph(np.stack([FILM] * 3, axis=-1), **colour)), FILM)
    with pytest.raises(UnusableImage, match=r"^film\.dcm: a colour picture .*; send a radiograph$"):
        shown(radiograph(np.stack([FILM, 255 - FILM, FILM], axis=-1), **colour))


def test_all_five_encodings_of_the_real_extremity_agree(real_data):
    greys = []
    for syntax in EXTREMITIES:
        path = real_data / "dicom" / f"extremity_cr_{syntax}_mono1_10bit.dcm"
        greys.append(decode_dicom(read_dicom(path.read_bytes(), path.name), path.name))
    for grey in greys:
        np.testing.assert_array_equal(grey.values, greys[0].values)
        assert (grey.black, grey.white) == (greys[0].black, greys[0].white) == (-1061, -38)


def test_the_real_chest_of_8_bits(real_data):
    path = real_data / "dicom" / "chest_cr_jpeg-baseline_mono2_8bit.dcm"
    header = radiograph_header(read_dicom(path.read_bytes(), path.name), path.name)
    assert (header.age_years, header.sex, header.view) == (62.0, "M", "PA")
    assert header.acquired == datetime(1901, 1, 1)
    assert header.warnings == ()
    square = square_of(path.read_bytes(), path.name, 256)
    assert square[100:200, 110:146].mean() > square[60:120, 50:90].mean()


def test_the_real_chest_of_15_bits_shows_air_dark(real_data):
    path = real_data / "dicom" / "chest_cr_jpeg2000-lossless_mono1_15bit.dcm"
    header = radiograph_header(read_dicom(path.read_bytes(), path.name), path.name)
    assert (header.age_years, header.sex, header.view) == (64.0, "F", "PA")
    assert header.acquired == datetime(1995, 9, 26, 12, 51, 30), "content date, before that of the study"
    square = square_of(path.read_bytes(), path.name, 256)
    mediastinum = square[140:200, 118:138].mean()
    assert square[60:120, 60:90].mean() < mediastinum - 30, "right lung"
    assert square[60:120, 170:200].mean() < mediastinum - 30, "left lung"


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
        ({"StudyTime": "1011"}, datetime(2020, 1, 31)),
        ({"SeriesDate": "20200201", "SeriesTime": "080000"}, datetime(2020, 2, 1, 8)),
        ({"AcquisitionDate": "20200202", "SeriesDate": "20200201"}, datetime(2020, 2, 2)),
        ({"AcquisitionDate": "", "StudyDate": "20200131"}, datetime(2020, 1, 31, 10, 11, 12)),
        ({"StudyDate": "unknown"}, None),
        ({"StudyDate": None}, None),
    ],
)
def test_the_moment_of_acquisition(attributes, acquired):
    assert radiograph_header(radiograph(**attributes), "film.dcm").acquired == acquired


def test_what_is_empty_is_unknown_and_warned_of():
    header = radiograph_header(radiograph(PatientSex="O", ViewPosition="", BodyPartExamined=None, PatientID=""), "film")
    assert (header.sex, header.view, header.patient_id) == (None, None, "")
    assert header.warnings == (
        "BodyPartExamined is empty: taken as a chest radiograph",
        "ViewPosition is empty: view unknown",
    )


def test_a_chest_film_as_secondary_capture_is_accepted():
    assert check_frontal_chest(radiograph(SOPClassUID="1.2.840.10008.5.1.4.1.1.7"), "film.dcm") == []


REFUSED = {
    "CT": ({"Modality": "CT"}, UnusableImage, r"Modality is CT; only radiographs \(CR, DX, DR\) are read"),
    "no modality": ({"Modality": None}, UnusableImage, r"Modality is absent; only radiographs \(CR, DX, DR\) are read"),
    "hand": ({"BodyPartExamined": "HAND"}, UnusableImage, "BodyPartExamined is HAND; only chest radiographs are read"),
    "lateral": ({"ViewPosition": "LL"}, UnusableImage, r"ViewPosition is LL; only frontal views \(PA, AP\) are read"),
    "frames": ({"NumberOfFrames": 12}, UnusableImage, "NumberOfFrames is 12; only single images are read"),
    "no UID": ({"StudyInstanceUID": None}, DamagedImage, "StudyInstanceUID is absent; send a complete DICOM instance"),
}


@pytest.mark.parametrize(("attributes", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_frontal_chest_radiograph_is_refused(attributes, kind, message):
    with pytest.raises(kind, match=rf"^film\.dcm: {message}$"):
        radiograph_header(radiograph(**attributes), "film.dcm")


def test_the_real_extremity_is_refused(real_data):
    path = real_data / "dicom" / "extremity_cr_rle_mono1_10bit.dcm"
    with path.open("rb") as stream, pytest.raises(UnusableImage, match=r"BodyPartExamined is EXTREMITY; only chest"):
        radiograph_header(read_dicom_header(stream, path.name), path.name)


UNDECODABLE = {
    "no image": ({"PixelData": None, "Rows": None}, UnusableImage, "holds no PixelData; send an image instance"),
    "no pixels": ({"PixelData": None}, DamagedImage, "holds no PixelData for its 48 rows; send the file again"),
    "constant": ({"pixels": np.full((8, 8), 9, dtype=np.uint16)}, UnusableImage, "every pixel has the value 9; send"),
    "palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, UnusableImage, "PALETTE COLOR pixels of shape"),
    "oversized": ({"Rows": 20000, "Columns": 10000}, OversizedImage, "10000x20000 is 200 megapixels; send at most 64"),
    "too few bytes": ({"Rows": 500}, DamagedImage, r"pixels do not decode as Explicit VR Little Endian \(.*; send the"),
    "two rows": ({"Rows": [48, 48]}, DamagedImage, r"Rows is \[48, 48\], no whole number; send the file again"),
    "no LUT data": ({"VOILUTSequence": Sequence([Dataset()])}, DamagedImage, r"its LUT or window cannot be applied \("),
    "bad window": ({"WindowCenter": 500, "WindowWidth": 11}, UnusableImage, "showing 494.5 to 504.5 leaves a single grey"),
}


@pytest.mark.parametrize(("attributes", "kind", "message"), UNDECODABLE.values(), ids=UNDECODABLE)
def test_what_does_not_decode_is_said_in_one_line(attributes, kind, message):
    with pytest.raises(kind, match=rf"^film\.dcm: {message}") as caught:
        stored_square(decode_dicom(radiograph(**attributes), "film.dcm"), 16, "film.dcm")
    assert "\n" not in str(caught.value)


def test_an_unknown_transfer_syntax_is_unsupported():
    dataset = radiograph()
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
    with pytest.raises(UnsupportedImage, match=r"^film\.dcm: transfer syntax MPEG-4 .* is not decoded; transcode it$"):
        decode_dicom(dataset, "film.dcm")


def test_extended_jpeg_of_12_bits_is_unsupported():
    dataset = radiograph(FILM.astype(np.uint16), BitsStored=12)
    dataset.file_meta.TransferSyntaxUID = JPEGExtended12Bit
    with pytest.raises(UnsupportedImage, match=r"^film\.dcm: transfer syntax JPEG Extended .* up to 8 bits only; transcode"):
        decode_dicom(dataset, "film.dcm")


def test_an_absent_transfer_syntax_is_damage():
    dataset = radiograph()
    del dataset.file_meta.TransferSyntaxUID
    with pytest.raises(DamagedImage, match=r"^film\.dcm: TransferSyntaxUID is absent; send DICOM Part 10"):
        decode_dicom(dataset, "film.dcm")


def test_what_is_no_dicom_is_unsupported():
    for data in (b"", b"dear colleague", png(FILM), b"\0" * 132):
        assert not looks_like_dicom(data)
        with pytest.raises(UnsupportedImage, match=r"^film\.dcm: not a DICOM file \(no DICM prefix\); send"):
            read_dicom(data, "film.dcm")
    assert looks_like_dicom(file_of(radiograph()))


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_header_cut_anywhere_before_its_last_uid_is_never_taken_for_another_kind_of_file(syntax):
    whole = file_of(radiograph(syntax=syntax))
    end = len(whole) - FILM.size if syntax == DeflatedExplicitVRLittleEndian else whole.index(b"1.2.3.3")
    for length in range(len(whole) if end > len(whole) else end):
        with pytest.raises((DamagedImage, UnsupportedImage)):
            radiograph_header(read_dicom_header(io.BytesIO(whole[:length]), "film.dcm"), "film.dcm")


def test_truncated_pixels_are_damage(real_data):
    for path in sorted((real_data / "dicom").glob("*.dcm")):
        data = path.read_bytes()
        with pytest.raises(DamagedImage, match=rf"^{path.name}: .*send the file again$"):
            decode_dicom(read_dicom(data[: len(data) // 2], path.name), path.name)


def test_a_code_stream_larger_than_announced_is_not_decoded():
    dataset = radiograph(FILM.astype(np.uint16), BitsStored=12)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    data = bytearray(file_of(dataset))
    size = data.index(b"\xff\x4f\xff\x51") + 8
    data[size : size + 8] = (60000).to_bytes(4) * 2
    with pytest.raises(DamagedImage, match=r"its code stream is 60000x60000, the header says 32x48\); send the file"):
        decode_dicom(read_dicom(bytes(data), "film.dcm"), "film.dcm")


def test_lossless_jpeg_that_ends_its_decoder_is_damage_and_the_next_image_is_decoded(real_data):
    """GDCM aborts over the version in the JFIF segment."""
    whole = (real_data / "dicom" / "extremity_cr_jpeg-lossless_mono1_10bit.dcm").read_bytes()
    start = whole.index(b"\xff\xd8\xff")
    jfif = b"\xff\xe0\x00\x10JFIF\x00\xff\xff\x00\x00\x01\x00\x01\x00\x00"
    odd = read_dicom(whole, "film.dcm")
    odd.PixelData = encapsulate([whole[start : start + 2] + jfif + get_frame(odd.PixelData, 0, number_of_frames=1)[2:]])
    with pytest.raises(DamagedImage, match=r"pixels do not decode as JPEG Lossless.*the decoder ended over it"):
        decode_dicom(odd, "film.dcm")
    assert decode_dicom(read_dicom(whole, "film.dcm"), "film.dcm").values.shape == (1760, 1760)


@pytest.mark.system
@pytest.mark.parametrize(("option", "depth"), [("+e1", 12), ("+el", 16), ("+ee", 8), ("+eb", 8)])
def test_jpeg_written_by_dcmtk(tmp_path, option, depth):
    dcmcjpeg = shutil.which("dcmcjpeg") or pytest.skip("DCMTK is not installed")
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    values = smooth if depth == 8 else smooth.astype(np.uint16) * 2 ** (depth - 8)
    dataset = radiograph(values, BitsStored=depth)
    (tmp_path / "film.dcm").write_bytes(file_of(dataset))
    subprocess.run([dcmcjpeg, option, tmp_path / "film.dcm", tmp_path / "jpeg.dcm"], check=True)
    square = square_of((tmp_path / "jpeg.dcm").read_bytes(), "jpeg.dcm")
    expected = square_of(file_of(dataset), "film.dcm")
    np.testing.assert_allclose(square.astype(int), expected, atol=0 if depth > 8 else 3)


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
    films = [file_of(radiograph(FILM.astype(np.uint16), syntax, **rich)) for syntax in SYNTAXES]
    for syntax in COMPRESSED:
        dataset = radiograph(FILM.astype(np.uint16), BitsStored=12, ModalityLUTSequence=curve)
        dataset.compress(syntax, generate_instance_uid=False)
        films.append(file_of(dataset))
    return films


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


def test_odd_values_are_not_told_to_the_log(recwarn, caplog):
    """They may be a patient's."""
    with_odd_values = file_of(radiograph(PatientID="P" * 65)).replace(b"20200131", b"Mustermn")
    header = radiograph_header(read_dicom(with_odd_values, "film.dcm"), "film.dcm")
    assert (header.patient_id, header.acquired) == ("P" * 65, None)
    assert [*recwarn, *caplog.records] == []
