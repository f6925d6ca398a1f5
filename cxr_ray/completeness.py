"""Whether what is scored is the whole of the official test split: only then may a figure stand beside published ones."""

from dataclasses import dataclass

from cxr_ray import presets
from cxr_ray.bundle_description import BundleDescription
from cxr_ray.dataset import Manifest
from cxr_ray.presets.preset import Published

OFFICIAL_TEST_IMAGES = 25_596
_NOT_COMPARABLE = "NOT comparable with published figures"


@dataclass(frozen=True)
class Extent:
    """What a split is to the official test list of ChestX-ray14.

    Attributes
    ----------
    images
        In the dataset's split.
    from_official_list
        Whether it was made from that list; it may hold a part of it.
    """

    images: int
    from_official_list: bool

    @property
    def is_official_test(self) -> bool:
        """Whether it is the whole of it."""
        return self.from_official_list and self.images == OFFICIAL_TEST_IMAGES

    def in_words(self) -> str:
        """What a table's title has to say of it."""
        if self.is_official_test:
            return "the whole official test split"
        if self.from_official_list:
            return f"{self.images:,} of the {OFFICIAL_TEST_IMAGES:,} images of the official test split: {_NOT_COMPARABLE}"
        return f"not the official test split: {_NOT_COMPARABLE}"


def extent(manifest: Manifest, split: str) -> Extent:
    """The extent of a split that a dataset's manifest has."""
    official = manifest.settings.get("split") == "official" and manifest.counts.get("official_test") == OFFICIAL_TEST_IMAGES
    return Extent(manifest.splits[split].images, split == "test" and official)


def published_of(bundle: BundleDescription) -> tuple[Published, ...]:
    """What was published about a bundle's network, those of the official split first; nothing about a changed one."""
    preset = presets.find(bundle.preset)
    if (bundle.variant, bundle.layout) != (preset.variants[0], preset.layout):
        return ()
    return tuple(sorted(preset.published, key=lambda published: not published.split.startswith("official")))


def comparable(bundle: BundleDescription, extent: Extent) -> Published | None:
    """The published figures that may stand beside those of this split, or None."""
    if not extent.is_official_test:
        return None
    return next((each for each in published_of(bundle) if each.split.startswith("official")), None)
