"""The page's style and scripts, as a browser may keep them.

Their address carries a digest of them all, which modules that import each other inherit. While one release replaces another, a
page of the one may meet files of the other: these are served, and not to be kept.
"""

import hashlib
from functools import cache
from pathlib import Path
from types import MappingProxyType

from fastapi import APIRouter, Response

from serve.http.problems import ApiProblem

router = APIRouter(include_in_schema=False)
_FOLDER = Path(__file__).parent / "static"
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript"}
_A_YEAR = "public, max-age=31536000, immutable"


@cache
def _files() -> MappingProxyType[str, bytes]:
    return MappingProxyType({file.name: file.read_bytes() for file in sorted(_FOLDER.iterdir()) if file.suffix in _MEDIA_TYPES})


@cache
def assets_version() -> str:
    """Digest of all files."""
    digest = hashlib.sha256()
    for name, content in _files().items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:12]


@router.get("/static/{version}/{name}")
async def asset(version: str, name: str) -> Response:
    """A file."""
    content = _files().get(name)
    if content is None:
        raise ApiProblem(404, f"the page has no file {name[:64]!r}")
    headers = {"Cache-Control": _A_YEAR} if version == assets_version() else {}
    return Response(content, headers=headers, media_type=_MEDIA_TYPES[Path(name).suffix])
