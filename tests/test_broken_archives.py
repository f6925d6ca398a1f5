"""Zips and tars that are broken in the ways archives are, or made to do harm."""

import gzip
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import pytest
from packed_files import LOCAL, read, reason, source_file, write_tar, write_zip

from cxr_ray.errors import CxrRayError
from cxr_ray.pixels import OversizedImage
from ingest import files
from ingest.archives import list_members


def noise(size):
    return os.urandom(size)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("where", ["in a file", "between files", "before the end mark"])
def test_a_tar_that_breaks_off_is_found_out(tmp_path, mode, where):
    """tarfile itself takes two of these for the end of the archive."""
    path = write_tar(
        tmp_path / ("t.tar" if mode == "w" else "t.tgz"), {"a": noise(700), "b": noise(700), "c": noise(700)}, mode
    )
    whole = path.read_bytes() if mode == "w" else gzip.decompress(path.read_bytes())
    cut, files_found = {
        "in a file": (3 * 512 + 2 * 512 + 100, 2),
        "between files": (2 * 1536, 2),
        "before the end mark": (3 * 1536, 3),
    }[where]
    path.write_bytes(whole[:cut] if mode == "w" else gzip.compress(whole[:cut]))
    with pytest.raises(CxrRayError, match=rf"^{path.name}: breaks off after {files_found} files; download it again$"):
        list_members(LOCAL, source_file(path))
    first, last = read(f"{path}!/a", f"{path}!/c")
    assert first == whole[512 : 512 + 700]
    if where == "before the end mark":
        assert last == whole[2 * 1536 + 512 : 2 * 1536 + 512 + 700]
    else:
        assert str(last) == "cannot be read (its archive is damaged or breaks off); check the file"


def test_a_gzip_that_breaks_off_or_has_a_wrong_checksum_is_found_out(tmp_path):
    path = write_tar(tmp_path / "t.tgz", {"a": noise(700), "b": noise(70_000)})
    whole = path.read_bytes()
    for damaged in (whole[:40_000], whole[:-2], whole[:-8] + bytes(8)):
        path.write_bytes(damaged)
        with pytest.raises(CxrRayError, match=r"^t\.tgz: breaks off after \d files; download it again$"):
            list_members(LOCAL, source_file(path))


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
@pytest.mark.parametrize(
    "content", [b"", b"no archive", bytes(2000), b"PK\x03\x04" + bytes(100)], ids=["empty", "text", "zeros", "head"]
)
def test_what_is_no_archive_is_said_so(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    if (name, content) == ("x.tar", bytes(2000)):  # two blocks of zeros are an empty tar
        assert list_members(LOCAL, source_file(tmp_path / name)) == []
        return
    with pytest.raises(
        CxrRayError,
        match=rf"^{name}: breaks off after 0 files; download it again$",
    ):
        list_members(LOCAL, source_file(tmp_path / name))
    assert reason(f"{tmp_path / name}!/a.dcm").startswith("cannot be read (")


def test_a_damaged_member_of_a_zip_costs_itself_only(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"bad": b"12345678", "good": b"fine"}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"12345678", b"12345679"))
    assert reason(f"{path}!/bad") == "cannot be read (wrong checksum); check the file"
    assert read(f"{path}!/good") == [b"fine"]


def test_a_truncated_zip_is_found_out(tmp_path):
    path = write_zip(tmp_path / "x.zip")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CxrRayError, match=r"^x\.zip: breaks off after 0 files; download it again$"):
        list_members(LOCAL, source_file(path))


def test_an_encrypted_member_is_said_so(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a": b"secret"})
    data = bytearray(path.read_bytes())
    local, central = data.index(b"a", data.index(b"PK\x03\x04", 10)) - 30, data.rindex(b"PK\x01\x02")
    data[local + 6] |= 1
    data[central + 8] |= 1
    path.write_bytes(data)
    assert reason(f"{path}!/a") == "cannot be read (encrypted in its zip); check the file"


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_expand_without_bound_are_not_read(tmp_path, method):
    path = write_zip(tmp_path / "x.zip", {"a": bytes(1000)}, method)
    assert (
        reason(f"{path}!/a") == f"cannot be read (compressed by zip method {method}, and only Deflate is read); check the file"
    )


def test_a_file_beyond_the_limit_is_never_expanded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
    (tmp_path / "plain").write_bytes(bytes(1001))
    write_zip(tmp_path / "x.zip", {"a": bytes(1001), "b": bytes(1000)})
    write_tar(tmp_path / "x.tgz", {"a": bytes(1001), "b": bytes(1000)})
    found = read(*(f"{tmp_path}/{name}" for name in ("plain", "x.zip!/a", "x.tgz!/a", "x.zip!/b", "x.tgz!/b")))
    assert [type(content) for content in found] == [OversizedImage] * 3 + [bytes] * 2
    assert str(found[1]) == "holds 1001 bytes; files of up to 1000 bytes are read"


def lying_zip(path, expanded=1 << 29, announced=1000):
    """A zip whose member says it has `announced` bytes and expands to `expanded`."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = bytes(1 << 20)
    packed = b"".join(packer.compress(block) for _ in range(expanded >> 20)) + packer.flush()
    head = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, 0, len(packed), announced, 1, 0)
    central = b"PK\x01\x02\x14\x00" + head + struct.pack("<HHHII", 0, 0, 0, 0, 0) + b"a"
    body = b"PK\x03\x04" + head + b"a" + packed
    path.write_bytes(body + central + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(body), 0))


def bombs(folder):
    lying_zip(folder / "lying.zip")
    with gzip.open(folder / "header.tgz", "wb", 1) as packed:
        entry = tarfile.TarInfo("x")
        entry.type, entry.size = tarfile.XHDTYPE, 1 << 29
        packed.write(entry.tobuf(tarfile.GNU_FORMAT))
        for _ in range(1 << 9):
            packed.write(bytes(1 << 20))


def test_bombs_stay_small(tmp_path):
    """Each would take half a gigabyte; the process that reads them may grow by far less."""
    bombs(tmp_path)
    code = f"""
import resource
from pyarrow import fs
from ingest.files import read_files, open_file, DamagedImage
local = fs.LocalFileSystem()
list(read_files(local, ["/etc/hostname"]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = dict(read_files(local, ["{tmp_path}/lying.zip!/a", "{tmp_path}/header.tgz!/a"]))
assert all(isinstance(content, DamagedImage) for content in found.values()), found
try:
    with open_file(local, "{tmp_path}/lying.zip!/a") as stream:
        assert len(stream.read()) <= 1000
except Exception as error:
    assert "CRC" in str(error), error
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 100_000


def test_listing_a_tar_needs_the_same_memory_however_many_files_it_holds(tmp_path):
    peaks = []
    for number in (100, 40_000):
        path = write_tar(tmp_path / f"{number}.tar", {f"{index:06d}": b"" for index in range(number)}, "w")
        code = f"""
import resource
from pyarrow import fs
from ingest.tar_stream import stream_tar
with stream_tar(fs.LocalFileSystem(), "{path}") as entries:
    assert sum(1 for _ in entries) == {number}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
        peaks.append(int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 15_000  # kilobytes; the headers would be 60 MB
