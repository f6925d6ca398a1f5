"""How the pixels of a DICOM image lie in memory: the Image Pixel attributes (PS3.3 C.7.6.3), checked before use.

Every size that a decoder reserves follows from these numbers, so none of them is believed unseen.
"""

from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset

from cxr_ray.dicom_values import shown, text, whole_number
from cxr_ray.pixels import DamagedImage, UnsupportedImage, UnusableImage, check_megapixels

GREY = ("MONOCHROME1", "MONOCHROME2")
PALETTE = "PALETTE COLOR"
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_BITS_ALLOCATED = (8, 16, 32)


@dataclass(frozen=True)
class PixelLayout:
    """The Image Pixel attributes of a single image, consistent with each other."""

    rows: int
    columns: int
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool

    @property
    def pixels(self) -> int:
        """How many pixels the image has."""
        return self.rows * self.columns

    @property
    def sample_bytes(self) -> int:
        """How many bytes a sample takes."""
        return self.bits_allocated // 8


def pixel_layout(dataset: Dataset, name: str) -> PixelLayout:
    """Read and check the Image Pixel attributes.

    Raises
    ------
    DicomValueError
        If an attribute is no number.
    OversizedImage, DamagedImage, UnsupportedImage, UnusableImage
        If the image is too large, empty, of a layout that is not read, or its attributes contradict each other.
    """
    rows, columns = whole_number(dataset, "Rows"), whole_number(dataset, "Columns")
    check_megapixels(name, rows, columns)
    if rows <= 0 or columns <= 0:
        raise DamagedImage(f"{name}: Rows is {rows} and Columns is {columns}; send the file again")
    samples = whole_number(dataset, "SamplesPerPixel") or 1
    photometric = _photometric(dataset, samples, name)
    allocated = whole_number(dataset, "BitsAllocated")
    if allocated not in _BITS_ALLOCATED:
        raise UnsupportedImage(f"{name}: BitsAllocated is {allocated}; send 8, 16 or 32 bits a sample")
    stored = whole_number(dataset, "BitsStored") or allocated
    high_bit = whole_number(dataset, "HighBit") if "HighBit" in dataset else stored - 1
    if not 0 < stored <= high_bit + 1 <= allocated:
        raise DamagedImage(
            f"{name}: BitsStored is {stored}, HighBit {high_bit} and BitsAllocated {allocated}; correct the header"
        )
    signed = whole_number(dataset, "PixelRepresentation") == 1
    return PixelLayout(rows, columns, samples, photometric, allocated, stored, high_bit, signed)


def _photometric(dataset: Dataset, samples: int, name: str) -> str:
    photometric = text(dataset, "PhotometricInterpretation").upper()
    if photometric not in (*GREY, PALETTE, *COLOUR):
        known = shown(photometric) if photometric else "absent"
        raise UnsupportedImage(f"{name}: PhotometricInterpretation is {known}; send MONOCHROME1 or MONOCHROME2")
    if samples != (3 if photometric in COLOUR else 1):
        raise UnusableImage(
            f"{name}: SamplesPerPixel is {samples} under PhotometricInterpretation {photometric}; send a single grey image"
        )
    return photometric


def stored_bits(cells: np.ndarray, layout: PixelLayout, high_bit: int) -> np.ndarray:
    """Cells (any shape, 8 to 32 bits) without the bits above and below those stored, signs extended (PS3.5 8.1.1).

    Older files keep overlays in the unused bits, and nothing forbids garbage in them.
    """
    width = 8 * cells.dtype.itemsize
    stored = min(layout.bits_stored, width)
    above, below = width - 1 - min(high_bit, width - 1), max(0, min(high_bit, width - 1) + 1 - stored)
    cells = cells.view(f"u{cells.dtype.itemsize}")
    if layout.signed:
        cells = (
            np.left_shift(cells, above).view(f"i{cells.dtype.itemsize}") if above else cells.view(f"i{cells.dtype.itemsize}")
        )
        return np.right_shift(cells, above + below) if above + below else cells
    if below:
        cells = np.right_shift(cells, below)
    mask = 2**stored - 1
    return cells if stored == width or int(cells.max()) <= mask else np.bitwise_and(cells, cells.dtype.type(mask))
