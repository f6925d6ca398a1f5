"""`baltruschat2018`: ResNets of one grey channel, with age, sex and view (Baltruschat et al., arXiv 1803.02315, Sci Rep 2019).

The authors compare depths (38, 50, 101), ImageNet against training from scratch on grey images, 224 px against 448 px
("large"), and the image alone against age, sex and view put beside the pooled features ("meta"). ResNet-38-large-meta from
scratch was best: .806 on the official split, and .822 over five random splits of the patients. At 448 px one more pooling lets
the rest of the network see the grid that it has at 224 px; it has no parameters, and smaller inputs pass without it.

History, which the paper does not have, is a switch like meta: its numbers stand beside the others as they are.
"""

import torch
from torch import nn
from torch.nn import functional as F

from cxr_ray import vision
from cxr_ray.clinical import ClinicalLayout
from cxr_ray.findings import FINDINGS
from cxr_ray.presets.preset import Network, NetworkOptions, Preset, Published, in_nih_order

LARGE = 448


class Baltruschat(Network):
    """Grey image and clinical numbers to 14 logits.

    Parameters
    ----------
    name
        Name of the `vision.backbone`, a ResNet.
    layout
        The clinical numbers; of width 0 for the image alone.
    """

    def __init__(self, name: str, layout: ClinicalLayout) -> None:
        super().__init__()
        self.backbone_name = name
        self.features, channels = vision.backbone(name)
        self.features.conv1 = _of_grey(self.features.get_submodule("conv1"))
        self.reads_clinical = layout.width > 0
        self.head = nn.Linear(channels + layout.width, len(FINDINGS))

    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Images (float32, shape (N, 3, H, W), of which the first channel is read) to the maps that are averaged.

        Returns
        -------
        torch.Tensor
            Shape (N, 2048, H/32, W/32), or (N, 2048, H/64, W/64) from `LARGE` pixels on.
        """
        maps = images[:, :1]
        for name, stage in self.features.named_children():
            maps = stage(maps)
            if name == "layer1" and min(images.shape[2:]) >= LARGE:
                maps = F.max_pool2d(maps, kernel_size=3, stride=2, padding=1)
        return maps

    def forward(self, images: torch.Tensor, clinical: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """See `Network.forward`."""
        pooled = self.feature_maps(images).mean(dim=(2, 3))
        return self.head(torch.cat([pooled, clinical], dim=1) if self.reads_clinical else pooled)

    def set_prior(self, log_odds: torch.Tensor) -> None:
        """See `Network.set_prior`."""
        with torch.no_grad():
            self.head.bias.copy_(log_odds)

    def load_imagenet(self) -> None:
        """See `Network.load_imagenet`; filters are summed over red, green and blue, which is exact for grey images."""
        coloured, _ = vision.backbone(self.backbone_name)
        vision.load_imagenet_weights(self.backbone_name, coloured)
        self.load_coloured(coloured.state_dict())

    def load_coloured(self, state: dict[str, torch.Tensor]) -> None:
        """Fill the backbone with weights of one that reads three channels (names of `vision.backbone`)."""
        self.features.load_state_dict({**state, "conv1.weight": state["conv1.weight"].sum(dim=1, keepdim=True)})


def _of_grey(first: nn.Module) -> nn.Conv2d:
    """A first convolution like torchvision's, with its initialisation, for one channel."""
    made = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made


def _make(options: NetworkOptions) -> Network:
    return Baltruschat(options.variant, options.layout)


PRESET = Preset(
    name="baltruschat2018",
    summary="ResNet-38 (or 50, 101) of one grey channel with age, sex and view",
    source="Baltruschat et al. 2019, Comparison of deep learning approaches for multi-label chest X-ray classification",
    published=(
        Published(
            "official",
            in_nih_order(.763, .875, .822, .694, .820, .747, .714, .840, .749, .846, .895, .816, .763, .937),
            verified=False,
        ),
    ),
    assumed=(
        "ResNet-38: bottlenecks [2, 3, 5, 2]",
        "the pooling of 448 px: 3x3 maximum of stride 2 after the first group of bottlenecks",
        "the recipe is quoted from memory of the paper, where a plateau halves the learning rate; here it leaves a tenth",
    ),
    layout=ClinicalLayout("paper", meta=True, history=False),
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
        "augmentation": "crop",
    },
    published_size=LARGE,
    variants=("resnet38", "resnet50", "resnet101"),
    pretrained=False,
)  # fmt: skip
