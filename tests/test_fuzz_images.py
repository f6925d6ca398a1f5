"""Thousands of damaged and hostile images: each ends as a row or as a reason, in time, within its memory.

The inputs are made from good images of every kind by a seeded generator: bits flipped, parts cut out, repeated or cut off,
lengths and sizes set to extremes, above all in headers.
"""

import io
import os
import struct
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from cxr_ray.decoder_process import DecoderProcess
from cxr_ray.decoding import Format
from cxr_ray.dicom_header import radiograph_header, read_dicom_header
from cxr_ray.pixels import ImageError
from cxr_ray.records import SPLITS

# pydicom speaks of tags that it does not know.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PICTURES, DICOMS = 2600, 2600
MAX_SECONDS = 5.0
MAX_BYTES = 512 * 1024**2
SIZE = 16
CR = "1.2.840.10008.5.1.4.1.1.1"
UID = "1.2.826.0.1.3680043.10.999."


def film(seed: int, bits: int = 8) -> np.ndarray:
    ramp = np.add.outer(np.arange(48), np.arange(40)) / 88
    noise = np.random.default_rng(seed).random((48, 40))
    return ((0.7 * ramp + 0.3 * noise) * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)


def pictures() -> list[bytes]:
    grey, deep = Image.fromarray(film(0)), Image.fromarray(film(1, 16))
    made = [(grey, "PNG"), (deep, "PNG"), (grey.convert("RGBA"), "PNG"), (grey.convert("P"), "PNG"), (grey.convert("1"), "PNG")]
    made += [(grey.convert("RGB"), "PNG"), (grey, "JPEG"), (grey.convert("RGB"), "JPEG")]
    files = []
    for picture, kind in made:
        content = io.BytesIO()
        picture.save(content, format=kind)
        files.append(content.getvalue())
    return files


def dicom(syntax: str, photometric: str = "MONOCHROME2") -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.Modality, dataset.BodyPartExamined = CR, "CR", "CHEST"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID + "000000"
    dataset.file_meta.MediaStorageSOPClassUID = CR
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.PatientID = UID + "1", UID + "2", "P1"
    dataset.PatientAge, dataset.PatientSex, dataset.ViewPosition, dataset.StudyDate = "040Y", "F", "PA", "20200102"
    dataset.WindowCenter, dataset.WindowWidth, dataset.RescaleSlope, dataset.RescaleIntercept = [2000, 100], [4000, 50], 1, -10
    bits = 8 if syntax == JPEGBaseline8Bit else 12
    pixels = film(3, bits)
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 48, 40, 1, photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = (
        8 if bits == 8 else 16,
        bits,
        bits - 1,
        0,
    )
    dataset.PixelData = pixels.tobytes()
    content = io.BytesIO()
    if syntax == JPEGBaseline8Bit:
        jpeg = io.BytesIO()
        Image.fromarray(pixels).save(jpeg, format="JPEG")
        dataset.PixelData = encapsulate([jpeg.getvalue()])
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
        dataset.file_meta.TransferSyntaxUID = syntax
    elif syntax == JPEGLosslessSV1:
        return lossless_jpeg(dataset)
    elif syntax == ExplicitVRBigEndian:
        dataset.PixelData = pixels.byteswap().tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
    elif syntax == JPEG2000:
        dataset.compress(syntax, j2k_cr=[5], generate_instance_uid=False)
    elif syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        dataset.compress(syntax, generate_instance_uid=False)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    options = {} if dataset.file_meta.TransferSyntaxUID.is_compressed else dict(implicit_vr=implicit, little_endian=little)
    pydicom.dcmwrite(content, dataset, enforce_file_format=True, **options)
    return content.getvalue()


def lossless_jpeg(dataset: Dataset) -> bytes:
    import tempfile

    from conftest import run_peer

    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder) / "plain.dcm", Path(folder) / "packed.dcm"
        pydicom.dcmwrite(plain, dataset, enforce_file_format=True, implicit_vr=False, little_endian=True)
        said = run_peer("dcmcjpeg", "+e1", plain, packed)
        assert said.returncode == 0, said.stdout
        return packed.read_bytes()


def dicoms() -> list[bytes]:
    syntaxes = [
        ImplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
    ]
    syntaxes += [JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, JPEG2000]
    return [*(dicom(syntax) for syntax in syntaxes), dicom(ExplicitVRLittleEndian, "MONOCHROME1")]


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """One to four changes, most of them in the first part, where the headers are."""
    data = bytearray(content)
    for _ in range(random.integers(1, 5)):
        reach = len(data) if random.random() < 0.4 else min(len(data), 700)
        at = int(random.integers(0, max(reach, 1)))
        length = int(random.integers(1, 40))
        match random.integers(0, 7):
            case 0:
                data[at : at + 1] = bytes([data[at] ^ (1 << random.integers(0, 8))]) if data else b""
            case 1:
                data[at : at + length] = random.bytes(length)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length] * int(random.integers(1, 4))
            case 4:
                del data[max(at, 1) :]
            case 5:
                extreme = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)[random.integers(0, 8)]
                form = random.choice(["<H", ">H", "<I", ">I"])
                data[at : at + struct.calcsize(form)] = struct.pack(form, extreme & (2 ** (8 * struct.calcsize(form)) - 1))
            case 6:
                data[at : at + 4] = data[at // 2 : at // 2 + 4]
    return bytes(data) or b"\0"


def with_checksums(content: bytes) -> bytes:
    """A damaged PNG whose chunks have right checksums as far as they can be followed, so that decoders look inside."""
    data, at = bytearray(content), 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        if at + 12 + length > len(data):
            break
        data[at + 8 + length : at + 12 + length] = zlib.crc32(data[at + 4 : at + 8 + length]).to_bytes(4)
        at += 12 + length
    return bytes(data)


def png_with_size(width: int, height: int, colour: int = 0) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    body = zlib.compress(bytes(1_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def dicom_with(**values: object) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(dicom(ExplicitVRLittleEndian)))
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    content = io.BytesIO()
    pydicom.dcmwrite(content, dataset)
    return content.getvalue()


def hostile_dicoms() -> list[bytes]:
    zeros = Dataset()
    zeros.update(pydicom.dcmread(io.BytesIO(dicom(DeflatedExplicitVRLittleEndian))))
    zeros.file_meta = FileMetaDataset()
    zeros.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    zeros.PixelData = bytes(300_000_000)
    deflated = io.BytesIO()
    pydicom.dcmwrite(deflated, zeros, enforce_file_format=True)
    return [
        dicom_with(Rows=60_000, Columns=60_000),
        dicom_with(Rows=0),
        dicom_with(BitsAllocated=64, BitsStored=64),
        dicom_with(BitsStored=0),
        dicom_with(NumberOfFrames=2**31 - 1),
        dicom_with(WindowWidth=[0, 0]),
        dicom_with(RescaleSlope="1e308", RescaleIntercept="-1e308"),
        dicom_with(SamplesPerPixel=65535),
        deflated.getvalue(),
    ]


@pytest.fixture(scope="module")
def inputs() -> dict[Format, list[bytes]]:
    random = np.random.default_rng(2026)
    pngs, files = pictures(), dicoms()
    made = [mutated(pngs[number % len(pngs)], random) for number in range(PICTURES)]
    made = [with_checksums(content) if random.random() < 0.5 else content for content in made]
    made += [
        png_with_size(60_000, 60_000),
        png_with_size(60_000, 60_000, 2),
        png_with_size(1, 2**31 - 1),
        png_with_size(8000, 8000, 6),
    ]
    # Each file is an instance of its own, so that none is left out for having another's UID.
    damaged = []
    for number in range(DICOMS):
        own = files[number % len(files)].replace(f"{UID}000000".encode(), f"{UID}{number:06d}".encode())
        damaged.append(mutated(own, random))
    studies = damaged + hostile_dicoms()
    return {Format.PICTURE: made, Format.DICOM: studies, Format.ANY: made + studies}


def peak_memory(process: int) -> int:
    """Bytes of main memory that a process has held at most."""
    return int(Path(f"/proc/{process}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.parametrize("kind", list(Format))
def test_each_input_ends_in_a_square_or_a_reason(inputs, kind):
    outcomes = Counter()
    highest = 0
    with DecoderProcess(kind, SIZE, max_seconds=MAX_SECONDS, max_bytes=MAX_BYTES) as decoder:
        list(decoder.squares([(0, pictures()[0] if kind is Format.PICTURE else dicoms()[0])]))
        started = peak_memory(decoder._process._child.pid)
        for number, answer in decoder.squares(enumerate(inputs[kind])):
            if isinstance(answer, ImageError):
                assert str(answer), number
                assert "\n" not in str(answer)
                outcomes[str(answer).partition("(")[0][:40]] += 1
            else:
                assert answer.shape == (SIZE, SIZE)
                outcomes["square"] += 1
            if decoder._process._child is not None:
                highest = max(highest, peak_memory(decoder._process._child.pid))
    assert sum(outcomes.values()) == len(inputs[kind])
    # Both kinds of end are met often, or the inputs would try nothing.
    assert outcomes["square"] > 100
    assert outcomes.total() - outcomes["square"] > 1000
    assert not [reason for reason in outcomes if "takes more than" in reason], outcomes
    assert highest < started + MAX_BYTES


def test_each_header_is_read_or_refused_in_time(inputs):
    read = 0
    for number, content in enumerate(inputs[Format.DICOM]):
        started = time.monotonic()
        try:
            radiograph_header(read_dicom_header(io.BytesIO(content), "x"), "x")
            read += 1
        except ImageError as error:
            assert "\n" not in str(error)
        assert time.monotonic() - started < MAX_SECONDS, number
    assert 300 < read < DICOMS


@pytest.mark.ray
def test_an_archive_of_them_ends_with_every_file_accounted_for(ray_cluster, inputs, tmp_path, monkeypatch):
    from ingest.dicom import DicomSettings, ingest_dicom
    from ingest.shards import LEFT_OUT

    archive, out = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    for number, content in enumerate(inputs[Format.DICOM]):
        (archive / f"{number:06d}.dcm").write_bytes(content)
    monkeypatch.setenv("CXR_RAY_PATIENT_KEY", "a secret of the test's own")
    manifest = ingest_dicom(DicomSettings(source=str(archive), out=str(out), size=SIZE, max_quarantined=1.0))
    rows = sum(split.images for split in manifest.splits.values())
    left_out = pd.read_csv(out / LEFT_OUT)
    assert rows + len(left_out) + manifest.counts["duplicate_instances"] == len(inputs[Format.DICOM])
    assert rows > 100
    assert left_out["reason"].notna().all()
    assert left_out["file"].is_unique


@pytest.mark.ray
def test_a_release_of_them_ends_with_every_file_accounted_for(ray_cluster, inputs, tmp_path):
    from pyarrow import fs

    from cxr_ray.records import record_schema
    from ingest.shards import Source, write_dataset

    files = inputs[Format.PICTURE]
    for number, content in enumerate(files):
        (tmp_path / f"{number:06d}.png").write_bytes(content)
    count = len(files)
    known = {"visit": [0] * count, "split": [SPLITS[number % 3] for number in range(count)], "source": ["nih"] * count}
    known |= {name: [f"{number:06d}.png" for number in range(count)] for name in ("image_id", "patient_key")}
    schema = record_schema(None)
    table = pa.table({field.name: known.get(field.name, pa.nulls(count, field.type)) for field in schema}, schema=schema)
    table = table.append_column("location", pa.array([os.fspath(tmp_path / f"{number:06d}.png") for number in range(count)]))
    table = table.append_column("stamp", pa.array(["1"] * count))
    source = Source("nih", fs.LocalFileSystem(), Format.PICTURE, None, {}, {}, root=os.fspath(tmp_path))
    manifest = write_dataset(table, str(tmp_path / "out"), source, size=SIZE, max_quarantined=1.0, overwrite=False)
    rows = sum(split.images for split in manifest.splits.values())
    assert rows + len(manifest.left_out) == count
    assert rows > 100
