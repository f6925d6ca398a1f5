"""Values and display against independent decoders: DCMTK, and GDCM where DCMTK cannot (JPEG 2000), on files of others."""

import os
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
from conftest import REPOSITORY, run_peer
from PIL import Image
from pydicom.uid import (
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from radiographs import FILM, as_greys, decoded, file_of, lut, radiograph

from cxr_ray.dicom_codecs import stored_values
from cxr_ray.dicom_header import read_dicom
from cxr_ray.dicom_layout import pixel_layout

pytestmark = [pytest.mark.system, pytest.mark.filterwarnings("ignore")]

PYDICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
REAL_FILES = REPOSITORY / os.environ.get("CXR_REAL_DATA", "../shared/data") / "dicom"
DECODERS = {
    RLELossless: "dcmdrle",
    JPEGBaseline8Bit: "dcmdjpeg",
    JPEGExtended12Bit: "dcmdjpeg",
    JPEGLossless: "dcmdjpeg",
    JPEGLosslessSV1: "dcmdjpeg",
    JPEGLSLossless: "dcmdjpls",
    JPEGLSNearLossless: "dcmdjpls",
}
NOT_COMPARED = {
    "JPEG2000-embedded-sequence-delimiter.dcm": "its code stream announces another size than its header",
    "MR_truncated.dcm": "fewer pixels than its header announces",
    "badVR.dcm": "its NumberOfFrames is no number",
    "rtdose_expb_1frame.dcm": "big-endian samples of 32 bits, which decoders order in two ways",
}


def reason_not_to_compare(path):
    """Why a file is no single grey image; None for those that are."""
    if path.name in NOT_COMPARED:
        return NOT_COMPARED[path.name]
    dataset = pydicom.dcmread(path, force=True)
    if "PixelData" not in dataset or "Rows" not in dataset:
        return "no image"
    if dataset.get("NumberOfFrames", 1) not in (None, 1):
        return "several frames"
    if dataset.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        return "colour"
    return "a bit a pixel" if dataset.BitsAllocated == 1 else None


CANDIDATES = sorted(PYDICOM_FILES.glob("*.dcm")) + sorted(REAL_FILES.glob("*.dcm"))
COMPARED = [path for path in CANDIDATES if reason_not_to_compare(path) is None]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """Decodes a file with the reference decoder of its transfer syntax; gives the path of the uncompressed file."""
    folder = tmp_path_factory.mktemp("native")
    made = {}

    def decode(path):
        if path not in made:
            syntax = pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID
            made[path] = folder / f"{len(made)}.dcm"
            if syntax in DECODERS or not syntax.is_encapsulated:
                result = run_peer(DECODERS.get(syntax, "dcmconv"), "+te", path, made[path])
                assert result.returncode == 0, result.stdout
            else:
                decode_with_gdcm(path, made[path])
        return made[path]

    return decode


def decode_with_gdcm(path, target):
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.ExplicitVRLittleEndian))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def values_of(path):
    """Stored values of an uncompressed little-endian file, read by the definition of PS3.5 section 8.1.1; int64."""
    dataset = pydicom.dcmread(path)
    cells = np.frombuffer(dataset.PixelData, dtype=f"<u{dataset.BitsAllocated // 8}", count=dataset.Rows * dataset.Columns)
    cells = cells.reshape(dataset.Rows, dataset.Columns).astype(np.int64)
    values = (cells >> (dataset.HighBit + 1 - dataset.BitsStored)) & (2**dataset.BitsStored - 1)
    sign = 2 ** (dataset.BitsStored - 1)
    return values - 2 * sign * (values >= sign) if dataset.PixelRepresentation else values


def rendering(path, folder, *options):
    """What dcm2pnm shows, in 65,536 greys; int64."""
    result = run_peer("dcm2pnm", "-O", "+opn", 16, *options, path, folder / "shown.pgm")
    assert result.returncode == 0, result.stdout
    return np.asarray(Image.open(folder / "shown.pgm")).astype(np.int64)


def display_options(path):
    """How dcm2pnm is told to apply what the file states: the first VOI LUT, the first window, or the extremes."""
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    if "VOILUTSequence" in dataset:
        return ("+Wl", 1)
    if dataset.get("WindowCenter") not in (None, ""):
        return ("+Wi", 1)
    return () if dataset.BitsStored <= 8 else ("+Wm",)


def assert_shown_alike(grey, expected):
    share = np.clip((grey.values.astype(np.float64) - grey.black) / (grey.white - grey.black), 0, 1)
    assert np.abs(share * 65535 - expected).max() <= 257, "one grey of 256"
    assert as_greys(grey).std() > 0 or expected.std() == 0


def test_nearly_every_syntax_and_enough_files_are_compared():
    assert len(COMPARED) >= 20
    syntaxes = {pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID for path in COMPARED}
    assert len(syntaxes) >= 9


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.name)
def test_stored_values_are_those_of_the_reference_decoder(path, native):
    dataset = read_dicom(path.read_bytes(), path.name)
    values = stored_values(dataset, pixel_layout(dataset, path.name), path.name)
    np.testing.assert_array_equal(values, values_of(native(path)))


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.name)
def test_what_is_shown_is_what_dcmtk_shows(path, native, tmp_path):
    expected = rendering(native(path), tmp_path, *display_options(path))
    assert_shown_alike(decoded(path.read_bytes(), path.name), expected)


CURVE = np.rint(np.linspace(0, 1, 4096) ** 2 * 1023)
DISPLAYS = {
    "linear": {"WindowCenter": 2000, "WindowWidth": 2500},
    "linear exact": {"WindowCenter": 2000, "WindowWidth": 2500, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 2000, "WindowWidth": 2500, "VOILUTFunction": "SIGMOID"},
    "rescaled": {"WindowCenter": 3000, "WindowWidth": 2500, "RescaleSlope": 2, "RescaleIntercept": -1000},
    "falling": {"WindowCenter": -2000, "WindowWidth": 2500, "RescaleSlope": -1, "RescaleIntercept": 0},
    "Modality LUT": {"ModalityLUTSequence": lut(CURVE, 0, 10), "WindowCenter": 500, "WindowWidth": 900},
    "VOI LUT": {"VOILUTSequence": lut(CURVE, 0, 10)},
    "short VOI LUT": {"VOILUTSequence": lut(CURVE[:2000], 1000, 10)},
    "rescaled VOI LUT": {"VOILUTSequence": lut(CURVE, 0, 10), "RescaleSlope": 0.5, "RescaleIntercept": 100},
    "Modality LUT and sigmoid": {
        "ModalityLUTSequence": lut(CURVE, 0, 10),
        "WindowCenter": 500,
        "WindowWidth": 300,
        "VOILUTFunction": "SIGMOID",
    },
}


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("attributes", DISPLAYS.values(), ids=DISPLAYS)
def test_each_way_to_grey_is_that_of_dcmtk(attributes, photometric, tmp_path):
    data = file_of(radiograph(FILM.astype(np.uint16) * 16, BitsStored=12, PhotometricInterpretation=photometric, **attributes))
    (tmp_path / "film.dcm").write_bytes(data)
    function = ["+Wfs"] if attributes.get("VOILUTFunction") == "SIGMOID" else []
    options = [*display_options(tmp_path / "film.dcm"), *function]
    assert_shown_alike(decoded(data), rendering(tmp_path / "film.dcm", tmp_path, *options))


LAYOUTS = {
    "garbage above": {"BitsStored": 12, "HighBit": 11},
    "stored at the top": {"BitsStored": 12, "HighBit": 15},
    "stored in the middle": {"BitsStored": 10, "HighBit": 12},
    "signed": {"BitsStored": 12, "HighBit": 11, "PixelRepresentation": 1},
    "signed at the top": {"BitsStored": 12, "HighBit": 15, "PixelRepresentation": 1},
}


@pytest.mark.parametrize("attributes", LAYOUTS.values(), ids=LAYOUTS)
def test_bits_that_are_not_stored_are_ignored_as_dcmtk_ignores_them(attributes, tmp_path):
    cells = np.random.default_rng(0).integers(0, 2**16, (40, 30), dtype=np.uint16)
    data = file_of(radiograph(cells, **attributes))
    (tmp_path / "film.dcm").write_bytes(data)
    dataset = read_dicom(data, "film.dcm")
    values = stored_values(dataset, pixel_layout(dataset, "film.dcm"), "film.dcm")
    np.testing.assert_array_equal(values, values_of(tmp_path / "film.dcm"))
    assert_shown_alike(decoded(data), rendering(tmp_path / "film.dcm", tmp_path, "+Wm"))


ENCODERS = {
    "+e1": ("dcmcjpeg", 16),
    "+el": ("dcmcjpeg", 16),
    "+ee": ("dcmcjpeg", 12),
    "+eb": ("dcmcjpeg", 8),
    "+ee of 8 bits": ("dcmcjpeg", 8),
    "+el of 8 bits": ("dcmcjpeg", 8),
    "+en +md 2": ("dcmcjpls", 16),
    "+en of 8 bits": ("dcmcjpls", 8),
    "": ("dcmcjpls", 12),
    "rle": ("dcmcrle", 12),
    "rle of 8 bits": ("dcmcrle", 8),
}


@pytest.mark.parametrize("options", ENCODERS)
def test_what_dcmtk_encodes_is_decoded_as_dcmtk_decodes_it(options, native, tmp_path):
    encoder, bits = ENCODERS[options]
    waves = np.sin(np.add.outer(np.arange(60) / 7, np.arange(50) / 9))
    # dcmcjpeg stretches what it compresses with loss over all greys: these fill them already.
    waves = (waves - waves.min()) / (waves.max() - waves.min())
    values = (waves * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    (tmp_path / "film.dcm").write_bytes(file_of(radiograph(values, BitsStored=bits)))
    arguments = [word for word in options.removesuffix("of 8 bits").split() if word != "rle"]
    result = run_peer(encoder, *arguments, tmp_path / "film.dcm", tmp_path / "encoded.dcm")
    assert result.returncode == 0, result.stdout
    dataset = read_dicom((tmp_path / "encoded.dcm").read_bytes(), "encoded.dcm")
    assert dataset.file_meta.TransferSyntaxUID.is_encapsulated
    decoded_values = stored_values(dataset, pixel_layout(dataset, "encoded.dcm"), "encoded.dcm")
    np.testing.assert_array_equal(decoded_values, values_of(native(tmp_path / "encoded.dcm")))
    lossy = options.startswith(("+ee", "+eb", "+en"))
    np.testing.assert_allclose(decoded_values.astype(int), values, atol=2**bits / 40 if lossy else 0)
