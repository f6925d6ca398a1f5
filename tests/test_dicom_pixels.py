"""How stored values become grey: windows, LUTs, padding, unused bits, polarity, colour; the same film as PNG and DICOM."""

from datetime import datetime

import imagecodecs
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import pack_bits
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from radiographs import FILM, NATIVE, compressed, decoded, file_of, lut, png, radiograph, rle_frame, shown, square_of

from cxr_ray.dicom_header import radiograph_header, read_dicom
from cxr_ray.dicom_pixels import decode_dicom
from cxr_ray.pixels import DamagedImage, UnsupportedImage, UnusableImage, decode_picture, stored_square

LOSSLESS = (RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1, HTJ2KLossless)
ENCODERS = {JPEGLSLossless: "pyjpegls", JPEG2000Lossless: "pylibjpeg"}


def encoded(dataset, values, syntax):
    """The dataset in a lossless transfer syntax."""
    if syntax == JPEGLosslessSV1:
        code_stream = imagecodecs.jpeg8_encode(values, lossless=True, bitspersample=8 * values.dtype.itemsize)
        return compressed(dataset, syntax, code_stream)
    if syntax == HTJ2KLossless:
        return compressed(dataset, syntax, imagecodecs.htj2k_encode(values, reversible=True))
    if syntax == RLELossless:
        return compressed(dataset, syntax, rle_frame(values))
    if syntax in LOSSLESS:
        dataset.compress(syntax, generate_instance_uid=False, encoding_plugin=ENCODERS[syntax])
    return dataset


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("syntax", [*NATIVE, *LOSSLESS], ids=lambda syntax: syntax.name)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_same_film_as_png_and_as_dicom_gives_the_same_square(dtype, syntax, inverted):
    film = FILM if dtype == np.uint8 else FILM.astype(np.uint16) * 200 + 77
    values = ~film if inverted else film
    native = syntax if syntax in NATIVE else ExplicitVRLittleEndian
    dataset = radiograph(values, native, PhotometricInterpretation="MONOCHROME1" if inverted else "MONOCHROME2")
    data = file_of(encoded(dataset, values, syntax))
    for size in (16, 24, 64):
        expected = stored_square(decode_picture(png(film), "film.png"), size)
        np.testing.assert_array_equal(square_of(data, size=size), expected)


def test_eight_bits_in_sixteen_are_those_of_the_png():
    data = file_of(radiograph(FILM.astype(np.uint16), BitsStored=8, RescaleSlope=1, RescaleIntercept=0))
    np.testing.assert_array_equal(square_of(data), stored_square(decode_picture(png(FILM), "film.png"), 64))


@pytest.mark.parametrize("attribute", ["PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"])
def test_pixels_that_are_not_square_give_the_same_square(attribute):
    """The field of view is what is mapped, so that sampling it twice as densely along one axis changes nothing."""
    field = np.add.outer(np.arange(64) * 500, np.arange(96) * 300).astype(np.uint16)
    dense = np.repeat(field, 2, axis=0)
    spacing = [1, 2] if attribute == "PixelAspectRatio" else [0.1, 0.2]
    header = radiograph_header(dataset := radiograph(dense, **{attribute: spacing}), "film.dcm")
    assert header.warnings == ()
    expected = square_of(file_of(radiograph(field)), size=32)
    np.testing.assert_allclose(square_of(file_of(dataset), size=32).astype(int), expected, atol=1)


def test_a_linear_window_is_that_of_the_standard():
    """PS3.3 C.11.2.1.2.1: a center of 2048 and a width of 4096 show 0 as black and 4095 as white."""
    grey = decode_dicom(radiograph(FILM.astype(np.uint16), WindowCenter=2048, WindowWidth=4096), "film.dcm")
    assert (grey.black, grey.white) == (0, 4095)


def test_a_linear_exact_window_is_that_of_the_standard():
    """PS3.3 C.11.2.1.3.2: center minus and plus half of the width."""
    exact = {"WindowCenter": 2048, "WindowWidth": 4096, "VOILUTFunction": "LINEAR_EXACT"}
    grey = decode_dicom(radiograph(FILM.astype(np.uint16), **exact), "film.dcm")
    assert (grey.black, grey.white) == (0, 4096)


def test_a_sigmoid_is_that_of_the_standard():
    """PS3.3 C.11.2.1.3.1: half at the center, 1 / (1 + e^-2) half a width above it; and so through a rescale."""
    values = np.array([[1000, 1500, 2000], [500, 0, 1250]] * 8, dtype=np.uint16)
    window = {"WindowCenter": 2000, "WindowWidth": 2000, "VOILUTFunction": "SIGMOID"}
    grey = decode_dicom(radiograph(values, RescaleSlope=2, RescaleIntercept=0, **window), "film.dcm")
    expected = 1 / (1 + np.exp(-4 * (values * 2.0 - 2000) / 2000))
    np.testing.assert_allclose((grey.values - grey.black) / (grey.white - grey.black), expected, atol=1e-6)
    assert expected[0, 0] == 0.5


def test_a_sigmoid_far_from_its_center_does_not_overflow(recwarn):
    steep = radiograph(FILM.astype(np.uint16) * 257, WindowCenter=30000, WindowWidth=0.001, VOILUTFunction="SIGMOID")
    assert set(np.unique(shown(steep))) == {0, 255}
    assert [*recwarn] == []


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


@pytest.mark.parametrize(("attribute", "value"), [("RescaleSlope", 0), ("RescaleIntercept", "1e999")])
def test_a_rescale_that_shows_nothing_is_damage(attribute, value):
    dataset = radiograph(**({"RescaleSlope": 1, "RescaleIntercept": 0} | {attribute: value}))
    with pytest.raises(DamagedImage, match=r"^film\.dcm: RescaleSlope or RescaleIntercept is zero or infinite; correct"):
        decode_dicom(dataset, "film.dcm")


def test_a_window_that_falls_and_a_lut_that_falls_show_alike():
    values = FILM.astype(np.uint16)
    window = {"RescaleSlope": -1, "RescaleIntercept": 255, "WindowCenter": 128, "WindowWidth": 256}
    table = {"RescaleSlope": -1, "RescaleIntercept": 255, "VOILUTSequence": lut(np.arange(256), 0, 8)}
    for attributes in (window, table):
        np.testing.assert_array_equal(shown(radiograph(values, **attributes)), 255 - FILM)


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


def test_a_voi_lut_whose_negative_start_is_written_as_unsigned():
    values = np.array([[0, 1], [2, 3]], dtype=np.uint16)
    table = lut([5, 50, 150, 250], 65534, 8)
    dataset = radiograph(values, RescaleSlope=1, RescaleIntercept=-2, VOILUTSequence=table)
    np.testing.assert_array_equal(shown(dataset), [[5, 50], [150, 250]])


def test_a_lut_deeper_than_it_says_is_shown_whole():
    values = np.array([[0, 1], [2, 3]], dtype=np.uint16)
    dataset = radiograph(values, VOILUTSequence=lut([0, 1023, 2046, 4092], 0, 8))
    np.testing.assert_array_equal(shown(dataset), [[0, 64], [128, 255]])


@pytest.mark.parametrize("syntax", NATIVE)
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


@pytest.mark.parametrize("padding", [63536, -2000])
def test_padding_of_signed_pixels_however_it_is_written(padding):
    values = FILM.astype(np.int16)
    values[:5] = -2000
    dataset = radiograph(values)
    dataset.add_new("PixelPaddingValue", "US" if padding > 0 else "SS", padding)
    expected = FILM.copy()
    expected[:5] = 0
    np.testing.assert_array_equal(shown(dataset), expected)


def test_padding_under_a_voi_lut_is_dark():
    values = FILM.astype(np.uint16)
    values[:5] = 4095
    dataset = radiograph(values, BitsStored=12, PixelPaddingValue=4095, VOILUTSequence=lut(np.arange(4096) // 16, 0, 8))
    assert shown(dataset)[:5].max() == 0


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("stored", "high"), [(10, 9), (10, 12), (10, 15), (8, 15)])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless], ids=lambda syntax: syntax.name)
def test_only_the_stored_bits_count(syntax, stored, high, signed):
    """Older files keep overlays in the other bits (retired in PS3.5 2004), and nothing forbids garbage in them."""
    values = np.arange(2**stored).reshape(16, -1) - signed * 2 ** (stored - 1)
    place = high + 1 - stored
    mask = (2**stored - 1) << place
    garbage = np.random.default_rng(0).integers(0, 2**16, values.shape) & ~mask
    cells = (((values << place) & mask) | garbage).astype(np.uint16)
    attributes = {"BitsStored": stored, "HighBit": high, "PixelRepresentation": int(signed)}
    native = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    dataset = encoded(radiograph(cells, native, **attributes), cells, syntax)
    grey = decoded(file_of(dataset))
    np.testing.assert_array_equal(grey.values, values)
    assert (grey.black, grey.white) == (values.min(), values.max())


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless], ids=lambda syntax: syntax.name)
def test_an_odd_number_of_pixels_has_a_padding_byte(syntax):
    film = FILM[:17, :31]
    native = syntax if syntax in NATIVE else ExplicitVRLittleEndian
    np.testing.assert_array_equal(shown(encoded(radiograph(film, native), film, syntax)), film)


def test_eight_bits_in_words_of_big_endian():
    """PS3.5 section 8.1.1: under OW the bytes of each word are turned round."""
    dataset = radiograph(FILM, ExplicitVRBigEndian)
    dataset.PixelData = FILM.reshape(-1, 2)[:, ::-1].tobytes()
    dataset["PixelData"].VR = "OW"
    np.testing.assert_array_equal(shown(dataset), FILM)


def test_bytes_beyond_the_pixels_are_padding():
    np.testing.assert_array_equal(shown(radiograph(PixelData=FILM.tobytes() + b"\xff" * 100)), FILM)


def test_overlays_are_not_drawn():
    dataset = radiograph(BitsStored=8)
    plain = shown(dataset)
    dataset.add_new(0x60000010, "US", FILM.shape[0])
    dataset.add_new(0x60000011, "US", FILM.shape[1])
    dataset.add_new(0x60000050, "SS", [1, 1])
    dataset.add_new(0x60003000, "OW", pack_bits(np.ones(FILM.size, dtype=np.uint8)))
    np.testing.assert_array_equal(shown(dataset), plain)


RGB = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda syntax: syntax.name)
@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("shape", [(48, 32), (17, 31)])
def test_a_grey_film_sent_in_colour_is_read(syntax, planar, shape):
    film = FILM[: shape[0], : shape[1]]
    colour = np.stack([film] * 3, axis=0 if planar else -1)
    dataset = radiograph(colour, syntax, PlanarConfiguration=planar, Rows=shape[0], Columns=shape[1], **RGB)
    np.testing.assert_array_equal(shown(dataset), film)


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.name)
def test_a_grey_film_compressed_in_colour_is_read(syntax):
    colour = np.stack([FILM] * 3, axis=-1)
    dataset = radiograph(colour, PlanarConfiguration=0, **RGB)
    np.testing.assert_array_equal(shown(encoded(dataset, colour, syntax)), FILM)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEGLosslessSV1], ids=lambda syntax: syntax.name)
def test_a_grey_film_in_luminance_and_no_chrominance_is_read(syntax):
    colour = np.stack([FILM, np.full_like(FILM, 128), np.full_like(FILM, 128)], axis=-1)
    dataset = radiograph(colour, SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL", PlanarConfiguration=0)
    if syntax == JPEGLosslessSV1:
        frame = imagecodecs.jpeg8_encode(colour, lossless=True, colorspace="RGB", outcolorspace="RGB")
        dataset = compressed(dataset, syntax, frame)
    np.testing.assert_array_equal(shown(encoded(dataset, colour, syntax) if syntax == RLELossless else dataset), FILM)


def test_colour_of_sixteen_bits_is_read():
    colour = np.stack([FILM.astype(np.uint16) * 257] * 3, axis=-1)
    np.testing.assert_array_equal(shown(radiograph(colour, PlanarConfiguration=0, **RGB)), FILM)


def palette(curves, bits=16):
    """Attributes of a palette whose red, green and blue are `curves` of 256 entries."""
    attributes = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, curve in zip(("Red", "Green", "Blue"), curves, strict=True):
        attributes[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        attributes[f"{name}PaletteColorLookupTableData"] = curve.astype("<u2" if bits == 16 else np.uint8).tobytes()
    return attributes


@pytest.mark.parametrize("bits", [8, 16])
def test_a_grey_palette_is_applied(bits):
    curve = np.arange(256)[::-1] * (257 if bits == 16 else 1)
    np.testing.assert_array_equal(shown(radiograph(**palette([curve] * 3, bits))), 255 - FILM)


@pytest.mark.parametrize("kind", ["RGB", "palette"])
def test_a_colour_picture_is_refused(kind):
    if kind == "RGB":
        dataset = radiograph(np.stack([FILM, 255 - FILM, FILM], axis=-1), PlanarConfiguration=0, **RGB)
    else:
        dataset = radiograph(**palette([np.arange(256), np.arange(256)[::-1], np.arange(256)], 8))
    with pytest.raises(UnusableImage, match=r"^film\.dcm: a colour picture .*; send a radiograph$"):
        shown(dataset)


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


REFUSED = {
    "no image": ({"PixelData": None, "Rows": None}, UnusableImage, "holds no PixelData; send an image instance"),
    "no pixels": ({"PixelData": None}, DamagedImage, "holds no PixelData for its Rows; send the file again"),
    "floats": ({"PixelData": None, "FloatPixelData": b"1234"}, UnsupportedImage, "holds FloatPixelData; send whole numbers"),
    "constant": ({"pixels": np.full((8, 8), 9, dtype=np.uint16)}, UnusableImage, "every pixel has the value 9; send"),
    "no palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, DamagedImage, r"its LUT or window cannot be applied \("),
    "no photometric": ({"PhotometricInterpretation": None}, UnsupportedImage, "PhotometricInterpretation is absent; send"),
    "CIELab": ({"PhotometricInterpretation": "CIELAB"}, UnsupportedImage, "PhotometricInterpretation is CIELAB; send"),
    "grey in three": ({"SamplesPerPixel": 3}, UnusableImage, "SamplesPerPixel is 3 under PhotometricInterpretation MONO"),
    "12 allocated": ({"BitsAllocated": 12}, UnsupportedImage, "BitsAllocated is 12; send 8, 16 or 32 bits a sample"),
    "too many stored": ({"BitsStored": 12}, DamagedImage, "BitsStored is 12, HighBit 11 and BitsAllocated 8; correct"),
    "high bit too low": ({"HighBit": 3}, DamagedImage, "BitsStored is 8, HighBit 3 and BitsAllocated 8; correct"),
    "no rows": ({"Rows": 0}, DamagedImage, "Rows is 0 and Columns is 32; send the file again"),
    "frames": ({"NumberOfFrames": 2}, UnusableImage, "NumberOfFrames is 2; only single images are read"),
    "two rows": ({"Rows": [48, 48]}, DamagedImage, "Rows is no whole number; send the file again"),
    "no LUT data": ({"VOILUTSequence": [Dataset()]}, DamagedImage, r"its LUT or window cannot be applied \("),
    "LUT of no bits": ({"VOILUTSequence": lut([1], 0, 0)}, DamagedImage, "LUTDescriptor does not describe LUTData; correct"),
    "bad window": ({"WindowCenter": 500, "WindowWidth": 11}, UnusableImage, "showing 494.5 to 504.5 leaves a single grey"),
}


@pytest.mark.parametrize(("attributes", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_shows_no_film_is_refused_in_one_line(attributes, kind, message):
    with pytest.raises(kind, match=rf"^film\.dcm: {message}") as caught:
        stored_square(decode_dicom(radiograph(**attributes), "film.dcm"), 16, "film.dcm")
    assert "\n" not in str(caught.value)
