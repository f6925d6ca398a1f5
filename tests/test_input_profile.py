"""Input profiles: counts that add up, and an index that is zero for the same and large for another population."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_ray.clinical import ClinicalInputs, from_request
from cxr_ray.errors import CxrRayError
from cxr_ray.input_profile import InputProfile, drift, profile

KNOWN = st.tuples(
    st.one_of(st.none(), st.floats(0, 120)),
    st.sampled_from([None, "M", "F"]),
    st.sampled_from([None, "PA", "AP"]),
    st.sampled_from([None, [], ["Mass"], ["Hernia", "Effusion"]]),
)


def patients(*known) -> ClinicalInputs:
    return ClinicalInputs.concatenate([from_request(*each)[0] for each in known])


def films(number: int, seed: int = 0, *, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (number, 16, 16), dtype=np.uint8)


@settings(max_examples=50, deadline=None)
@given(st.lists(KNOWN, min_size=2, max_size=30), st.integers(0, 2**32 - 1))
def test_profiles_of_parts_add_up_to_that_of_the_whole(known, seed):
    inputs, pixels = patients(*known), films(len(known), seed)
    cut = len(known) // 2
    parts = profile(pixels[:cut], inputs.taken(np.arange(cut))), profile(pixels[cut:], inputs.taken(np.arange(cut, len(known))))
    whole = profile(pixels, inputs)
    assert parts[0] + parts[1] == whole
    assert {sum(counts) for counts in vars(whole).values()} == {len(known)}
    assert InputProfile.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    assert set(drift(whole, whole).values()) == {0.0}


def test_each_radiograph_falls_into_its_bins():
    grey = np.full((4, 8, 8), [[[0]], [[100]], [[255]], [[0]]], dtype=np.uint8)
    grey[3, :, ::2] = 255
    seen = profile(
        grey, patients((0, "M", "AP", ["Mass"]), (120, "F", "PA", []), (49.5, None, None, None), (50, "M", "PA", []))
    )
    assert [place for place, count in enumerate(seen.brightness) for _ in range(count)] == [0, 12, 15, 31]
    assert [place for place, count in enumerate(seen.contrast) for _ in range(count)] == [0, 0, 0, 31]
    assert [place for place, count in enumerate(seen.age) for _ in range(count)] == [0, 4, 5, 12]
    assert (seen.sex, seen.view, seen.history) == ((2, 1, 1), (2, 1, 1), (1, 2, 1))
    unknown = profile(np.empty((1, 0, 0), np.uint8), patients((None, None, None, None)))
    assert unknown.age[-1] == unknown.sex[2] == unknown.view[2] == unknown.history[2] == 1
    assert sum(unknown.brightness) == sum(unknown.contrast) == 0


def test_the_index_is_that_of_the_formula():
    reference, observed = InputProfile(sex=(50, 50, 0)), InputProfile(sex=(1, 3, 0))
    by_hand = (0.25 - 0.5) * math.log(0.25 / 0.5) + (0.75 - 0.5) * math.log(0.75 / 0.5)
    assert drift(reference, observed) == {"sex": pytest.approx(by_hand)}
    assert drift(observed, reference) == {"sex": pytest.approx(by_hand)}
    # Who never came before counts, though the formula has no value for it.
    newcomers = drift(reference, InputProfile(sex=(50, 40, 10)))["sex"]
    assert newcomers == pytest.approx((0.4 - 0.5) * math.log(0.8) + (0.1 - 1e-4) * math.log(0.1 / 1e-4))


def test_equal_populations_stay_where_chance_puts_them_and_others_do_not():
    draw = np.random.default_rng(3)

    def sample(number: int, shares: list[float]) -> InputProfile:
        return InputProfile(view=tuple(draw.multinomial(number, shares).tolist()))

    reference = sample(8000, [0.6, 0.4, 0.0])
    same = [drift(reference, sample(500, [0.6, 0.4, 0.0]))["view"] for _ in range(300)]
    assert np.mean(same) == pytest.approx(1 / 8000 + 1 / 500, rel=0.3)
    assert max(same) < 0.1
    assert drift(reference, sample(500, [0.2, 0.8, 0.0]))["view"] > 0.25


def test_darker_films_move_brightness_and_nothing_else():
    inputs = patients(*[(age, "M", "PA", []) for age in range(100)])
    learnt, shown = profile(films(100, low=100, high=200), inputs), profile(films(100, 1, low=20, high=120), inputs)
    found = drift(learnt, shown)
    assert found.pop("brightness") > 1
    assert max(found.values()) < 0.25
    assert drift(InputProfile(), shown) == {}
    assert set(drift(replace(learnt, age=InputProfile().age), shown)) == {"brightness", "contrast", "sex", "view", "history"}


@pytest.mark.parametrize(
    ("change", "named"),
    [({"sex": [1, 2]}, "sex"), ({"sex": [1, 2, -3]}, "sex"), ({"sex": [1, 2, 0.5]}, "sex"), ({"weight": [1]}, "weight")],
)
def test_what_is_no_profile_is_refused(change, named):
    with pytest.raises(CxrRayError, match=named):
        InputProfile.from_json(InputProfile().to_json() | change)
    absent = InputProfile().to_json()
    del absent["view"]
    with pytest.raises(CxrRayError, match="view is absent"):
        InputProfile.from_json(absent)
