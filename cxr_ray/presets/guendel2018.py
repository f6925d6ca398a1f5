"""`guendel2018`: DNet and DNetLoc, DenseNet-121 at 1024 px that also learns where (Guendel et al. 2018, arXiv 1803.04565).

Two strided convolutions in front of an ImageNet DenseNet-121 bring 1024 px down to 256. DNetLoc has further outputs for the
position of what is abnormal, trained on the PLCO screening trial together with the NIH release (297,541 images): .807 on the
official split, .841 with the same network on a random one.

PLCO is not freely available. What is here is the NIH half: the variant ``dnet`` has the fourteen findings; ``dnet-loc`` has
columns for `LOCATIONS` behind them in training, which learn from a dataset that has such targets and lie still where all are
unknown. Boxes of the NIH release are no such targets: all 984 lie on images of the official test split, so training on them
would be training on the test.
"""

import torch
from torch import nn
from torch.nn import functional as F

from cxr_ray.clinical import ClinicalLayout
from cxr_ray.presets.fusion import LateFusion
from cxr_ray.presets.preset import Network, NetworkOptions, Preset, Published, in_nih_order

LOCATIONS = (
    "right lung",
    "left lung",
    "upper fifth",
    "upper middle fifth",
    "middle fifth",
    "lower middle fifth",
    "lower fifth",
    "diffuse",
    "multiple",
)
# An input that is at least twice the 224 px of DenseNet is halved.
_HALVED_FROM = 448
_BINOMIAL = (1.0, 2.0, 1.0)


class Reduction(nn.Module):
    """Two learnt 3x3 convolutions of three channels; each halves its input from 448 px on.

    1024 px become 256 px, as in the paper, and 512 px do too; less than 448 px keep their size. They start as binomial
    filters, so that ImageNet weights behind them see a radiograph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = _smoothing()
        self.second = _smoothing()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (float32, shape (N, 3, H, W)) to smaller ones."""
        for convolution in (self.first, self.second):
            stride = 2 if min(images.shape[2:]) >= _HALVED_FROM else 1
            images = F.conv2d(images, convolution.weight, stride=stride, padding=1)
        return images


def _smoothing() -> nn.Conv2d:
    convolution = nn.Conv2d(3, 3, kernel_size=3, padding=1, bias=False)
    line = torch.tensor(_BINOMIAL) / sum(_BINOMIAL)
    with torch.no_grad():
        convolution.weight.copy_(torch.eye(3)[:, :, None, None] * torch.outer(line, line))
    return convolution


class DNet(LateFusion):
    """Image to 14 logits, from 1024 px.

    Parameters
    ----------
    layout
        The clinical numbers; of width 0 as published.
    """

    def __init__(self, layout: ClinicalLayout) -> None:
        super().__init__("densenet121", layout)
        self.reduction = Reduction()

    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Images (float32, shape (N, 3, H, W)) to the maps that are averaged; (N, 1024, 8, 8) from 1024 px."""
        return F.relu(self.features(self.reduction(images)))


class DNetLoc(DNet):
    """`DNet` with a column for each of `LOCATIONS` in training."""

    def __init__(self, layout: ClinicalLayout) -> None:
        super().__init__(layout)
        self.locations = nn.Linear(self.head.in_features, len(LOCATIONS))

    def forward(self, images: torch.Tensor, clinical: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """See `Network.forward`; in training, shape (N, 14 + 9), the further columns in the order of `LOCATIONS`."""
        fused = self.fuse(self.pool(self.feature_maps(images)), clinical)
        if not self.training:
            return self.head(fused)
        return torch.cat([self.head(fused), self.locations(fused)], dim=1)


def _make(options: NetworkOptions) -> Network:
    return (DNetLoc if options.variant == "dnet-loc" else DNet)(options.layout)


PRESET = Preset(
    name="guendel2018",
    summary="DenseNet-121 behind strided convolutions for 1024 px, with locations as further targets",
    source="Guendel et al. 2018, Learning to recognize abnormalities in chest X-rays with location-aware dense networks",
    published=(
        Published(
            "official",
            in_nih_order(.767, .883, .828, .709, .821, .758, .731, .846, .745, .835, .895, .818, .761, .896),
            verified=False,
        ),
    ),
    assumed=(
        "the figures are those of DNetLoc with PLCO, which cannot be repeated from the NIH release alone",
        "names of the nine locations; shared by all findings",
        "the strided convolutions keep the size of inputs below 448 px",
        "Adam at 1e-3 in batches of 16 and a tenth at each plateau; flips as augmentation; weights of the loss as in CheXNet",
        "clinical numbers, which the paper does not have, join through the branch of multi-input",
    ),
    layout=ClinicalLayout("paper", meta=False, history=False),
    make=_make,
    recipe={
        "loss": "weighted-bce",
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "head_rate": 1.0,
        "weight_decay": 0.0,
        "batch_size": 16,
        "schedule": "plateau",
        "warmup": 0.0,
        "augmentation": "flip",
    },
    published_size=1024,
    variants=("dnet", "dnet-loc"),
)  # fmt: skip
