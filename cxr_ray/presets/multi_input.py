"""`multi-input`: the network of Crobu & Di Ciaccio.

DenseNet-121 with global average pooling beside a small branch for the 17 clinical numbers (17 -> 32 -> 16), concatenated into
one layer of 14 sigmoids. The published 7,053,182 parameters fix the architecture: they count the batch-norm statistics, so that
torch has 6,969,534 trainable ones. Assumed, because the paper does not say: ReLU in the clinical branch, the input size, the
schedule, and that a first visit gets zeros for its history.
"""

import torch
from torch import nn
from torch.nn import functional as F

from cxr_ray import vision
from cxr_ray.clinical import PAPER_WIDTH
from cxr_ray.findings import FINDINGS

IMAGE_WIDTH = 1024
CLINICAL_WIDTH = 16

SOURCE = "Crobu & Di Ciaccio: chest X-ray classification from images and patient history"
SPLIT = "official"
# NIH order, as printed in the paper.
PUBLISHED_AUC = (
    0.816, 0.925, 0.867, 0.731, 0.897, 0.827, 0.776, 0.927, 0.801, 0.893, 0.946, 0.881, 0.827, 0.963,
)  # fmt: skip
ASSUMED = (
    "ReLU between the clinical layers",
    "input size and optimiser (AdamW, warm-up and cosine)",
    "weighted cross-entropy with CheXNet's weights, class by class",
    "history: ever seen on a strictly earlier visit; zeros on a first visit",
)


class MultiInput(nn.Module):
    """Image and clinical numbers to 14 logits.

    Parameters
    ----------
    clinical
        Whether the clinical branch exists; without it the network is DenseNet-121 with one linear layer.
    """

    def __init__(self, *, clinical: bool = True) -> None:
        super().__init__()
        self.features = vision.densenet121_features()
        self.clinical = (
            nn.Sequential(nn.Linear(PAPER_WIDTH, 32), nn.ReLU(), nn.Linear(32, CLINICAL_WIDTH), nn.ReLU()) if clinical else None
        )
        self.head = nn.Linear(IMAGE_WIDTH + (CLINICAL_WIDTH if clinical else 0), len(FINDINGS))

    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Images (float32, (N, 3, H, W)) to the maps that are averaged, (N, 1024, H/32, W/32)."""
        return F.relu(self.features(images))

    def forward(self, images: torch.Tensor, clinical: torch.Tensor) -> torch.Tensor:
        """Images (float32, (N, 3, H, W)) and clinical numbers (float32, (N, 17)) to logits (N, 14)."""
        pooled = self.feature_maps(images).mean(dim=(2, 3))
        if self.clinical is not None:
            pooled = torch.cat([pooled, self.clinical(clinical)], dim=1)
        return self.head(pooled)
