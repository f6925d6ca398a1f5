"""Heatmaps: where in the image a finding's score comes from.

Occlusion asks the network itself (Zeiler & Fergus 2014): a part of the film is blurred until nothing can be told from it, and
the fall of the finding's logit is what that part contributed. It works for every network and every resolution; maps of the
last layer would be two by two at 64 pixels.
"""

import cv2
import numpy as np

from cxr_ray.clinical import ClinicalInputs
from cxr_ray.engines import Engine

_PATCHES_AN_EDGE = 8
_STEPS_A_PATCH = 2
_IMAGES_AT_ONCE = 64


def occlusion(engine: Engine, pixels: np.ndarray, inputs: ClinicalInputs, finding: int) -> np.ndarray:
    """How much each place of an image adds to a finding's logit, the clinical inputs held fixed.

    Parameters
    ----------
    pixels
        One stored square, uint8, shape (size, size).
    inputs
        The clinical values of that image (N = 1).
    finding
        Position in NIH order.

    Returns
    -------
    numpy.ndarray
        float32, shape (size, size), in logit units: the mean fall of the logit over the patches that cover a pixel, each an
        eighth of the image wide.
    """
    size = pixels.shape[0]
    patch = max(2, size // _PATCHES_AN_EDGE)
    stride = max(1, patch // _STEPS_A_PATCH)
    starts = range(-patch // 2, size - patch // 2, stride)
    places = [_window(row, column, patch, size) for row in starts for column in starts]
    blurred = cv2.GaussianBlur(pixels, (0, 0), sigmaX=patch)
    covered = np.repeat(pixels[None], len(places), axis=0)
    for image, place in zip(covered, places, strict=True):
        image[place] = blurred[place]
    whole = _logit(engine.predict(pixels[None], inputs)[0, finding])
    fall, times = np.zeros((2, size, size), dtype=np.float32)
    for first in range(0, len(places), _IMAGES_AT_ONCE):
        part = covered[first : first + _IMAGES_AT_ONCE]
        repeated = ClinicalInputs(*(np.repeat(values, len(part), axis=0) for values in vars(inputs).values()))
        logits = _logit(engine.predict(part, repeated)[:, finding])
        for place, logit in zip(places[first:], logits, strict=False):
            fall[place] += whole - logit
            times[place] += 1
    return fall / np.maximum(times, 1)


def _window(row: int, column: int, patch: int, size: int) -> tuple[slice, slice]:
    return (
        slice(max(row, 0), min(row + patch, size)),
        slice(max(column, 0), min(column + patch, size)),
    )


def _logit(probability: np.ndarray) -> np.ndarray:
    safe = np.clip(probability, 1e-6, 1 - 1e-6)
    return np.log(safe / (1 - safe))


def overlay(pixels: np.ndarray, contribution: np.ndarray) -> np.ndarray:
    """A radiograph with what speaks for the finding in colour.

    Parameters
    ----------
    pixels
        uint8, shape (size, size).
    contribution
        float32, of any square shape, as `occlusion` returns it; what is negative stays grey.

    Returns
    -------
    numpy.ndarray
        RGB, uint8, shape (size, size, 3).
    """
    size = pixels.shape[0]
    smooth = cv2.resize(np.clip(contribution, 0, None), (size, size), interpolation=cv2.INTER_CUBIC)
    share = np.clip(smooth / smooth.max(), 0, 1) if smooth.max() > 0 else np.zeros_like(smooth)
    warm = cv2.cvtColor(cv2.applyColorMap((share * 255).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    grey = np.repeat(pixels[:, :, None], 3, axis=2).astype(np.float32)
    opacity = 0.65 * share[:, :, None]
    return np.clip(grey * (1 - opacity) + warm * opacity, 0, 255).astype(np.uint8)
