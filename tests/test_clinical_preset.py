"""clinical: the network that reads no film, and the encoder of earlier visits that it shares with `beyond`."""

import pytest
import torch
from phantom_batch import overfit, phantom_batch, told_apart
from torch import nn

from cxr_ray import presets
from cxr_ray.clinical import ClinicalLayout
from cxr_ray.errors import CxrRayError, UsageError
from cxr_ray.presets.clinical_only import PRESET
from cxr_ray.presets.preset import NetworkOptions
from cxr_ray.presets.visits import ClinicalEncoder

RICH = ClinicalLayout("rich")
META, SUMMARY, VISIT = 6, 63, 16


def clinical_vectors(n: int, took_place: list[float], seed: int = 0) -> torch.Tensor:
    """Rich vectors of random numbers; `took_place` says so of the latest visit, the second and the third latest."""
    numbers = torch.randn(n, META + SUMMARY + 3 * VISIT, generator=torch.Generator().manual_seed(seed))
    for back, flag in enumerate(took_place):
        numbers[:, META + SUMMARY + back * VISIT] = flag
    return numbers


def visit(back: int) -> slice:
    """Where the numbers of a visit stand, without its flag."""
    start = META + SUMMARY + back * VISIT
    return slice(start + 1, start + VISIT)


@pytest.fixture
def encoder() -> ClinicalEncoder:
    torch.manual_seed(0)
    return ClinicalEncoder(RICH, 8).eval()


@pytest.fixture
def no_images() -> torch.Tensor:
    return torch.zeros(32, 3, 0, 0)


def test_paper_network_counts_by_arithmetic():
    model = presets.build("clinical")
    assert sum(parameter.numel() for parameter in model.parameters()) == (17 * 32 + 32) + (32 * 16 + 16) + (16 * 14 + 14)
    assert model.reads_images is False
    assert model.backbone == ""


def test_rich_network_counts_by_arithmetic():
    model = presets.build("clinical", presets.options(PRESET, encoding="rich"))
    perceptron = (69 * 64 + 64) + (64 * 64 + 64)
    gru = 3 * 64 * (16 + 64) + 2 * 3 * 64
    norm = 2 * 64
    assert sum(parameter.numel() for parameter in model.parameters()) == perceptron + gru + norm + 64 * 14 + 14


def test_without_anything_to_read_it_is_refused():
    with pytest.raises(UsageError, match="preset clinical reads no image: leave it meta or history"):
        presets.options(PRESET, meta=False, history=False)


def test_there_are_no_imagenet_weights():
    with pytest.raises(CxrRayError, match="init 'imagenet': preset clinical reads no image; give --init random") as refused:
        presets.build("clinical", init="imagenet")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("took_place", [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
@torch.inference_mode()
def test_visits_are_torchs_gru_from_the_oldest_to_the_latest(encoder, took_place):
    clinical = clinical_vectors(4, took_place)
    gru = nn.GRU(VISIT, 8, batch_first=True)
    gru.load_state_dict({f"{name}_l0": tensor for name, tensor in encoder.visit.state_dict().items()})
    count = sum(took_place)
    state = torch.zeros(4, 8)
    if count:
        state = gru(clinical[:, META + SUMMARY :].reshape(4, 3, VISIT)[:, :count].flip(1))[1][0]
    expected = encoder.after(encoder.numbers(clinical[:, : META + SUMMARY]) + state)
    torch.testing.assert_close(encoder(clinical), expected)


@torch.inference_mode()
def test_the_numbers_of_a_visit_that_was_not_count_for_nothing(encoder):
    clinical = clinical_vectors(4, [1, 0, 0])
    absent, present = clinical.clone(), clinical.clone()
    absent[:, visit(1)] = 7
    absent[:, visit(2)] = -7
    present[:, visit(0)] += 1
    assert torch.equal(encoder(absent), encoder(clinical))
    assert not torch.allclose(encoder(present), encoder(clinical))


@torch.inference_mode()
def test_the_order_of_visits_counts(encoder):
    clinical = clinical_vectors(4, [1, 1, 1])
    swapped = clinical.clone()
    swapped[:, visit(0)], swapped[:, visit(2)] = clinical[:, visit(2)], clinical[:, visit(0)]
    assert not torch.allclose(encoder(swapped), encoder(clinical), atol=1e-3)


@torch.inference_mode()
def test_a_visit_that_may_have_been_moves_the_state_by_its_probability(encoder):
    clinical = clinical_vectors(4, [0.25, 0, 0])
    numbers = clinical[:, META + SUMMARY : META + SUMMARY + VISIT]
    state = 0.25 * encoder.visit(0.25 * numbers, torch.zeros(4, 8))
    torch.testing.assert_close(encoder(clinical), encoder.after(encoder.numbers(clinical[:, : META + SUMMARY]) + state))


@pytest.mark.parametrize(
    "layout", [ClinicalLayout(), ClinicalLayout(history=False), ClinicalLayout("rich", history=False)], ids=str
)
def test_layouts_without_single_visits_have_the_perceptron_alone(layout):
    encoder = ClinicalEncoder(layout, 8).eval()
    clinical = torch.randn(4, layout.width)
    assert encoder.visit is None
    torch.testing.assert_close(encoder(clinical), encoder.after(encoder.numbers(clinical)))


def test_history_without_meta_has_its_visits_behind_the_summary(no_images):
    model = presets.build("clinical", presets.options(PRESET, encoding="rich", meta=False)).eval()
    clinical = clinical_vectors(32, [1, 0, 0])[:, META:]
    other = clinical.clone()
    other[:, SUMMARY + VISIT + 1 : SUMMARY + 2 * VISIT] = 9
    with torch.inference_mode():
        assert torch.equal(model(no_images, clinical), model(no_images, other))


@pytest.mark.parametrize("encoding", ["paper", "rich"])
def test_every_parameter_learns_and_the_order_of_the_batch_changes_nothing(no_images, encoding):
    layout = ClinicalLayout(encoding)
    model = PRESET.make(NetworkOptions(layout, "default"))
    clinical = torch.randn(32, 17) if encoding == "paper" else clinical_vectors(32, [0, 0, 0])
    model(no_images, clinical).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    order = torch.randperm(32)
    with torch.inference_mode():
        straight = model.eval()(no_images, clinical)
        torch.testing.assert_close(model(no_images, clinical[order]), straight[order])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(no_images, clinical)
    torch.testing.assert_close(rounded.float(), straight, rtol=0, atol=0.05)


def test_the_prior_is_the_last_layers_bias(no_images):
    model = presets.build("clinical").eval()
    prior = torch.linspace(-1, -6, 14)
    model.set_prior(prior)
    with torch.inference_mode():
        model.head.weight.zero_()
        torch.testing.assert_close(model(no_images, torch.randn(32, 17)), prior.expand(32, 14))


@pytest.mark.parametrize("encoding", ["paper", "rich"])
def test_a_planted_rule_is_found_and_holds_for_patients_not_seen(encoding):
    """Finding k is there where it was there at an earlier visit: with the rich layout, at the second latest one."""
    torch.manual_seed(0)
    layout = ClinicalLayout(encoding)
    clinical = clinical_vectors(3072, [1, 1, 1]) if encoding == "rich" else torch.randn(3072, 17)
    first = META + SUMMARY + VISIT + 2 if encoding == "rich" else 3
    labels = (clinical[:, first : first + 14] > 0.5).float()
    model = PRESET.make(NetworkOptions(layout, "default"))
    images = torch.zeros(3072, 3, 0, 0)
    assert overfit(model, images[:2048], clinical[:2048], labels[:2048], steps=150, rate=1e-2) > 0.99
    with torch.inference_mode():
        assert told_apart(model(images[2048:], clinical[2048:]), labels[2048:]) > 0.9


@pytest.mark.parametrize("encoding", ["paper", "rich"])
def test_it_learns_32_patients(no_images, encoding):
    torch.manual_seed(0)
    batch = phantom_batch()
    clinical = batch.clinical_paper + 0.3 * torch.randn(32, 17)
    if encoding == "rich":
        clinical = torch.cat([clinical, clinical_vectors(32, [1, 1, 0])[:, 17:]], dim=1)
    model = PRESET.make(NetworkOptions(ClinicalLayout(encoding), "default"))
    assert overfit(model, no_images, clinical, batch.labels, steps=500, rate=1e-2) == 1.0
