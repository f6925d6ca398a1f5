"""What zips and tars hold: listed without being unpacked, one archive a Ray Data task.

A zip says so in its central directory; a tar has to be read to its end, which also shows whether it is whole.
"""

import stat
from collections.abc import Iterable, Iterator, Sequence
from zipfile import ZipInfo

import pyarrow as pa
from pyarrow import fs

from cxr_ray.errors import CxrRayError
from cxr_ray.progress import ProgressReport
from cxr_ray.ray_session import without_reservations
from ingest.files import SourceFile, is_tar, open_zip, problem
from ingest.tar_stream import stream_tar

_LISTING = pa.schema(
    [
        pa.field("archive", pa.int64()),
        pa.field("damage", pa.string()),
        pa.field("names", pa.list_(pa.string())),
        pa.field("sizes", pa.list_(pa.int64())),
    ]
)


def list_members(filesystem: fs.FileSystem, archive: SourceFile) -> list[SourceFile]:
    """The regular files in a zip or tar, in its order; links, folders and devices are none.

    Raises
    ------
    CxrRayError
        If the archive is damaged or breaks off.
    """
    damage, members = _list_members(filesystem, archive.location)
    return _source_files(archive, damage, members)


def list_archives(filesystem: fs.FileSystem, archives: Sequence[SourceFile]) -> dict[str, list[SourceFile]]:
    """The members of each archive by the archive's location, listed on Ray Data; errors as `list_members`."""
    listed: dict[str, list[SourceFile]] = {}
    for archive, members in try_archives(filesystem, archives):
        if isinstance(members, CxrRayError):
            raise members
        listed[archive.location] = members
    return {archive.location: listed[archive.location] for archive in archives}


def try_archives(
    filesystem: fs.FileSystem, archives: Sequence[SourceFile]
) -> Iterator[tuple[SourceFile, list[SourceFile] | CxrRayError]]:
    """Each archive with its members or why it has none, as they are done, listed on Ray Data."""
    import ray.data  # noqa: PLC0415 - takes a second that other commands need not pay

    if not archives:
        return
    locations = [archive.location for archive in archives]
    tasks = [pa.table({"archive": [number], "location": [location]}) for number, location in enumerate(locations)]
    results = without_reservations(ray.data.from_arrow(tasks)).map_batches(
        _listing, fn_kwargs={"filesystem": filesystem}, batch_format="pyarrow", batch_size=None
    )
    with ProgressReport("archives", len(archives), "archives") as progress:
        for block in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in block.to_pylist():
                progress.advance(1)
                archive = archives[row["archive"]]
                try:
                    yield archive, _source_files(archive, row["damage"], zip(row["names"], row["sizes"], strict=True))
                except CxrRayError as error:
                    yield archive, error


def _listing(archives: pa.Table, filesystem: fs.FileSystem) -> pa.Table:
    rows = []
    for row in archives.to_pylist():
        damage, members = _list_members(filesystem, row["location"])
        names, sizes = [name for name, _ in members], [size for _, size in members]
        rows.append({"archive": row["archive"], "damage": damage, "names": names, "sizes": sizes})
    return pa.Table.from_pylist(rows, schema=_LISTING)


def _list_members(filesystem: fs.FileSystem, location: str) -> tuple[str | None, list[tuple[str, int]]]:
    """What is wrong with the archive, if anything, and the name and size of each member found."""
    members: list[tuple[str, int]] = []
    try:
        if is_tar(location):
            with stream_tar(filesystem, location) as entries:
                members.extend((name, entry.size) for name, entry, _ in entries)
        else:
            opened = open_zip(filesystem, location)
            files = (opened.getinfo(name) for name in dict.fromkeys(opened.namelist()))
            members.extend((file.filename, file.file_size) for file in files if not (file.is_dir() or _is_link(file)))
    except Exception as error:  # noqa: BLE001 - a hostile archive makes the parser raise nearly anything
        if isinstance(error, OSError) and error.errno:
            return f"cannot be read ({problem(error)}); check the file", members
        return f"breaks off after {len(members)} files; download it again", members
    return None, members


def _is_link(file: ZipInfo) -> bool:
    # Unix keeps the mode of the file in the upper half.
    return stat.S_ISLNK(file.external_attr >> 16)


def _source_files(archive: SourceFile, damage: str | None, members: Iterable[tuple[str, int]]) -> list[SourceFile]:
    if damage is not None:
        raise CxrRayError(f"{archive.name}: {damage}")
    return [
        SourceFile(f"{archive.location}!/{name}", f"{archive.name}!/{name}", f"{archive.stamp}-{size}")
        for name, size in members
    ]
