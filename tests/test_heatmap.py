"""Occlusion on a network whose reason is known: the brightness of one square."""

from dataclasses import replace

import numpy as np
import pytest

from cxr_ray.clinical import ClinicalInputs, ClinicalLayout, ClinicalStatistics, PastVisits, encode
from cxr_ray.heatmap import occlusion, overlay, warm_layer

SIZE = 64
SQUARE = (slice(12, 24), slice(36, 48))
FINDING = 5
STATISTICS = ClinicalStatistics(48.0, 16.5, 0.56, 0.4, (0.1,) * 14, (0.2,) * 111)


class BrightnessEngine:
    """Probability of one finding: the mean brightness of a square; the others do not look at the image."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign
        self.clinical_rows: list[np.ndarray] = []

    def predict(self, pixels: np.ndarray, inputs: ClinicalInputs) -> np.ndarray:
        assert pixels.dtype == np.uint8
        assert len(inputs) == len(pixels)
        self.clinical_rows.append(encode(inputs, STATISTICS, ClinicalLayout("rich")))
        answer = np.full((len(pixels), 14), 0.3, dtype=np.float32)
        brightness = pixels[:, *SQUARE].mean(axis=(1, 2)) / 255 - 0.5
        answer[:, FINDING] = 1 / (1 + np.exp(-self.sign * 6 * brightness))
        return answer


INPUTS = ClinicalInputs(
    np.array([63.0], dtype=np.float32),
    np.array([1.0], dtype=np.float32),
    np.array([np.nan], dtype=np.float32),
    np.eye(14, dtype=np.float32)[:1],
    replace(PastVisits.unknown(1), count=np.array([2.0], dtype=np.float32)),
)


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    """Dark, with the square and another patch of the same brightness."""
    film = np.full((SIZE, SIZE), 40, dtype=np.uint8)
    film[SQUARE] = 230
    film[44:56, 8:20] = 230
    return film


def test_occlusion_finds_the_square(film):
    heat = occlusion(BrightnessEngine(), film, INPUTS, FINDING)
    assert heat.shape == (SIZE, SIZE)
    assert heat.dtype == np.float32
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert SQUARE[0].start <= row < SQUARE[0].stop
    assert SQUARE[1].start <= column < SQUARE[1].stop
    # A quarter of the film away nothing changes, the other bright patch included.
    reach = SIZE // 4
    near = np.zeros_like(film, dtype=bool)
    rows, columns = (slice(max(side.start - reach, 0), side.stop + reach) for side in SQUARE)
    near[rows, columns] = True
    assert not near[44:56, 8:20].any()
    assert np.abs(heat[~near]).max() < 1e-5
    assert heat[SQUARE].mean() > 3 * np.abs(heat).mean() > 0


def test_what_speaks_against_is_negative(film):
    straight = occlusion(BrightnessEngine(), film, INPUTS, FINDING)
    np.testing.assert_allclose(occlusion(BrightnessEngine(-1.0), film, INPUTS, FINDING), -straight, atol=1e-4)


def test_a_finding_that_does_not_look_at_the_image_has_no_heat(film):
    assert np.abs(occlusion(BrightnessEngine(), film, INPUTS, FINDING + 1)).max() == 0


def test_clinical_inputs_are_held_fixed_and_the_film_is_not_changed(film):
    before = film.copy()
    engine = BrightnessEngine()
    occlusion(engine, film, INPUTS, FINDING)
    np.testing.assert_array_equal(film, before)
    rows = np.concatenate(engine.clinical_rows)
    np.testing.assert_array_equal(rows, np.repeat(engine.clinical_rows[0], len(rows), axis=0))


@pytest.mark.parametrize("size", [16, 17, 33])
def test_every_place_is_covered_at_any_size(size):
    class WholeFilm:
        def predict(self, pixels, inputs):
            mean = pixels.std(axis=(1, 2)) / 255
            return np.repeat((1 / (1 + np.exp(-mean)))[:, None], 14, axis=1)

    noise = np.random.default_rng(size).integers(0, 256, (size, size), dtype=np.uint8)
    heat = occlusion(WholeFilm(), noise, INPUTS, 0)
    # Blurring a part of noise lowers its deviation wherever that part is.
    assert heat.shape == (size, size)
    assert (heat > 0).all()


def test_overlay_is_warm_where_something_speaks_for_the_finding(film):
    heat = occlusion(BrightnessEngine(), film, INPUTS, FINDING)
    picture = overlay(film, heat)
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture.dtype == np.uint8
    coloured = np.ptp(picture.astype(int), axis=2)
    assert coloured[SQUARE].mean() > 30
    assert coloured[44:56, 8:20].max() == 0
    # Red before blue: OpenCV's order is the other one.
    assert picture[SQUARE][..., 0].mean() > picture[SQUARE][..., 2].mean()


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (8, 8)])
@pytest.mark.parametrize("value", [-2.0, 0.0])
def test_overlay_without_positive_contribution_is_the_grey_film(film, shape, value):
    picture = overlay(film, np.full(shape, value, dtype=np.float32))
    for channel in range(3):
        np.testing.assert_array_equal(picture[:, :, channel], film)


def test_overlay_scales_a_coarse_map_to_the_film(film):
    coarse = np.zeros((8, 8), dtype=np.float32)
    coarse[1, 5] = 1
    coloured = np.ptp(overlay(film, coarse).astype(int), axis=2)
    row, column = np.unravel_index(coloured.argmax(), coloured.shape)
    assert (row // 8, column // 8) == (1, 5)


def test_the_layer_laid_over_a_film_is_the_overlay():
    generator = np.random.default_rng(0)
    shown = generator.integers(0, 256, (90, 70), np.uint8)
    contribution = generator.normal(size=(16, 16)).astype(np.float32)
    layer = warm_layer(contribution, shown.shape)
    assert (layer.shape, layer.dtype) == ((90, 70, 4), np.uint8)
    opacity = layer[..., 3:] / 255
    laid_over = shown[..., None] * (1 - opacity) + layer[..., :3] * opacity
    assert np.abs(laid_over - overlay(shown, contribution)).max() < 2
