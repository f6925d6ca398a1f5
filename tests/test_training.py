"""The training step: schedule, optimiser, augmentation, and that a step goes downhill."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cxr_ray import presets
from cxr_ray.losses import ClassWeights, weighted_bce
from cxr_ray.training import (
    Batch,
    TrainingStep,
    TrainSettings,
    augment,
    learning_rate_factor,
    make_optimizer,
    probabilities,
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
    )


def training_step(chosen: TrainSettings) -> TrainingStep:
    torch.manual_seed(0)
    model = presets.build("multi-input").train()
    return TrainingStep(model, make_optimizer(model, chosen), HALF, chosen, torch.Generator().manual_seed(0))


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


def test_augmentation_off_is_identity():
    images = as_input(batch().pixels)
    torch.testing.assert_close(augment(images, 0.0, torch.Generator()), images, rtol=0, atol=0)


def test_augmentation_keeps_form_and_follows_its_generator():
    images = as_input(batch().pixels)

    def augmented(seed):
        return augment(images, 1.0, torch.Generator().manual_seed(seed))

    one = augmented(3)
    assert (one.shape, one.dtype, one.device) == (images.shape, images.dtype, images.device)
    assert torch.isfinite(one).all()
    torch.testing.assert_close(one, augmented(3), rtol=0, atol=0)
    assert not torch.allclose(one, augmented(4))
    # The channels stay one grey.
    torch.testing.assert_close(one[:, 0], one[:, 2], rtol=0, atol=0)


def test_the_faintest_augmentation_is_a_mirror_or_nothing():
    images = as_input(batch(32).pixels)
    moved = augment(images, 1e-6, torch.Generator().manual_seed(0))
    same = (moved - images).abs().amax(dim=(1, 2, 3)) < 1e-2
    mirrored = (moved - images.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-2
    assert (same ^ mirrored).all()
    assert 8 <= same.sum() <= 24


def test_augmentation_does_not_turn_films_over():
    """A bright upper half stays the upper half at full strength."""
    pixels = torch.zeros(32, 32, 32, dtype=torch.uint8)
    pixels[:, :16] = 255
    moved = augment(as_input(pixels), 1.0, torch.Generator().manual_seed(0))
    assert (moved[:, 0, :12].mean(dim=(1, 2)) > moved[:, 0, 20:].mean(dim=(1, 2)) + 3).all()


def test_steps_lower_the_loss_of_a_fixed_batch():
    step, fixed = training_step(train_settings(learning_rate=3e-4, head_rate=3.0)), batch()
    losses = [step(fixed, progress=0.1).item() for _ in range(10)]
    assert math.isfinite(losses[-1])
    assert losses[0] == pytest.approx(0.5 * math.log(2), rel=0.3)
    assert losses[-1] < 0.8 * losses[0]


def test_a_step_at_the_end_of_the_schedule_moves_no_weight():
    step = training_step(train_settings())
    before = {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}
    step(batch(4), progress=0.0)
    for name, parameter in step.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert {group["lr"] for group in step.optimizer.param_groups} == {0.0}
    step(batch(4), progress=0.1)
    assert sorted({group["lr"] for group in step.optimizer.param_groups}) == pytest.approx([1e-3, 1e-2])
    assert not torch.equal(step.model.head.weight, before["head.weight"])


def test_a_step_returns_the_loss_before_it():
    step, fixed = training_step(train_settings()), batch(4)
    with torch.no_grad():
        expected = weighted_bce(step.model(as_input(fixed.pixels), fixed.clinical), fixed.labels, HALF)
    loss = step(fixed, progress=0.5)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_unlabelled_images_teach_nothing_to_the_last_layer():
    step, fixed = training_step(train_settings(weight_decay=0.0)), batch(4)
    before = step.model.head.weight.detach().clone()
    step(Batch(fixed.pixels, fixed.clinical, torch.full((4, 14), float("nan"))), progress=0.5)
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
