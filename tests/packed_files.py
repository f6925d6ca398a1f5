"""Zips and tars for tests, and what is read from them."""

import io
import tarfile
import zipfile

from pyarrow import fs

from cxr_ray.pixels import DamagedImage
from ingest.files import list_files, read_files

LOCAL = fs.LocalFileSystem()
CONTENTS = {
    "a.dcm": b"alpha" * 3000,
    "deep/er/b c.dcm": b"beta",
    "Ärztin/ß.dcm": b"gamma",
    "empty.dcm": b"",
}


def write_tar(path, contents=CONTENTS, mode="w:gz", extra=()):
    with tarfile.open(path, mode) as tar:
        for entry in extra:
            tar.addfile(entry)
        for name, data in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def write_zip(path, contents=CONTENTS, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as packed:
        packed.mkdir("folder")
        for name, data in contents.items():
            packed.writestr(name, data)
    return path


def source_file(path):
    _, _, (file,) = list_files(str(path), "--source")
    return file


def read(*locations):
    """What `read_files` yields, in the order of the locations, each of which it yields once."""
    found = list(read_files(LOCAL, [str(location) for location in locations]))
    assert sorted(index for index, _ in found) == list(range(len(locations)))
    return [content for _, content in sorted(found, key=lambda pair: pair[0])]


def reason(location):
    (content,) = read(location)
    assert isinstance(content, DamagedImage), content
    assert type(content) is DamagedImage
    return str(content)
