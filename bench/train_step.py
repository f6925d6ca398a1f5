"""The product's training step and scoring on drawn numbers, without Ray, and what they move and compute.

Runs from a bare clone wherever torch, torchvision, numpy and safetensors are, also without pydantic (`_stand_in_for_pydantic`).
"""

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def _stand_in_for_pydantic() -> None:
    """Let the step's settings be defined where pydantic is not installed: names, types and defaults, nothing checked."""
    module = types.ModuleType("pydantic")

    class BaseModel:
        def __init__(self, **values: object) -> None:
            vars(self).update(values)

    def field(default: object = ..., **_: object) -> object:
        return default

    def field_validator(*_: object, **__: object) -> Callable[[Any], Any]:
        return lambda method: method

    vars(module).update(
        BaseModel=BaseModel, ConfigDict=dict, Field=field, field_validator=field_validator, ValidationError=ValueError
    )
    sys.modules["pydantic"] = module


if importlib.util.find_spec("pydantic") is None:
    _stand_in_for_pydantic()

from cxr_ray import presets  # noqa: E402 - pydantic has to be stood in for before
from cxr_ray.findings import FINDINGS  # noqa: E402
from cxr_ray.losses import ClassWeights, make_loss  # noqa: E402
from cxr_ray.train_settings import TrainSettings  # noqa: E402
from cxr_ray.training import Batch, Moment, TrainingStep, logits_of, make_optimizer  # noqa: E402

PRESET = "multi-input"


@dataclass(frozen=True)
class Arithmetic:
    """How a network computes.

    Attributes
    ----------
    precision
        "bf16" is autocast, as the product has it; "bf16-weights" holds weights and activations in bfloat16 (scoring only).
    compile
        Mode of torch.compile, "default" for its own; empty where the network runs eagerly.
    """

    precision: Literal["float32", "bf16", "bf16-weights"] = "float32"
    layout: Literal["contiguous", "channels_last"] = "channels_last"
    compile: str = ""


class _AsWanted(nn.Module):
    """A network that sees its images in another memory layout or type than the product gives them."""

    def __init__(self, network: nn.Module, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.network = network
        self._format = torch.contiguous_format if arithmetic.layout == "contiguous" else torch.channels_last
        self._dtype = torch.bfloat16 if arithmetic.precision == "bf16-weights" else torch.float32

    def forward(self, images: torch.Tensor, clinical: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        images = images.to(self._dtype).contiguous(memory_format=self._format)
        return self.network(images, clinical.to(self._dtype), labels)


def _network(arithmetic: Arithmetic, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    network = presets.build(PRESET).to(device)
    if arithmetic.layout == "contiguous":
        network = network.to(memory_format=torch.contiguous_format)
    if arithmetic.precision == "bf16-weights":
        network = network.to(torch.bfloat16)
    if arithmetic.compile:
        network.compile(mode=None if arithmetic.compile == "default" else arithmetic.compile)
    plain = arithmetic.layout == "channels_last" and arithmetic.precision != "bf16-weights"
    return network if plain else _AsWanted(network, arithmetic)


def drawn_batch(images: int, size: int, device: torch.device, *, pinned: bool = False) -> Batch:
    """Squares, clinical numbers and labels drawn at random; one label in twenty is positive."""
    random = torch.Generator().manual_seed(0)
    batch = Batch(
        pixels=torch.randint(0, 256, (images, size, size), dtype=torch.uint8, generator=random),
        clinical=torch.randn(images, presets.PRESETS[PRESET].layout.width, generator=random),
        labels=(torch.rand(images, len(FINDINGS), generator=random) < 0.05).float(),
        rows=torch.arange(images),
    )
    if pinned:
        return Batch(*(tensor.pin_memory() for tensor in vars(batch).values()))
    return batch.to(device)


def training(arithmetic: Arithmetic, batch: Batch, device: torch.device) -> Callable[[], None]:
    """What runs one training step with the settings' defaults: augmentation, forward, backward, AdamW."""
    settings = TrainSettings(data="", out="")
    network = _network(arithmetic, device).train()
    # The optimiser asks the network which of its parameters are the backbone's.
    product = network.network if isinstance(network, _AsWanted) else network
    half = torch.full((len(FINDINGS),), 0.5, device=device)
    step = TrainingStep(
        model=network,
        optimizer=make_optimizer(product, settings),
        loss=make_loss(settings.loss, ClassWeights(half, half), settings.label_smoothing),
        settings=settings,
        precision=arithmetic.precision,
    )

    def run() -> None:
        if arithmetic.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        step(batch.to(device), Moment(progress=0.5, seed=0))

    return run


def scoring(arithmetic: Arithmetic, batch: Batch, device: torch.device) -> Callable[[], None]:
    """What computes the logits of one batch, in evaluation mode."""
    network = _network(arithmetic, device).eval()

    def run() -> None:
        moved = batch.to(device)
        logits_of(network, moved.pixels, moved.clinical, arithmetic.precision, None)

    return run


@dataclass(frozen=True)
class Work:
    """What one call moves and computes.

    Attributes
    ----------
    bytes
        Each operator of eager execution reads its arguments once and writes its results once; views move nothing.
    operations
        Floating-point operations of convolutions and matrix products, a multiplication and an addition counted as two.
    """

    bytes: int
    operations: int


def work_of(run: Callable[[], None]) -> Work:
    """Count what one eager call moves and computes."""
    with _ByteCounter() as counter:
        run()
    with FlopCounterMode(display=False) as operations:
        run()
    return Work(counter.bytes, int(operations.get_total_flops()))


class _ByteCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            # An expanded tensor is no larger than what it is expanded from.
            self.bytes += sum(min(each.numel() * each.element_size(), each.untyped_storage().nbytes()) for each in tensors)
        return result


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Whether float32 convolutions and products may round their inputs to 10 bits on a GPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
