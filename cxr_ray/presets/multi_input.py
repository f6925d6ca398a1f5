"""`multi-input`: the network of Crobu & Di Ciaccio.

DenseNet-121 with global average pooling beside a small branch for the 17 clinical numbers (17 -> 32 -> 16), concatenated into
one layer of 14 sigmoids. The published 7,053,182 parameters fix the architecture: they count the batch-norm statistics, so that
torch has 6,969,534 trainable ones. The paper calls its split the official one; its mean of .863 has not been reproduced
there by anyone else (the best image-only networks reach .835, and earlier findings add about .01 to an image).
"""

from cxr_ray.clinical import ClinicalLayout
from cxr_ray.presets.fusion import LateFusion
from cxr_ray.presets.preset import Network, NetworkOptions, Preset, Published, in_nih_order


class MultiInput(LateFusion):
    """Image and clinical numbers to 14 logits.

    Parameters
    ----------
    layout
        The clinical numbers; without any, the network is DenseNet-121 with one linear layer.
    """

    def __init__(self, layout: ClinicalLayout) -> None:
        super().__init__("densenet121", layout)


def _make(options: NetworkOptions) -> Network:
    return MultiInput(options.layout)


PRESET = Preset(
    name="multi-input",
    summary="DenseNet-121 beside 17 clinical numbers, one layer on both",
    source="Crobu & Di Ciaccio: chest X-ray classification from images and patient history",
    published=(
        Published(
            "official, says the paper",
            in_nih_order(.816, .925, .867, .731, .897, .827, .776, .927, .801, .893, .946, .881, .827, .963),
            verified=True,
        ),
    ),
    assumed=(
        "ReLU between the clinical layers",
        "input size and optimiser (AdamW, warm-up and cosine)",
        "weighted cross-entropy with CheXNet's weights, class by class",
        "history: ever seen on a strictly earlier visit; zeros on a first visit",
    ),
    layout=ClinicalLayout("paper", meta=True, history=True),
    make=_make,
)  # fmt: skip
