"""Class maps: how much each cell of a network's maps adds to a logit.

Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) weighs the maps of one stage by the mean of their gradient and adds them up;
it works whatever comes behind. `Wang` has class activation maps (Zhou et al. 2016; Wang et al. 2017), which need no gradient.

The papers look at the last maps, which are 7 x 7 at 224 pixels. At 64 pixels the last maps of the same network are 2 x 2, and
hardly say where. So the maps are those of the deepest stage that still has `CELLS` cells an edge: the last ones from 224 pixels
on, and earlier ones below. On phantoms of 64 pixels these pointed at the finding 2.7 times as often as the last (.27, .10).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cxr_ray.errors import CxrRayError
from cxr_ray.presets.preset import Network
from cxr_ray.presets.wang2017 import Wang

CELLS = 7


def class_maps(network: Network, images: torch.Tensor, clinical: torch.Tensor, findings: torch.Tensor) -> torch.Tensor:
    """One map a radiograph, by the method that suits the network: class activation maps where it has them, else Grad-CAM.

    Class activation maps of less than `CELLS` cells an edge give way to Grad-CAM.

    Parameters
    ----------
    network
        In evaluation mode, on the device of the tensors, which must not come from inference mode. Neither its weights nor
        their ``grad`` are touched.
    images
        float32, shape (N, 3, H, W).
    clinical
        float32, shape (N, K).
    findings
        Position of each radiograph's finding in NIH order; int64, shape (N,).

    Returns
    -------
    torch.Tensor
        float32, shape (N, h, w), h and w at least `CELLS`; what is negative speaks against the finding. In logits: see
        `activation_maps` and `grad_cam`.

    Raises
    ------
    CxrRayError
        If the images are so small that no stage has maps of `CELLS` cells an edge.
    """
    if isinstance(network, Wang):
        maps = activation_maps(network, images, findings)
        if min(maps.shape[1:]) >= CELLS:
            return maps
    return grad_cam(network, images, clinical, findings)


@torch.no_grad()
def activation_maps(network: Wang, images: torch.Tensor, findings: torch.Tensor) -> torch.Tensor:
    """Class activation maps (Zhou et al. 2016) of a network that has them.

    Returns
    -------
    torch.Tensor
        float32, shape (N, H/32, W/32): the logit that each place would give, were the whole film like it; without the bias and
        what clinical numbers add. Other arguments as in `class_maps`.
    """
    rows = torch.arange(len(images), device=images.device)
    return network.class_maps(images)[rows, findings].float()


def grad_cam(network: Network, images: torch.Tensor, clinical: torch.Tensor, findings: torch.Tensor) -> torch.Tensor:
    """Grad-CAM (Selvaraju et al. 2017, equations 1 and 2) of the deepest maps with `CELLS` cells an edge.

    The last ReLU of the paper's equation 2 is left to those who draw, so that what speaks against the finding is not lost.
    A DenseNet's last maps are taken before their ReLU.

    Returns
    -------
    torch.Tensor
        float32, shape (N, h, w): logits a cell, to first order: each channel's activation there, times the mean of the
        logit's gradient over that channel. Arguments and errors as in `class_maps`.
    """
    with torch.enable_grad(), _deepest_maps(network) as deepest:
        logits = network(images, clinical)
        if not deepest:
            raise CxrRayError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels leave the network no maps of "
                f"{CELLS} x {CELLS} cells; give larger ones"
            )
        rows = torch.arange(len(images), device=images.device)
        # In evaluation mode no radiograph changes the logits of another one, so that the sum's gradient is each one's own.
        (gradient,) = torch.autograd.grad(logits[rows, findings].sum(), deepest[0])
    return (gradient.mean(dim=(2, 3), keepdim=True) * deepest[0].detach()).sum(dim=1).float()


@contextmanager
def _deepest_maps(network: Network) -> Iterator[list[torch.Tensor]]:
    """A list that holds, after a forward pass of this thread, the deepest maps with enough cells: the leaf of its graph."""
    deepest: list[torch.Tensor] = []
    # A server may run the same network in another thread, whose maps are not ours.
    thread = threading.get_ident()

    def begin_graph(module: nn.Module, inputs: object, maps: torch.Tensor) -> torch.Tensor | None:
        if threading.get_ident() != thread or min(maps.shape[2:]) < CELLS:
            return None
        # What led here is let go: nothing before the deepest maps needs a gradient.
        leaf = maps.detach().requires_grad_()
        deepest[:] = [leaf]
        # The next step may be a ReLU that works in place, which a leaf does not allow.
        return leaf.clone()

    handles = [step.register_forward_hook(begin_graph) for step in _steps(network.get_submodule(network.backbone.rstrip(".")))]
    try:
        yield deepest
    finally:
        for handle in handles:
            handle.remove()


def _steps(trunk: nn.Module) -> Iterator[nn.Module]:
    """The modules of a trunk that run one after another, so that all that is known of the film passes through each."""
    for module in trunk.children():
        if type(module).forward is nn.Sequential.forward:
            yield from _steps(module)
        else:
            yield module
