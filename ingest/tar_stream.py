"""A tar read in one pass, compressed or not, wherever it lies: archives of many gigabytes need no more memory than small ones.

The standard library's reader is kept from three habits that do not fit here: it takes whatever is no header for the end of
the archive, keeps every header that it has passed, and reads a header of any length at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from tarfile import (
    GNUTYPE_LONGLINK,
    GNUTYPE_LONGNAME,
    SOLARIS_XHDTYPE,
    XGLTYPE,
    XHDTYPE,
    HeaderError,
    ReadError,
    TarFile,
    TarInfo,
)
from typing import Self

import pyarrow as pa
from pyarrow import fs

_BUFFER_BYTES = 1 << 20
# Long names and extended headers are headers of their own; a path is never this long.
_MAX_HEADER_BYTES = 1 << 20
_HEADER_TYPES = (GNUTYPE_LONGNAME, GNUTYPE_LONGLINK, XHDTYPE, XGLTYPE, SOLARIS_XHDTYPE)


@contextmanager
def stream_tar(filesystem: fs.FileSystem, archive: str) -> Iterator[Iterator[tuple[str, TarInfo, TarFile]]]:
    """Pass once over a tar, compressed with gzip or not: name, header and reader of each regular file, in flat memory.

    Raises
    ------
    OSError, tarfile.ReadError
        While iterating, where the tar is damaged or breaks off; others where it is hostile.
    """
    compression = None if archive.lower().endswith(".tar") else "gzip"
    with filesystem.open_input_stream(archive, compression=compression, buffer_size=_BUFFER_BYTES) as stream:
        yield _members(stream)


def _members(stream: pa.NativeFile) -> Iterator[tuple[str, TarInfo, TarFile]]:
    with TarFile.open(
        fileobj=stream,
        mode="r|",
        bufsize=_BUFFER_BYTES,
        tarinfo=_StrictTarInfo,
        encoding="utf-8",
        errors="backslashreplace",  # Arrow takes no other text
    ) as tar:
        seen = set()
        while (entry := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # else it keeps every header
            name = entry.name.removeprefix("./")
            if entry.isreg() and name not in seen:
                seen.add(name)
                yield name, entry, tar
    # The checksum of gzip stands at its end.
    while stream.read(_BUFFER_BYTES):
        pass


class _StrictTarInfo(TarInfo):
    """A header that only the end mark may follow instead of another."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # of the standard library, and not told to type checkers
                raise
            raise ReadError("breaks off") from None

    def _proc_member(self, tarfile: TarFile) -> TarInfo:
        if self.type in _HEADER_TYPES and self.size > _MAX_HEADER_BYTES:
            raise ReadError("header too long")
        return super()._proc_member(tarfile)  # type: ignore[misc]
