"""`clinical`: age, sex, view and earlier findings without the film, ours, as the baseline of everything that looks at films.

Findings stay: who had an effusion last month has one more often today than others. Logistic regression on the paper's 17
numbers reaches a mean AUC of .758 on the official test split of ChestX-ray14, and .788 with how often and how lately each
finding was seen. A network with history that is not clearly better than this one has not looked at the film.

With the paper's layout it is the clinical branch of `multi-input` under a last layer of its own; with the rich one it reads the
earlier visits as a sequence. Trained on the official train_val list less a tenth of its patients with the recipe below, one run
each, they reach .757 and .793 on the test list. The variant `ensemble` is four of the latter beside boosted trees: .803.
"""

from typing import cast

import torch
from torch import nn

from cxr_ray.clinical import ClinicalLayout
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.presets.forest import Forest
from cxr_ray.presets.fusion import CLINICAL_WIDTH, clinical_branch
from cxr_ray.presets.preset import Network, NetworkOptions, Preset
from cxr_ray.presets.visits import ClinicalEncoder

RICH_FEATURES = 64
ENSEMBLE = "ensemble"
# Chosen by cross-validation over patients of the official train_val list.
MEMBERS, TREES, LEAVES = 4, 250, 8


class _WithoutImages(Network):
    """What networks that read no film have in common."""

    reads_images = False
    backbone = ""

    def load_imagenet(self) -> None:
        """See `Network.load_imagenet`; there is no backbone to fill."""
        raise CxrRayError("init 'imagenet': preset clinical reads no image; give --init random, a weights file or a bundle")


class ClinicalOnly(_WithoutImages):
    """Clinical numbers to 14 logits; the images are not read.

    Parameters
    ----------
    layout
        Of at least one number.
    """

    def __init__(self, layout: ClinicalLayout) -> None:
        super().__init__()
        self.clinical: nn.Module
        if layout.encoding == "rich":
            width = RICH_FEATURES
            self.clinical = ClinicalEncoder(layout, width)
        else:
            width = CLINICAL_WIDTH
            self.clinical = clinical_branch(layout.width)
        self.head = nn.Linear(width, len(FINDINGS))

    def forward(self, images: torch.Tensor, clinical: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """See `Network.forward`."""
        return self.head(self.clinical(clinical))

    def set_prior(self, log_odds: torch.Tensor) -> None:
        """See `Network.set_prior`."""
        with torch.no_grad():
            self.head.bias.copy_(log_odds)


class ClinicalEnsemble(_WithoutImages):
    """Some networks that began differently, beside boosted trees; their probabilities are averaged, half and half.

    Parameters
    ----------
    layout
        Of at least one number.
    """

    def __init__(self, layout: ClinicalLayout) -> None:
        super().__init__()
        self.members = nn.ModuleList(ClinicalOnly(layout) for _ in range(MEMBERS))
        self.forest = Forest(TREES, LEAVES)

    def forward(self, images: torch.Tensor, clinical: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """See `Network.forward`."""
        logits = torch.stack([member(images, clinical) for member in self.members], dim=1)
        if self.training:
            return logits
        together = logits.float().sigmoid().mean(dim=1)
        return torch.logit((together + self.forest(clinical.float()).sigmoid()) / 2, eps=1e-6)

    def trees(self) -> Forest:
        """See `Network.trees`."""
        return self.forest

    def set_prior(self, log_odds: torch.Tensor) -> None:
        """See `Network.set_prior`."""
        for member in self.members:
            cast(ClinicalOnly, member).set_prior(log_odds)


def _make(options: NetworkOptions) -> Network:
    return ClinicalEnsemble(options.layout) if options.variant == ENSEMBLE else ClinicalOnly(options.layout)


PRESET = Preset(
    name="clinical",
    summary="age, sex, view and earlier findings without the film: the baseline",
    source="clinical inputs alone; ours, with the clinical branch of Crobu & Di Ciaccio",
    published=(),
    assumed=(),
    layout=ClinicalLayout("paper", meta=True, history=True),
    make=_make,
    recipe={
        "loss": "bce",
        "prior_bias": True,
        "learning_rate": 3e-3,
        "head_rate": 1.0,
        "batch_size": 512,
        "epochs": 15,
        "ema": 0.99,
        "augment": 0.0,
        # So little is computed at once that a second thread costs more than it brings.
        "threads": 1,
    },
    published_size=None,
    smallest_size=1,
    variants=("default", ENSEMBLE),
)
