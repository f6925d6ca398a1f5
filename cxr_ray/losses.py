"""Losses over binary labels, each of which may be unknown.

All of them are a mean over the labels that are known, in float32 whatever the logits' type, and differ in what a term weighs:
nothing (`bce`), a constant of its finding (`weighted_bce`), the balance of the batch (`balanced_bce`) or how sure the network
is already (`asymmetric`). A batch without a known label costs exactly 0 and has gradients of 0.

Label smoothing moves the targets from 0 and 1 to ``s`` and ``1 - s``. A term's weight follows the label before it is moved:
positives weigh up to 600 times as much as negatives, and a smoothed negative would otherwise be drawn to 1 by its small
positive part.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

from cxr_ray import train_settings

GAMMA_POSITIVE = 0.0
GAMMA_NEGATIVE = 4.0
MARGIN = 0.05


class Loss(Protocol):
    """What every loss here is, once its constants are chosen."""

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of a batch.

        Parameters
        ----------
        logits
            Any float type, shape (N, K).
        labels
            float32, shape (N, 14) or up to (N, K), NaN where unknown; columns that they lack are unknown.

        Returns
        -------
        torch.Tensor
            float32 scalar; 0 where no label is known.
        """
        ...


@dataclass(frozen=True)
class ClassWeights:
    """Weights of the positive and the negative term of each finding; float32, shape (14,)."""

    positive: torch.Tensor
    negative: torch.Tensor

    def to(self, device: torch.device) -> "ClassWeights":
        """The same weights on a device."""
        return ClassWeights(self.positive.to(device), self.negative.to(device))


def class_weights(labels: np.ndarray, cap: float = 0.0) -> ClassWeights:
    """Per-class weights from the training split: positives weigh the share of negatives and the reverse.

    This is CheXNet's formula (Rajpurkar et al. 2017, section 2.1) taken class by class, the likeliest reading of the "weighted
    binary cross-entropy" of Crobu & Di Ciaccio. A finding without positives, or without negatives, is weighted 0.5 and 0.5.

    Parameters
    ----------
    labels
        float32, shape (N, 14); NaN where unknown.
    cap
        Largest ratio of the positive to the negative weight of a finding; 0 for none. A finding above it gets
        ``cap / (1 + cap)`` and ``1 / (1 + cap)``, so that the two still add up to 1, as if it were as frequent as that.
    """
    known = np.isfinite(labels)
    rate = np.nansum(labels, axis=0) / np.maximum(known.sum(axis=0), 1)
    rate = np.where((rate <= 0) | (rate >= 1), 0.5, rate)
    if cap > 0:
        rate = np.maximum(rate, 1 / (1 + cap))
    return ClassWeights(torch.as_tensor(1 - rate, dtype=torch.float32), torch.as_tensor(rate, dtype=torch.float32))


def prior_log_odds(labels: np.ndarray) -> torch.Tensor:
    """Log-odds of each finding's prevalence, counted with one positive and one negative more (Laplace's rule of succession).

    Thereby no finding has a prevalence of 0 or 1, and one that nobody labelled has log-odds of 0.

    Parameters
    ----------
    labels
        float32, shape (N, 14); NaN where unknown.

    Returns
    -------
    torch.Tensor
        float32, shape (14,).
    """
    positives = np.nansum(labels, axis=0, dtype=np.float64)
    negatives = np.isfinite(labels).sum(axis=0) - positives
    return torch.as_tensor(np.log((positives + 1) / (negatives + 1)), dtype=torch.float32)


def make_loss(kind: train_settings.Loss, weights: ClassWeights, label_smoothing: float = 0.0) -> Loss:
    """The loss that the settings name; `weights` are read by ``weighted-bce`` alone, on the device of the logits."""
    losses: dict[train_settings.Loss, Loss] = {
        "bce": partial(bce, label_smoothing=label_smoothing),
        "weighted-bce": partial(weighted_bce, weights=weights, label_smoothing=label_smoothing),
        "balanced-bce": partial(balanced_bce, label_smoothing=label_smoothing),
        "asymmetric": partial(asymmetric, label_smoothing=label_smoothing),
    }
    return losses[kind]


def bce(logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Binary cross-entropy; arguments and result as in `Loss`."""
    batch = _KnownLabels.of(logits, labels)
    return batch.mean(batch.cross_entropy(label_smoothing))


def weighted_bce(
    logits: torch.Tensor, labels: torch.Tensor, weights: ClassWeights, *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Binary cross-entropy weighted by finding; arguments and result as in `Loss`.

    Columns behind those that have weights (locations, say) weigh 0.5 and 0.5.
    """
    batch = _KnownLabels.of(logits, labels)
    further = batch.labels.shape[1] - weights.positive.shape[0]
    positive, negative = (F.pad(weight, (0, further), value=0.5) for weight in (weights.positive, weights.negative))
    weight = batch.labels * positive + (1 - batch.labels) * negative
    return batch.mean(weight * batch.cross_entropy(label_smoothing))


def balanced_bce(logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """W-CEL of Wang et al. 2017 (ChestX-ray8, section 4.1); arguments and result as in `Loss`.

    One pair of weights a batch, counted over all its known labels: ``(|P| + |N|) / |P|`` for positives and
    ``(|P| + |N|) / |N|`` for negatives. The weighted sum is divided by the number of known labels ``|P| + |N|``, a choice made
    here: the loss is then the mean of the positive terms plus the mean of the negative ones, whatever the batch's size. A batch
    of one kind only has the mean of that kind. Each worker of DDP counts its own part of the batch, and so does
    each pass where a step is divided into several.
    """
    batch = _KnownLabels.of(logits, labels)
    known = batch.known.sum()
    positives = batch.labels.sum()
    positive = known / positives.clamp(min=1)
    negative = known / (known - positives).clamp(min=1)
    weight = batch.labels * positive + (1 - batch.labels) * negative
    return batch.mean(weight * batch.cross_entropy(label_smoothing))


def asymmetric(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    gamma_positive: float = GAMMA_POSITIVE,
    gamma_negative: float = GAMMA_NEGATIVE,
    margin: float = MARGIN,
) -> torch.Tensor:
    """Asymmetric loss (ASL) of Ridnik et al. 2021; arguments and result as in `Loss`.

    A positive costs ``-(1 - p)^gamma_positive log p``, a negative ``-q^gamma_negative log(1 - q)`` with
    ``q = max(p - margin, 0)``: negatives that the network is sure of count little, and nothing below the margin. Probabilities
    learnt so are not calibrated. The gradient goes through the focusing factors too, as the equations say, and the
    terms are averaged, where the authors add them up.

    Parameters
    ----------
    gamma_positive, gamma_negative
        Exponents, 0 or at least 1; those of the paper are 0 and 4.
    margin
        Probability that is taken off a negative's, in [0, 1); the paper's is 0.05.
    """
    batch = _KnownLabels.of(logits, labels)
    probability = batch.logits.sigmoid()
    shifted = (probability - margin).clamp(min=0)
    focus = batch.labels * (1 - probability) ** gamma_positive + (1 - batch.labels) * shifted**gamma_negative
    log_absent = F.logsigmoid(-batch.logits)
    if margin > 0:
        # log(1 - q) = log(1 - p + margin), from the logits because 1 - p is 0 in float32 for logits above 17.
        log_absent = torch.logaddexp(log_absent, log_absent.new_full((), math.log(margin))).clamp(max=0)
    target = batch.targets(label_smoothing)
    return batch.mean(-focus * (target * F.logsigmoid(batch.logits) + (1 - target) * log_absent))


@dataclass(frozen=True)
class _KnownLabels:
    """A batch as the losses read it: float32 logits and labels, bool known, all (N, K); labels are 0 where unknown."""

    logits: torch.Tensor
    labels: torch.Tensor
    known: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, labels: torch.Tensor) -> "_KnownLabels":
        further = logits.shape[1] - labels.shape[1]
        if further < 0:
            raise ValueError(f"labels have {labels.shape[1]} columns, logits {logits.shape[1]}; give at most as many labels")
        labels = F.pad(labels.float(), (0, further), value=float("nan"))
        return cls(logits.float(), labels.nan_to_num(nan=0.0), ~labels.isnan())

    def targets(self, label_smoothing: float) -> torch.Tensor:
        return self.labels * (1 - 2 * label_smoothing) + label_smoothing

    def cross_entropy(self, label_smoothing: float) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(self.logits, self.targets(label_smoothing), reduction="none")

    def mean(self, terms: torch.Tensor) -> torch.Tensor:
        return torch.where(self.known, terms, 0.0).sum() / self.known.sum().clamp(min=1)
