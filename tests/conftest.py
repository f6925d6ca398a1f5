"""What several tests share: the real data, and one Ray for the session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cxr_ray.ray_session import ray_session

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real images: folders nih, nih-1024 and dicom below CXR_REAL_DATA."""
    path = (REPOSITORY / os.environ.get("CXR_REAL_DATA", "../shared/data")).resolve()
    if not path.is_dir():
        pytest.skip(f"no real data in {path}; set CXR_REAL_DATA")
    return path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    with ray_session(local_cpus=4):
        yield
