"""`chexnet`: DenseNet-121 on 14 findings (Rajpurkar et al. 2017, arXiv 1711.05225).

An ImageNet DenseNet-121 at 224 px, averaged, with one linear layer of 14 sigmoids; unweighted cross-entropy, Adam at 1e-3 in
batches of 16, divided by ten when the validation loss stalls, and flips as the only augmentation. The weights of the paper's
cross-entropy belong to its network for pneumonia alone. Start from ImageNet as the paper did with ``--init imagenet``.

The published .841 was taken on a random split of the patients. On the official split the same recipe has been reported
between .80 and .82 by others; the two figures do not compare.
"""

from cxr_ray.clinical import ClinicalLayout
from cxr_ray.presets.fusion import LateFusion
from cxr_ray.presets.preset import Network, NetworkOptions, Preset, Published, in_nih_order


class CheXNet(LateFusion):
    """Image to 14 logits; with clinical numbers switched on, they join as in `multi-input`."""

    def __init__(self, layout: ClinicalLayout) -> None:
        super().__init__("densenet121", layout)


def _make(options: NetworkOptions) -> Network:
    return CheXNet(options.layout)


PRESET = Preset(
    name="chexnet",
    summary="DenseNet-121 and one layer, the image alone",
    source="Rajpurkar et al. 2017, CheXNet: radiologist-level pneumonia detection on chest X-rays with deep learning",
    published=(
        Published(
            "random 70/10/20 by patient",
            in_nih_order(
                .8094, .9248, .8638, .7345, .8676, .7802, .7680, .8887, .7901, .8878, .9371, .8047, .8062, .9164,
            ),
            verified=True,
        ),
    ),
    assumed=(
        "the recipe is quoted from memory of the paper and agrees with public reimplementations",
        "clinical numbers, which the paper does not have, join through the branch of multi-input",
    ),
    layout=ClinicalLayout("paper", meta=False, history=False),
    make=_make,
    recipe={
        "loss": "bce",
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "head_rate": 1.0,
        "weight_decay": 0.0,
        "batch_size": 16,
        "schedule": "plateau",
        "warmup": 0.0,
        "augmentation": "flip",
        "select": "best",
    },
)  # fmt: skip
