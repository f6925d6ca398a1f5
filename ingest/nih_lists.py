"""Lists of images: which of the table's images belong together, as the release's two lists and those of other people say it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from pyarrow import fs

from cxr_ray import storage
from cxr_ray.errors import CxrRayError

TRAIN_VAL_LIST = "train_val_list.txt"
TEST_LIST = "test_list.txt"


@dataclass(frozen=True)
class ImageList:
    """Names of images; `file` is what errors call the list."""

    file: str
    images: Sequence[str]


def read_image_list(filesystem: fs.FileSystem, path: str, file: str) -> ImageList:
    """Read a list with a name a line.

    Raises
    ------
    CxrRayError
        If it is absent, no text or empty.
    """
    try:
        text = storage.read_bytes(filesystem, path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CxrRayError(f"{file}: is no text; give a list with the name of an image a line") from None
    images = [line.strip() for line in text.splitlines() if line.strip()]
    if not images:
        raise CxrRayError(f"{file}: is empty; give a list with the name of an image a line")
    return ImageList(file, images)


def official_lists(filesystem: fs.FileSystem, root: str) -> dict[str, ImageList]:
    """The release's lists, ``train_val`` and ``test``; errors as `read_image_list`."""
    names = {"train_val": TRAIN_VAL_LIST, "test": TEST_LIST}
    return {name: read_image_list(filesystem, f"{root}/{file}", f"{root}/{file}") for name, file in names.items()}


def given_lists(uris: Mapping[str, str]) -> dict[str, ImageList]:
    """The lists at `uris` by the same names; errors as `read_image_list`."""
    return {name: read_image_list(*storage.resolve(uri), storage.shown(uri)) for name, uri in uris.items()}


def list_of_each(images: np.ndarray, patients: np.ndarray, lists: Mapping[str, ImageList]) -> np.ndarray:
    """The name of the list that each image stands in, None where it stands in none; object, shape (N,).

    Raises
    ------
    CxrRayError
        If a list names an image that is not there, or two lists share an image or a patient.
    """
    known = set(images)
    for held in lists.values():
        unknown = [image for image in held.images if image not in known]
        if unknown:
            raise CxrRayError(
                f"{held.file}: names {len(unknown)} images that the table does not hold (first: {unknown[0]}); "
                "use lists and table of one release"
            )
    for one, other in combinations(lists.values(), 2):
        both = set(one.images) & set(other.images)
        if both:
            raise CxrRayError(
                f"{len(both)} images stand in both {one.file} and {other.file} (first: {min(both)}); correct the lists"
            )
    by_image = {image: name for name, held in lists.items() for image in held.images}
    found = np.array([by_image.get(image) for image in images], dtype=object)
    for (name, one), (other_name, other) in combinations(lists.items(), 2):
        shared = np.intersect1d(patients[found == name], patients[found == other_name])
        if len(shared):
            raise CxrRayError(
                f"{len(shared)} patients have images in both {one.file} and {other.file} (first: {shared[0]}); "
                "move all images of a patient to one list"
            )
    return found
