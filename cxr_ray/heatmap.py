"""Heatmaps: where in the image a finding's score comes from.

`explain` reads it off the network's own maps (`cxr_ray.gradcam`) in one pass forward and a part of one back. Occlusion asks the
network from outside (Zeiler & Fergus 2014): a part of the film is blurred until nothing can be told from it, and the fall of
the finding's logit is what that part contributed. It takes 257 passes, works for every engine, and is the check of the former.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch

from cxr_ray import clinical, vision
from cxr_ray.bundle import Bundle
from cxr_ray.clinical import ClinicalInputs
from cxr_ray.engines import Engine
from cxr_ray.findings import FINDINGS
from cxr_ray.gradcam import class_maps

# A patch is a sixth of the image wide; its centres stand sixteen to an edge.
_PATCHES_AN_EDGE = 6
_CENTRES_AN_EDGE = 16
_IMAGES_AT_ONCE = 64
# Gradients keep what a forward pass forgets, so that a batch costs several times the memory of a prediction.
_MAPS_AT_ONCE = 16
_OPACITY = 0.65


def explain(bundle: Bundle, pixels: np.ndarray, inputs: ClinicalInputs, finding: int) -> np.ndarray:
    """`explain_all` of one image: pixels uint8, shape (size, size); float32, shape (size, size)."""
    return explain_all(bundle, pixels[None], inputs, [finding])[0]


def explain_all(bundle: Bundle, pixels: np.ndarray, inputs: ClinicalInputs, findings: Sequence[int] | np.ndarray) -> np.ndarray:
    """How much each place of an image adds to the logit of its finding, read off the bundle's network.

    The method is the network's: class activation maps for `wang2017`, Grad-CAM for the others and for images so small that
    such maps are coarser than 7 x 7 (see `cxr_ray.gradcam`). Computed in float32, wherever the network is; an engine of the
    same bundle may run in another thread.

    Parameters
    ----------
    bundle
        Of a network that reads images.
    pixels
        Stored squares, uint8, shape (N, size, size); the same image may come again for another finding.
    inputs
        Their clinical values.
    findings
        The finding asked of each image, as its position in NIH order; N of them.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, size, size), interpolated linearly between the cells; what is negative speaks against the finding.
        In logits: of a class activation map, the logit that a film would have that is everywhere as it is there, without the
        bias and what clinical numbers add; of Grad-CAM, to first order, what the cell there adds to the logit.

    Raises
    ------
    CxrRayError
        If the network reads no image, or the images are too small for maps of 7 x 7.
    ValueError
        If the shapes do not fit, or a finding is none of the fourteen.
    """
    asked = _asked(pixels, bundle.require_images(), inputs, findings)
    encoded = clinical.encode(inputs, bundle.statistics, bundle.layout)
    heat = np.empty(pixels.shape, dtype=np.float32)
    for first in range(0, len(pixels), _MAPS_AT_ONCE):
        part = slice(first, first + _MAPS_AT_ONCE)
        maps = _class_maps(bundle, pixels[part], encoded[part], asked[part])
        heat[part] = [cv2.resize(coarse, pixels.shape[:0:-1], interpolation=cv2.INTER_LINEAR) for coarse in maps]
    return heat


# A caller may be in inference mode, where nothing has a gradient.
@torch.inference_mode(mode=False)
def _class_maps(bundle: Bundle, pixels: np.ndarray, encoded: np.ndarray, asked: np.ndarray) -> np.ndarray:
    network = bundle.model.eval()
    device = next(network.parameters()).device
    # A new array: what comes from Arrow is read-only, which torch does not know.
    images = vision.as_input(torch.from_numpy(np.array(pixels)).to(device), bundle.input_size)
    given = (torch.from_numpy(values).to(device) for values in (encoded, asked))
    return class_maps(network, images, *given).cpu().numpy()


def _asked(pixels: np.ndarray, size: int, inputs: ClinicalInputs, findings: Sequence[int] | np.ndarray) -> np.ndarray:
    """The findings as int64, shape (N,), once everything fits."""
    asked = np.asarray(findings, dtype=np.int64)
    if pixels.ndim != 3 or pixels.shape[1:] != (size, size):
        raise ValueError(f"pixels have shape {pixels.shape}; the bundle needs (N, {size}, {size})")
    if asked.shape != (len(pixels),) or len(inputs) != len(pixels):
        raise ValueError(
            f"{len(pixels)} images, {len(inputs)} clinical inputs, findings of shape {asked.shape}; give N of each"
        )
    if asked.size and not (asked.min() >= 0 and asked.max() < len(FINDINGS)):
        raise ValueError(f"findings are {asked.min()} to {asked.max()}; give positions in NIH order, 0 to {len(FINDINGS) - 1}")
    return asked


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
        uint8, shape (height, width): the stored square, or the film with its own proportions.
    contribution
        float32, of any square shape, as `explain` and `occlusion` return it; what is negative stays grey.

    Returns
    -------
    numpy.ndarray
        RGB, uint8, shape (height, width, 3).
    """
    warm, opacity = _warm(contribution, pixels.shape)
    grey = np.repeat(pixels[:, :, None], 3, axis=2).astype(np.float32)
    return np.clip(grey * (1 - opacity) + warm * opacity, 0, 255).astype(np.uint8)


def warm_layer(contribution: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """What `overlay` lays over a radiograph of this shape (height, width): RGBA, uint8, shape (height, width, 4)."""
    warm, opacity = _warm(contribution, shape)
    return np.concatenate([warm, np.rint(opacity * 255).astype(np.uint8)], axis=2)


def _warm(contribution: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Colours, RGB, uint8, and their opacity, 0 to 1, of one channel."""
    height, width = shape
    smooth = cv2.resize(np.clip(contribution, 0, None), (width, height), interpolation=cv2.INTER_CUBIC)
    share = np.clip(smooth / smooth.max(), 0, 1) if smooth.max() > 0 else np.zeros_like(smooth)
    warm = cv2.cvtColor(cv2.applyColorMap((share * 255).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return warm, _OPACITY * share[:, :, None]
