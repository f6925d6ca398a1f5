"""32 phantoms as one batch of training, and the proof that a network can learn: it must tell apart what it has seen."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from cxr_ray.findings import FINDINGS
from cxr_ray.presets.preset import Network
from ingest.phantom import PhantomVisit, simulate_patients
from ingest.phantom_drawing import draw

IMAGES, SIZE = 32, 64
# With this seed the 32 films show each of the fourteen findings at least twice.
SEED = 291
# Where the loss is below this, every label is told with confidence and further steps are wasted.
LEARNT = 0.02


class PhantomBatch(NamedTuple):
    """Films of a few patients, visit after visit.

    Attributes
    ----------
    pixels
        uint8, shape (32, 64, 64).
    clinical_paper
        Age about 50 in units of 20 years, sex, view, and the findings seen on earlier visits; float32, shape (32, 17).
    labels
        float32, shape (32, 14).
    """

    pixels: torch.Tensor
    clinical_paper: torch.Tensor
    labels: torch.Tensor


@cache
def phantom_batch() -> PhantomBatch:
    """The batch, always the same; do not write into it."""
    visits = simulate_patients(IMAGES, SEED)[:IMAGES]
    return PhantomBatch(
        torch.from_numpy(np.stack([draw(visit, SIZE) for visit in visits])),
        torch.from_numpy(_clinical(visits)),
        torch.tensor([visit.labels for visit in visits], dtype=torch.float32),
    )


def _clinical(visits: list[PhantomVisit]) -> np.ndarray:
    rows = np.zeros((len(visits), 3 + len(FINDINGS)), dtype=np.float32)
    for index, visit in enumerate(visits):
        earlier = [other.labels for other in visits if other.patient_id == visit.patient_id and other.visit < visit.visit]
        rows[index, :3] = (visit.age_years - 50) / 20, visit.sex == "M", visit.view == "AP"
        rows[index, 3:] = np.any(earlier, axis=0) if earlier else 0
    return rows


def told_apart(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean AUC over the findings that some films of the batch have and others have not.

    Parameters
    ----------
    scores, labels
        float32, shape (N, 14).
    """
    both = [column for column in range(labels.shape[1]) if 0 < labels[:, column].sum() < len(labels)]
    return float(np.mean([roc_auc_score(labels[:, column], scores[:, column]) for column in both]))


def overfit(
    model: Network, images: torch.Tensor, clinical: torch.Tensor, labels: torch.Tensor, *, steps: int, rate: float
) -> float:
    """Train on the whole batch at once and return `told_apart` in evaluation mode, as it is after at most `steps` steps.

    Parameters
    ----------
    images
        float32, shape (N, 3, H, W).
    clinical
        float32, shape (N, K).
    labels
        float32, shape (N, 14).
    rate
        Learning rate of AdamW.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
    model.train()
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(model(images, clinical, labels)[:, : len(FINDINGS)], labels)
        if loss < LEARNT:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    settle(model, images, clinical, labels)
    model.eval()
    with torch.inference_mode():
        return told_apart(model(images, clinical), labels)


def settle(model: Network, images: torch.Tensor, clinical: torch.Tensor, labels: torch.Tensor) -> None:
    """Give batch norms the statistics of the last weights; their moving means lag by more steps than a test has.

    The model stays in training mode.
    """
    model.train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(images, clinical, labels)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
