"""How often a test split was read: whoever looks at it many times and reports the best has chosen on it.

Each scoring of a dataset's test split leaves one small file in ``readings/`` beside its shards, written before anything is
scored. They are counted in the report.
"""

import json
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from pyarrow import fs

from cxr_ray import storage
from cxr_ray.dataset import Dataset

READINGS = "readings"


@dataclass(frozen=True)
class Reading:
    """One scoring of a test split.

    Attributes
    ----------
    time
        ISO 8601, UTC.
    bundle, digest
        Name and version of the bundle, and its digest.
    rows
        How many figures for the whole split it gave: the honest one and the ablations.
    """

    time: str
    bundle: str
    digest: str
    dataset_digest: str
    rows: int


def note(dataset: Dataset, bundle: str, digest: str, rows: int) -> list[Reading] | None:
    """Note a reading; all readings of this dataset up to now, or None where its folder cannot be written."""
    now = datetime.now(UTC)
    reading = Reading(now.isoformat(timespec="seconds"), bundle, digest, dataset.digest, rows)
    name = f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.json"
    folder = f"{dataset.root}/{READINGS}"
    try:
        dataset.filesystem.create_dir(folder, recursive=True)
        storage.write_atomically(dataset.filesystem, f"{folder}/{name}", json.dumps(asdict(reading), indent=2).encode())
        return _all(dataset, folder)
    except (OSError, ValueError, TypeError):
        return None


def _all(dataset: Dataset, folder: str) -> list[Reading]:
    files = [info.path for info in dataset.filesystem.get_file_info(fs.FileSelector(folder)) if info.path.endswith(".json")]
    read = [Reading(**json.loads(storage.read_bytes(dataset.filesystem, path))) for path in sorted(files)]
    return [reading for reading in read if reading.dataset_digest == dataset.digest]
