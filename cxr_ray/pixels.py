"""Pixels: from whatever a file holds to the stored square that ingest and serving share.

A source yields a `Greyscale`: the decoded values with air dark, and the two values that become black and white.
`stored_square` turns that into uint8, size x size. The whole image is scaled to the square without regard to its aspect
ratio, because the released NIH images were made that way: a study of any detector then looks like its own NIH copy
would. The same image gives the same square whether it comes as PNG or as DICOM.
"""

import io
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from cxr_ray.errors import CxrRayError
from cxr_ray.grey_png import decode_grey_png

# The largest flat-panel detectors deliver about 18 megapixels; what is far beyond is a mistake or an attack.
MAX_MEGAPIXELS = 64
# A film that was scanned or saved in colour deviates by a few grey levels; a screenshot by far more.
MAX_MEAN_COLOUR = 8.0

PIXEL_RECIPE = {
    "version": 2,
    "grey": "ITU-R 601 luma",
    "range": "VOI LUT, else window, else 0..255 of 8 bit, else minimum..maximum",
    "photometric": "air dark (MONOCHROME1 inverted)",
    "geometry": "whole image to a square; area average when shrinking, bilinear when enlarging",
}


class ImageError(CxrRayError):
    """An image cannot be used; the subclasses say why."""


def reason(error: ImageError, name: str) -> str:
    """What is wrong and what to do, without the name that the error was raised with."""
    return str(error).removeprefix(f"{name}: ")


class UnsupportedImage(ImageError):
    """The bytes are of no type that is read here."""


class DamagedImage(ImageError):
    """The type is known, but the content is truncated or broken."""


class OversizedImage(ImageError):
    """The image has more than `MAX_MEGAPIXELS` megapixels."""


class UnusableImage(ImageError):
    """The image is readable, but is no frontal chest radiograph."""


@dataclass(frozen=True)
class Greyscale:
    """Decoded pixels with air dark.

    Attributes
    ----------
    values
        Numbers of any type, shape (height, width).
    black, white
        The values shown as black and as white; what lies beyond is clipped.
    """

    values: np.ndarray
    black: float
    white: float


def check_megapixels(name: str, height: int, width: int) -> None:
    """Refuse an image before its pixels are decoded.

    Raises
    ------
    OversizedImage
        If height x width exceeds `MAX_MEGAPIXELS`.
    """
    megapixels = height * width / 1e6
    if megapixels > MAX_MEGAPIXELS:
        raise OversizedImage(
            f"{name}: {width}x{height} is {megapixels:.0f} megapixels; send at most {MAX_MEGAPIXELS} megapixels"
        )


def full_range(values: np.ndarray) -> Greyscale:
    """Choose black and white where a file states no window: 0..255 for 8 bit, else the extremes of the image."""
    if values.dtype == np.uint8:
        return Greyscale(values, 0.0, 255.0)
    return Greyscale(values, float(values.min()), float(values.max()))


def colour_to_grey(name: str, colour_HWC: np.ndarray) -> np.ndarray:
    """Luma (uint8, shape (height, width)) of an 8-bit RGB image whose three channels agree.

    Raises
    ------
    UnusableImage
        If the image is truly coloured, as a screenshot or a photograph is.
    """
    channels = colour_HWC.astype(np.int16)
    colour = float(np.mean(channels.max(axis=-1) - channels.min(axis=-1)))
    if colour > MAX_MEAN_COLOUR:
        raise UnusableImage(f"{name}: a colour picture (channels differ by {colour:.0f} on average); send a radiograph")
    return np.asarray(Image.fromarray(np.ascontiguousarray(colour_HWC, dtype=np.uint8)).convert("L"))


def decode_picture(data: bytes, name: str) -> Greyscale:
    """Decode a PNG (grey of 1 to 16 bits, palette, RGB or RGBA) or a JPEG.

    Parameters
    ----------
    data
        The file's bytes.
    name
        What the errors call the file.

    Raises
    ------
    UnsupportedImage, DamagedImage, OversizedImage, UnusableImage
        If the bytes are no PNG or JPEG, are truncated, too large, or a coloured picture.
    """
    grey = decode_grey_png(data, MAX_MEGAPIXELS * 10**6)
    if grey is not None:
        return full_range(grey)
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    except UnidentifiedImageError:
        raise UnsupportedImage(f"{name}: neither PNG, JPEG nor DICOM ({len(data)} bytes); convert it to one") from None
    except Image.DecompressionBombError as error:
        raise OversizedImage(f"{name}: {_first_line(error).rstrip('.')}; send at most {MAX_MEGAPIXELS} megapixels") from None
    except Exception as error:  # noqa: BLE001 - a hostile file makes the parser raise nearly anything
        raise DamagedImage(f"{name}: damaged header ({_first_line(error)}); send the file again") from None
    check_megapixels(name, picture.height, picture.width)
    try:
        picture.load()
        frames = getattr(picture, "n_frames", 1)
    except Exception as error:  # noqa: BLE001 - as above
        raise DamagedImage(f"{name}: damaged or truncated ({_first_line(error)}); send the file again") from None
    if frames > 1:
        raise UnusableImage(f"{name}: {frames} frames; send one image a file")
    if picture.mode in ("L", "I;16", "I;16B", "I"):
        return full_range(np.asarray(picture))
    if picture.mode == "1":
        return full_range(np.asarray(picture.convert("L")))
    return full_range(colour_to_grey(name, np.asarray(picture.convert("RGB"))))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def stored_square(grey: Greyscale, size: int, name: str = "image") -> np.ndarray:
    """The stored form of a radiograph: uint8, shape (size, size), air dark.

    Raises
    ------
    UnusableImage
        If the image shows a single value only.
    """
    return _drawn(grey, size, size, name)


def film(grey: Greyscale, longest: int, name: str = "image") -> np.ndarray:
    """A radiograph as people look at it: uint8, shape (height, width), air dark, its longer edge at most `longest` pixels.

    Raises
    ------
    UnusableImage
        If the image shows a single value only.
    """
    height, width = grey.values.shape
    shrink = min(1.0, longest / max(height, width))
    return _drawn(grey, max(1, round(width * shrink)), max(1, round(height * shrink)), name)


def _drawn(grey: Greyscale, width: int, height: int, name: str) -> np.ndarray:
    values = grey.values
    least, most = values.min(), values.max()
    if grey.white <= grey.black or least == most:
        raise UnusableImage(f"{name}: every pixel has the value {values.flat[0]}; send an exposed radiograph")
    shown, white = _clipped(grey, least, most)
    shrinking = values.shape[0] >= height and values.shape[1] >= width
    drawn = cv2.resize(shown, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    if drawn.dtype != np.uint8:
        scaled = drawn.astype(np.float32) * np.float32(255 / white)
        drawn = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    if drawn.min() == drawn.max():
        span = f"{grey.black:g} to {grey.white:g}"
        raise UnusableImage(f"{name}: showing {span} leaves a single grey ({drawn.flat[0]}); correct its window")
    return drawn


def _clipped(grey: Greyscale, least: float, most: float) -> tuple[np.ndarray, float]:
    """What lies between black and white, and the value that is white; black is 0.

    Whole numbers stay whole, which OpenCV averages at half the cost; spread over 16 bits, their rounding is no part of a grey.
    """
    values, black, white = grey.values, float(grey.black), float(grey.white)
    if values.dtype == np.uint8 and (black, white) == (0.0, 255.0):
        return values, 255.0
    width = white - black
    if values.dtype in (np.uint16, np.int16) and width < 2**16 and width.is_integer() and _fits(values.dtype, black, white):
        # A difference of 16 bits is right whatever wraps round.
        start = np.uint16(int(black) % 2**16)
        if black <= least and most <= white:
            cells = values.view(np.uint16) - start
        else:
            cells = np.clip(values, int(black), int(white)).view(np.uint16)
            cells -= start
        spare = 16 - int(width).bit_length()
        return np.left_shift(cells, spare, out=cells), float(int(width) << spare)
    scaled = (values.astype(np.float32) - np.float32(black)) * np.float32(255 / width)
    return np.clip(scaled, 0, 255, out=scaled), 255.0


def _fits(dtype: np.dtype, black: float, white: float) -> bool:
    limits = np.iinfo(dtype)
    return black.is_integer() and limits.min <= black and white <= limits.max
