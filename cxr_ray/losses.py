"""Losses over fourteen binary labels, each of which may be unknown."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class ClassWeights:
    """Weights of the positive and the negative term of each finding; float32, shape (14,)."""

    positive: torch.Tensor
    negative: torch.Tensor


def class_weights(labels: np.ndarray) -> ClassWeights:
    """Per-class weights from the training split: positives weigh the share of negatives and the reverse.

    This is CheXNet's formula (Rajpurkar et al. 2017, section 2.1) taken class by class, the likeliest reading of the "weighted
    binary cross-entropy" of Crobu & Di Ciaccio. A finding without positives, or without negatives, is weighted 0.5 and 0.5.

    Parameters
    ----------
    labels
        float32, shape (N, 14); NaN where unknown.
    """
    known = np.isfinite(labels)
    rate = np.nansum(labels, axis=0) / np.maximum(known.sum(axis=0), 1)
    rate = np.where((rate <= 0) | (rate >= 1), 0.5, rate)
    return ClassWeights(torch.as_tensor(1 - rate, dtype=torch.float32), torch.as_tensor(rate, dtype=torch.float32))


def weighted_bce(logits: torch.Tensor, labels: torch.Tensor, weights: ClassWeights) -> torch.Tensor:
    """Weighted binary cross-entropy, averaged over the labels that are known.

    Parameters
    ----------
    logits
        float, shape (N, 14).
    labels
        float32, shape (N, 14); NaN where unknown.

    Returns
    -------
    torch.Tensor
        A scalar; 0 where no label is known.
    """
    known = ~torch.isnan(labels)
    target = torch.where(known, labels, torch.zeros_like(labels))
    weight = target * weights.positive + (1 - target) * weights.negative
    terms = F.binary_cross_entropy_with_logits(logits.float(), target, weight=weight * known, reduction="sum")
    return terms / known.sum().clamp(min=1)
