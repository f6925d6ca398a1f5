"""Weighted cross-entropy: the published formula, and labels that are unknown."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_ray.losses import ClassWeights, class_weights, weighted_bce

NAN = float("nan")
HALF = ClassWeights(torch.full((14,), 0.5), torch.full((14,), 0.5))


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


def test_loss_by_hand():
    logits = torch.zeros(1, 14)
    logits[0, 0], logits[0, 1], logits[0, 2] = 2.0, -1.0, 0.5
    labels = torch.full((1, 14), NAN)
    labels[0, 0], labels[0, 1], labels[0, 2] = 1, 0, 0
    weights = ClassWeights(torch.full((14,), 0.9), torch.full((14,), 0.1))
    # -w+ log s(2), -w- log(1 - s(-1)), -w- log(1 - s(0.5)) with log s(x) = -log(1 + exp(-x))
    terms = [0.9 * math.log1p(math.exp(-2)), 0.1 * math.log1p(math.exp(-1)), 0.1 * math.log1p(math.exp(0.5))]
    assert weighted_bce(logits, labels, weights).item() == pytest.approx(sum(terms) / 3, rel=1e-6)


@given(st.lists(st.booleans(), min_size=28, max_size=28), st.integers(0, 1000))
@settings(deadline=None)
def test_unknown_labels_have_no_gradient_and_change_no_other(unknown, seed):
    generator = torch.Generator().manual_seed(seed)
    unknown = torch.tensor(unknown).reshape(2, 14)
    labels = torch.randint(0, 2, (2, 14), generator=generator).float()
    labels[unknown] = NAN
    logits = (torch.randn(2, 14, generator=generator) * 3).requires_grad_()
    loss = weighted_bce(logits, labels, HALF)
    loss.backward()
    assert torch.isfinite(loss)
    assert (logits.grad[unknown] == 0).all()
    assert (logits.grad[~unknown] != 0).all()
    other = torch.where(unknown, logits.detach() + 5, logits.detach())
    torch.testing.assert_close(weighted_bce(other, labels, HALF), loss.detach())


def test_no_known_label_gives_zero_and_no_gradient():
    logits = torch.randn(3, 14, requires_grad=True)
    loss = weighted_bce(logits, torch.full((3, 14), NAN), HALF)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_a_finding_without_positives_still_learns_that_it_is_absent():
    labels = np.zeros((4, 14), dtype=np.float32)
    logits = torch.zeros(4, 14, requires_grad=True)
    loss = weighted_bce(logits, torch.from_numpy(labels), class_weights(labels))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.log(2))
    assert (logits.grad > 0).all()


def test_half_precision_logits_of_any_size_give_a_finite_loss():
    logits = torch.tensor([[1e4, -1e4] * 7], dtype=torch.bfloat16)
    loss = weighted_bce(logits, torch.tensor([[0.0, 1.0] * 7]), HALF)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.5 * 1e4, rel=0.01)
