"""The pointing game: on maps whose maximum is known, beside what knows nothing, and over patients."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_ray.boxes import Box
from cxr_ray.localisation import holds_centre, pointed, pointing_game

CORNER = Box("a.png", "Mass", 0.0, 0.0, 0.25, 0.5)
MIDDLE = Box("b.png", "Cardiomegaly", 0.25, 0.25, 0.5, 0.5)


def peak(row: int, column: int, size: int = 8) -> np.ndarray:
    heat = np.zeros((size, size), dtype=np.float32)
    heat[row, column] = 1
    return heat


@pytest.mark.parametrize(("row", "column", "expected"), [(0, 0, 1), (3, 1, 1), (4, 1, 0), (3, 2, 0), (7, 7, 0), (1, 3, 0)])
def test_rows_go_down_and_columns_across(row, column, expected):
    assert pointed(peak(row, column)[None], [CORNER]) == [expected]


def test_each_map_is_held_against_its_own_box():
    maps = np.stack([peak(0, 0), peak(0, 0), peak(4, 4)])
    np.testing.assert_array_equal(pointed(maps, [CORNER, MIDDLE, MIDDLE]), [1, 0, 1])


def test_tied_maxima_score_the_share_that_lies_in_the_box():
    heat = peak(0, 0)
    heat[7, 7] = heat[0, 7] = heat[1, 1] = 1
    assert pointed(heat[None], [CORNER]) == [0.5]
    # Without any contrast, it is the chance of a point drawn at random.
    assert pointed(np.full((1, 8, 8), -3.0), [CORNER]) == [CORNER.area]


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_flat_map_scores_the_pixels_in_the_box(height, width, data):
    x, y = (data.draw(st.floats(0, 0.9)) for _ in range(2))
    box = Box("a.png", "Mass", x, y, data.draw(st.floats(0.01, 1 - x)), data.draw(st.floats(0.01, 1 - y)))
    share = pointed(np.zeros((1, height, width)), [box])[0]
    # Off by no more than a pixel on either side.
    assert abs(share - box.area) <= (1 / height + 1 / width) + 1e-9
    heat = np.random.default_rng(height * 41 + width).normal(size=(1, height, width))
    down, across = np.unravel_index(heat[0].argmax(), heat[0].shape)
    inside = x <= (across + 0.5) / width < x + box.width and y <= (down + 0.5) / height < y + box.height
    assert pointed(heat, [box])[0] == inside
    # Neither scale nor offset of a map matters.
    assert pointed(3 * heat - 7, [box])[0] == inside


def test_the_centre_of_the_image():
    assert holds_centre(MIDDLE)
    assert not holds_centre(CORNER)


def test_scores_by_finding_over_all_and_their_mean():
    boxes = [CORNER, CORNER, CORNER, MIDDLE]
    found = pointing_game(boxes, np.array([1.0, 0.0, 0.5, 0.0]), np.array(["p", "p", "q", "r"]))
    assert list(found.findings) == ["Cardiomegaly", "Mass"]
    mass, heart = found.findings["Mass"], found.findings["Cardiomegaly"]
    assert (mass.boxes, mass.patients, heart.boxes, heart.patients) == (3, 2, 1, 1)
    assert (mass.hits.value, mass.at_random.value, mass.at_centre.value, mass.above_centre.value) == (0.5, 0.125, 0, 0.5)
    assert (heart.hits.value, heart.at_random.value, heart.at_centre.value, heart.above_centre.value) == (0, 0.25, 1, -1)
    assert (found.overall.boxes, found.overall.patients, found.overall.hits.value) == (4, 3, 0.375)
    assert found.mean.hits.value == 0.25
    assert found.overall.at_centre.value == 0.25
    assert found.mean.at_centre.value == 0.5
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["findings"]["Mass"]["hits"]["value"] == 0.5


def test_patients_are_drawn_and_not_boxes():
    """Ten boxes a patient that all hit or all miss tell no more than one box a patient."""
    rng = np.random.default_rng(0)
    hits = rng.integers(0, 2, 40).astype(float)
    once = pointing_game([CORNER] * 40, hits, np.arange(40)).overall.hits
    clustered = pointing_game([CORNER] * 400, hits.repeat(10), np.arange(40).repeat(10)).overall.hits
    loose = pointing_game([CORNER] * 400, hits.repeat(10), np.arange(400)).overall.hits
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high))
    assert loose.high - loose.low < 0.5 * (once.high - once.low)
    # Of 40 coins, the interval is near that of the normal approximation.
    spread = 1.96 * np.sqrt(hits.mean() * (1 - hits.mean()) / 40)
    assert once.high - once.low == pytest.approx(2 * spread, rel=0.15)


def test_a_gain_on_the_centre_is_drawn_in_pairs():
    rng = np.random.default_rng(1)
    boxes = [MIDDLE if each else CORNER for each in rng.integers(0, 2, 60)]
    hits = np.array([float(holds_centre(box)) for box in boxes])
    gain = pointing_game(boxes, hits, np.arange(60)).overall.above_centre
    assert (gain.value, gain.low, gain.high) == (0, 0, 0)


def test_resamples_without_a_box_of_a_finding_are_left_out():
    found = pointing_game([CORNER, MIDDLE], np.array([1.0, 0.0]), np.array([0, 1]), resamples=200)
    assert (found.findings["Mass"].hits.low, found.findings["Mass"].hits.high) == (1, 1)
    assert (found.overall.hits.low, found.overall.hits.high) == (0, 1)
    assert pointing_game([CORNER], np.array([1.0]), np.array([0]), resamples=0).overall.hits.value != 1


@pytest.mark.parametrize(
    ("maps", "boxes", "message"),
    [
        (np.zeros((2, 8, 8)), [CORNER], "there are 1 boxes"),
        (np.zeros((8, 8)), [CORNER], r"give \(N, h, w\)"),
        (np.full((1, 8, 8), np.nan), [CORNER], "not finite"),
    ],
)
def test_maps_that_do_not_fit_are_refused(maps, boxes, message):
    with pytest.raises(ValueError, match=message):
        pointed(maps, boxes)


def test_no_map_and_no_box():
    assert pointed(np.zeros((0, 8, 8)), []).shape == (0,)
    with pytest.raises(ValueError, match="at least 1"):
        pointing_game([], np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="as many of each"):
        pointing_game([CORNER], np.zeros(2), np.zeros(1))
