"""The film of a phantom visit: a stylised frontal chest radiograph, drawn from formulas.

The chest is laid out in its own coordinates: `u` runs across it, -1 and 1 at the inner chest wall where it is widest,
negative on the patient's right (the left of the film); `v` runs down the film from 0 to 1. Lungs, heart and diaphragm
are soft-edged shapes in these coordinates; a finding either changes the layout (a wide heart, low diaphragms) or
lays a density over it. Each finding draws from its own random stream: adding one leaves the others where they were.
The anatomy follows from the patient's part of the seed, position and breath vary between visits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np

from cxr_ray.findings import names
from ingest.phantom import VISIT_BITS, PhantomVisit

# Smaller films are averaged down from this size, so that thin lines fade instead of breaking up.
_SMALLEST_DRAWN = 256
# The density of the mildest case of a finding, as a share of the gravest.
_MILDEST = 0.55
_RIGHT, _LEFT = -1, 1


@dataclass(frozen=True)
class _Anatomy:
    """What is drawn before any density: lengths in film widths, `u` and `v` as the file says.

    Pairs are (patient's right, patient's left).
    """

    centre: tuple[float, float]
    tilt: float
    half_width: float
    wall: float
    apex: float
    base: tuple[float, float]
    dome: float
    heart_ratio: float
    heart_height: float
    rib_spacing: float
    rib_phase: float
    breast: float
    bone: float
    lung: float
    contrast: float
    bedside: bool


@dataclass(frozen=True)
class _Chest:
    """The anatomy laid out on a film: float32 arrays of (size, size).

    `t` is ``|u|``; `height` runs from 0 at the apex of the lungs to 1 at their lowest angle; `inside` is the distance
    from the lateral chest wall inwards and `above` that from the diaphragm upwards, in film widths; `lung` and
    `heart` are 1 within and 0 outside; `field` is the lungs with the part behind the heart.
    """

    anatomy: _Anatomy
    u: np.ndarray
    v: np.ndarray
    t: np.ndarray
    height: np.ndarray
    medial: np.ndarray
    inside: np.ndarray
    above: np.ndarray
    field: np.ndarray
    heart: np.ndarray
    lung: np.ndarray


def draw(visit: PhantomVisit, size: int = 256) -> np.ndarray:
    """The film of a visit: air dark, bone bright, the patient's left on the right; equal arguments give equal films.

    Parameters
    ----------
    visit
        Only its `visible` findings are drawn, and its seed, sex, age and view shape the rest.
    size
        Width and height in pixels, at least 16.

    Returns
    -------
    numpy.ndarray
        uint8, shape (size, size).

    Raises
    ------
    ValueError
        If `size` is too small.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, is {size}")
    drawn = max(size, _SMALLEST_DRAWN)
    streams = {name: np.random.default_rng([visit.seed, *name.encode()]) for name in names(visit.visible)}

    anatomy = _anatomy(visit)
    for name, reshape in _RESHAPES.items():
        if name in streams:
            anatomy = reshape(anatomy, streams[name])
    chest = _lay_out(anatomy, drawn)
    rng = np.random.default_rng([visit.seed])
    film = _healthy_film(chest, np.random.default_rng([visit.seed >> VISIT_BITS, 1]))
    for name, overlay in _OVERLAYS.items():
        if name in streams:
            severity = streams[name].uniform(_MILDEST, 1.0)
            film = _cover(film, overlay(chest, film, streams[name]), severity)
    film = _expose(film, anatomy.contrast, rng)
    return film if drawn == size else cv2.resize(film, (size, size), interpolation=cv2.INTER_AREA)


def _anatomy(visit: PhantomVisit) -> _Anatomy:
    patient = np.random.default_rng([visit.seed >> VISIT_BITS, 0])
    habitus, build, heart, ribs, breast, phase, apex, liver = patient.random(8).tolist()
    turn, shift = patient.normal(0.0, (0.012, 0.012)).tolist()
    now = np.random.default_rng([visit.seed, 0])
    across, down, lean, breath, exposure = now.uniform(-1.0, 1.0, 5).tolist()
    bedside = visit.view == "AP"
    base = 0.715 + 0.012 * breath - (0.025 if bedside else 0.0)
    return _Anatomy(
        centre=(0.5 + shift + 0.008 * across, 0.008 * down),
        tilt=turn + 0.015 * lean,
        half_width=0.355 + 0.04 * build,
        wall=1.10 + 0.14 * habitus,
        apex=0.125 + 0.03 * apex,
        base=(base - 0.012 - 0.015 * liver, base + 0.01),
        dome=0.10,
        heart_ratio=(0.395 + 0.04 * heart + 0.0003 * (visit.age_years - 50)) * (1.06 if bedside else 1.0),
        heart_height=0.145 + 0.015 * heart,
        rib_spacing=0.072 + 0.012 * ribs,
        rib_phase=phase,
        breast=(0.05 + 0.05 * breast) if visit.sex == "F" else 0.0,
        bone=1.15 - 0.005 * (visit.age_years - 20),
        lung=0.19 + 0.03 * habitus + (0.03 if bedside else 0.0),
        contrast=(0.93 if bedside else 1.0) + 0.04 * exposure,
        bedside=bedside,
    )


def _wide_heart(anatomy: _Anatomy, rng: np.random.Generator) -> _Anatomy:
    return replace(anatomy, heart_ratio=rng.uniform(0.58, 0.68), heart_height=anatomy.heart_height + 0.03)


def _hyperinflated(anatomy: _Anatomy, rng: np.random.Generator) -> _Anatomy:
    low = rng.uniform(0.07, 0.09)
    return replace(
        anatomy,
        base=(anatomy.base[0] + low, anatomy.base[1] + low),
        dome=0.02,
        heart_ratio=anatomy.heart_ratio * 0.85,
        lung=anatomy.lung - 0.09,
        rib_spacing=anatomy.rib_spacing * 1.12,
    )


def _volume_loss(anatomy: _Anatomy, rng: np.random.Generator) -> _Anatomy:
    raised = rng.uniform(0.075, 0.10)
    right, left = anatomy.base
    return replace(anatomy, base=(right - raised, left) if _side(rng) == _RIGHT else (right, left - raised))


def _lay_out(anatomy: _Anatomy, size: int) -> _Chest:
    x, y = _grid(size)
    across, down = x - anatomy.centre[0], y - (0.5 + anatomy.centre[1])
    cos, sin = math.cos(anatomy.tilt), math.sin(anatomy.tilt)
    u = (across * cos + down * sin) / anatomy.half_width
    v = down * cos - across * sin + 0.5
    t = np.abs(u)

    height = (v - anatomy.apex) / (0.83 - anatomy.apex)
    below_apex = np.clip(height, 0.0, 1.0)
    lateral = 0.42 + 0.58 * np.sqrt(1 - (1 - below_apex) ** 2)
    medial = 0.19 + 0.23 * np.exp(below_apex * -12)
    inside = (lateral - t) * anatomy.half_width
    above = np.where(u < 0, *map(np.float32, anatomy.base)) + anatomy.dome * ((t - 0.45) * 2) ** 2 - v
    field = _edge(inside, 0.012) * _edge(above, 0.014) * _edge(height, 0.02)

    width = anatomy.heart_ratio
    middle = 0.36 * width
    fall = (v - 0.655 - 0.10 * (u - middle)) / anatomy.heart_height
    heart = _edge(1 - ((u - middle - 0.04 * fall) / width) ** 2 - fall**2, 0.12)
    chest = _Chest(anatomy, u, v, t, height, medial, inside, above, field, heart, field)
    aorta, trunk = _blob(chest, 0.17, 0.335, 0.038, 0.03), _blob(chest, 0.18, 0.43, 0.048, 0.05)
    between = np.maximum(np.maximum(heart, _edge(medial - t, 0.03)), np.maximum(aorta, trunk))
    return replace(chest, lung=field * (1 - between))


def _healthy_film(chest: _Chest, rng: np.random.Generator) -> np.ndarray:
    anatomy, v, t = chest.anatomy, chest.v, chest.t
    shoulder = 0.17 * np.clip((t - 0.25) / 0.95, 0.0, 2.0) ** 1.6 - 0.02
    wall = anatomy.wall + 0.22 * np.exp(-((v / 0.26) ** 2))
    body = _edge((wall - t) * anatomy.half_width, 0.012) * _edge(v - shoulder, 0.014)
    depth = np.sqrt(np.clip(1 - (t / (anatomy.wall + 0.12)) ** 2, 0.0, 1.0))
    belly = _edge(-chest.above, 0.03) * _edge(v - 0.5, 0.2)
    middle = np.maximum(chest.heart, _edge(chest.medial - t, 0.06)) * (1 - belly)
    stomach = _blob(chest, 0.48, anatomy.base[1] + 0.075, 0.035, 0.03) * _edge(-chest.above - 0.015, 0.02)
    tissue = 0.25 + 0.30 * depth + 0.07 * belly + 0.07 * middle - 0.09 * stomach

    lung = anatomy.lung + 0.03 * _clouds(rng, 12, t.shape[0]) + 0.13 * _hila(chest, 0.10) + 0.12 * _vessels(chest, rng)
    if anatomy.breast:
        lung += anatomy.breast * np.exp(-(((t - 0.62) * anatomy.half_width / 0.12) ** 2) - ((v - 0.65) / 0.10) ** 2)
    film = tissue + (lung - tissue) * chest.lung
    film += anatomy.bone * _bones(chest)
    film -= 0.10 * _edge(0.05 - t, 0.03) * _edge(0.40 - v, 0.05)
    return 0.02 + (film - 0.02) * body


def _bones(chest: _Chest) -> np.ndarray:
    anatomy, v, t = chest.anatomy, chest.v, chest.t
    cage = _edge(chest.inside + 0.015, 0.012) * _edge(v - anatomy.apex + 0.03, 0.02)
    cage *= _edge(0.06 + chest.above, 0.12)
    behind = (v - 0.16 * (t - 0.30) ** 2 - 0.05 * t) / anatomy.rib_spacing + anatomy.rib_phase
    front = (v - 0.34 * (1.02 - t)) / (1.25 * anatomy.rib_spacing) + anatomy.rib_phase
    ribs = 0.105 * _band(behind, 0.20) * _edge(t - 0.13, 0.08)
    ribs += 0.055 * _band(front, 0.24) * _edge(t - 0.42, 0.25) * _edge(v - anatomy.apex - 0.10, 0.10)

    collar = anatomy.apex + (0.035 if anatomy.bedside else 0.075) - 0.055 * t + 0.014 * np.sin(5.5 * t)
    clavicle = _edge(0.013 - np.abs(v - collar), 0.008) * _edge(t - 0.10, 0.03) * _edge(1.02 - t, 0.10)
    vertebra = 0.75 + 0.25 * np.cos(2 * np.pi * v / (0.6 * anatomy.rib_spacing))
    spine = _edge(0.105 - t, 0.03) * vertebra
    scapula = _edge(t - 0.86 - 0.45 * (v - 0.25), 0.03) * _edge(0.47 - v, 0.05) * _edge(v - 0.16, 0.05)
    blade = 0.06 if anatomy.bedside else 0.025
    return ribs * cage * (0.4 + 0.6 * chest.lung) + 0.13 * clavicle + 0.12 * spine + blade * scapula


def _vessels(chest: _Chest, rng: np.random.Generator) -> np.ndarray:
    anatomy, size = chest.anatomy, chest.u.shape[0]
    side = np.repeat([_RIGHT, _LEFT], 9)[:, None]
    direction = np.tile(np.linspace(-1.25, 1.35, 9), 2) + rng.normal(0.0, 0.12, 18)
    reach, bend = rng.uniform(0.20, 0.30, (18, 1)), rng.normal(0.0, 0.5, (18, 1))
    steps = np.linspace(0.0, 1.0, 7)
    angle = direction[:, None] + bend * steps
    across = side * (0.24 + reach * steps * np.cos(angle) / anatomy.half_width)
    points = _on_film(anatomy, across, 0.46 + 0.95 * reach * steps * np.sin(angle), size)
    canvas = np.zeros((size, size), np.uint8)
    for part, thick in ((points[:, :4], 0.008), (points[:, 3:], 0.004)):
        cv2.polylines(canvas, list(part), False, 255, max(1, round(thick * size)), cv2.LINE_AA, 4)
    return cv2.GaussianBlur(canvas, (0, 0), 0.003 * size) * np.float32(1 / 255)


def _on_film(anatomy: _Anatomy, u: np.ndarray, v: np.ndarray, size: int) -> np.ndarray:
    """Where points of the chest lie on the film: int32 with (x, y) last, in sixteenths of a pixel."""
    across, down = u * anatomy.half_width, v - 0.5
    cos, sin = math.cos(anatomy.tilt), math.sin(anatomy.tilt)
    x = anatomy.centre[0] + across * cos - down * sin
    y = 0.5 + anatomy.centre[1] + across * sin + down * cos
    return np.rint((np.stack([x, y], axis=-1) * size - 0.5) * 16).astype(np.int32)


def _atelectasis(chest: _Chest, film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # `_volume_loss` has raised the diaphragm on the side of the collapse; otherwise the right one is the higher.
    side = _LEFT if chest.anatomy.base[1] < chest.anatomy.base[0] else _RIGHT
    slope, length = rng.uniform(0.06, 0.12), rng.uniform(0.75, 0.9)
    here = chest.lung * _edge(side * chest.u, 0.02) * _edge(length - chest.t, 0.1)
    lift = chest.anatomy.base[side == _LEFT] - chest.v + slope * (chest.t - 0.4)
    plates = np.maximum(_edge(0.011 - np.abs(lift - 0.085), 0.01), 0.8 * _edge(0.008 - np.abs(lift - 0.045), 0.01))
    wedge = _edge(0.10 - 0.16 * chest.t - chest.above, 0.03)
    return _cover(film, 0.70, 0.8 * here * np.maximum(plates, wedge))


def _effusion(chest: _Chest, film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    depths = rng.uniform(0.10, 0.18, 2).tolist()
    side = 0 if rng.random() < 0.3 else _side(rng)
    for which, depth in zip((_RIGHT, _LEFT), depths, strict=True):
        if side in (0, which):
            rise = depth * (0.55 + 0.9 * chest.t**4)
            fluid = _edge(chest.v - (0.80 - rise), 0.02) * _edge(which * chest.u, 0.02)
            fluid *= _edge(chest.inside, 0.012) * _edge(chest.t - 0.15, 0.10) * _edge(0.02 + chest.above, 0.07)
            film = _cover(film, 0.68, 0.95 * fluid)
    return film


def _infiltration(chest: _Chest, film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side, size = _side(rng), film.shape[0]
    patches = np.clip(_clouds(rng, 13, size) + 0.25, 0.0, 1.4) + 0.4 * np.clip(_clouds(rng, 40, size), 0.0, 2.0)
    return film + 0.20 * chest.lung * _edge(side * chest.u, 0.02) * patches


def _mass(chest: _Chest, film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    u, v = _place(chest, rng, _side(rng), (0.25, 0.70))
    lobed = rng.uniform(0.055, 0.08) + 0.006 * _clouds(rng, 18, film.shape[0])
    ball = _blob(chest, u, v, lobed, 0.018)
    return _cover(film, 0.74, 0.9 * ball * np.maximum(chest.field, 0.25))


def _nodule(chest: _Chest, film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    levels = np.linspace(0.15, 0.82, rng.integers(4, 8)).tolist()
    for upper, lower in pairwise(levels):
        u, v = _place(chest, rng, _side(rng), (upper, lower))
        dot = _blob(chest, u, v, rng.uniform(0.017, 0.024), 0.007)
        film = _cover(film, 0.82, 0.95 * dot)
    return film


def _pneumonia(chest: _Chest, film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    u, v = _place(chest, rng, _side(rng), (0.58, 0.78))
    wide, tall = rng.uniform(0.085, 0.11, 2).tolist()
    away = ((chest.u - u) * chest.anatomy.half_width / wide) ** 2 + ((chest.v - v) / tall) ** 2
    patch = np.exp(-(away**1.5))
    mottle = 1 + 0.15 * _clouds(rng, 24, film.shape[0])
    return _cover(film, 0.73, np.clip(0.95 * patch * mottle, 0.0, 1.0) * chest.lung)


def _pneumothorax(chest: _Chest, film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side, deep = _side(rng), rng.uniform(0.075, 0.12)
    # The rim is thickest at the apex and thins out along the lateral wall.
    rim = deep * (0.35 + 0.65 * np.clip(1 - chest.height, 0.0, 1.0))
    top = np.maximum(chest.v - chest.anatomy.apex, 0.002)
    away = (np.maximum(chest.inside, 0.002) ** -3 + top**-3) ** (-1 / 3)
    gap = rim - away
    here = chest.lung * _edge(side * chest.u - 0.1, 0.02) * _edge(0.80 - chest.height, 0.1)
    film = _cover(film, 0.50, 0.20 * here)
    film = _cover(film, 0.03, 0.80 * here * _edge(gap, 0.008))
    return _cover(film, 0.65, 0.8 * here * _edge(0.0035 - np.abs(gap), 0.005))


def _consolidation(chest: _Chest, film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side, fissure, slope = _side(rng), rng.uniform(0.38, 0.46), rng.uniform(-0.05, 0.05)
    border = chest.height - fissure - slope * chest.t
    lobe = chest.lung * _edge(side * chest.u, 0.02) * _edge(-border, 0.018)
    bronchi = np.exp(-((_clouds(rng, 16, film.shape[0]) / 0.10) ** 2))
    return _cover(film, 0.70, 0.88 * lobe * (1 - 0.15 * bronchi))


def _edema(chest: _Chest, film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    haze = _hila(chest, rng.uniform(0.13, 0.16)) * (1 + 0.2 * _clouds(rng, 20, film.shape[0]))
    return _cover(film, 0.72, np.clip(0.85 * haze, 0.0, 1.0) * chest.lung)


def _fibrosis(chest: _Chest, film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size = film.shape[0]
    net = np.exp(-((_clouds(rng, 32, size) / 0.28) ** 2)) + 0.8 * np.exp(-((_clouds(rng, 56, size) / 0.28) ** 2))
    low = _edge(chest.height - rng.uniform(0.50, 0.58), 0.20)
    return film + 0.30 * np.clip(net, 0.0, 1.2) * low * chest.lung


def _pleural_thickening(chest: _Chest, film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side, thick = 0 if rng.random() < 0.4 else _side(rng), rng.uniform(0.032, 0.05)
    ragged = thick * (1 + 0.18 * _clouds(rng, 14, film.shape[0]))
    rind = _edge(ragged - chest.inside, 0.01) * _edge(chest.height - 0.12, 0.08) * _edge(0.88 - chest.height, 0.08)
    here = rind if side == 0 else rind * _edge(side * chest.u, 0.02)
    return _cover(film, 0.76, 0.9 * here * chest.field)


def _hernia(chest: _Chest, film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    u, radius = rng.uniform(-0.02, 0.16), rng.uniform(0.062, 0.08)
    v = max(chest.anatomy.base) + rng.uniform(-0.06, -0.03)
    pouch = _blob(chest, u, v, radius, 0.012)
    gas = _blob(chest, u, v, radius - 0.009, 0.012)
    film = _cover(film, 0.86, 0.9 * pouch)
    return _cover(film, 0.16, 0.9 * gas * _edge(v - chest.v, 0.006))


# In the order in which they are applied: a wide heart stays wide in a long chest.
_RESHAPES: dict[str, Callable[[_Anatomy, np.random.Generator], _Anatomy]] = {
    "Emphysema": _hyperinflated,
    "Cardiomegaly": _wide_heart,
    "Atelectasis": _volume_loss,
}
# In the order in which they are laid on: air and fluid after what they displace, dense spots last.
_OVERLAYS: dict[str, Callable[[_Chest, np.ndarray, np.random.Generator], np.ndarray]] = {
    "Infiltration": _infiltration,
    "Fibrosis": _fibrosis,
    "Edema": _edema,
    "Pneumonia": _pneumonia,
    "Consolidation": _consolidation,
    "Atelectasis": _atelectasis,
    "Pneumothorax": _pneumothorax,
    "Effusion": _effusion,
    "Pleural_Thickening": _pleural_thickening,
    "Mass": _mass,
    "Nodule": _nodule,
    "Hernia": _hernia,
}


def _expose(film: np.ndarray, contrast: float, rng: np.random.Generator) -> np.ndarray:
    size = film.shape[0]
    grain = rng.standard_normal((_SMALLEST_DRAWN, _SMALLEST_DRAWN), dtype=np.float32)
    if size != _SMALLEST_DRAWN:
        grain = cv2.resize(grain, (size, size), interpolation=cv2.INTER_LINEAR)
        grain += rng.standard_normal((size, size), dtype=np.float32)
    blurred = cv2.GaussianBlur(film, (0, 0), 0.0025 * size)
    exposed = cv2.addWeighted(blurred, contrast, grain, 0.014, 0.02 * (1 - contrast))
    return cv2.convertScaleAbs(np.maximum(exposed, 0.0, out=exposed), alpha=255)


def _side(rng: np.random.Generator) -> int:
    return _RIGHT if rng.random() < 0.5 else _LEFT


def _place(chest: _Chest, rng: np.random.Generator, side: int, heights: tuple[float, float]) -> tuple[float, float]:
    """A point (u, v) within a lung, clear of the heart."""
    anatomy = chest.anatomy
    height = rng.uniform(*heights)
    lateral = 0.42 + 0.58 * math.sqrt(1 - (1 - height) ** 2)
    heart = (1.36 if side == _LEFT else 0.64) * anatomy.heart_ratio if height > 0.55 else 0.0
    medial = max(0.34, heart)
    t = medial + rng.uniform(0.30, 0.75) * (lateral - medial)
    return side * t, anatomy.apex + height * (0.83 - anatomy.apex)


def _hila(chest: _Chest, reach: float) -> np.ndarray:
    across, down = (chest.t - 0.30) * chest.anatomy.half_width, chest.v - 0.47
    return np.exp(-((across / reach) ** 2) - (down / (1.2 * reach)) ** 2)


def _cover(film: np.ndarray, brightness: float | np.ndarray, opacity: float | np.ndarray) -> np.ndarray:
    return film + (brightness - film) * opacity


def _blob(chest: _Chest, u: float, v: float, radius: float | np.ndarray, softness: float) -> np.ndarray:
    away = np.sqrt(((chest.u - u) * chest.anatomy.half_width) ** 2 + (chest.v - v) ** 2)
    return _edge(radius - away, softness)


def _edge(distance: np.ndarray, softness: float) -> np.ndarray:
    """0 outside and 1 inside of a border, with a smooth step of width `softness` where `distance` is 0."""
    step = distance * (1 / softness)
    step += 0.5
    np.minimum(step, 1.0, out=step)
    np.maximum(step, 0.0, out=step)
    slope = step * -2
    slope += 3
    step *= step
    step *= slope
    return step


def _band(phase: np.ndarray, half: float) -> np.ndarray:
    """Bands of half width `half` at whole numbers of `phase`, with the bright rims of cortical bone."""
    away = np.abs(phase - np.rint(phase))
    return _edge(half - away, 0.1) * (0.75 + 0.35 * (away / half) ** 2)


def _clouds(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Smooth noise of about unit variance, with `cells` independent values across the film."""
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    along = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(along, along)
    x.setflags(write=False)
    y.setflags(write=False)
    return x, y
