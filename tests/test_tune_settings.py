"""The ranges of a search: read as they are meant, or refused with the remedy."""

import pytest

from cxr_ray.errors import UsageError
from cxr_ray.settings import load_settings
from cxr_ray.tune_settings import DEFAULT_SEARCH, Choice, Range, TuneSettings, parse_search


def test_the_default_searches_what_matters():
    found = parse_search(DEFAULT_SEARCH)
    assert list(found) == ["learning_rate", "weight_decay", "loss", "augment"]
    assert found["learning_rate"] == Range(1e-4, 1e-2)
    assert found["learning_rate"].logarithmic
    assert found["loss"] == Choice(("bce", "weighted-bce", "asymmetric"))
    assert found["augment"] == Range(0, 2)
    assert not found["augment"].logarithmic


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ("", "names nothing to search"),
        (
            "learning_rate",
            "'learning_rate' names no setting to search; write NAME=LOW..HIGH or NAME=ONE|OTHER with one of: preset,",
        ),
        ("rate=1..2", "'rate=1..2' names no setting to search"),
        ("out=a|b", "'out=a|b' names no setting to search"),
        ("learning_rate=2..1", "learning_rate='2..1' is no range that rises"),
        ("learning_rate=a..b", "learning_rate='a..b' is no range"),
        ("learning_rate=0..1", "learning_rate=0.0: Input should be greater than 0"),
        ("learning_rate=1..inf", "is no range that rises"),
        ("loss=bce|dice", "loss=dice: Input should be 'bce', "),
    ],
)
def test_other_searches_are_refused(search, said):
    with pytest.raises(UsageError) as refused:
        load_settings(TuneSettings, None, {"data": "d", "out": "o", "search": search})
    message = str(refused.value)
    assert message.startswith(f"setting 'search' is {search!r}: ")
    assert said in message
    assert "\n" not in message


def test_a_trial_is_a_training_with_what_was_drawn():
    searched = TuneSettings(data="d", out="o", preset="chexnet", epochs=7, trials=3)
    trial = searched.trial("elsewhere", {"learning_rate": 0.5, "loss": "asymmetric"})
    assert (trial.out, trial.epochs, trial.learning_rate, trial.loss) == ("elsewhere", 7, 0.5, "asymmetric")
    # What neither the user nor the search chose is left to the recipe of the preset.
    assert "batch_size" not in trial.model_fields_set
