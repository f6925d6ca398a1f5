"""Transfer syntaxes: every one that is read, those that are not, and code streams that are not what the header says."""

import re

import imagecodecs
import numpy as np
import pytest
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from radiographs import FILM, NATIVE, compressed, decoded, file_of, radiograph, rle_frame, shown

from cxr_ray.dicom_codecs import TRANSFER_SYNTAXES
from cxr_ray.dicom_header import read_dicom
from cxr_ray.dicom_pixels import decode_dicom
from cxr_ray.pixels import DamagedImage, UnsupportedImage

EXTREMITIES = ["uncompressed", "rle", "jpeg-lossless", "jpeg-ls-lossless", "jpeg2000-lossless"]
SMOOTH = np.rint(np.sin(np.add.outer(np.arange(48) / 9, np.arange(32) / 7)) * 2047 + 2048).astype(np.uint16)

LOSSLESS = {
    RLELossless: lambda values, bits: rle_frame(values),
    JPEGLossless: lambda values, bits: imagecodecs.jpeg8_encode(values, lossless=True, predictor=6, bitspersample=bits),
    JPEGLosslessSV1: lambda values, bits: imagecodecs.jpeg8_encode(values, lossless=True, predictor=1, bitspersample=bits),
    JPEGLSLossless: lambda values, bits: imagecodecs.jpegls_encode(values),
    JPEG2000Lossless: lambda values, bits: imagecodecs.jpeg2k_encode(
        values, codecformat="j2k", reversible=True, bitspersample=bits
    ),
    HTJ2KLossless: lambda values, bits: imagecodecs.htj2k_encode(values, reversible=True),
    HTJ2KLosslessRPCL: lambda values, bits: imagecodecs.htj2k_encode(values, reversible=True, tlm=True),
}
# Encoder, bits a sample, and how many of 2 ** bits greys it may be wrong.
LOSSY = {
    "JPEG baseline": (JPEGBaseline8Bit, 8, lambda values: imagecodecs.jpeg8_encode(values, level=95), 4),
    "JPEG extended": (JPEGExtended12Bit, 12, lambda values: imagecodecs.jpeg8_encode(values, level=95, bitspersample=12), 64),
    "JPEG extended of 8 bits": (JPEGExtended12Bit, 8, lambda values: imagecodecs.jpeg8_encode(values, level=95), 4),
    "JPEG-LS": (JPEGLSNearLossless, 8, lambda values: imagecodecs.jpegls_encode(values, level=2), 2),
    "JPEG-LS of 16 bits": (JPEGLSNearLossless, 16, lambda values: imagecodecs.jpegls_encode(values, level=7), 7),
    "JPEG 2000": (JPEG2000, 16, lambda values: imagecodecs.jpeg2k_encode(values, level=80, codecformat="j2k"), 256),
    "HTJ2K": (HTJ2K, 16, lambda values: imagecodecs.htj2k_encode(values, level=0.0005, reversible=False), 256),
}


def smooth(bits):
    """SMOOTH, whose greys fill 12 bits, in another number of bits."""
    return (SMOOTH >> 4).astype(np.uint8) if bits == 8 else SMOOTH << (bits - 12)


def test_every_syntax_is_tested():
    assert {*NATIVE, *LOSSLESS, *(syntax for syntax, *_ in LOSSY.values())} == set(TRANSFER_SYNTAXES)


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda syntax: syntax.name)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_native_syntaxes_decode_to_the_values(syntax, dtype):
    values = FILM.astype(dtype) * (1 if dtype == np.uint8 else 100)
    grey = decoded(file_of(radiograph(values, syntax)))
    np.testing.assert_array_equal(grey.values, values)
    assert grey.values.dtype == dtype


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.name)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_lossless_syntaxes_decode_to_the_values(syntax, bits):
    values = smooth(bits)
    dataset = compressed(radiograph(values, BitsStored=bits), syntax, LOSSLESS[syntax](values, bits))
    np.testing.assert_array_equal(decoded(file_of(dataset)).values, values)


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.name)
def test_lossless_syntaxes_decode_to_signed_values(syntax):
    values = smooth(16).view(np.int16)
    unsigned = syntax in (RLELossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless)
    code_stream = LOSSLESS[syntax](values.view(np.uint16) if unsigned else values, 16)
    np.testing.assert_array_equal(decoded(file_of(compressed(radiograph(values), syntax, code_stream))).values, values)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_syntaxes_decode_to_nearly_the_values(name):
    syntax, bits, encode, error = LOSSY[name]
    values = smooth(bits)
    dataset = compressed(radiograph(values, BitsStored=bits), syntax, encode(values))
    found = decoded(file_of(dataset)).values
    np.testing.assert_allclose(found.astype(int), values, atol=error)


def test_signed_values_of_12_bits_in_jpeg_ls():
    """JPEG-LS knows no signs: they are those of the stored bits."""
    values = SMOOTH.astype(np.int16) - 2048
    code_stream = imagecodecs.jpegls_encode((values & 0xFFF).astype(np.uint16))
    dataset = compressed(radiograph(values, BitsStored=12), JPEGLSLossless, code_stream)
    np.testing.assert_array_equal(decoded(file_of(dataset)).values, values)


WHOLE_CELLS = [(syntax, 16) for syntax in LOSSLESS]
# The other encoders write as many bits as the type of the values has.
STORED_BITS = [(syntax, 12) for syntax in (JPEGLossless, JPEGLosslessSV1, JPEG2000Lossless)]


@pytest.mark.parametrize(("syntax", "precision"), WHOLE_CELLS + STORED_BITS)
def test_a_code_stream_holds_whole_cells_or_the_stored_bits_alone(syntax, precision):
    """Of 12 bits stored at the top of 16: a code stream of 12 bits a sample can hold nothing but them."""
    values = SMOOTH if precision == 12 else SMOOTH << 4 | 0b1001
    dataset = radiograph(values, BitsStored=12, HighBit=15)
    dataset = compressed(dataset, syntax, LOSSLESS[syntax](values, precision))
    np.testing.assert_array_equal(decoded(file_of(dataset)).values, SMOOTH)


@pytest.mark.parametrize("syntax", sorted(set(LOSSLESS) - {RLELossless}), ids=lambda syntax: syntax.name)
def test_a_code_stream_of_8_bits_for_cells_of_16(syntax):
    dataset = compressed(radiograph(FILM.astype(np.uint16), BitsStored=8), syntax, LOSSLESS[syntax](FILM, 8))
    np.testing.assert_array_equal(shown(dataset), FILM)


def test_fill_bytes_before_a_marker_are_skipped():
    """ITU-T T.81 B.1.1.2."""
    plain = imagecodecs.jpeg8_encode(FILM, level=95)
    filled = plain[:2] + b"\xff\xff\xff" + plain[2:]
    expected = shown(compressed(radiograph(), JPEGBaseline8Bit, plain))
    np.testing.assert_array_equal(shown(compressed(radiograph(), JPEGBaseline8Bit, filled)), expected)


def test_a_jpeg2000_file_in_place_of_its_code_stream_is_read():
    boxes = imagecodecs.jpeg2k_encode(SMOOTH, codecformat="jp2", reversible=True)
    assert boxes[4:6] == b"jP"
    dataset = compressed(radiograph(SMOOTH, BitsStored=12), JPEG2000Lossless, boxes)
    np.testing.assert_array_equal(decoded(file_of(dataset)).values, SMOOTH)


def test_all_five_encodings_of_the_real_extremity_agree(real_data):
    greys = []
    for syntax in EXTREMITIES:
        path = real_data / "dicom" / f"extremity_cr_{syntax}_mono1_10bit.dcm"
        greys.append(decode_dicom(read_dicom(path.read_bytes(), path.name), path.name))
    for grey in greys:
        np.testing.assert_array_equal(grey.values, greys[0].values)
        assert grey.values.dtype == np.uint16
        # The window of the file shows 38 to 1061, and MONOCHROME1 turns the greys of 16 bits round.
        assert (grey.black, grey.white) == (65535 - 1061, 65535 - 38)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.102", "1.2.840.10008.1.2.4.93", "1.2.3.4", "1.2.840.10008.1.2.4.94"])
def test_a_syntax_that_is_not_decoded_is_named(syntax):
    dataset = radiograph()
    dataset.file_meta.TransferSyntaxUID = syntax
    known = dataset.file_meta.TransferSyntaxUID.name
    with pytest.raises(UnsupportedImage) as caught:
        decode_dicom(dataset, "film.dcm")
    assert str(caught.value) == f"film.dcm: transfer syntax {known} is not decoded; transcode it to Explicit VR Little Endian"


def test_an_absent_transfer_syntax_is_damage():
    dataset = radiograph()
    del dataset.file_meta.TransferSyntaxUID
    with pytest.raises(DamagedImage, match=r"^film\.dcm: TransferSyntaxUID is absent; send DICOM Part 10"):
        decode_dicom(dataset, "film.dcm")


def test_fewer_pixels_than_announced_are_damage():
    with pytest.raises(DamagedImage) as caught:
        decode_dicom(radiograph(Rows=500), "film.dcm")
    reason = "PixelData has 1536 bytes, its header asks for 16000"
    assert str(caught.value) == f"film.dcm: pixels do not decode as Explicit VR Little Endian ({reason}); send the file again"


def test_big_endian_samples_of_32_bits_are_not_guessed():
    with pytest.raises(DamagedImage, match=r"\(readers disagree about the order of big-endian samples of 32 bits\)"):
        shown(radiograph(FILM.astype(np.uint32), NATIVE[2]))
    np.testing.assert_array_equal(decoded(file_of(radiograph(FILM.astype(np.uint32)))).values, FILM)


def test_truncated_pixels_are_damage(real_data):
    for path in sorted((real_data / "dicom").glob("*.dcm")):
        data = path.read_bytes()
        with pytest.raises(DamagedImage, match=rf"^{path.name}: .*send the file again$"):
            decode_dicom(read_dicom(data[: len(data) // 2], path.name), path.name)


@pytest.mark.parametrize("syntax", [*LOSSLESS], ids=lambda syntax: syntax.name)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_code_stream_that_breaks_off_is_damage(syntax, share):
    """Some decoders fill what is missing with grey."""
    noise = np.random.default_rng(0).integers(0, 4096, (64, 64), dtype=np.uint16)
    whole = LOSSLESS[syntax](noise, 12)
    dataset = compressed(radiograph(noise, BitsStored=12), syntax, whole[: int(share * len(whole))])
    with pytest.raises(DamagedImage, match=r"^film\.dcm: pixels do not decode as .*; send the file again$"):
        decoded(file_of(dataset))


@pytest.mark.parametrize("syntax", sorted(set(LOSSLESS) - {RLELossless}), ids=lambda syntax: syntax.name)
def test_a_code_stream_of_another_size_is_not_decoded(syntax):
    dataset = compressed(radiograph(SMOOTH, BitsStored=12), syntax, LOSSLESS[syntax](SMOOTH[:40], 12))
    with pytest.raises(DamagedImage, match=r"\(its code stream is 32x40, the header says 32x48\); send the file again$"):
        decoded(file_of(dataset))


def test_a_code_stream_of_another_number_of_samples_is_not_decoded():
    colour = imagecodecs.jpeg8_encode(np.stack([FILM] * 3, axis=-1))
    dataset = compressed(radiograph(), JPEGBaseline8Bit, colour)
    with pytest.raises(DamagedImage, match=r"\(its code stream has 3 samples a pixel, the header says 1\); send the file"):
        decoded(file_of(dataset))


def test_run_lengths_that_make_more_than_the_image_reserve_no_more():
    """A run of two bytes makes 128: what follows the image is not decoded."""
    frame = rle_frame(FILM)[:64] + b"\x81\x07" * 1_000_000
    grey = decoded(file_of(compressed(radiograph(), RLELossless, frame)))
    assert grey.values.shape == FILM.shape
    assert (grey.values == 7).all()


def test_run_lengths_may_cross_rows():
    """PS3.5 annex G.3.1 forbids it, and encoders do it."""
    frame = rle_frame(FILM)
    assert len(frame) < 64 + FILM.size + 2 * FILM.shape[0] / 4, "runs of 128 over rows of 32"
    np.testing.assert_array_equal(shown(compressed(radiograph(), RLELossless, frame)), FILM)


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


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, *sorted(set(LOSSLESS) - {RLELossless})], ids=lambda syntax: syntax.name)
def test_reasons_of_codecs_are_not_repeated(syntax):
    """They quote what they read, which in a damaged file may be anything."""
    whole = imagecodecs.jpeg8_encode(FILM) if syntax == JPEGBaseline8Bit else LOSSLESS[syntax](FILM, 8)
    with pytest.raises(DamagedImage) as caught:
        decoded(file_of(compressed(radiograph(), syntax, whole[: len(whole) // 3])))
    known = re.escape(syntax.name)
    assert re.fullmatch(rf"film\.dcm: pixels do not decode as {known} \(\w+\); send the file again", str(caught.value))


def test_a_code_stream_that_is_none_is_damage():
    dataset = compressed(radiograph(), JPEGBaseline8Bit, b"\xff\xd8 Doe^Jane \xff\xd9")
    with pytest.raises(DamagedImage, match=r"\(its code stream has no header\); send the file again$"):
        decoded(file_of(dataset))
