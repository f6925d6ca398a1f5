"""Files at any pyarrow filesystem URI: a local path, ``file://``, ``s3://``, ``gs://``, ``hdfs://``."""

import secrets
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from cxr_ray.errors import CxrRayError, UsageError

_SECRET_OPTIONS = ("access_key", "secret_key", "session_token", "external_id")
# Object stores show a file when it is closed, and have no rename but copying.
_SHOWN_WHEN_CLOSED = ("s3", "gcs", "abfs")


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI and the path inside it; a plain path is local and may be relative.

    Raises
    ------
    UsageError
        If the scheme is not one that pyarrow knows.
    """
    try:
        if "://" in uri:
            return fs.FileSystem.from_uri(uri)
        return fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UsageError(
            f"URI {shown(uri)!r} cannot be used ({error}); give a path or a URI such as s3://bucket/folder"
        ) from None


def absolute(uri: str) -> str:
    """The same place, named so that a process with another working folder finds it."""
    return uri if "://" in uri else resolve(uri)[1]


def child(uri: str, name: str) -> str:
    """The URI of what lies below another one; options after a question mark stay behind the path."""
    path, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def shown(uri: str) -> str:
    """The URI as it may be printed and stored: without the user, the password and the keys that it may carry."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    query = [(name, value) for name, value in parse_qsl(parts.query) if name not in _SECRET_OPTIONS]
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(query)))


def exists(filesystem: fs.FileSystem, path: str) -> bool:
    """Whether a file or folder is there."""
    return filesystem.get_file_info(path).type != fs.FileType.NotFound


def read_bytes(filesystem: fs.FileSystem, path: str) -> bytes:
    """The content of a file.

    Raises
    ------
    CxrRayError
        If it is absent or unreadable.
    """
    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            return stream.read()
    except OSError as error:
        raise CxrRayError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); check the path and its permissions"
        ) from None


def write_atomically(filesystem: fs.FileSystem, path: str, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none of it."""
    partial = path if filesystem.type_name in _SHOWN_WHEN_CLOSED else f"{path}.{secrets.token_hex(4)}.partial"
    with filesystem.open_output_stream(partial, compression=None) as stream:
        stream.write(data)
    if partial != path:
        filesystem.move(partial, path)
