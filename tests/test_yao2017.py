"""yao2017: an LSTM over the findings, whose marginals are sums over all courses and not one course."""

import math
from itertools import product

import pytest
import torch
from phantom_batch import overfit, phantom_batch
from torch import nn

from cxr_ray import presets, vision
from cxr_ray.clinical import ClinicalLayout
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.presets.yao2017 import PRESET, FindingChain, Yao2017, enumerated_log_odds

IMAGE_ONLY = ClinicalLayout(meta=False, history=False)
ABSENT, PRESENT, UNKNOWN = 0, 1, 2


def log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def chain_with_opinions(width: int, labels: int, hidden: int) -> FindingChain:
    """Untrained chains answer one half to everything; this one depends strongly on image and earlier labels."""
    chain = FindingChain(width, labels, hidden)
    with torch.no_grad():
        chain.earlier.weight.normal_(0, 2)
        chain.output.weight.normal_(0, 2)
    return chain


def network(layout: ClinicalLayout = IMAGE_ONLY, **arguments) -> Yao2017:
    model = Yao2017(layout, **arguments)
    model.set_prior(torch.linspace(-1, -4, 14))
    with torch.no_grad():
        model.chain.output.weight.mul_(5)
    return model


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_three_labels_by_hand():
    """The eight courses one by one, each a product of three probabilities."""
    chain, vector = chain_with_opinions(5, 3, 4), torch.randn(2, 5)
    present = torch.zeros(2, 3)
    total = torch.zeros(2)
    for course in product((ABSENT, PRESENT), repeat=3):
        image, state = chain.begin(vector)
        earlier, probability = torch.zeros(2, 1, dtype=torch.long), torch.ones(2)
        for label, taken in enumerate(course):
            logit, state = chain.step(label, earlier, image, state)
            likely = logit[:, 0].sigmoid()
            probability = probability * (likely if taken else 1 - likely)
            earlier = torch.full((2, 1), taken)
        present += probability[:, None] * torch.tensor(course)
        total += probability
    torch.testing.assert_close(total, torch.ones(2))
    assert (present > 0.01).all()
    assert (present < 0.99).all()
    torch.testing.assert_close(chain.marginals(vector, 4).log_odds.sigmoid(), present)
    torch.testing.assert_close(enumerated_log_odds(chain, vector).sigmoid(), present)


def two_labels() -> FindingChain:
    """A chain of known answers: p(a) = .4; p(b | a) = .9, p(b | not a) = .1.

    All gates are held open but the forget gate, so that the state is tanh(tanh(candidate)), and the candidate is 0 at first,
    then 20 or -20 as a is told.
    """
    chain = FindingChain(1, 2, 1)
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.zero_()
        chain.image.bias.copy_(torch.tensor([30.0, -30.0, 0.0, 30.0]))
        chain.earlier.weight[1 + ABSENT, 2] = -20
        chain.earlier.weight[1 + PRESENT, 2] = 20
        chain.output.weight[1] = log_odds(0.9) / math.tanh(1)
        chain.output.bias[0] = log_odds(0.4)
    return chain


@torch.inference_mode()
def test_one_s_own_decisions_are_no_marginals():
    chain, vector = two_labels(), torch.zeros(1, 1)
    exact = chain.marginals(vector, 2)
    torch.testing.assert_close(exact.log_odds.sigmoid(), torch.tensor([[0.4, 0.4 * 0.9 + 0.6 * 0.1]]))
    torch.testing.assert_close(exact.coverage, torch.ones(1, 2))
    # A single course decides against a, and knows b from there only.
    greedy = chain.marginals(vector, 1)
    torch.testing.assert_close(greedy.log_odds.sigmoid(), torch.tensor([[0.4, 0.1]]))
    torch.testing.assert_close(greedy.coverage, torch.tensor([[1.0, 0.6]]))


@torch.inference_mode()
def test_a_wide_beam_is_exact_for_fourteen_labels():
    chain, vector = chain_with_opinions(3, 14, 3), torch.randn(1, 3)
    wide = chain.marginals(vector, 2**13)
    torch.testing.assert_close(wide.coverage, torch.ones(1, 14))
    torch.testing.assert_close(wide.log_odds, enumerated_log_odds(chain, vector), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_narrow_beam_is_exact_at_first_and_then_within_what_it_let_go():
    chain, vector = chain_with_opinions(3, 14, 3), torch.randn(1, 3)
    truth = enumerated_log_odds(chain, vector).sigmoid()
    narrow = chain.marginals(vector, 8)
    answered, coverage = narrow.log_odds.sigmoid(), narrow.coverage
    torch.testing.assert_close(answered[:, :4], truth[:, :4])
    assert (coverage.diff(dim=1) <= 1e-6).all()
    assert coverage[0, -1] < 0.999
    assert not torch.allclose(answered, truth, atol=1e-4)
    assert (truth >= coverage * answered - 1e-6).all()
    assert (truth <= coverage * answered + 1 - coverage + 1e-6).all()


def unrolled(model: Yao2017, vector: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """Teacher forcing with torch's own LSTM, which reads image vector and earlier label side by side."""
    chain, order = model.chain, model.order.tolist()
    rows, hidden = chain.earlier.weight.shape[0], chain.recurrent.in_features
    lstm = nn.LSTMCell(vector.shape[1] + rows, hidden)
    with torch.no_grad():
        lstm.weight_ih.copy_(torch.cat([chain.image.weight, chain.earlier.weight.T], dim=1))
        lstm.bias_ih.copy_(chain.image.bias)
        lstm.weight_hh.copy_(chain.recurrent.weight)
        lstm.bias_hh.zero_()
    first = chain.initial(vector)
    state = first[:, :hidden].tanh(), first[:, hidden:]
    logits = torch.zeros(len(vector), 14)
    row = torch.zeros(len(vector), dtype=torch.long)
    for step, finding in enumerate(order):
        state = lstm(torch.cat([vector, nn.functional.one_hot(row, rows)], dim=1), state)
        logits[:, finding] = chain.output(state[0])[:, step]
        row = 1 + 3 * step + told[:, finding]
    return logits


@pytest.mark.parametrize("order", [FINDINGS, FINDINGS[::-1]], ids=["NIH order", "reversed"])
def test_teacher_forcing_is_torchs_lstm_unrolled(images, order):
    model = network(ClinicalLayout(), order=order).train()
    clinical = torch.randn(6, 17)
    told = torch.randint(0, 3, (6, 14))
    labels = torch.where(told == UNKNOWN, torch.nan, told.float())
    with torch.no_grad():
        vector = torch.cat([model.features(images).mean(dim=(2, 3)), clinical], dim=1)
        torch.testing.assert_close(model(images, clinical, labels), unrolled(model, vector, told))
        untold = torch.full_like(told, UNKNOWN)
        torch.testing.assert_close(model(images, clinical), unrolled(model, vector, untold))


def test_a_label_is_told_to_later_findings_only(images):
    model = network(order=FINDINGS[::-1]).train()
    labels = torch.zeros(6, 14)
    other = labels.clone()
    other[:, FINDINGS.index("Mass")] = 1
    with torch.no_grad():
        changed = (model(images, torch.zeros(6, 0), labels) != model(images, torch.zeros(6, 0), other)).any(dim=0)
    assert [name for name, moved in zip(FINDINGS, changed, strict=True) if moved] == list(FINDINGS[: FINDINGS.index("Mass")])


@torch.inference_mode()
def test_evaluation_gives_marginals_in_nih_order_and_reads_no_label(images):
    model = network(order=FINDINGS[::-1]).eval()
    nothing = torch.zeros(2, 0)
    answered = model(images[:2], nothing)
    exact = model.chain.marginals(model.features(images[:2]).mean(dim=(2, 3)), 2**13)
    # The first eight in the chain's order have no more than 128 courses before them.
    torch.testing.assert_close(answered.flip(1)[:, :8], exact.log_odds[:, :8], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answered.flip(1).sigmoid(), exact.log_odds.sigmoid(), rtol=0, atol=0.02)
    assert torch.equal(model(images[:2], nothing, torch.ones(2, 14)), answered)


@torch.inference_mode()
def test_the_order_travels_with_the_weights(images):
    trained, loaded = network(order=FINDINGS[::-1]).eval(), Yao2017(IMAGE_ONLY).eval()
    loaded.load_state_dict(trained.state_dict())
    nothing = torch.zeros(6, 0)
    assert torch.equal(loaded(images, nothing), trained(images, nothing))


@torch.inference_mode()
def test_the_order_of_the_batch_changes_nothing(images):
    model, clinical = network(ClinicalLayout()).eval(), torch.randn(6, 17)
    shuffled = torch.tensor([3, 0, 5, 1, 4, 2])
    straight = model(images, clinical)
    torch.testing.assert_close(model(images[shuffled], clinical[shuffled]), straight[shuffled], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(images[1:2], clinical[1:2]), straight[1:2], rtol=1e-4, atol=1e-4)
    assert straight.std(dim=0).min() > 1e-3


@torch.inference_mode()
def test_bfloat16_comes_near_and_stays_finite(images):
    model = network().eval()
    nothing = torch.zeros(6, 0)
    straight = model(images, nothing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(images, nothing)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.sigmoid(), straight.sigmoid(), rtol=0, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.chain.output.bias.fill_(-1e6)
        assert torch.equal(model(images, nothing), torch.full((6, 14), -30.0))


def test_every_parameter_learns_whether_or_not_labels_are_told(images):
    for labels in (None, torch.zeros(6, 14)):
        model = network().train()
        model(images, torch.zeros(6, 0), labels).sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.inference_mode()
def test_the_prior_is_where_a_chain_without_opinions_starts(images):
    model = Yao2017(IMAGE_ONLY, FINDINGS[::-1]).eval()
    model.chain.output.weight.zero_()
    prior = torch.linspace(-1, -6, 14)
    model.set_prior(prior)
    torch.testing.assert_close(model(images[:1], torch.zeros(1, 0))[0], prior, rtol=1e-4, atol=1e-4)


def test_the_preset():
    model = presets.build("yao2017")
    channels = 48
    for block in (4, 6, 8):
        channels = (channels + block * 24) // 2
    channels += 8 * 24
    assert channels == 342
    chain = (342 * 200 + 200) + (342 * 400 + 400) + (1 + 13 * 3) * 400 + 100 * 400 + (100 * 14 + 14)
    assert sum(parameter.numel() for parameter in model.chain.parameters()) == chain
    assert PRESET.published[0].mean == pytest.approx(0.803, abs=5e-4)
    with pytest.raises(CxrRayError, match="init 'imagenet': preset yao2017 is trained from scratch") as refused:
        presets.build("yao2017", init="imagenet")
    assert "\n" not in str(refused.value)


def test_it_learns_32_films():
    batch = phantom_batch()
    model = presets.build("yao2017")
    assert overfit(model, vision.as_input(batch.pixels, 32), torch.zeros(32, 0), batch.labels, steps=50, rate=3e-3) == 1.0
