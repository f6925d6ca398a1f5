"""The losses: by hand, against formulas in float64, and with labels that are unknown."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cxr_ray import train_settings
from cxr_ray.losses import (
    ClassWeights,
    asymmetric,
    balanced_bce,
    bce,
    class_weights,
    make_loss,
    prior_log_odds,
    weighted_bce,
)

NAN = float("nan")
KINDS = get_args(train_settings.Loss)
HALF = ClassWeights(torch.full((14,), 0.5), torch.full((14,), 0.5))
RISING = ClassWeights(torch.linspace(0.5, 0.95, 14), torch.linspace(0.5, 0.05, 14))
every_kind = pytest.mark.parametrize("kind", KINDS)


def log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def drawn_batch(seed: int = 0, images: int = 9, columns: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels, a third of these unknown."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, columns, generator=generator) * 3
    labels = (torch.rand(images, columns, generator=generator) < 0.3).float()
    labels[torch.rand(images, columns, generator=generator) < 1 / 3] = NAN
    return logits, labels


def reference(kind: str, logits: torch.Tensor, labels: torch.Tensor, weights: ClassWeights, smoothing: float) -> float:
    """Label after label as the formulas are written, in float64."""
    known = [(row, column) for row, column in np.ndindex(*labels.shape) if not math.isnan(labels[row, column])]
    positives = sum(labels[place] == 1 for place in known).item()
    total = 0.0
    for row, column in known:
        p, present = 1 / (1 + math.exp(-logits[row, column].item())), labels[row, column] == 1
        target = 1 - smoothing if present else smoothing
        absent_log = math.log(1 - p)
        if kind == "bce":
            weight = 1.0
        elif kind == "weighted-bce":
            weight = (weights.positive if present else weights.negative)[column].item() if column < 14 else 0.5
        elif kind == "balanced-bce":
            weight = len(known) / (positives if present else len(known) - positives)
        else:
            shifted = max(p - 0.05, 0)
            absent_log = math.log(1 - shifted)
            weight = 1.0 if present else shifted**4
        total -= weight * (target * math.log(p) + (1 - target) * absent_log)
    return total / len(known)


def test_positives_weigh_the_share_of_negatives():
    labels = np.zeros((8, 14), dtype=np.float32)
    labels[0, 0] = 1
    labels[:6, 1] = 1
    weights = class_weights(labels)
    assert weights.positive.dtype == weights.negative.dtype == torch.float32
    assert weights.positive[:2].tolist() == [7 / 8, 2 / 8]
    assert weights.negative[:2].tolist() == [1 / 8, 6 / 8]


def test_both_classes_weigh_the_same_over_the_split():
    labels = (np.random.default_rng(0).random((500, 14)) < np.linspace(0.02, 0.6, 14)).astype(np.float32)
    weights = class_weights(labels)
    positive = labels.sum(axis=0) * weights.positive.numpy()
    negative = (1 - labels).sum(axis=0) * weights.negative.numpy()
    np.testing.assert_allclose(positive, negative, rtol=1e-4)


def test_unknown_labels_do_not_count_for_the_weights():
    labels = np.zeros((6, 14), dtype=np.float32)
    labels[0, 3] = 1
    labels[4:, 3] = NAN
    assert class_weights(labels).positive[3].item() == pytest.approx(3 / 4)


@pytest.mark.parametrize("value", [0.0, 1.0, NAN])
def test_a_finding_with_one_class_only_is_weighted_evenly(value):
    weights = class_weights(np.full((5, 14), value, dtype=np.float32))
    assert weights.positive.tolist() == weights.negative.tolist() == [0.5] * 14


def test_a_cap_limits_the_ratio_of_the_weights_and_keeps_their_sum():
    labels = np.zeros((1000, 14), dtype=np.float32)
    labels[:2, 0] = 1
    labels[:100, 1] = 1
    labels[:900, 2] = 1
    weights = class_weights(labels, cap=19)
    # Frequencies of 1 in 500, 1 in 10 and 9 in 10: 499 to 1 becomes 19 to 1, 9 to 1 and 1 to 9 stay.
    np.testing.assert_allclose(weights.positive[:3].numpy(), [0.95, 0.9, 0.1], rtol=1e-6)
    np.testing.assert_allclose(weights.negative[:3].numpy(), [0.05, 0.1, 0.9], rtol=1e-6)
    assert class_weights(labels, cap=0).positive[0].item() == pytest.approx(0.998)


def test_weights_move_to_a_device():
    moved = HALF.to(torch.device("meta"))
    assert moved.positive.device.type == moved.negative.device.type == "meta"


def test_prior_log_odds_count_one_more_of_each():
    labels = np.full((10, 14), NAN, dtype=np.float32)
    labels[:, 0] = [1, 1, 0, 0, 0, 0, 0, 0, NAN, NAN]
    labels[:, 1], labels[:, 2] = 0, 1
    log_odds_14 = prior_log_odds(labels)
    assert log_odds_14.dtype == torch.float32
    expected = [math.log(3 / 7), math.log(1 / 11), math.log(11), *[0.0] * 11]
    np.testing.assert_allclose(log_odds_14.numpy(), expected, rtol=1e-6)


def test_prior_log_odds_of_a_large_split_are_those_of_its_prevalence():
    labels = np.zeros((86_524, 14), dtype=np.float32)
    labels[:141] = 1
    np.testing.assert_allclose(prior_log_odds(labels).sigmoid().numpy(), 141 / 86_524, rtol=0.01)


def test_weighted_loss_by_hand():
    logits = torch.zeros(1, 14)
    logits[0, 0], logits[0, 1], logits[0, 2] = 2.0, -1.0, 0.5
    labels = torch.full((1, 14), NAN)
    labels[0, 0], labels[0, 1], labels[0, 2] = 1, 0, 0
    weights = ClassWeights(torch.full((14,), 0.9), torch.full((14,), 0.1))
    # -w+ log s(2), -w- log(1 - s(-1)), -w- log(1 - s(0.5)) with log s(x) = -log(1 + exp(-x))
    terms = [0.9 * math.log1p(math.exp(-2)), 0.1 * math.log1p(math.exp(-1)), 0.1 * math.log1p(math.exp(0.5))]
    assert weighted_bce(logits, labels, weights).item() == pytest.approx(sum(terms) / 3, rel=1e-6)


def test_balanced_loss_by_hand():
    """Two positives and three negatives are known, so that positives weigh 5/2 and negatives 5/3.

    Probabilities        Labels      Terms
    1/2  1/5  3/4        1  0  0     ln 2  ln 5/4  ln 4
    1/9  1/4  1/2        ?  1  0     -     ln 4    ln 2

    The loss is (5/2 (ln 2 + ln 4) + 5/3 (ln 5/4 + ln 4 + ln 2)) / 5 = ln(8) / 2 + ln(10) / 3.
    """
    logits = torch.tensor([[1 / 2, 1 / 5, 3 / 4], [1 / 9, 1 / 4, 1 / 2]]).logit()
    labels = torch.tensor([[1, 0, 0], [NAN, 1, 0]])
    assert balanced_bce(logits, labels).item() == pytest.approx(math.log(8) / 2 + math.log(10) / 3, rel=1e-6)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_batch_of_one_kind_is_weighted_evenly(label):
    logits, labels = torch.randn(4, 14, generator=torch.Generator().manual_seed(0)), torch.full((4, 14), label)
    torch.testing.assert_close(balanced_bce(logits, labels), bce(logits, labels))


def test_asymmetric_loss_by_hand():
    """A positive at 1/4, a negative at 0.55 (0.5 beyond the margin), one below the margin."""
    logits = torch.tensor([[log_odds(0.25), log_odds(0.55), log_odds(0.04)]])
    labels = torch.tensor([[1.0, 0.0, 0.0]])
    assert asymmetric(logits, labels).item() == pytest.approx((math.log(4) + 0.5**4 * math.log(2)) / 3, rel=1e-5)
    focused = asymmetric(logits, labels, gamma_positive=1, gamma_negative=2, margin=0.15)
    assert focused.item() == pytest.approx((0.75 * math.log(4) + 0.4**2 * -math.log(0.6)) / 3, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_asymmetric_loss_without_focus_and_margin_is_cross_entropy(smoothing):
    logits, labels = drawn_batch(images=20)
    logits = (logits * 8).requires_grad_()
    plain = bce(logits, labels, label_smoothing=smoothing)
    reduced = asymmetric(logits, labels, label_smoothing=smoothing, gamma_positive=0, gamma_negative=0, margin=0)
    torch.testing.assert_close(reduced, plain)
    (expected,), (gradient,) = torch.autograd.grad(plain, logits), torch.autograd.grad(reduced, logits)
    torch.testing.assert_close(gradient, expected)


def test_gradient_of_the_asymmetric_loss_is_that_of_its_formula():
    logits, labels = drawn_batch(3, images=2)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(asymmetric(logits, labels), logits)
    step = 1e-6
    for row, column in np.ndindex(2, 14):
        moved = torch.zeros(2, 14, dtype=torch.float64)
        moved[row, column] = step
        higher, lower = (reference("asymmetric", logits.double() + sign * moved, labels, HALF, 0) for sign in (1, -1))
        assert gradient[row, column].item() == pytest.approx((higher - lower) / (2 * step), rel=1e-4, abs=1e-7)


@every_kind
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("columns", [14, 17])
def test_loss_is_that_of_the_formula(kind, smoothing, columns):
    loss = make_loss(kind, RISING, smoothing)
    for seed in range(3):
        logits, labels = drawn_batch(seed, columns=columns)
        assert loss(logits, labels).item() == pytest.approx(reference(kind, logits, labels, RISING, smoothing), rel=1e-5)


@every_kind
def test_order_of_the_batch_does_not_matter(kind):
    loss = make_loss(kind, RISING, 0.05)
    logits, labels = drawn_batch(images=16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(logits[order], labels[order]), loss(logits, labels))
    assert not torch.isclose(loss(logits[order], labels), loss(logits, labels))


@pytest.mark.parametrize("kind", ["bce", "weighted-bce", "balanced-bce"])
@pytest.mark.parametrize("label", [0, 1])
def test_smoothing_moves_the_best_answer_as_far_for_a_rare_finding(kind, label):
    """However unequal the weights, a negative's best probability is 0.1 and a positive's 0.9."""
    rare = ClassWeights(torch.full((14,), 0.998), torch.full((14,), 0.002))
    logits = torch.full((1, 14), log_odds(0.1 if label == 0 else 0.9), requires_grad=True)
    labels = torch.full((1, 14), float(label))
    make_loss(kind, rare, 0.1)(logits, labels).backward()
    assert logits.grad.abs().max() < 1e-7
    make_loss(kind, rare, 0.0)(logits, labels).backward()
    assert logits.grad.abs().min() > 1e-5


@every_kind
@given(st.lists(st.booleans(), min_size=28, max_size=28), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_unknown_labels_have_no_gradient_and_change_no_other(kind, unknown, seed):
    loss = make_loss(kind, RISING, 0.05)
    generator = torch.Generator().manual_seed(seed)
    unknown = torch.tensor(unknown).reshape(2, 14)
    labels = torch.randint(0, 2, (2, 14), generator=generator).float()
    labels[unknown] = NAN
    # Above the margin of the asymmetric loss, below which negatives have no gradient.
    logits = (torch.rand(2, 14, generator=generator) * 4 - 2).requires_grad_()
    found = loss(logits, labels)
    found.backward()
    assert torch.isfinite(found)
    assert (logits.grad[unknown] == 0).all()
    assert (logits.grad[~unknown] != 0).all()
    other = torch.where(unknown, logits.detach() + 5, logits.detach())
    torch.testing.assert_close(loss(other, labels), found.detach())


@every_kind
def test_no_known_label_gives_zero_and_no_gradient(kind):
    logits = torch.randn(3, 14, requires_grad=True)
    loss = make_loss(kind, HALF, 0.1)(logits, torch.full((3, 14), NAN))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


@every_kind
def test_columns_without_labels_are_unknown(kind):
    loss = make_loss(kind, RISING, 0.05)
    logits, labels = drawn_batch(columns=17)
    logits.requires_grad_()
    found = loss(logits, labels[:, :14])
    torch.testing.assert_close(found, loss(logits[:, :14], labels[:, :14]))
    found.backward()
    assert logits.grad[:, 14:].abs().max() == 0
    assert logits.grad[:, :14].abs().max() > 0


def test_labels_without_logits_are_an_error():
    with pytest.raises(ValueError, match="labels have 17 columns, logits 14"):
        bce(torch.zeros(2, 14), torch.zeros(2, 17))


def test_a_finding_without_positives_still_learns_that_it_is_absent():
    labels = np.zeros((4, 14), dtype=np.float32)
    logits = torch.zeros(4, 14, requires_grad=True)
    loss = weighted_bce(logits, torch.from_numpy(labels), class_weights(labels))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.log(2))
    assert (logits.grad > 0).all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_type_are_judged_in_float32(kind, dtype):
    loss = make_loss(kind, RISING, 0.05)
    logits, labels = drawn_batch()
    rounded = logits.to(dtype)
    found = loss(rounded, labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(rounded.float(), labels))


@every_kind
@pytest.mark.parametrize("logit", [-1e4, -90.0, 40.0, 1e4])
def test_logits_of_any_size_give_a_finite_loss_and_gradient(kind, logit):
    labels = torch.tensor([[0.0, 1.0] * 7])
    logits = torch.full((1, 14), logit, requires_grad=True)
    loss = make_loss(kind, RISING, 0.0)(logits, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_a_confident_error_costs_its_logit():
    logits = torch.tensor([[1e4, -1e4] * 7], dtype=torch.bfloat16)
    labels = torch.tensor([[0.0, 1.0] * 7])
    assert weighted_bce(logits, labels, HALF).item() == pytest.approx(0.5 * 1e4, rel=0.01)
    assert asymmetric(logits, labels, margin=0).item() == pytest.approx(1e4, rel=0.01)
    # With a margin of 0.05 a negative never seems likelier than 0.95.
    absent = asymmetric(torch.full((1, 14), 40.0), torch.zeros(1, 14))
    assert absent.item() == pytest.approx(0.95**4 * -math.log(0.05), rel=1e-5)


@every_kind
def test_the_loss_reads_nothing_back_from_its_device(kind):
    """On the meta device there are no values: whatever asks for one fails."""
    meta = torch.device("meta")
    logits = torch.zeros(4, 17, device=meta, requires_grad=True)
    loss = make_loss(kind, RISING.to(meta), 0.05)(logits, torch.zeros(4, 14, device=meta))
    loss.backward()
    assert loss.device == logits.grad.device == meta


def test_bce_is_that_of_torch():
    logits, labels = drawn_batch()
    known = ~labels.isnan()
    torch.testing.assert_close(bce(logits, labels), F.binary_cross_entropy_with_logits(logits[known], labels[known]))
