"""What a preset is: where a network comes from, what was published about it, and how it is made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from cxr_ray.clinical import ClinicalLayout
from cxr_ray.findings import FINDINGS
from cxr_ray.presets.forest import Forest


@dataclass(frozen=True)
class Published:
    """AUCs that a source prints.

    Attributes
    ----------
    split
        The split they were taken on, in a few words.
    auc
        Finding to AUC.
    verified
        Whether the figures were read in a public source; otherwise they are quoted from memory of the paper.
    mean_verified
        Whether at least their mean was.
    """

    split: str
    auc: Mapping[str, float]
    verified: bool
    mean_verified: bool = True

    @property
    def mean(self) -> float:
        """Mean over the findings that the source has."""
        return sum(self.auc.values()) / len(self.auc)


def in_nih_order(*aucs: float) -> dict[str, float]:
    """The fourteen AUCs of a source, given in NIH order."""
    return dict(zip(FINDINGS, aucs, strict=True))


class NetworkOptions(NamedTuple):
    """What a user can choose of a preset's network.

    Attributes
    ----------
    layout
        The clinical numbers that it reads; of width 0 for none.
    variant
        One of the preset's `variants`.
    """

    layout: ClinicalLayout
    variant: str


class Network(nn.Module):
    """Base of every preset's network.

    Attributes
    ----------
    reads_images
        False for a network of the clinical numbers alone.
    backbone
        Name prefix of the parameters that ImageNet weights or another bundle can fill, and that learn at the base rate; what
        is outside of it is new, and learns `head_rate` times faster. Empty where there is none.
    """

    reads_images = True
    backbone = "features."

    def forward(self, images: torch.Tensor, clinical: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Images and clinical numbers to logits.

        Parameters
        ----------
        images
            float32, shape (N, 3, H, W), the same grey in all channels; of shape (N, 3, 0, 0) where `reads_images` is False.
        clinical
            float32, shape (N, K), without NaN.
        labels
            float32, shape (N, 14), NaN where unknown; given in training only, for networks that feed back earlier labels.

        Returns
        -------
        torch.Tensor
            Logits, shape (N, 14) in evaluation; in training a network may have further columns, for targets that
            most datasets do not have, and an ensemble those of its M members, shape (N, M, 14).
        """
        raise NotImplementedError

    def set_prior(self, log_odds: torch.Tensor) -> None:
        """Set the biases of the last layer to the log-odds of each finding in the training split (float32, shape (14,)).

        A network then starts from the prevalence instead of one half (Lin et al. 2017, section 4.1).
        """
        raise NotImplementedError

    def trees(self) -> Forest | None:
        """Trees that are grown before the training and answer beside the network; None for none."""
        return None

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are learnt; batch-norm statistics are not among them."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def load_imagenet(self) -> None:
        """Fill the backbone with torchvision's ImageNet weights, downloading them if they are not cached.

        Raises
        ------
        CxrRayError
            If there are none for this backbone, or the download fails.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Preset:
    """A published system, or ours.

    Attributes
    ----------
    summary
        The network in one line.
    source
        The paper, or where else it comes from.
    assumed
        What the source leaves open and was chosen here.
    layout
        The clinical numbers that the source's network reads.
    recipe
        Settings of `cxr-ray train` that differ from the general defaults because the source says so.
    published_size
        Pixels an edge of the source's input; None without images.
    smallest_size
        Pixels an edge below which the network has no grid left to pool.
    variants
        Names of the networks that the source compares, the best first; a single one is called "default".
    pretrained
        Whether ImageNet weights of the first of them were published.
    """

    name: str
    summary: str
    source: str
    published: tuple[Published, ...]
    assumed: tuple[str, ...]
    layout: ClinicalLayout
    make: Callable[[NetworkOptions], Network]
    recipe: Mapping[str, object] = field(default_factory=dict)
    published_size: int | None = 224
    smallest_size: int = 32
    variants: tuple[str, ...] = ("default",)
    pretrained: bool = True

    @property
    def reads_images(self) -> bool:
        """False for a network of the clinical numbers alone."""
        return self.published_size is not None
