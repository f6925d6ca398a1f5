"""Where a node's spool is unless somebody says so: for the node itself, and for the commands that look into it."""

import os
from pathlib import Path

SPOOL_VARIABLE = "CXR_RAY_SPOOL"
DEFAULT_SPOOL = Path("cxr-ray-spool")


def usual_spool() -> Path:
    """The folder that the environment names, else one in the working folder."""
    return Path(os.environ.get(SPOOL_VARIABLE) or DEFAULT_SPOOL)
