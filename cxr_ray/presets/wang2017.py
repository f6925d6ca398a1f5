"""`wang2017`: the baseline that came with the data (Wang et al. 2017, ChestX-ray8, CVPR).

An ImageNet network without its classifier, a *transition* convolution, log-sum-exp pooling between mean and maximum (r = 10 was
best), and a linear prediction layer. Its weights over the transition maps are the paper's heatmaps: `Wang.class_maps`. The
loss balances the positive and the negative labels of each batch as a whole, not finding by finding. Of AlexNet, GoogLeNet,
VGG-16 and ResNet-50, the last was best; all start from ImageNet (``--init imagenet``) and see the released 1024 px.

Three sets of figures exist. CheXNet printed .738, and many after it, which was taken before the official lists were released;
on the official split it is .745. The conference paper has eight findings only.
"""

import torch
from torch import nn
from torch.nn import functional as F

from cxr_ray.clinical import ClinicalLayout
from cxr_ray.presets.fusion import LateFusion
from cxr_ray.presets.pooling import log_mean_exp
from cxr_ray.presets.preset import Network, NetworkOptions, Preset, Published, in_nih_order

TRANSITION_WIDTH = 1024
SHARPNESS = 10.0


class Wang(LateFusion):
    """Image to 14 logits through a transition layer and log-sum-exp pooling.

    Parameters
    ----------
    name
        Name of the `vision.backbone`.
    layout
        The clinical numbers; of width 0 as published.
    sharpness
        r of the pooling: towards 0 the mean, towards infinity the maximum.
    """

    def __init__(self, name: str, layout: ClinicalLayout, sharpness: float = SHARPNESS) -> None:
        super().__init__(name, layout, TRANSITION_WIDTH)
        self.sharpness = sharpness
        self.transition = nn.Conv2d(self.channels, TRANSITION_WIDTH, kernel_size=3, padding=1)

    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Images (float32, shape (N, 3, H, W)) to the transition maps, shape (N, 1024, H/32, W/32)."""
        return F.relu(self.transition(self.features(images)))

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        """See `LateFusion.pool`; float32."""
        return log_mean_exp(maps, self.sharpness)

    def class_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Heatmaps: the prediction layer's weights times the transition maps (Wang et al. 2017).

        Parameters
        ----------
        images
            float32, shape (N, 3, H, W).

        Returns
        -------
        torch.Tensor
            Logits a place, without bias and clinical share; shape (N, 14, H/32, W/32). Pooled by their mean they are the logits
            of a network that pools by the mean.
        """
        weights = self.head.weight[:, : self.image_width]
        return F.conv2d(self.feature_maps(images), weights[:, :, None, None])


def _make(options: NetworkOptions) -> Network:
    return Wang(options.variant, options.layout)


PRESET = Preset(
    name="wang2017",
    summary="ResNet-50 (or AlexNet, GoogLeNet, VGG-16), transition layer, log-sum-exp pooling",
    source="Wang et al. 2017, ChestX-ray8: hospital-scale chest X-ray database and benchmarks (CVPR; arXiv 1705.02315)",
    published=(
        Published(
            "before the official lists, as printed by CheXNet",
            in_nih_order(.716, .807, .784, .609, .706, .671, .633, .806, .708, .835, .815, .769, .708, .767),
            verified=True,
        ),
        Published(
            "official",
            in_nih_order(.700, .810, .759, .661, .693, .669, .658, .799, .703, .805, .833, .786, .684, .872),
            verified=False,
        ),
        Published(
            "before the official lists, eight findings (CVPR)",
            {
                "Atelectasis": .707,
                "Cardiomegaly": .814,
                "Effusion": .736,
                "Infiltration": .613,
                "Mass": .561,
                "Nodule": .716,
                "Pneumonia": .633,
                "Pneumothorax": .789,
            },
            verified=True,
        ),
    ),
    assumed=(
        "transition layer: 3x3 convolution to 1024 maps with ReLU, as for class activation maps (Zhou et al. 2016)",
        "AlexNet and VGG-16 keep their last max pooling; GoogLeNet has its batch norms and no auxiliary classifiers",
        "SGD at 1e-3, ten times that outside the backbone; no augmentation; steps of 80 images in 5 passes",
        "clinical numbers, which the paper does not have, join through the branch of multi-input",
    ),
    layout=ClinicalLayout("paper", meta=False, history=False),
    make=_make,
    recipe={
        "loss": "balanced-bce",
        "optimizer": "sgd",
        "learning_rate": 1e-3,
        "head_rate": 10.0,
        "weight_decay": 5e-4,
        "batch_size": 80,
        "accumulate": 5,
        "schedule": "plateau",
        "warmup": 0.0,
        "augment": 0.0,
    },
    published_size=1024,
    smallest_size=63,
    variants=("resnet50", "googlenet", "vgg16", "alexnet"),
)  # fmt: skip
