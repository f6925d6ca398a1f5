"""Random changes to training images, and the fixed ones that test-time augmentation averages over.

Every image of a batch gets changes of its own, all on the device that trains: one affine resampling of the single grey channel,
then what concerns brightness. Random numbers come from a CPU generator, as many for every batch of the same shape, and
reach the device in copies that nobody waits for; so a seed means the same films on every device.

All kinds mirror half of the images, as the published systems do. A mirrored chest has its heart on the wrong side; none of
the fourteen findings depends on that.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional as F

from cxr_ray.train_settings import Augmentation, Views
from cxr_ray.vision import IMAGENET_MEAN, IMAGENET_STD

# What a black pixel is to a network.
BLACK = -IMAGENET_MEAN / IMAGENET_STD
# Share of the films that lose a rectangle to "strong", and the rectangle's shortest and longest edge in film widths.
ERASED_SHARE = 0.25
_ERASED_EDGE = (0.08, 0.30)
# CheXNet's ten-crop: 224 pixels of a film scaled to 256.
_CROP = 7 / 8


def augment(images: torch.Tensor, kind: Augmentation, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Change each image of a batch at random.

    - "flip": mirrors half of them.
    - "mild": mirror, turn (5 degrees), shift (4 %), scale (5 %) and contrast (10 %).
    - "crop": mirror, turn (7 degrees) and a crop of 8 to 100 % of the area with an aspect ratio of 3:4 to 4:3, resized to the
      whole (Baltruschat et al. 2019; Szegedy et al. 2015).
    - "strong": mirror, turn (10 degrees), shift (8 %), scale (15 %), tone curve (a power of 0.71 to 1.4), contrast (20 %),
      brightness (10 % of the range), noise (a deviation of up to 2 % of the range), and a rectangle of mean grey over a
      quarter of the images.

    What a turned, shifted or smaller film leaves free is black, as beside a collimated field; in "mild" the film's outermost
    pixels go on.

    Parameters
    ----------
    images
        What `vision.as_input` makes: float32, shape (N, 3, H, H), the same grey in all channels. Images of no pixels, for
        networks that read none, are given back as they are.
    strength
        Multiplies every range and the share of images with a rectangle, not that of mirrored ones; 0 changes nothing. Crops
        are no smaller and no narrower above 1.
    generator
        A CPU generator.

    Returns
    -------
    torch.Tensor
        float32, shape (N, 3, H, H), channels last.
    """
    if strength == 0 or images.numel() == 0:
        return images
    grey = _KINDS[kind](images[:, :1], strength, generator)
    return grey.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def views(images: torch.Tensor, kind: Views) -> list[torch.Tensor]:
    """The views of a batch whose probabilities test-time augmentation averages.

    - "none": the images.
    - "flip": the images and their mirror images.
    - "ten-crop": four corners and the centre, of 7/8 of the edge, then the mirror image of each. Reruns of CheXNet cut 224
      pixels out of 256 so. Crops are not scaled back: anatomy stays as large as in training, and no view is resampled; the
      network must be able to read 7/8 of its edge.

    Parameters
    ----------
    images
        float32, shape (N, 3, H, W). Images of no pixels have one view.

    Returns
    -------
    list of torch.Tensor
        1, 2 or 10 batches, channels last, of shape (N, 3, H, W), or (N, 3, 7H/8, 7W/8) rounded for "ten-crop".
    """
    if kind == "none" or images.numel() == 0:
        return [images]
    upright = [images] if kind == "flip" else _five_crops(images)
    both = [*upright, *(view.flip(3) for view in upright)]
    return [view.contiguous(memory_format=torch.channels_last) for view in both]


def _five_crops(images: torch.Tensor) -> list[torch.Tensor]:
    height, width = images.shape[2:]
    rows, columns = round(height * _CROP), round(width * _CROP)
    down, right = height - rows, width - columns
    corners = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
    return [images[:, :, top : top + rows, left : left + columns] for top, left in corners]


def _flip(grey: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    del strength
    mirrored = _on_device_of(grey, torch.rand(len(grey), 1, 1, 1, generator=generator) < 0.5)
    return torch.where(mirrored, grey.flip(3), grey)


def _mild(grey: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    angle, scale, mirror, shift_x, shift_y, contrast = torch.rand(6, len(grey), generator=generator)
    edge = 1 + _around_zero(scale, 0.05, strength)
    shift = _around_zero(shift_x, 0.08, strength), _around_zero(shift_y, 0.08, strength)
    rows = _affine(_around_zero(angle, math.radians(5), strength), (edge, edge), _mirror(mirror), shift)
    constants = _on_device_of(grey, torch.cat([rows, 1 + _around_zero(contrast, 0.10, strength)[:, None]], dim=1))
    return _resample(grey, constants[:, :6], "border") * constants[:, 6, None, None, None]


def _crop(grey: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    area, aspect, across, down, angle, mirror = torch.rand(6, len(grey), generator=generator)
    smallest = max(1 - 0.92 * strength, 0.08)
    log_area = (smallest + (1 - smallest) * area).log()
    # Inception draws again where a crop does not fit into the film; drawing among the fitting ratios takes one draw.
    widest = (-log_area).clamp(max=math.log(4 / 3) * min(strength, 1.0))
    log_aspect = (2 * aspect - 1) * widest
    width, height = ((log_area + log_aspect) / 2).exp(), ((log_area - log_aspect) / 2).exp()
    centre = (2 * across - 1) * (1 - width), (2 * down - 1) * (1 - height)
    rows = _affine(_around_zero(angle, math.radians(7), strength), (width, height), _mirror(mirror), centre)
    return _resample(grey, _on_device_of(grey, rows), "black")


def _strong(grey: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    angle, scale, mirror, shift_x, shift_y, power, contrast, brightness, noise = torch.rand(9, len(grey), generator=generator)
    edge = 1 + _around_zero(scale, 0.15, strength)
    shift = _around_zero(shift_x, 0.16, strength), _around_zero(shift_y, 0.16, strength)
    rows = _affine(_around_zero(angle, math.radians(10), strength), (edge, edge), _mirror(mirror), shift)
    tone = [
        _around_zero(power, math.log(1.4), strength).exp(),
        1 + _around_zero(contrast, 0.20, strength),
        _around_zero(brightness, 0.10, strength),
        0.02 * strength * noise,
    ]
    constants = _on_device_of(grey, torch.cat([rows, torch.stack(tone, dim=1)], dim=1))
    moved = _resample(grey, constants[:, :6], "black")
    power, contrast, brightness, deviation = constants[:, 6:, None, None, None].unbind(1)
    levels = (moved * IMAGENET_STD + IMAGENET_MEAN).clamp(0, 1) ** power
    levels = (levels - 0.5) * contrast + 0.5 + brightness + deviation * _noise(grey, generator)
    return _erase((levels.clamp(0, 1) - IMAGENET_MEAN) / IMAGENET_STD, strength, generator)


def _noise(grey: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal noise in the shape of the batch: one field, which each image sees shifted around by an offset of its own.

    A field for each image would take the CPU longer to draw than the GPU takes for the whole step.
    """
    count, _, height, width = grey.shape
    field = _on_device_of(grey, torch.randn(height, width, generator=generator))
    offsets = _on_device_of(grey, torch.randint(0, height * width, (2, count, 1), generator=generator))
    rows = (offsets[0] + torch.arange(height, device=grey.device)) % height
    columns = (offsets[1] + torch.arange(width, device=grey.device)) % width
    return field[rows[:, :, None], columns[:, None, :]][:, None]


def _erase(grey: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """A rectangle of mean grey over some of the images (Zhong et al. 2020)."""
    chance, across, down, width, height = torch.rand(5, len(grey), generator=generator)
    shortest, longest = _ERASED_EDGE
    width, height = (shortest + (longest - shortest) * draw for draw in (width, height))
    left, top = across * (1 - width), down * (1 - height)
    # Nothing lies between equal edges.
    right, bottom = (start + edge * (chance < ERASED_SHARE * strength) for start, edge in ((left, width), (top, height)))
    box = _on_device_of(grey, torch.stack([left, right, top, bottom]))
    left, right, top, bottom = box[:, :, None]
    x, y = ((torch.arange(edge, device=grey.device) + 0.5) / edge for edge in (grey.shape[3], grey.shape[2]))
    columns, rows = (x >= left) & (x < right), (y >= top) & (y < bottom)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], 0.0, grey)


_KINDS: dict[Augmentation, Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]] = {
    "flip": _flip,
    "mild": _mild,
    "crop": _crop,
    "strong": _strong,
}


def _around_zero(draw: torch.Tensor, limit: float, strength: float) -> torch.Tensor:
    """Draws from [0, 1) to ``[-limit, limit) * strength``."""
    return (draw * 2 - 1) * limit * strength


def _mirror(draw: torch.Tensor) -> torch.Tensor:
    """Draws from [0, 1) to -1 for half of them and 1."""
    return 1 - 2 * (draw < 0.5).float()


def _affine(
    angle: torch.Tensor,
    edges: tuple[torch.Tensor, torch.Tensor],
    mirror: torch.Tensor,
    shift: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Where each image of a batch is sampled: a rectangle of the film, mirrored, turned about its centre and shifted.

    Edges are in film widths, shifts in half film widths; all are of shape (N,). The result is `F.affine_grid`'s matrix, row by
    row, of shape (N, 6).
    """
    width, height = edges
    x, y = shift
    rows = [
        *(mirror * width * angle.cos(), -height * angle.sin(), x),
        *(mirror * width * angle.sin(), height * angle.cos(), y),
    ]
    return torch.stack(rows, dim=1)


def _resample(grey: torch.Tensor, rows: torch.Tensor, beyond: Literal["border", "black"]) -> torch.Tensor:
    """The batch sampled bilinearly where `_affine` says; beyond the film its outermost pixels go on, or it is black."""
    grid = F.affine_grid(rows.reshape(-1, 2, 3), list(grey.shape), align_corners=False)
    if beyond == "border":
        return F.grid_sample(grey, grid, padding_mode="border", align_corners=False)
    return F.grid_sample(grey - BLACK, grid, padding_mode="zeros", align_corners=False) + BLACK


def _on_device_of(grey: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    # A blocking copy would wait for all work that the GPU still has.
    return drawn.to(grey.device, non_blocking=True)
