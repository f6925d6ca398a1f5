"""Files of a source: found in a folder, in any pyarrow filesystem or inside archives, and read one at a time.

A *location* is a path of the filesystem, or ``ARCHIVE!/MEMBER`` for a member of a zip or tar. What cannot be read costs itself
only and is told by its reason, never by its name: names of files may be names of patients.
"""

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tarfile import TarFile, TarInfo
from typing import IO, BinaryIO

from pyarrow import fs

from cxr_ray import storage
from cxr_ray.errors import CxrRayError
from cxr_ray.pixels import DamagedImage, ImageError, OversizedImage
from ingest.tar_stream import stream_tar

MAX_FILE_BYTES = 1 << 30
# A header mostly fits, so that an object store is asked once for it.
_BUFFER_BYTES = 1 << 16
_ENCRYPTED_FLAG = 1

_ZIP = re.compile(r"\.zip$", re.IGNORECASE)
_TAR = re.compile(r"\.(tar|tar\.gz|tgz)$", re.IGNORECASE)
_MEMBER = re.compile(r"(?P<archive>.*?\.(?:zip|tar|tar\.gz|tgz))!/(?P<member>.+)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source.

    Attributes
    ----------
    location
        Where `read_files` and `open_file` find it.
    name
        The same relative to the source's root.
    stamp
        Changes when the file does: size and time of change; a member has its archive's stamp and its own size.
    """

    location: str
    name: str
    stamp: str


def is_zip(path: str) -> bool:
    """Whether a path is that of a zip, by its extension."""
    return _ZIP.search(path) is not None


def is_tar(path: str) -> bool:
    """Whether a path is that of a tar, compressed or not, by its extension."""
    return _TAR.search(path) is not None


def archive_and_member(location: str) -> tuple[str, str] | None:
    """The two parts of a member's location; None for a plain file."""
    parts = _MEMBER.fullmatch(location)
    return None if parts is None else (parts["archive"], parts["member"])


def list_files(uri: str, option: str) -> tuple[fs.FileSystem, str, list[SourceFile]]:
    """Find the files below a folder, links followed, or the single file that `uri` is; archives are not opened.

    Parameters
    ----------
    option
        The setting that gave `uri`, for the error: "--source".

    Returns
    -------
    tuple
        Filesystem, root that names are relative to, and the files in the order of their locations.

    Raises
    ------
    CxrRayError
        If it is not there or a folder cannot be listed.
    """
    filesystem, root = storage.resolve(uri)
    root = root.rstrip("/")
    try:
        info = filesystem.get_file_info(root)
        if info.type == fs.FileType.File:
            folder, _, name = root.rpartition("/")
            return filesystem, folder, [SourceFile(root, name, _stamp(info.size, info.mtime_ns))]
        return filesystem, root, walk_files(filesystem, root)
    except (OSError, UnicodeDecodeError) as error:
        raise CxrRayError(
            f"{option} {storage.shown(uri)}: cannot be listed ({problem(error)}); check the path and its permissions"
        ) from None


def walk_files(filesystem: fs.FileSystem, root: str) -> list[SourceFile]:
    """The files below a folder in the order of their locations; errors are those of the filesystem."""
    walk = _walk_local if isinstance(filesystem, fs.LocalFileSystem) else _walk
    return sorted(walk(filesystem, root), key=lambda file: file.location)


def _stamp(size: int | None, mtime_ns: int | None) -> str:
    return f"{size}-{mtime_ns}"


def _walk(filesystem: fs.FileSystem, root: str) -> Iterator[SourceFile]:
    for info in filesystem.get_file_info(fs.FileSelector(root, recursive=True)):
        if info.type == fs.FileType.File:
            yield SourceFile(info.path, info.path.removeprefix(f"{root}/"), _stamp(info.size, info.mtime_ns))


def _walk_local(filesystem: fs.FileSystem, root: str) -> Iterator[SourceFile]:
    """As `_walk`, which would go round in circles of links and stop at the first name that is not UTF-8."""
    for path, status in _walk_folder(root, ()):
        location = path.encode(errors="surrogateescape").decode(errors="backslashreplace")
        yield SourceFile(location, location.removeprefix(f"{root}/"), _stamp(status.st_size, status.st_mtime_ns))


def _walk_folder(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, os.stat_result]]:
    status = Path(folder).stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    folders = []
    with os.scandir(folder or "/") as entries:
        for entry in entries:
            if entry.is_file():
                yield entry.path, entry.stat()
            elif entry.is_dir():
                folders.append(entry.path)
    for inner in folders:
        yield from _walk_folder(inner, (*above, identity))


def problem(error: Exception) -> str:
    """What an error says without the paths that its text may quote."""
    number = getattr(error, "errno", None)
    if number:
        return os.strerror(number)
    cloud = re.search(r"AWS Error (\w+)", str(error))
    return cloud[1] if cloud else type(error).__name__


def _unreadable(reason: str) -> DamagedImage:
    return DamagedImage(f"cannot be read ({reason}); check the file")


def _check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise OversizedImage(f"holds {size} bytes; files of up to {MAX_FILE_BYTES} bytes are read")


def read_files(filesystem: fs.FileSystem, locations: Sequence[str]) -> Iterator[tuple[int, bytes | ImageError]]:
    """Read each file once; yield its index in `locations` and its content, or why there is none.

    Plain files come first, in the order given, then the members of one archive after another: those of a zip in the order
    given, those of a tar, by one pass over it, in its own order. Errors are `DamagedImage`, and `OversizedImage` for more than
    `MAX_FILE_BYTES`; they name no file.
    """
    archives: dict[str, dict[str, list[int]]] = {}
    for index, location in enumerate(locations):
        parts = archive_and_member(location)
        if parts is None:
            yield index, _bytes_or_error(_read_plain, filesystem, location)
        else:
            archives.setdefault(parts[0], {}).setdefault(parts[1], []).append(index)
    for archive, wanted in archives.items():
        members = _read_tar_members if is_tar(archive) else _read_zip_members
        for member, content in members(filesystem, archive, list(wanted)):
            yield from ((index, content) for index in wanted[member])


def _bytes_or_error(read: Callable[..., bytes], *arguments: object) -> bytes | ImageError:
    try:
        return read(*arguments)
    except ImageError as error:
        return error


def _read_plain(filesystem: fs.FileSystem, location: str) -> bytes:
    try:
        with filesystem.open_input_file(location) as file:
            _check_size(file.size())
            return file.read()
    except OSError as error:
        raise _unreadable(problem(error)) from None


@contextmanager
def open_file(filesystem: fs.FileSystem, location: str) -> Iterator[BinaryIO]:
    """Open a plain file or a member of a zip for reading its first part; seekable.

    Raises
    ------
    DamagedImage, OversizedImage
        If it cannot be opened; what happens while it is read is for the reader to catch.
    """
    parts = archive_and_member(location)
    if parts is None:
        try:
            file = filesystem.open_input_file(location)
        except OSError as error:
            raise _unreadable(problem(error)) from None
        with _NamedReader(file, _BUFFER_BYTES) as stream:
            yield stream
        return
    with _zip_errors():
        opened = open_zip(filesystem, parts[0])
        member = opened.open(_zip_entry(opened, parts[1]))
    with _NamedReader(_ZipStream(member)) as stream:
        yield stream


class _NamedReader(io.BufferedReader):
    """A buffered reader for pydicom, which reads a few bytes at a time and asks for a name."""

    name = ""


class _ZipStream(io.RawIOBase):
    """A member of a zip, expanded in small steps: asked for all of it, zipfile makes up to 2 GiB whatever was announced."""

    def __init__(self, member: IO[bytes]) -> None:
        super().__init__()
        self._member = member

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._member.seek(offset, whence)

    def tell(self) -> int:
        return self._member.tell()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._member.read(min(len(buffer), _BUFFER_BYTES))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _zip_errors() -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except zipfile.BadZipFile as error:
        raise _unreadable("wrong checksum" if "CRC" in str(error) else "damaged in its zip") from None
    except EOFError:
        raise _unreadable("breaks off") from None
    except Exception as error:  # noqa: BLE001 - a hostile zip makes the parser raise nearly anything
        raise _unreadable(problem(error)) from None


def open_zip(filesystem: fs.FileSystem, archive: str) -> zipfile.ZipFile:
    """The zip, kept open in this process as long as it does not change.

    Raises
    ------
    OSError, zipfile.BadZipFile
        If it cannot be read or is no whole zip; others where it is hostile.
    """
    info = filesystem.get_file_info(archive)
    return _open_zip(pickle.dumps(filesystem), archive, _stamp(info.size, info.mtime_ns))


@lru_cache(maxsize=4)
def _open_zip(pickled_filesystem: bytes, archive: str, stamp: str) -> zipfile.ZipFile:
    filesystem = pickle.loads(pickled_filesystem)  # noqa: S301 - pickled a moment ago by this process
    return zipfile.ZipFile(_NamedReader(filesystem.open_input_file(archive), _BUFFER_BYTES))


def _zip_entry(opened: zipfile.ZipFile, member: str) -> zipfile.ZipInfo:
    try:
        entry = opened.getinfo(member)
    except KeyError:
        raise _unreadable("no longer in its archive") from None
    _check_size(entry.file_size)
    if entry.flag_bits & _ENCRYPTED_FLAG:
        raise _unreadable("encrypted in its zip")
    # The other methods expand a few bytes to gigabytes in one step.
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _unreadable(f"compressed by zip method {entry.compress_type}, and only Deflate is read")
    return entry


def _read_zip_members(
    filesystem: fs.FileSystem, archive: str, members: Sequence[str]
) -> Iterator[tuple[str, bytes | ImageError]]:
    try:
        with _zip_errors():
            opened = open_zip(filesystem, archive)
    except ImageError as error:
        yield from ((member, error) for member in members)
        return
    for member in members:
        yield member, _bytes_or_error(_read_zip_member, opened, member)


def _read_zip_member(opened: zipfile.ZipFile, member: str) -> bytes:
    entry = _zip_entry(opened, member)
    with _zip_errors(), opened.open(entry) as stream:
        # Told its size, the decompressor makes no more than that.
        data = stream.read(entry.file_size)
        if len(data) < entry.file_size:
            raise _unreadable("breaks off")
        return data


def _read_tar_members(
    filesystem: fs.FileSystem, archive: str, members: Sequence[str]
) -> Iterator[tuple[str, bytes | ImageError]]:
    wanted = dict.fromkeys(members)
    reason = "no longer in its archive"
    try:
        with stream_tar(filesystem, archive) as entries:
            for name, entry, tar in entries:
                if name in wanted:
                    content = _bytes_or_error(_read_tar_member, tar, entry)
                    del wanted[name]
                    yield name, content
                if not wanted:
                    return
    except Exception as error:  # noqa: BLE001 - a hostile tar makes the parser raise nearly anything
        missing = isinstance(error, OSError) and error.errno
        reason = problem(error) if missing else "its archive is damaged or breaks off"
    yield from ((member, _unreadable(reason)) for member in wanted)


def _read_tar_member(tar: TarFile, entry: TarInfo) -> bytes:
    _check_size(entry.size)
    stream = tar.extractfile(entry)
    if stream is None:
        raise _unreadable("no file in its archive")
    with stream:
        return stream.read()
