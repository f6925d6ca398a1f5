"""What a training split shows a network, as the bundle keeps it: every patient of it, and a sample of its films.

The films of a whole release are tens of gigabytes, and a histogram of 32 bins needs some thousands. Those are whole row groups,
evenly spaced over the split, that Ray's tasks read wherever there is room.
"""

import numpy as np
import ray
from pyarrow import fs

from cxr_ray.clinical import Encoding
from cxr_ray.dataset import Dataset, RowGroup
from cxr_ray.input_profile import InputProfile, profile_of_patients, profile_of_squares
from cxr_ray.records import clinical_columns, clinical_inputs, pixel_array
from cxr_ray.shard_rows import read_group

FILMS = 8192
_TASKS = 16


def training_inputs(dataset: Dataset, encoding: Encoding, *, with_films: bool) -> InputProfile:
    """The profile of a training split: of all its patients, and of at most about `FILMS` of its films.

    The same split gives the same profile. Ray has to be initialised.

    Raises
    ------
    CxrRayError
        If a shard is absent, damaged, or not the one that the manifest lists.
    """
    found = profile_of_patients(clinical_inputs(dataset.read("train", list(clinical_columns(encoding))), encoding))
    if with_films:
        groups = sampled(dataset.row_groups("train"), FILMS)
        parts = [groups[first::_TASKS] for first in range(min(_TASKS, len(groups)))]
        for counted in ray.get([_counted.remote(dataset.filesystem, part) for part in parts]):
            found += counted
    return found


def sampled(groups: list[RowGroup], rows: int) -> list[RowGroup]:
    """Groups evenly spaced over all, which together hold at most `rows`, or a single one."""
    most = max(1, rows // max(group.rows for group in groups))
    if most >= len(groups):
        return groups
    return [groups[place] for place in np.linspace(0, len(groups) - 1, most).round().astype(int)]


@ray.remote
def _counted(filesystem: fs.FileSystem, groups: list[RowGroup]) -> InputProfile:
    found = InputProfile()
    for group in groups:
        found += profile_of_squares(pixel_array(read_group(filesystem, group, ["pixels"])["pixels"]))
    return found
