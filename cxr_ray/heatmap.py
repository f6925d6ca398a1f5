"""Heatmaps: where in the image a finding's score comes from.

Occlusion asks the network itself (Zeiler & Fergus 2014): a part of the film is blurred until nothing can be told from it, and
the fall of the finding's logit is what that part contributed. It works for every network and every resolution; maps of the
last layer would be two by two at 64 pixels.
"""

import cv2
import numpy as np

from cxr_ray.clinical import ClinicalInputs
from cxr_ray.engines import Engine

# A patch is a sixth of the image wide; its centres stand sixteen to an edge.
_PATCHES_AN_EDGE = 6
_CENTRES_AN_EDGE = 16
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
        float32, shape (size, size), in logit units: the fall of the logit when the patch centred there is blurred, interpolated
        between 16 x 16 centres.
    """
    size = pixels.shape[0]
    places = _patches(size)
    blurred = cv2.GaussianBlur(pixels, (0, 0), sigmaX=size / _PATCHES_AN_EDGE)
    covered = np.repeat(pixels[None], len(places), axis=0)
    for image, place in zip(covered, places, strict=True):
        image[place] = blurred[place]
    whole = _logit(engine.predict(pixels[None], inputs)[0, finding])
    logits = []
    for first in range(0, len(places), _IMAGES_AT_ONCE):
        part = covered[first : first + _IMAGES_AT_ONCE]
        logits.append(_logit(engine.predict(part, inputs.repeated(len(part)))[:, finding]))
    fall = (whole - np.concatenate(logits)).astype(np.float32).reshape(_CENTRES_AN_EDGE, _CENTRES_AN_EDGE)
    return cv2.resize(fall, (size, size), interpolation=cv2.INTER_CUBIC)


def _patches(size: int) -> list[tuple[slice, slice]]:
    """Squares around evenly spaced centres, row by row, cut off at the border."""
    reach = max(1.0, size / _PATCHES_AN_EDGE / 2)
    centres = (np.arange(_CENTRES_AN_EDGE) + 0.5) * size / _CENTRES_AN_EDGE
    spans = [slice(max(round(centre - reach), 0), min(round(centre + reach), size)) for centre in centres]
    return [(row, column) for row in spans for column in spans]


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
