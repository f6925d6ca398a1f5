"""Image features beside clinical numbers, and one linear layer on both: what several presets are made of."""

import torch
from torch import nn
from torch.nn import functional as F

from cxr_ray import vision
from cxr_ray.clinical import ClinicalLayout
from cxr_ray.findings import FINDINGS
from cxr_ray.presets.preset import Network

CLINICAL_WIDTH = 16


def clinical_branch(width: int) -> nn.Sequential:
    """`width` clinical numbers to `CLINICAL_WIDTH` features, through 32 (Crobu & Di Ciaccio; the ReLUs are assumed)."""
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, CLINICAL_WIDTH), nn.ReLU())


class LateFusion(Network):
    """A backbone, its maps averaged, beside a `clinical_branch`, and a last layer of 14 logits.

    Parameters
    ----------
    name
        Name of the `vision.backbone`.
    layout
        The clinical numbers; of width 0 for the image alone.
    image_width
        Image features that the last layer reads, where they are not the backbone's channels.
    """

    def __init__(self, name: str, layout: ClinicalLayout, image_width: int | None = None) -> None:
        super().__init__()
        self.backbone_name = name
        self.features, self.channels = vision.backbone(name)
        self.image_width = image_width or self.channels
        self.clinical = clinical_branch(layout.width) if layout.width else None
        self.head = nn.Linear(self.image_width + (CLINICAL_WIDTH if layout.width else 0), len(FINDINGS))

    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Images (float32, shape (N, 3, H, W)) to the maps that are pooled, shape (N, image_width, H/32, W/32)."""
        return F.relu(self.features(images))

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (float, shape (N, C, h, w)) to features, shape (N, C)."""
        return maps.mean(dim=(2, 3))

    def fuse(self, pooled: torch.Tensor, clinical: torch.Tensor) -> torch.Tensor:
        """What the last layer reads: image features (float, shape (N, C)), beside those of the clinical numbers if any."""
        return pooled if self.clinical is None else torch.cat([pooled, self.clinical(clinical)], dim=1)

    def forward(self, images: torch.Tensor, clinical: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """See `Network.forward`."""
        return self.head(self.fuse(self.pool(self.feature_maps(images)), clinical))

    def set_prior(self, log_odds: torch.Tensor) -> None:
        """See `Network.set_prior`."""
        with torch.no_grad():
            self.head.bias.copy_(log_odds)

    def load_imagenet(self) -> None:
        """See `Network.load_imagenet`."""
        vision.load_imagenet_weights(self.backbone_name, self.features)
