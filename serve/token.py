"""The bearer token that a service asks for and the DICOM node brings."""

import os
from pathlib import Path

from cxr_ray.errors import CxrRayError

TOKEN_VARIABLE = "CXR_RAY_TOKEN"  # noqa: S105 - the name of the variable, not a token


def read_token(token_file: Path | None) -> str | None:
    """The bearer token from a file, else from the environment; None if there is none.

    Raises
    ------
    CxrRayError
        If the file cannot be read or is empty.
    """
    if token_file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CxrRayError(f"--token-file {token_file}: cannot be read ({error}); write the token into it") from None
    if not token:
        raise CxrRayError(f"--token-file {token_file}: is empty; write the token into it")
    return token
