"""The images of the NIH release, wherever they lie: extracted folders, a flat folder, archives as downloaded, or a mixture."""

from collections.abc import Iterable, Sequence

from pyarrow import fs

from ingest.archives import list_archives
from ingest.files import SourceFile, is_tar, is_zip


def without_litter(files: Iterable[SourceFile]) -> list[SourceFile]:
    """The files without those that macOS leaves beside each: ``._00000001_000.png`` and whatever ``__MACOSX`` holds."""
    return [file for file in files if not _is_litter(file.name)]


def _is_litter(name: str) -> bool:
    *folders, last = name.split("/")
    return last.startswith("._") or "__MACOSX" in folders


def find_images(filesystem: fs.FileSystem, files: Sequence[SourceFile]) -> tuple[dict[str, SourceFile], int]:
    """Every PNG by its name, in folders and in archives, and how many files repeat a name.

    Of files with one name the first is taken, plain files before members of archives.

    Raises
    ------
    CxrRayError
        If an archive is damaged.
    """
    archives = [file for file in files if is_tar(file.name) or is_zip(file.name)]
    members = list_archives(filesystem, archives) if archives else {}
    images: dict[str, SourceFile] = {}
    duplicates = 0
    for held in (files, *(without_litter(members[archive.location]) for archive in archives)):
        for file in held:
            if file.name.lower().endswith(".png"):
                name = file.name.rpartition("/")[2]
                duplicates += name in images
                images.setdefault(name, file)
    return images, duplicates
