"""Boosted trees as tensors: they answer what scikit-learn answers, in a bundle that has never heard of it."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier

from cxr_ray import boosting, presets
from cxr_ray.boosting import grow_trees
from cxr_ray.clinical import ClinicalLayout
from cxr_ray.errors import CxrRayError
from cxr_ray.losses import class_weights, make_loss
from cxr_ray.presets.clinical_only import MEMBERS, PRESET, ClinicalEnsemble
from cxr_ray.presets.forest import Forest
from cxr_ray.train_settings import TrainSettings
from cxr_ray.training import Batch, Moment, TrainingStep, make_optimizer

RICH = presets.options(PRESET, encoding="rich", variant="ensemble")
TREES, LEAVES = 30, 8


def table(rows=3000, seed=0):
    """Flags, shares and an age, as the clinical numbers are, and a label that depends on several of them."""
    generator = np.random.default_rng(seed)
    numbers = generator.normal(size=(rows, 12)).astype(np.float32)
    numbers[:, :4] = numbers[:, :4] > 0
    numbers[:, 4:8] = np.round(generator.random((rows, 4)), 2)
    odds = 2 * numbers[:, 0] * numbers[:, 5] - numbers[:, 9] + (numbers[:, 10] > 1) - 1
    return numbers, (generator.random(rows) < 1 / (1 + np.exp(-odds))).astype(np.float32)


def forest_of(grown):
    """A forest that has these trees for every finding."""
    forest = Forest(TREES, LEAVES)
    state = {
        name: torch.from_numpy(np.stack([getattr(grown, name)] * 14)) for name in ("feature", "kept", "threshold", "value")
    }
    forest.load_state_dict(state | {"constant": torch.full((14,), grown.constant)})
    return forest


@pytest.fixture(scope="module")
def grown():
    return grow_trees(*table(), TREES, LEAVES, 0.0, seed=3)


@torch.inference_mode()
def test_the_forest_answers_as_scikit_learn_does(grown):
    numbers, labels = table()
    model = HistGradientBoostingClassifier(
        learning_rate=0.03, max_iter=TREES, max_leaf_nodes=LEAVES, min_samples_leaf=40, l2_regularization=10.0,
        max_features=0.2, early_stopping=False, random_state=3,
    ).fit(numbers, labels)  # fmt: skip
    unseen, _ = table(seed=1)
    expected = model.decision_function(unseen)
    assert expected.std() > 0.1
    answers = forest_of(grown)(torch.from_numpy(unseen)).numpy()
    for k in (0, 13):
        np.testing.assert_allclose(answers[:, k], expected, atol=1e-5)
    np.testing.assert_allclose(grown.log_odds(unseen), expected, atol=1e-5)


@torch.inference_mode()
def test_a_number_on_a_threshold_goes_where_it_went_when_the_tree_was_grown(grown):
    """Thresholds are float64 between two float32 numbers; rounded up, a number just above one would change sides."""
    numbers, _ = table()
    used = np.unique(grown.threshold[grown.threshold < 1e30])
    assert len(used) > 20
    column = grown.feature[0, 0]
    rows = np.repeat(numbers[:1], 3, axis=0)
    threshold = grown.threshold[0, 0]
    rows[:, column] = [np.nextafter(threshold, np.float32(-9)), threshold, np.nextafter(threshold, np.float32(9))]
    below, on, above = grown.log_odds(rows)
    assert below == on
    assert above != on


@torch.inference_mode()
def test_rows_do_not_depend_on_each_other(grown):
    forest, numbers = forest_of(grown), torch.from_numpy(table(rows=300)[0])
    together = forest(numbers)
    torch.testing.assert_close(together, torch.cat([forest(row[None]) for row in numbers]), rtol=0, atol=1e-5)
    assert forest(numbers[:0]).shape == (0, 14)


def test_unknown_labels_are_left_out():
    numbers, labels = table()
    half = labels.copy()
    half[1000:] = np.nan
    one, other = (
        grow_trees(numbers, half, TREES, LEAVES, 0.0, 0),
        grow_trees(numbers[:1000], labels[:1000], TREES, LEAVES, 0.0, 0),
    )
    np.testing.assert_array_equal(one.threshold, other.threshold)
    np.testing.assert_array_equal(one.value, other.value)


@pytest.mark.parametrize("label", [0.0, 1.0, np.nan])
def test_a_finding_of_one_class_is_its_constant(label):
    numbers, labels = table(rows=100)
    grown = grow_trees(numbers, np.full_like(labels, label), TREES, LEAVES, -4.5, 0)
    assert set(forest_of(grown)(torch.from_numpy(numbers)).flatten().tolist()) == {-4.5}


def test_trees_that_are_read_wrongly_are_refused(monkeypatch):
    """As another release of scikit-learn might keep them."""
    monkeypatch.setattr(boosting, "_at_most", lambda threshold: np.float32(threshold + 0.5))
    with pytest.raises(CxrRayError, match=r"scikit-learn [\d.]+ keeps its trees in another way .*; install 1\.9 instead"):
        grow_trees(*table(), TREES, LEAVES, 0.0, 0)


def test_more_leaves_than_bits_are_refused():
    with pytest.raises(ValueError, match="trees of 9 leaves; give at most 8"):
        Forest(3, 9)


@pytest.fixture
def ensemble():
    torch.manual_seed(0)
    model = presets.build("clinical", RICH)
    assert isinstance(model, ClinicalEnsemble)
    return model


@torch.inference_mode()
def test_an_ensemble_answers_the_mean_of_members_and_trees(ensemble):
    clinical = torch.randn(20, ClinicalLayout("rich").width)
    ensemble.eval().forest.constant.fill_(-1.5)
    images = torch.zeros(20, 3, 0, 0)
    members = torch.stack([member(images, clinical).sigmoid() for member in ensemble.members]).mean(dim=0)
    expected = (members + torch.sigmoid(torch.tensor(-1.5))) / 2
    torch.testing.assert_close(ensemble(images, clinical).sigmoid(), expected)
    assert members.std() > 0.01


def test_members_learn_apart_and_trees_do_not_learn(ensemble):
    settings = TrainSettings(data="", out="", preset="clinical", augment=0.0, warmup=0.0, schedule="constant", loss="bce")
    labels = (torch.rand(64, 14) < 0.3).float()
    batch = Batch(torch.zeros(64, 0, 0, dtype=torch.uint8), torch.randn(64, 117), labels, torch.arange(64))
    trees = {name: tensor.clone() for name, tensor in ensemble.forest.state_dict().items()}
    before = [member.head.weight.clone() for member in ensemble.members]
    step = TrainingStep(
        ensemble.train(),
        make_optimizer(ensemble, settings),
        make_loss("bce", class_weights(labels.numpy())),
        settings,
        "float32",
    )
    losses = [float(step(batch, Moment(0.5, seed=number))) for number in range(30)]
    assert losses[-1] < losses[0]
    moved = [member.head.weight - weight for member, weight in zip(ensemble.members, before, strict=True)]
    assert all(change.abs().max() > 0 for change in moved)
    assert not torch.allclose(moved[0], moved[1])
    assert len(moved) == MEMBERS
    for name, tensor in ensemble.forest.state_dict().items():
        assert torch.equal(tensor, trees[name])


def test_the_loss_of_an_ensemble_is_the_mean_of_its_members(ensemble):
    """With dropout off, the step's loss is what each member alone would have, on average."""
    settings = TrainSettings(data="", out="", preset="clinical", augment=0.0, loss="bce")
    labels = (torch.rand(16, 14) < 0.3).float()
    labels[3, 5] = torch.nan
    clinical = torch.randn(16, 117)
    for module in ensemble.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = make_loss("bce", class_weights(labels.numpy()))
    images = torch.zeros(16, 3, 0, 0)
    with torch.no_grad():
        expected = torch.stack([loss(member(images, clinical), labels) for member in ensemble.members]).mean()
    step = TrainingStep(ensemble.train(), make_optimizer(ensemble, settings), loss, settings, "float32")
    batch = Batch(torch.zeros(16, 0, 0, dtype=torch.uint8), clinical, labels, torch.arange(16))
    torch.testing.assert_close(step(batch, Moment(0.5, seed=0)), expected)
