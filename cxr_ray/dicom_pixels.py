"""A DICOM file's pixels as a display would show them: stored values, Modality LUT, VOI LUT or window, polarity (PS3.3 C.11).

Whatever turns one stored value into one grey depends on that value alone. Where this is a straight line, black and white
are carried back into stored values and the pixels stay as they are; where it is a curve, it is worked out for each value
that can be stored, and the pixels are looked up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut

from cxr_ray.dicom_codecs import stored_values
from cxr_ray.dicom_layout import PALETTE, PixelLayout, pixel_layout
from cxr_ray.dicom_values import DicomValueError, numbers, text
from cxr_ray.frontal_chest import check_single_frame
from cxr_ray.pixels import DamagedImage, Greyscale, UnsupportedImage, UnusableImage, colour_to_grey, full_range

_FLOATS = ("FloatPixelData", "DoubleFloatPixelData")


@dataclass(frozen=True)
class _Line:
    """Rescaled value = slope x stored value + intercept."""

    slope: float
    intercept: float


@dataclass(frozen=True)
class _Window:
    """Black and white by the linear functions; the sigmoid has no such ends."""

    center: float
    width: float
    sigmoid: bool

    @property
    def black(self) -> float:
        return self.center - self.width / 2

    @property
    def white(self) -> float:
        return self.center + self.width / 2


@dataclass(frozen=True)
class _Lut:
    """A Modality or VOI LUT: `entries` (uint16) belong to the values from `first` on."""

    entries: np.ndarray
    first: int
    bits: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Values through the table, whose first and last entries hold beyond its ends (PS3.3 C.11.1.1)."""
        # The first value mapped is written as unsigned where its values may be negative.
        first = self.first - 2**16 if self.first >= 2**15 and values.min() < 0 else self.first
        return self.entries[np.clip(np.rint(values).astype(np.int64) - first, 0, len(self.entries) - 1)]

    @property
    def white(self) -> float:
        return float(max(2**self.bits - 1, int(self.entries.max())))


_Modality = _Line | _Lut
_Voi = _Window | _Lut | None


def decode_dicom(dataset: Dataset, name: str) -> Greyscale:
    """Decode the only image of a dataset as a display would show it.

    Raises
    ------
    UnusableImage
        If this is no image, a coloured one, or several.
    OversizedImage, DamagedImage, UnsupportedImage
        If the pixels are too many, do not decode or are absent, or no decoder knows their type or transfer syntax.
    """
    _check_pixels_present(dataset, name)
    check_single_frame(dataset, name)
    try:
        layout = pixel_layout(dataset, name)
        stored = stored_values(dataset, layout, name)
        if layout.photometric == PALETTE:
            stored = apply_color_lut(stored, dataset)
        if stored.ndim == 3:
            return full_range(colour_to_grey(name, _eight_bits(stored, dataset, layout)))
        return _displayed(dataset, layout, stored)
    except DicomValueError as error:
        raise DamagedImage(f"{name}: {error}") from None
    except (ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError) as error:
        what = type(error).__name__
        raise DamagedImage(f"{name}: its LUT or window cannot be applied ({what}); correct the header") from None


def _check_pixels_present(dataset: Dataset, name: str) -> None:
    if "PixelData" in dataset:
        return
    floats = [keyword for keyword in _FLOATS if keyword in dataset]
    if floats:
        raise UnsupportedImage(f"{name}: holds {floats[0]}; send whole numbers in PixelData")
    if "Rows" in dataset:
        raise DamagedImage(f"{name}: holds no PixelData for its Rows; send the file again")
    raise UnusableImage(f"{name}: holds no PixelData; send an image instance")


def _eight_bits(colour_HWC: np.ndarray, dataset: Dataset, layout: PixelLayout) -> np.ndarray:
    bits = layout.bits_stored
    if layout.photometric == PALETTE:
        bits = 8 * colour_HWC.dtype.itemsize
    return (colour_HWC >> max(0, bits - 8)).astype(np.uint8)


def _displayed(dataset: Dataset, layout: PixelLayout, stored: np.ndarray) -> Greyscale:
    padding = _padding_mask(dataset, stored)
    little_endian = dataset.file_meta.TransferSyntaxUID.is_little_endian
    modality, voi = _modality(dataset, little_endian), _voi(dataset, little_endian)
    inverted = layout.photometric == "MONOCHROME1"
    if isinstance(modality, _Line) and (voi is None or (isinstance(voi, _Window) and not voi.sigmoid)):
        shown = _stored_range(stored, layout, padding) if voi is None else _carried_back(stored, modality, voi)
        return _with_air_dark(shown, inverted ^ (modality.slope < 0), padding)
    shown = _looked_up(stored, modality, voi)
    if voi is None:
        kept = shown.values if padding is None or padding.all() else shown.values[~padding]
        shown = Greyscale(shown.values, float(kept.min()), float(kept.max()))
    return _with_air_dark(shown, inverted, padding)


def _modality(dataset: Dataset, little_endian: bool) -> _Modality:
    """The Modality LUT or the rescale (PS3.3 C.11.1)."""
    lut = dataset.get("ModalityLUTSequence")
    if lut:
        return _lut(lut[0], little_endian)
    slope, intercept = (
        (numbers(dataset, f"Rescale{name}") or [default])[0] for name, default in (("Slope", 1), ("Intercept", 0))
    )
    if not (math.isfinite(slope) and math.isfinite(intercept) and slope):
        raise DicomValueError("RescaleSlope or RescaleIntercept is zero or infinite; correct the header")
    return _Line(slope, intercept)


def _voi(dataset: Dataset, little_endian: bool) -> _Voi:
    """The first VOI LUT, else the first window by the function that the file names (PS3.3 C.11.2.1.2 and C.11.2.1.3).

    None where there is no window, or one without width, as some archives write it for "none".
    """
    lut = dataset.get("VOILUTSequence")
    if lut:
        return _lut(lut[0], little_endian)
    centers, widths = numbers(dataset, "WindowCenter"), numbers(dataset, "WindowWidth")
    if not (centers and widths and math.isfinite(centers[0]) and math.isfinite(widths[0])):
        return None
    center, width = centers[0], widths[0]
    function = text(dataset, "VOILUTFunction").upper()
    if function not in ("LINEAR_EXACT", "SIGMOID"):
        center, width = center - 0.5, width - 1
    return _Window(center, width, function == "SIGMOID") if width > 0 else None


def _lut(item: Dataset, little_endian: bool) -> _Lut:
    """Read here, because pydicom wraps values that exceed the type of the entries and knows no Modality LUT of 12 bits."""
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    count = count or 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        words = "<u2" if little_endian else ">u2"
        data = np.frombuffer(data, dtype=words if len(data) >= 2 * count else np.uint8)
    entries = np.atleast_1d(np.asarray(data, dtype=np.int64)).astype(np.uint16)[:count]
    if not 1 <= bits <= 16 or not entries.size:
        raise DicomValueError("LUTDescriptor does not describe LUTData; correct the header")
    return _Lut(entries, first, bits)


def _carried_back(stored: np.ndarray, rescale: _Line, window: _Window) -> Greyscale:
    black, white = sorted((end - rescale.intercept) / rescale.slope for end in (window.black, window.white))
    return Greyscale(stored, black, white)


def _looked_up(stored: np.ndarray, modality: _Modality, voi: _Voi) -> Greyscale:
    black, white = 0.0, 1.0
    curves: list[Callable[[np.ndarray], np.ndarray]] = [_line(modality) if isinstance(modality, _Line) else modality]
    if isinstance(voi, _Lut):
        curves.append(voi)
        white = voi.white
    elif voi is not None and voi.sigmoid:
        curves.append(_sigmoid(voi))
    elif voi is not None:
        black, white = voi.black, voi.white
    return Greyscale(_each_value(stored, curves), black, white)


def _each_value(stored: np.ndarray, curves: list[Callable[[np.ndarray], np.ndarray]]) -> np.ndarray:
    bits = 8 * stored.dtype.itemsize
    values = np.arange(2**bits, dtype=f"u{bits // 8}").view(stored.dtype) if bits <= 16 else stored
    for curve in curves:
        values = curve(values)
    return cv2.LUT(stored.view(f"u{bits // 8}"), values) if bits <= 16 else values


def _line(line: _Line) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: (values * np.float64(line.slope) + line.intercept).astype(np.float32)


def _sigmoid(window: _Window) -> Callable[[np.ndarray], np.ndarray]:
    """PS3.3 C.11.2.1.3.1, from 0 to 1; its ends are reached at infinity."""

    def curve(values: np.ndarray) -> np.ndarray:
        # Beyond 80 it is 0 or 1 in single precision, and the exponential would overflow.
        exponent = np.clip(-4 * (values - np.float64(window.center)) / window.width, -80, 80)
        return (1 / (1 + np.exp(exponent))).astype(np.float32)

    return curve


def _padding_mask(dataset: Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Pixels that are no part of the image (PS3.3 C.7.5.1.1.2); None where there are none."""
    values = [*numbers(dataset, "PixelPaddingValue")[:1], *numbers(dataset, "PixelPaddingRangeLimit")[:1]]
    if "PixelPaddingValue" not in dataset or not values or not all(map(math.isfinite, values)):
        return None
    limits = np.iinfo(stored.dtype)
    # Written as unsigned where pixels are signed, or the other way round.
    span = int(limits.max) - int(limits.min) + 1
    low, high = sorted((int(value) - int(limits.min)) % span + int(limits.min) for value in (values[0], values[-1]))
    mask = stored == low if low == high else (stored >= low) & (stored <= high)
    return mask if mask.any() else None


def _stored_range(stored: np.ndarray, layout: PixelLayout, padding: np.ndarray | None) -> Greyscale:
    """Black and white where the file states no window: all of 8 bits, else the extremes of the image without padding."""
    if layout.bits_stored <= 8 and not layout.signed:
        return Greyscale(stored.astype(np.uint8, copy=False), 0.0, float(2**layout.bits_stored - 1))
    kept = stored if padding is None or padding.all() else stored[~padding]
    return Greyscale(stored, float(kept.min()), float(kept.max()))


def _with_air_dark(shown: Greyscale, inverted: bool, padding: np.ndarray | None) -> Greyscale:
    values, black, white = shown.values, shown.black, shown.white
    if inverted and values.dtype.kind in "iu":
        limits = np.iinfo(values.dtype)
        turn = int(limits.min) + int(limits.max)
        values, black, white = ~values, turn - white, turn - black
    elif inverted:
        values, black, white = -values, -white, -black
    if padding is not None:
        values = values.copy()
        values[padding] = _darkest(values.dtype, black)
    return Greyscale(values, black, white)


def _darkest(dtype: np.dtype, black: float) -> float:
    if dtype.kind == "f":
        return black
    return float(np.clip(math.floor(black), np.iinfo(dtype).min, np.iinfo(dtype).max))
