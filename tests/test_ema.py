"""Averaged weights: the recurrence, lending the average to the module, and going on from a checkpoint."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from cxr_ray.ema import AveragedWeights
from cxr_ray.errors import CxrRayError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(number)) + number
    optimizer.zero_grad()
    model.train()(images).square().mean().backward()
    optimizer.step()


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_recurrence(decay):
    """average <- d average + (1 - d) weights with d = min(decay, (1 + step) / (10 + step)), in float64."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = AveragedWeights(model, decay)
    expected = {name: tensor.double().numpy() for name, tensor in copied(model).items()}
    for step in range(25):
        train_step(model, optimizer, step)
        averaged.update()
        share = min(decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            expected[name] = share * expected[name] + (1 - share) * tensor.double().numpy()
    assert averaged.step == 25
    average = averaged.state_dict()["average"]
    assert average.keys() == expected.keys()
    for name, tensor in average.items():
        if tensor.is_floating_point():
            np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    # Batch-norm statistics are averaged, and their count of batches is not.
    moved = model[1].running_mean - average["1.running_mean"]
    assert (moved.abs().max() > 0.1) == (decay > 0)
    assert average["1.num_batches_tracked"].item() == 25


def test_the_first_average_is_the_module_itself():
    model = network()
    assert_same(AveragedWeights(model, 0.9).state_dict()["average"], copied(model))


def test_applied_lends_the_average_and_gives_the_weights_back_bitwise():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = AveragedWeights(model, 0.9)
    for step in range(3):
        train_step(model, optimizer, step)
        averaged.update()
    own = copied(model)
    average = {name: tensor.clone() for name, tensor in averaged.state_dict()["average"].items()}
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    with averaged.applied():
        assert_same(copied(model), average)
        assert not torch.equal(model[0].weight, own["0.weight"])
        # Where the optimiser and DDP hold them.
        assert [tensor.data_ptr() for tensor in model.state_dict().values()] == places
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same(copied(model), own)
    assert_same(averaged.state_dict()["average"], average)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_gives_the_weights_back(error):
    model = network()
    averaged = AveragedWeights(model, 0.9)
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    own = copied(model)
    with pytest.raises(error), averaged.applied():
        assert not torch.equal(model[0].weight, own["0.weight"])
        raise error
    assert_same(copied(model), own)
    averaged.update()


def test_validation_in_inference_mode_leaves_the_weights_trainable():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = AveragedWeights(model, 0.9)
    train_step(model, optimizer, 0)
    with averaged.applied(), torch.inference_mode():
        model.eval()(torch.zeros(1, 1, 8, 8))
    with torch.inference_mode(), averaged.applied():
        model.eval()(torch.zeros(1, 1, 8, 8))
    before = copied(model)
    train_step(model, optimizer, 1)
    averaged.update()
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_training_goes_on_as_if_nobody_had_validated():
    runs = []
    for validates in (False, True):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        averaged = AveragedWeights(model, 0.9)
        for step in range(4):
            train_step(model, optimizer, step)
            averaged.update()
            if validates:
                with averaged.applied(), torch.no_grad():
                    model.eval()(torch.zeros(1, 1, 8, 8))
        runs.append((copied(model), averaged.state_dict()["average"]))
    assert_same(runs[0][0], runs[1][0])
    assert_same(runs[0][1], runs[1][1])


def test_what_is_done_to_the_module_meanwhile_is_done_to_the_average():
    """So several workers can agree on its batch-norm statistics."""
    model = network()
    averaged = AveragedWeights(model, 0.9)
    with averaged.applied():
        model[1].running_mean.fill_(7)
    assert averaged.state_dict()["average"]["1.running_mean"].tolist() == [7] * 4
    assert model[1].running_mean.tolist() == [0] * 4


def test_a_run_that_was_resumed_goes_on_identically():
    def run(model, averaged, steps):
        for step in steps:
            train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), step)
            averaged.update()

    whole = network()
    averaged_whole = AveragedWeights(whole, 0.5)
    run(whole, averaged_whole, range(10))

    first = network()
    averaged_first = AveragedWeights(first, 0.5)
    run(first, averaged_first, range(4))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "average": averaged_first.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    second = network()
    averaged_second = AveragedWeights(second, 0.5)
    second.load_state_dict(state["model"])
    averaged_second.load_state_dict(state["average"])
    assert averaged_second.step == 4
    run(second, averaged_second, range(4, 10))
    assert_same(copied(second), copied(whole))
    assert_same(averaged_second.state_dict()["average"], averaged_whole.state_dict()["average"])


@pytest.mark.parametrize("change", ["absent", "further", "shape"])
def test_the_average_of_another_network_is_refused_whole(change):
    averaged = AveragedWeights(network(), 0.9)
    before = copy.deepcopy(averaged.state_dict())
    state = copy.deepcopy(before)
    state["step"] = 5
    for tensor in state["average"].values():
        tensor.add_(1)
    if change == "absent":
        del state["average"]["3.bias"]
    elif change == "further":
        state["average"]["4.bias"] = torch.zeros(2)
    else:
        state["average"]["3.bias"] = torch.zeros(3)
    with pytest.raises(CxrRayError, match=r"'(3|4)\.bias' has shape .* resume with the preset"):
        averaged.load_state_dict(state)
    assert averaged.step == 0
    assert_same(averaged.state_dict()["average"], before["average"])


def test_a_tensor_of_two_names_is_exchanged_once():
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    model["other"].weight = model["one"].weight
    averaged = AveragedWeights(model, 0.9)
    first = model["one"].weight.detach().clone()
    with torch.no_grad():
        model["one"].weight.fill_(3)
    with averaged.applied():
        assert torch.equal(model["other"].weight, first)
    assert model["one"].weight.tolist() == [[3, 3], [3, 3]]


def test_nothing_else_happens_while_the_average_is_lent():
    averaged = AveragedWeights(network(), 0.9)
    with averaged.applied():
        for forbidden in (averaged.update, averaged.state_dict, averaged.applied().__enter__):
            with pytest.raises(RuntimeError, match="leave 'applied' first"):
                forbidden()
    averaged.update()


def test_a_module_that_was_moved_is_noticed():
    model = network()
    averaged = AveragedWeights(model, 0.9)
    model.to(torch.float64)
    with pytest.raises(RuntimeError, match="move the module before averaging"), averaged.applied():
        pass


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_impossible_decays(decay):
    with pytest.raises(ValueError, match="below 1"):
        AveragedWeights(network(), decay)


def test_nothing_is_read_back_from_the_device():
    """On the meta device there are no values: whatever asks for one fails."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    averaged = AveragedWeights(model, 0.9)
    averaged.update()
    with averaged.applied():
        pass
    assert averaged.step == 1
