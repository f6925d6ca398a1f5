"""What a run is made of: recipe, user's choice, and the network that both describe."""

import pytest

from cxr_ray.errors import UsageError
from cxr_ray.presets import PRESETS
from cxr_ray.recipe import network_options, resolve
from cxr_ray.train_settings import TrainSettings


def settings(**chosen) -> TrainSettings:
    return TrainSettings.model_validate({"data": "d", "out": "o"} | chosen)


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_fills_what_the_user_left_open(name):
    recipe = dict(PRESETS[name].recipe)
    resolved = resolve(settings(preset=name))
    for setting, value in recipe.items():
        assert getattr(resolved, setting) == value, setting
    untouched = (
        TrainSettings.model_fields.keys() - recipe.keys() - {"data", "out", "preset", "variant", "meta", "history", "encoding"}
    )
    for setting in untouched:
        assert getattr(resolved, setting) == TrainSettings.model_fields[setting].default, setting
    layout = PRESETS[name].layout
    assert (resolved.encoding, resolved.meta, resolved.history) == (layout.encoding, layout.meta, layout.history)
    assert resolved.variant == PRESETS[name].variants[0]


def test_the_users_choice_wins_over_the_recipe():
    assert PRESETS["chexnet"].recipe["batch_size"] == 16
    assert PRESETS["chexnet"].recipe["loss"] == "bce"
    resolved = resolve(settings(preset="chexnet", batch_size=64, history=True))
    assert (resolved.batch_size, resolved.loss) == (64, "bce")
    assert network_options(resolved).layout.width == 14


def test_the_users_choice_of_a_default_wins_as_well():
    """A flag that says what the default says is a choice."""
    default = TrainSettings.model_fields["loss"].default
    assert PRESETS["chexnet"].recipe["loss"] != default
    assert resolve(settings(preset="chexnet", loss=default)).loss == default


def test_resolving_twice_changes_nothing():
    once = resolve(settings(preset="beyond"))
    assert resolve(once) == once


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"preset": "alexnet"}, "preset 'alexnet' is not known; use one of: multi-input, "),
        ({"preset": "wang2017", "variant": "resnet18"}, "setting 'variant' is 'resnet18': preset wang2017 has resnet50, "),
        ({"preset": "clinical", "meta": False, "history": False}, "preset clinical reads no image: leave it meta or history"),
    ],
)
def test_what_does_not_go_together_is_refused(chosen, said):
    with pytest.raises(UsageError) as refused:
        resolve(settings(**chosen))
    assert said in str(refused.value)


@pytest.mark.parametrize(("workers", "fewest", "most"), [(1, 1, 1), ("3", 3, 3), ("2..8", 2, 8), ("4..4", 4, 4)])
def test_workers_are_a_number_or_a_range(workers, fewest, most):
    assert settings(workers=workers).worker_range == (fewest, most)


@pytest.mark.parametrize("workers", ["0", "", "-1", "2..1", "0..2", "two", "2...4", "1.5", "2..", "..2"])
def test_other_workers_are_refused(workers):
    with pytest.raises(ValueError, match=r"give a number of at least 1, or a range such as 2\.\.8"):
        settings(workers=workers)
