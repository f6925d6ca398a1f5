"""The training step: schedules, optimiser, and that a step does what the equations say."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cxr_ray import presets
from cxr_ray.clinical import ClinicalLayout
from cxr_ray.ema import AveragedWeights
from cxr_ray.losses import ClassWeights, make_loss
from cxr_ray.train_settings import TrainSettings
from cxr_ray.training import (
    Batch,
    Moment,
    TrainingStep,
    choose_precision,
    count_plateaus,
    learning_rate_factor,
    make_optimizer,
    out_of_patience,
    probabilities,
    step_seed,
)
from cxr_ray.vision import as_input

HALF = ClassWeights(torch.full((14,), 0.5), torch.full((14,), 0.5))


def train_settings(**values) -> TrainSettings:
    return TrainSettings(**{"data": "d", "out": "o", "precision": "float32", "augment": 0.0} | values)


def batch(images: int = 8, edge: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        pixels=torch.randint(0, 256, (images, edge, edge), generator=generator, dtype=torch.uint8),
        clinical=torch.randn(images, 17, generator=generator),
        labels=torch.randint(0, 2, (images, 14), generator=generator).float(),
        rows=torch.arange(images),
    )


def weighted_bce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return make_loss("weighted-bce", HALF, 0.0)(logits, labels)


def training_step(chosen: TrainSettings, **changed) -> TrainingStep:
    torch.manual_seed(0)
    model = presets.build("multi-input").train()
    return TrainingStep(model, make_optimizer(model, chosen), weighted_bce, chosen, "float32", **changed)


def linear_step(chosen: TrainSettings, loss=weighted_bce) -> TrainingStep:
    """The step of a network without batch statistics or dropout, whose gradients can be had by hand."""
    torch.manual_seed(0)
    model = presets.build("clinical").train()
    return TrainingStep(model, make_optimizer(model, chosen), loss, chosen, "float32")


def at(progress: float, seed: int = 0, plateaus: int = 0) -> Moment:
    return Moment(progress, seed, plateaus)


def test_schedule_at_its_corners():
    assert learning_rate_factor(0.0, 0.1) == 0
    assert learning_rate_factor(0.05, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(0.1, 0.1) == pytest.approx(1)
    assert learning_rate_factor(0.55, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 0.1) == pytest.approx(0, abs=1e-12)
    assert learning_rate_factor(0.0, 0.0) == 1


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.9))
@settings(deadline=None)
def test_schedule_rises_then_falls(one, other, warmup):
    early, late = sorted((one, other))
    first, second = learning_rate_factor(early, warmup), learning_rate_factor(late, warmup)
    assert 0 <= first <= 1
    if late <= warmup:
        assert first <= second + 1e-9
    if early >= warmup:
        assert first >= second - 1e-9


def test_constant_and_plateau_schedules():
    assert learning_rate_factor(0.05, 0.1, "constant") == pytest.approx(0.5)
    assert {learning_rate_factor(progress, 0.1, "constant") for progress in (0.1, 0.5, 1.0)} == {1.0}
    assert [learning_rate_factor(0.5, 0.0, "plateau", plateaus) for plateaus in range(3)] == pytest.approx([1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("losses", "plateaus"),
    [
        ([], 0),
        ([3, 2, 1], 0),
        ([3, 2, 2.5], 0),  # one epoch no better than the best
        ([3, 2, 2.5, 2.0], 1),  # a second one
        ([3, 2, 2.5, 1.9, 2.5], 0),
        ([3, 2, 2.5, 2.5, 2.5], 1),  # counting starts again after the division
        ([3, 2, 2.5, 2.5, 2.5, 2.5], 2),
        ([3, math.nan, math.nan], 1),
    ],
)
def test_plateaus_are_counted_as_torch_does(losses, plateaus):
    assert count_plateaus(losses) == plateaus
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1, threshold=0.0)
    for loss in losses:
        reference.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1**plateaus)


@pytest.mark.parametrize(
    ("aucs", "patience", "ends"),
    [
        ([0.6, 0.7], 0, False),
        ([0.7, 0.6, 0.5], 2, True),
        ([0.7, 0.6, 0.71], 2, False),
        ([0.6, 0.7, 0.6], 2, False),
        ([0.7, 0.7, 0.7], 2, True),
        ([0.7], 1, False),
    ],
)
def test_patience_ends_a_run(aucs, patience, ends):
    assert out_of_patience(aucs, patience) is ends


def test_seeds_of_steps_differ_in_everything_that_matters():
    seeds = {
        step_seed(seed, epoch, images, rank)
        for seed in range(3)
        for epoch in range(4)
        for images in (0, 32, 64)
        for rank in (0, 1)
    }
    assert len(seeds) == 3 * 4 * 3 * 2
    assert step_seed(1, 2, 3, 4) == step_seed(1, 2, 3, 4)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_optimizer_groups():
    """Every parameter once; weights decay, biases and normalisation do not; what is not backbone learns faster."""
    chosen = train_settings(learning_rate=2e-3, head_rate=7.0, weight_decay=0.03)
    model = presets.build("multi-input")
    normalisations = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = []
    for group in make_optimizer(model, chosen).param_groups:
        assert group["lr"] == 2e-3
        for parameter in group["params"]:
            name = names[parameter]
            seen.append(name)
            free = name in normalisations or name.endswith(".bias")
            assert group["weight_decay"] == (0.0 if free else 0.03), name
            assert group["rate_factor"] == (1.0 if name.startswith("features.") else 7.0), name
    assert sorted(seen) == sorted(names.values())


def test_as_input_values():
    pixels = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)
    images = as_input(pixels)
    assert images.shape == (1, 3, 2, 2)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = torch.tensor([[(0 - 0.449) / 0.226, (1 - 0.449) / 0.226], [(0.2 - 0.449) / 0.226, (0.4 - 0.449) / 0.226]])
    for channel in range(3):
        torch.testing.assert_close(images[0, channel], expected)
    assert pixels.tolist() == [[[0, 255], [51, 102]]]


def test_steps_lower_the_loss_of_a_fixed_batch():
    step, fixed = training_step(train_settings(learning_rate=3e-4, head_rate=3.0)), batch()
    losses = [step(fixed, at(0.1)).item() for _ in range(10)]
    assert math.isfinite(losses[-1])
    assert losses[0] == pytest.approx(0.5 * math.log(2), rel=0.3)
    assert losses[-1] < 0.8 * losses[0]


def test_a_step_at_the_end_of_the_schedule_moves_no_weight():
    step = training_step(train_settings())
    before = {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}
    step(batch(4), at(0.0))
    for name, parameter in step.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert {group["lr"] for group in step.optimizer.param_groups} == {0.0}
    step(batch(4), at(0.1))
    assert sorted({group["lr"] for group in step.optimizer.param_groups}) == pytest.approx([1e-3, 1e-2])
    assert not torch.equal(step.model.head.weight, before["head.weight"])


def test_a_step_returns_the_loss_before_it():
    step, fixed = training_step(train_settings()), batch(4)
    with torch.no_grad():
        expected = weighted_bce(step.model(as_input(fixed.pixels), fixed.clinical), fixed.labels)
    loss = step(fixed, at(0.5))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_unlabelled_images_teach_nothing_to_the_last_layer():
    step, fixed = training_step(train_settings(weight_decay=0.0)), batch(4)
    before = step.model.head.weight.detach().clone()
    step(Batch(fixed.pixels, fixed.clinical, torch.full((4, 14), float("nan")), fixed.rows), at(0.5))
    assert torch.equal(step.model.head.weight, before)


def test_probabilities_are_those_of_evaluation_mode():
    torch.manual_seed(0)
    model, fixed = presets.build("multi-input").train(), batch(4)
    together = probabilities(model, fixed.pixels, fixed.clinical, "float32")
    assert together.shape == (4, 14)
    assert ((together > 0) & (together < 1)).all()
    for row in range(4):
        alone = probabilities(model, fixed.pixels[row : row + 1], fixed.clinical[row : row + 1], "float32")
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        logits = model.eval()(as_input(fixed.pixels), fixed.clinical)
    torch.testing.assert_close(together.logit(), logits, rtol=1e-3, atol=1e-4)


def test_bf16_probabilities_are_close_to_those_of_float32():
    torch.manual_seed(0)
    model, fixed = presets.build("multi-input"), batch(4)
    exact = probabilities(model, fixed.pixels, fixed.clinical, "float32")
    rough = probabilities(model, fixed.pixels, fixed.clinical, "bf16")
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.03)


def gradients(step: TrainingStep) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in step.model.parameters()]


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    whole, divided = linear_step(train_settings()), linear_step(train_settings(accumulate=parts))
    losses = [step(batch(8), at(0.5)) for step in (whole, divided)]
    torch.testing.assert_close(*losses)
    for one, other in zip(gradients(whole), gradients(divided), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_clipping_bounds_the_norm_and_keeps_the_direction():
    free, clipped = linear_step(train_settings()), linear_step(train_settings(clip=1e-3))
    for step in (free, clipped):
        step(batch(8), at(0.5))
    one, other = (torch.cat([gradient.flatten() for gradient in gradients(step)]) for step in (free, clipped))
    assert one.norm() > 1e-3
    assert other.norm() == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(other / other.norm(), one / one.norm())


@pytest.mark.parametrize(
    ("optimizer", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_the_optimizer_that_was_asked_for(optimizer, kind):
    made = make_optimizer(presets.build("clinical"), train_settings(optimizer=optimizer))
    assert type(made) is kind
    assert optimizer != "sgd" or made.param_groups[0]["momentum"] == 0.9


def test_averaged_weights_follow_the_steps():
    step = linear_step(train_settings())
    step.averaged = AveragedWeights(step.model, 0.5)
    seen = [copy.deepcopy(step.model.state_dict())]
    for _ in range(3):
        step(batch(8), at(0.5))
        seen.append(copy.deepcopy(step.model.state_dict()))
    expected = seen[0]
    for number, weights in enumerate(seen[1:]):
        decay = min(0.5, (1 + number) / (10 + number))
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in expected}
    with step.averaged.applied():
        for name, tensor in step.model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name])


def test_what_is_drawn_follows_from_the_moment_alone():
    """Two runs that reach a moment by different ways draw the same in it: dropout and augmentation."""
    chosen = train_settings(augment=1.0)
    one, other = training_step(chosen), training_step(chosen)
    torch.rand(1234)
    losses = [one(batch(8), at(0.0, seed=7))]
    torch.rand(99)
    other.generator.manual_seed(5)
    losses.append(other(batch(8), at(0.0, seed=7)))
    assert torch.equal(*losses)
    assert not torch.equal(one(batch(8), at(0.0, seed=8)), losses[0])


def test_a_smaller_input_is_the_average_of_the_stored_pixels():
    pixels = torch.tensor([[[0, 100], [50, 250]]], dtype=torch.uint8)
    assert as_input(pixels, 1)[0, 0].item() == pytest.approx((100 / 255 - 0.449) / 0.226)
    torch.testing.assert_close(as_input(pixels, 2), as_input(pixels))
    small = batch(4)
    large = Batch(small.pixels.repeat_interleave(2, 1).repeat_interleave(2, 2), small.clinical, small.labels, small.rows)
    reduced, stored = training_step(train_settings(), size=32), training_step(train_settings())
    torch.testing.assert_close(reduced(large, at(0.5)), stored(small, at(0.5)), rtol=1e-4, atol=0)


def test_test_time_augmentation_is_the_mean_over_views():
    torch.manual_seed(0)
    model, fixed = presets.build("multi-input").eval(), batch(4, edge=64)

    def seen(pixels):
        return probabilities(model, pixels, fixed.clinical, "float32")

    both = probabilities(model, fixed.pixels, fixed.clinical, "float32", tta="flip")
    torch.testing.assert_close(both, (seen(fixed.pixels) + seen(fixed.pixels.flip(2))) / 2, rtol=1e-4, atol=1e-5)
    crops = probabilities(model, fixed.pixels, fixed.clinical, "float32", tta="ten-crop")
    edge = fixed.pixels.shape[-1] * 7 // 8
    first, centre = fixed.pixels.shape[-1] - edge, (fixed.pixels.shape[-1] - edge) // 2
    corners = [(0, 0), (0, first), (first, 0), (first, first), (centre, centre)]
    cut = [fixed.pixels[:, top : top + edge, left : left + edge] for top, left in corners]
    expected = torch.stack([seen(crop) for crop in (*cut, *(crop.flip(2) for crop in cut))]).mean(dim=0)
    torch.testing.assert_close(crops, expected, rtol=1e-4, atol=1e-5)


def test_precision_is_what_the_processor_has():
    cpu = torch.device("cpu")
    assert choose_precision("float32", cpu) == "float32"
    assert choose_precision("bf16", cpu) == "bf16"
    capable = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    assert choose_precision("auto", cpu) == ("bf16" if capable else "float32")


@pytest.mark.long
def test_a_compiled_network_takes_the_same_step():
    import shutil

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU; there is none")
    plain, compiled = linear_step(train_settings()), linear_step(train_settings())
    compiled.model.compile()
    torch.testing.assert_close(plain(batch(8), at(0.5)), compiled(batch(8), at(0.5)))
    for one, other in zip(plain.model.state_dict().items(), compiled.model.state_dict().items(), strict=True):
        assert one[0] == other[0]
        torch.testing.assert_close(one[1], other[1])


def test_meta_and_history_can_be_left_out():
    for layout, width in ((ClinicalLayout("paper", meta=False), 14), (ClinicalLayout("paper", history=False), 3)):
        chosen = presets.options(presets.find("multi-input"), meta=layout.meta, history=layout.history)
        assert chosen.layout.width == width
        assert presets.build("multi-input", chosen).clinical[0].in_features == width
