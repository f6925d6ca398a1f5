"""The files of a DICOM archive: which of a folder's files may be DICOM, what a DICOMDIR names, what zips hold.

Files are looked at by name only; whether one is DICOM, its content tells later. A DICOMDIR (PS3.10 section 8) is a list of
files: given itself, it says which files are the archive; found in a folder, it says which ones must be there.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pyarrow import fs

from cxr_ray import storage
from cxr_ray.dicom_header import read_dicom
from cxr_ray.errors import CxrRayError
from cxr_ray.pixels import DamagedImage, ImageError, reason
from ingest.archives import try_archives
from ingest.files import SourceFile, is_tar, is_zip, list_files, problem, read_files, walk_files

OPTION = "--source"
ABSENT = "named in DICOMDIR, but absent; copy the medium again"
_EXTENSIONS = ("dcm", "dicom")
_INACTIVE = 0


@dataclass(frozen=True)
class DicomFiles:
    """What a source holds.

    Attributes
    ----------
    root
        What names are relative to.
    files
        Files that may be DICOM, in the order of their names.
    unreadable
        Name and reason of each file that is known to be unreadable: absent ones, and archives that are damaged.
    other_files
        How many files were passed over by their names.
    archives
        How many zips were opened.
    """

    filesystem: fs.FileSystem
    root: str
    files: tuple[SourceFile, ...]
    unreadable: tuple[tuple[str, str], ...]
    other_files: int
    archives: int


def find_dicom_files(uri: str) -> DicomFiles:
    """Find the DICOM files of a folder, a zip, a DICOMDIR or a single file.

    Raises
    ------
    CxrRayError
        If it is not there or cannot be listed, or is itself a damaged zip or DICOMDIR.
    """
    filesystem, root, found = list_files(uri, OPTION)
    single = len(found) == 1 and found[0].location == storage.resolve(uri)[1].rstrip("/")
    if not single:
        return _in_folder(filesystem, root, found)
    file = found[0]
    if _is_directory(file.name):
        return _in_directory(filesystem, root, file)
    if is_zip(file.name):
        held = _in_folder(filesystem, root, found)
        if held.unreadable and not held.files and held.archives == 0:
            raise CxrRayError(f"{OPTION} {file.name}: {held.unreadable[0][1]}")
        return held
    return DicomFiles(filesystem, root, (file,), (), other_files=0, archives=0)


def _in_folder(filesystem: fs.FileSystem, root: str, found: list[SourceFile]) -> DicomFiles:
    zips = [file for file in found if is_zip(file.name) and not _is_hidden(file.name)]
    files = [file for file in found if not (is_zip(file.name) and not _is_hidden(file.name))]
    unreadable: list[tuple[str, str]] = []
    for archive, members in try_archives(filesystem, zips):
        if isinstance(members, CxrRayError):
            unreadable.append((archive.name, str(members).removeprefix(f"{archive.name}: ")))
        else:
            files += members
    opened = len(zips) - len(unreadable)
    named: set[str] = set()
    damaged: set[str] = set()
    for directory in (file for file in files if _is_directory(file.name)):
        try:
            present, absent = _resolve(filesystem, directory, files)
        except ImageError as error:
            unreadable.append((directory.name, str(error)))
            damaged.add(directory.name)
            continue
        named |= {file.name for file in present}
        unreadable += [(name, ABSENT) for name in absent]
    candidates = [file for file in files if file.name in named or _may_be_dicom(file.name)]
    return DicomFiles(
        filesystem,
        root,
        tuple(sorted(candidates, key=lambda file: file.name)),
        tuple(sorted(unreadable)),
        other_files=len(files) - len(candidates) - len(damaged),
        archives=opened,
    )


def _in_directory(filesystem: fs.FileSystem, root: str, directory: SourceFile) -> DicomFiles:
    """Exactly the files that the DICOMDIR references."""
    try:
        present, absent = _resolve(filesystem, directory, walk_files(filesystem, root))
    except OSError as error:
        raise CxrRayError(f"{OPTION} {directory.name}: what lies around it cannot be listed ({problem(error)})") from None
    except ImageError as error:
        raise CxrRayError(f"{OPTION} {directory.name}: {error}") from None
    files_in_order = tuple(sorted(present, key=lambda file: file.name))
    unreadable = tuple((name, ABSENT) for name in sorted(absent))
    return DicomFiles(filesystem, root, files_in_order, unreadable, other_files=0, archives=0)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _is_directory(name: str) -> bool:
    return not _is_hidden(name) and _on_medium(name.rpartition("/")[2]) == "dicomdir"


def _may_be_dicom(name: str) -> bool:
    base = name.rpartition("/")[2]
    if _is_hidden(name) or _is_directory(name) or is_zip(base) or is_tar(base):
        return False
    _, dot, extension = base.rpartition(".")
    # A file named by its UID seems to have an extension of digits.
    return not dot or extension.lower() in _EXTENSIONS or extension.isdecimal()


def _resolve(filesystem: fs.FileSystem, directory: SourceFile, files: list[SourceFile]) -> tuple[list[SourceFile], list[str]]:
    """The files that a DICOMDIR references, and the names of those that are absent.

    Raises
    ------
    DamagedImage
        If the DICOMDIR cannot be read; without its name.
    """
    ((_, content),) = read_files(filesystem, [directory.location])
    if isinstance(content, ImageError):
        raise content
    folder = directory.name.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""
    there = {_on_medium(file.name): file for file in files if file.name.startswith(prefix)}
    present: dict[str, SourceFile] = {}
    absent: dict[str, None] = {}
    for reference in _references(content):
        name = f"{prefix}{reference}"
        file = there.get(_on_medium(name))
        if file is None:
            absent[name] = None
        else:
            present[file.name] = file
    return list(present.values()), list(absent)


def _on_medium(name: str) -> str:
    """A name as ISO 9660 compares it: without case, version and the dot of an empty extension (PS3.12 annex F)."""
    return "/".join(re.sub(r";\d+$", "", part).rstrip(".") for part in name.casefold().split("/"))


def _references(content: bytes) -> Iterator[str]:
    """Paths of Referenced File ID (0004,1500) in the records that are in use, relative to the DICOMDIR."""
    try:
        records = read_dicom(content, "").get("DirectoryRecordSequence") or []
        for record in records:
            parts = record.get("ReferencedFileID")
            if parts and record.get("RecordInUseFlag", 1) != _INACTIVE:
                listed = [parts] if isinstance(parts, str) else parts
                yield "/".join(str(part).strip() for part in listed)
    except ImageError as error:
        raise type(error)(reason(error, "")) from None
    except Exception as error:  # noqa: BLE001 - a hostile file makes the parser raise nearly anything
        raise DamagedImage(f"damaged DICOMDIR ({type(error).__name__}); copy the medium again") from None
