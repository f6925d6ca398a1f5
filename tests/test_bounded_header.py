"""Headers of files that a peer chose: what honest ones say is read, and no file decides how much memory that takes."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from dicom_peers import DEFLATED, EXPLICIT, IMPLICIT, data_set_of, deflated
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.sequence import Sequence
from pydicom.uid import JPEGBaseline8Bit
from radiographs import NATIVE, compressed, file_of, radiograph

from cxr_ray.bounded_header import HEADER, BoundsError, read_bounded_header
from cxr_ray.errors import CxrRayError
from serve.instance_names import instance_names
from serve.node.file_meta import FileMeta, encode_head

MIB = 1 << 20
CR = "1.2.840.10008.5.1.4.1.1.1"
EMPTY_ITEM = struct.pack("<HHL", 0xFFFE, 0xE000, 0)
SEQUENCE_END = struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
# Private, before the study's UID.
SEQUENCE = struct.pack("<HH2s2xL", 0x0009, 0x1001, b"SQ", 0xFFFFFFFF)


def element(tag: int, kind: bytes, value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<HH2s2xL", tag >> 16, tag & 0xFFFF, kind, len(value) if length is None else length) + value


def part10(data_set: bytes, syntax: str = EXPLICIT) -> bytes:
    return encode_head(FileMeta(CR, "1.2.3.1", syntax)) + data_set


def film() -> tuple[bytes, bytes]:
    """The data set of a film, before and from its study's UID; explicit VR little endian."""
    data = data_set_of(file_of(radiograph()))
    at = data.index(struct.pack("<HH", 0x0020, 0x000D))
    return data[:at], data[at:]


def peak(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("syntax", NATIVE)
def test_a_header_is_read_as_pydicom_reads_it(syntax, tmp_path: Path) -> None:
    reason = Dataset()
    reason.CodeValue, reason.CodeMeaning = "1", "cough"
    content = file_of(radiograph(syntax=syntax, ReasonForRequestedProcedureCodeSequence=Sequence([reason]), PatientName="Ä^B"))
    (tmp_path / "film.dcm").write_bytes(content)
    expected = dcmread(tmp_path / "film.dcm", stop_before_pixels=True)
    for file in (content, tmp_path / "film.dcm"):
        header = read_bounded_header(file, "film.dcm")
        assert list(header) == list(expected)
        assert header.file_meta == expected.file_meta
        assert header.original_encoding == expected.original_encoding


def test_a_compressed_film_has_a_header_too() -> None:
    content = file_of(compressed(radiograph(), JPEGBaseline8Bit, b"\xff\xd8\xff\xd9"))
    header = read_bounded_header(content, "film.dcm")
    assert (header.StudyInstanceUID, header.file_meta.TransferSyntaxUID) == ("1.2.3.2", JPEGBaseline8Bit)
    assert "PixelData" not in header


def test_a_deflated_data_set_is_inflated_as_far_as_its_pixels() -> None:
    before, after = film()
    bomb = part10(deflated(before + after, mebibytes=1000), DEFLATED)
    assert len(bomb) < 2 * MIB
    assert read_bounded_header(bomb, "film.dcm").StudyInstanceUID == "1.2.3.2"
    assert peak(lambda: read_bounded_header(bomb, "film.dcm")) < MIB


@pytest.mark.parametrize(
    "begun",
    [
        element(0x00091001, b"OB", b"", 0xFFFFFFFE),
        element(0x00091001, b"OB", b"", 0xFFFFFFFF),
        element(0x00091001, b"UN", b"", 0xFFFFFFFF),
        SEQUENCE,
        b"",
    ],
    ids=["a value", "a value without end", "unknown", "a sequence", "elements"],
)
def test_a_deflated_header_without_end_is_no_header(begun: bytes, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.dcm"
    bomb.write_bytes(part10(deflated(film()[0] + begun, mebibytes=1000), DEFLATED))
    assert bomb.stat().st_size < 2 * MIB

    def read() -> None:
        with pytest.raises(CxrRayError, match=r"^bomb\.dcm: .*; (mend the sender|send the instance again)$"):
            instance_names(bomb, bomb.name)

    assert peak(read) < 2 * HEADER.most_bytes + 24 * MIB


def test_a_deflated_data_set_that_breaks_off_behind_its_header_has_one() -> None:
    before, after = film()
    whole = deflated(before + after[:200])
    assert read_bounded_header(part10(deflated(before + after, 100)[:-2000], DEFLATED), "film.dcm").PatientID == "P1"
    with pytest.raises(CxrRayError, match=r"^film\.dcm: not readable as DICOM \(error\); send the instance again$"):
        read_bounded_header(part10(whole[: len(whole) // 2], DEFLATED), "film.dcm")


def test_a_sequence_of_nothing_but_items_is_left_where_it_is_long(tmp_path: Path) -> None:
    before, after = film()
    long = part10(before + element(0x00091001, b"SQ", EMPTY_ITEM * 1_000_000) + after)
    assert peak(lambda: instance_names(long)) < MIB
    assert 0x00091001 not in read_bounded_header(long, "film.dcm")
    endless = part10(before + SEQUENCE + EMPTY_ITEM * 1_000_000 + SEQUENCE_END + after)

    def read() -> None:
        with pytest.raises(BoundsError, match=r"^film\.dcm: its header has too many elements and items; mend the sender$"):
            read_bounded_header(endless, "film.dcm")

    assert peak(read) < 40 * MIB
    # Each short enough to be kept, for whoever looks into it.
    short = element(0x00091001, b"SQ", EMPTY_ITEM * 8000)
    many = b"".join(short[:2] + struct.pack("<H", number) + short[4:] for number in range(0x1001, 0x1009))
    with pytest.raises(BoundsError):
        read_bounded_header(part10(before + many + after), "film.dcm")
    few = read_bounded_header(part10(before + short + after), "film.dcm")
    assert len(few[0x00091001].value) == 8000


def test_sequences_of_an_honest_size_are_read() -> None:
    reason = Dataset()
    reason.CodeValue, reason.CodeMeaning = "1", "cough"
    source = radiograph(ReasonForRequestedProcedureCodeSequence=Sequence([reason] * 500))
    source["ReasonForRequestedProcedureCodeSequence"].is_undefined_length = True
    assert len(read_bounded_header(file_of(source), "film.dcm").ReasonForRequestedProcedureCodeSequence) == 500


def test_a_long_value_is_passed_over() -> None:
    before, after = film()
    content = part10(before + element(0x00091001, b"OB", bytes(100 * MIB)) + after)
    header = read_bounded_header(content, "film.dcm")
    assert (header.StudyInstanceUID, header.Rows, 0x00091001 in header) == ("1.2.3.2", 48, False)
    assert peak(lambda: read_bounded_header(content, "film.dcm")) < MIB
    # Where it is to be inflated, so far and no further.
    assert read_bounded_header(part10(deflated(before + element(0x00091001, b"OB", bytes(8 * MIB)) + after), DEFLATED), "film")
    with pytest.raises(BoundsError, match="does not end within 16777216 bytes"):
        read_bounded_header(part10(deflated(before + element(0x00091001, b"OB", bytes(20 * MIB)) + after), DEFLATED), "film")


def test_many_values_are_too_many_bytes() -> None:
    before, after = film()
    values = b"".join(element(0x00090000 + number, b"OB", bytes(60_000)) for number in range(0x1001, 0x1201))
    with pytest.raises(BoundsError, match="does not end within 16777216 bytes"):
        read_bounded_header(part10(before + values + after), "film.dcm")


def test_what_is_deflated_is_said_once() -> None:
    """pydicom ends the meta information at another group; a syntax that comes after it deceives nobody."""
    meta = encode_head(FileMeta(CR, "1.2.3.1", DEFLATED))
    body = meta[144:]
    plain = encode_head(FileMeta(CR, "1.2.3.1", EXPLICIT))[144:]
    other = struct.pack("<HH2sH", 1, 1, b"UI", 2) + b"1\0"
    before, after = film()
    bomb = meta[:144] + body + other + plain + deflated(before + after, mebibytes=1000)

    def read() -> None:
        with pytest.raises(CxrRayError):
            instance_names(bomb)

    assert peak(read) < 2 * HEADER.most_bytes


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_a_sequence_that_breaks_off_is_the_files_fault_and_not_the_disks(syntax: str) -> None:
    """pydicom raises OSError then, for which a spool waits."""
    content = Dataset()
    content.PatientID = "P1"
    content.RequestAttributesSequence = Sequence([Dataset()])
    content["RequestAttributesSequence"].is_undefined_length = True
    written = DicomBytesIO()
    written.is_implicit_VR, written.is_little_endian = syntax == IMPLICIT, True
    from pydicom.filewriter import write_dataset

    write_dataset(written, content)
    with pytest.raises(CxrRayError, match="not readable as DICOM"):
        instance_names(part10(written.getvalue()[:-4], syntax))


def test_a_disk_that_fails_is_not_the_files_fault(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bounded_header(tmp_path / "gone.dcm", "gone.dcm")
    with pytest.raises(IsADirectoryError):
        read_bounded_header(tmp_path, "folder")
