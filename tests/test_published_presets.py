"""The published systems: parameters by arithmetic, pooling against its formula, figures as printed, and networks that learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from phantom_batch import overfit, phantom_batch, settle
from torch.nn import functional as F

from cxr_ray import presets, vision
from cxr_ray.clinical import ClinicalLayout
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import FINDINGS
from cxr_ray.losses import bce
from cxr_ray.presets import NetworkOptions
from cxr_ray.presets.guendel2018 import LOCATIONS
from cxr_ray.presets.pooling import log_mean_exp
from cxr_ray.presets.preset import Network
from cxr_ray.presets.wang2017 import Wang

VARIANTS = [
    ("chexnet", "default"),
    ("wang2017", "resnet50"),
    ("wang2017", "googlenet"),
    ("wang2017", "vgg16"),
    ("wang2017", "alexnet"),
    ("baltruschat2018", "resnet38"),
    ("baltruschat2018", "resnet50"),
    ("baltruschat2018", "resnet101"),
    ("guendel2018", "dnet"),
    ("guendel2018", "dnet-loc"),
]
IMAGE_ONLY = ClinicalLayout("paper", meta=False, history=False)
# Of the networks with torchvision's classifier taken off, from the counts that torchvision documents.
BACKBONES = {
    "densenet121": 6_953_856,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet101": 44_549_160 - 2_049_000,
    "googlenet": 6_624_904 - 1_025_000,
    "vgg16": 138_357_544 - 123_642_856,
    "alexnet": 61_100_840 - 58_631_144,
}


def make(name: str, variant: str, layout: ClinicalLayout = IMAGE_ONLY, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return presets.build(name, NetworkOptions(layout, variant))


def count(name: str, variant: str, layout: ClinicalLayout = IMAGE_ONLY) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make(name, variant, layout).parameters())


def settled(model: Network) -> Network:
    """The network with the batch norms' statistics of 64-px phantoms, without which untrained maps may fade to nothing."""
    batch = phantom_batch()
    settle(model, vision.as_input(batch.pixels[:4]), batch.clinical_paper[:4], batch.labels[:4])
    return model.eval()


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def untrained(request) -> Network:
    """Each network without clinical numbers, in evaluation mode; leave it as it is."""
    return make(*request.param).eval()


def resnet_count(depths: tuple[int, ...], colours: int) -> int:
    """Parameters of a bottleneck ResNet without its classifier (He et al. 2015): convolutions, and two numbers a batch norm."""
    total, channels = colours * 64 * 49 + 2 * 64, 64
    for stage, depth in enumerate(depths):
        narrow, wide = 64 << stage, 256 << stage
        for block in range(depth):
            total += channels * narrow + 9 * narrow**2 + narrow * wide + 2 * (2 * narrow + wide)
            if block == 0:
                total += channels * wide + 2 * wide
            channels = wide
    return total


def test_the_arithmetic_agrees_with_torchvisions_counts():
    assert resnet_count((3, 4, 6, 3), colours=3) == BACKBONES["resnet50"]
    assert resnet_count((3, 4, 23, 3), colours=3) == BACKBONES["resnet101"]


def test_parameters_of_chexnet():
    assert count("chexnet", "default") == 6_953_856 + 14_350 == 6_968_206


@pytest.mark.parametrize(("variant", "channels"), [("resnet50", 2048), ("googlenet", 1024), ("vgg16", 512), ("alexnet", 256)])
def test_parameters_of_wang2017(variant, channels):
    transition = channels * 1024 * 9 + 1024
    assert count("wang2017", variant) == BACKBONES[variant] + transition + 1024 * 14 + 14


@pytest.mark.parametrize(
    ("variant", "depths"), [("resnet38", (2, 3, 5, 2)), ("resnet50", (3, 4, 6, 3)), ("resnet101", (3, 4, 23, 3))]
)
def test_parameters_of_baltruschat2018(variant, depths):
    meta = presets.find("baltruschat2018").layout
    assert count("baltruschat2018", variant, meta) == resnet_count(depths, colours=1) + (2048 + 3) * 14 + 14


def test_parameters_of_guendel2018():
    convolutions = 2 * 3 * 3 * 9
    assert count("guendel2018", "dnet") == 6_968_206 + convolutions
    assert count("guendel2018", "dnet-loc") == 6_968_206 + convolutions + (1024 + 1) * 9
    assert len(set(LOCATIONS)) == 9


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("chexnet", [(0.841, True)]),
        ("wang2017", [(0.738, True), (0.745, False), (0.696, True)]),
        ("baltruschat2018", [(0.806, False)]),
        ("guendel2018", [(0.807, False)]),
    ],
)
def test_published_figures_have_the_means_that_their_sources_state(name, means):
    published = presets.find(name).published
    assert [row.verified for row in published] == [verified for _, verified in means]
    assert [row.mean for row in published] == pytest.approx([mean for mean, _ in means], abs=1e-3)
    assert all(row.mean_verified for row in published)


def test_figures_of_the_official_split_are_told_from_others():
    official = {name: [row.split == "official" for row in presets.find(name).published] for name, _ in VARIANTS}
    assert official == {
        "chexnet": [False],
        "wang2017": [False, True, False],
        "baltruschat2018": [True],
        "guendel2018": [True],
    }
    eight = presets.find("wang2017").published[2].auc
    assert list(eight) == list(FINDINGS[:8])


# Pooling


def maps(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
def test_pooling_is_the_logarithm_of_the_mean_exponential(sharpness):
    drawn = maps(3, 5, 7, 6)
    wide = drawn.double()
    direct = torch.exp(sharpness * wide).mean(dim=(2, 3)).log() / sharpness
    torch.testing.assert_close(log_mean_exp(wide, sharpness), direct, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_mean_exp(drawn, sharpness).double(), direct, rtol=1e-5, atol=1e-6)


def test_pooling_tends_to_the_mean_and_to_the_maximum():
    drawn = maps(2, 4, 8, 8)
    torch.testing.assert_close(log_mean_exp(drawn, 1e-6), drawn.mean(dim=(2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_mean_exp(drawn, 1e6), drawn.amax(dim=(2, 3)), rtol=1e-5, atol=1e-5)
    between = log_mean_exp(drawn, 10.0)
    assert (between > drawn.mean(dim=(2, 3))).all()
    assert (between < drawn.amax(dim=(2, 3))).all()


@pytest.mark.parametrize("centre", [1e5, -1e5])
def test_pooling_of_large_values_stays_exact(centre):
    """exp of these would be infinite, or zero and its logarithm infinite."""
    grid = torch.full((1, 1, 2, 2), centre)
    grid[0, 0, 0, 0] += 1
    pooled = log_mean_exp(grid, 10.0).item()
    # One of four places is e^10 times the others.
    assert pooled == pytest.approx(centre + np.log((np.exp(10.0) + 3) / 4) / 10, abs=0.01)


def test_gradients_of_pooling_are_the_shares_of_the_places():
    drawn = maps(2, 3, 4, 5).double().requires_grad_()
    log_mean_exp(drawn, 10.0).sum().backward()
    shares = torch.softmax(10 * drawn.detach().flatten(2), dim=2).reshape(drawn.shape)
    torch.testing.assert_close(drawn.grad, shares)
    assert torch.autograd.gradcheck(lambda values: log_mean_exp(values, 3.0), drawn.detach().requires_grad_())


def test_pooling_of_half_precision_is_computed_in_float32():
    drawn = maps(2, 3, 8, 8, scale=3.0).bfloat16()
    pooled = log_mean_exp(drawn, 10.0)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, log_mean_exp(drawn.float(), 10.0), rtol=0, atol=0)


@pytest.mark.parametrize("sharpness", [0.0, -1.0, float("nan")])
def test_pooling_refuses_a_sharpness_without_a_meaning(sharpness):
    with pytest.raises(ValueError, match="sharpness must be above 0"):
        log_mean_exp(maps(1, 1, 2, 2), sharpness)


# Heatmaps of wang2017


def test_class_maps_average_to_the_logits_where_pooling_does():
    torch.manual_seed(0)
    model = settled(Wang("googlenet", IMAGE_ONLY, sharpness=1e-6))
    images = vision.as_input(phantom_batch().pixels[:2])
    with torch.inference_mode():
        heat, logits = model.class_maps(images), model(images, torch.zeros(2, 0))
    assert heat.shape == (2, 14, 2, 2)
    torch.testing.assert_close(heat.mean(dim=(2, 3)) + model.head.bias, logits, rtol=1e-4, atol=1e-5)


def test_class_maps_of_one_place_are_the_logits_at_any_sharpness():
    model = settled(make("wang2017", "googlenet", ClinicalLayout()))
    images, clinical = vision.as_input(phantom_batch().pixels[:2], 32), phantom_batch().clinical_paper[:2]
    with torch.inference_mode():
        heat = model.class_maps(images)[:, :, 0, 0]
        share = model.clinical(clinical) @ model.head.weight[:, model.image_width :].T
        torch.testing.assert_close(heat + share + model.head.bias, model(images, clinical), rtol=1e-4, atol=1e-5)


# Inputs


def test_grey_filters_are_the_sum_of_the_coloured_ones():
    coloured, _ = vision.backbone("resnet50")
    model = make("baltruschat2018", "resnet50").eval()
    model.load_coloured(coloured.state_dict())
    images = vision.as_input(phantom_batch().pixels[:2])
    with torch.inference_mode():
        torch.testing.assert_close(model.feature_maps(images), coloured.eval()(images), rtol=1e-3, atol=1e-4)


def test_large_inputs_leave_the_tail_the_grid_of_small_ones():
    model = make("baltruschat2018", "resnet38").eval()
    images = vision.as_input(phantom_batch().pixels[:1])
    with torch.inference_mode():
        for size, grid in ((64, 2), (224, 7), (448, 7)):
            assert model.feature_maps(F.interpolate(images, (size, size))).shape == (1, 2048, grid, grid)
        large = F.interpolate(images, (448, 448))
        stages = model.features
        early = stages.layer1(stages.maxpool(stages.relu(stages.bn1(stages.conv1(large[:, :1])))))
        tail = stages.layer4(stages.layer3(stages.layer2(F.max_pool2d(early, 3, 2, 1))))
        torch.testing.assert_close(model.feature_maps(large), tail)


@pytest.mark.parametrize(("size", "seen"), [(1024, 256), (512, 256), (448, 224), (224, 224), (64, 64)])
def test_dnet_halves_what_is_large(size, seen):
    model = make("guendel2018", "dnet")
    with torch.inference_mode():
        reduced = model.reduction(torch.full((1, 3, size, size), 0.7))
    assert reduced.shape == (1, 3, seen, seen)
    # At first it is a weighted mean of neighbours, so that a plain image stays as it is but for its edge.
    torch.testing.assert_close(reduced[..., 2:-2, 2:-2], torch.full((1, 3, seen - 4, seen - 4), 0.7))


@pytest.mark.parametrize("name", ["chexnet", "wang2017", "baltruschat2018", "guendel2018"])
@pytest.mark.parametrize(
    "layout",
    [
        ClinicalLayout("paper", meta=True, history=False),
        ClinicalLayout("paper", meta=False, history=True),
        ClinicalLayout("paper", meta=True, history=True),
        ClinicalLayout("rich", meta=True, history=True),
    ],
    ids=["meta", "history", "paper", "rich"],
)
def test_each_clinical_number_that_is_switched_on_counts(name, layout):
    preset = presets.find(name)
    model = make(name, preset.variants[0], layout).eval()
    with torch.device("meta"):
        blind = make(name, preset.variants[0]).head.in_features
    added = layout.width if name == "baltruschat2018" else 16
    assert model.head.in_features == blind + added
    features = torch.randn(1, blind).expand(layout.width + 1, -1)
    clinical = torch.cat([torch.zeros(1, layout.width), torch.eye(layout.width)])
    with torch.inference_mode():
        beside = torch.cat([features, clinical], dim=1) if added == layout.width else model.fuse(features, clinical)
        moved = (model.head(beside)[1:] - model.head(beside)[:1]).abs().amax(dim=1)
        assert (moved > 1e-6).all()
        image = vision.as_input(phantom_batch().pixels[:1], 32).expand(2, -1, -1, -1)
        none, all_of_them = model(image, torch.stack([clinical[0], torch.ones(layout.width)]))
    assert not torch.allclose(none, all_of_them)


def test_rows_of_a_batch_do_not_touch_each_other(untrained):
    images, none = vision.as_input(phantom_batch().pixels[:4]), torch.zeros(4, 0)
    order = torch.tensor([2, 0, 3, 1])
    with torch.inference_mode():
        straight, permuted = untrained(images, none), untrained(images[order], none)
        alone = untrained(images[1:2], none[1:2])
    assert straight.shape == (4, 14)
    torch.testing.assert_close(permuted, straight[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, straight[1:2], rtol=1e-4, atol=1e-5)
    assert not torch.equal(straight[0], straight[1])


def test_bf16_gives_nearly_the_same_logits(untrained):
    images, none = vision.as_input(phantom_batch().pixels[:4]), torch.zeros(4, 0)
    assert images.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        full = untrained(images, none) - untrained.head.bias
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = untrained(images, none).float() - untrained.head.bias
    # bf16 has eight bits, and errors of many layers partly cancel.
    assert (low - full).abs().mean() < 0.03 * full.abs().mean()


def test_memory_format_changes_nothing(untrained):
    images, none = vision.as_input(phantom_batch().pixels[:2]), torch.zeros(2, 0)
    with torch.inference_mode():
        torch.testing.assert_close(untrained(images.contiguous(), none), untrained(images, none), rtol=1e-4, atol=1e-5)


def test_a_prior_moves_the_logits_by_its_log_odds(untrained):
    images, none, log_odds = vision.as_input(phantom_batch().pixels[:2]), torch.zeros(2, 0), torch.linspace(-6, 1, 14)
    with torch.inference_mode():
        before, bias = untrained(images, none), untrained.head.bias.clone()
        untrained.set_prior(log_odds)
        after = untrained(images, none)
        untrained.set_prior(bias)
    torch.testing.assert_close(after - before, (log_odds - bias).expand(2, -1), rtol=1e-4, atol=1e-4)


# Locations of guendel2018


def test_locations_stand_behind_the_findings_in_training_only():
    model = make("guendel2018", "dnet-loc")
    images = vision.as_input(phantom_batch().pixels[:4], 32)
    with torch.inference_mode():
        trained = model(images, torch.zeros(4, 0))
        evaluated = model.eval()(images, torch.zeros(4, 0))
    assert trained.shape == (4, 14 + len(LOCATIONS))
    assert evaluated.shape == (4, 14)


def gradients(model: Network, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    bce(model(vision.as_input(phantom_batch().pixels[:8], 32), torch.zeros(8, 0)), targets).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_unknown_locations_teach_nothing():
    """Without location targets, all that both networks have learns alike, and the further outputs lie still."""
    located, plain = make("guendel2018", "dnet-loc"), make("guendel2018", "dnet")
    own = plain.state_dict()
    plain.load_state_dict({name: tensor for name, tensor in located.state_dict().items() if name in own})
    labels = phantom_batch().labels[:8]
    unknown = torch.cat([labels, torch.full((8, len(LOCATIONS)), float("nan"))], dim=1)
    expected = gradients(plain, labels)
    for targets in (labels, unknown):
        located.zero_grad()
        found = gradients(located, targets)
        assert found.pop("locations.weight").abs().max() == 0
        assert found.pop("locations.bias").abs().max() == 0
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_known_locations_teach():
    model = make("guendel2018", "dnet-loc")
    targets = torch.full((8, 14 + len(LOCATIONS)), float("nan"))
    targets[:, 14 + LOCATIONS.index("left lung")] = torch.tensor([0.0, 1.0] * 4)
    found = gradients(model, targets)
    taught = found["locations.weight"].abs().amax(dim=1) > 0
    assert [name for name, learns in zip(LOCATIONS, taught, strict=True) if learns] == ["left lung"]
    assert found["head.weight"].abs().max() == 0
    assert found["features.conv0.weight"].abs().max() > 0


# ImageNet weights, as files that torchvision would have downloaded


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """A cache that holds weights of the published form for DenseNet-121 and ResNet-50: random ones, to be recognised."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.manual_seed(5)
    state = vision.models.resnet50(weights=None).state_dict()
    torch.save(state, checkpoints / "resnet50-0676ba61.pth")
    densenet = vision.models.densenet121(weights=None).state_dict()
    torch.save(densenet, checkpoints / "densenet121-a639ec97.pth")
    return state, densenet


def test_imagenet_weights_reach_the_backbone(imagenet):
    resnet, densenet = imagenet
    for name, variant, first, expected in (
        ("chexnet", "default", "conv0", densenet["features.conv0.weight"]),
        ("guendel2018", "dnet-loc", "conv0", densenet["features.conv0.weight"]),
        ("wang2017", "resnet50", "conv1", resnet["conv1.weight"]),
        ("baltruschat2018", "resnet50", "conv1", resnet["conv1.weight"].sum(dim=1, keepdim=True)),
    ):
        model = make(name, variant)
        model.load_imagenet()
        torch.testing.assert_close(model.features.get_submodule(first).weight, expected)
        if "resnet" in variant:
            torch.testing.assert_close(model.features.layer4[2].conv3.weight, resnet["layer4.2.conv3.weight"])


def test_there_are_no_imagenet_weights_of_resnet38():
    with pytest.raises(CxrRayError, match="no such weights of resnet38; give --init random"):
        make("baltruschat2018", "resnet38").load_imagenet()


# Learning


@pytest.mark.parametrize(
    ("name", "variant", "size", "rate"),
    [
        ("chexnet", "default", 32, 3e-3),
        ("wang2017", "googlenet", 48, 1e-3),
        ("baltruschat2018", "resnet38", 32, 1e-3),
        ("guendel2018", "dnet-loc", 32, 3e-3),
    ],
)
def test_it_learns_32_phantoms_by_heart(name, variant, size, rate):
    batch, layout = phantom_batch(), presets.find(name).layout
    assert (batch.labels.sum(dim=0) > 0).all()
    model = make(name, variant, layout)
    images = vision.as_input(batch.pixels, size)
    assert overfit(model, images, batch.clinical_paper[:, : layout.width], batch.labels, steps=80, rate=rate) == 1.0


def test_layouts_of_the_sources():
    widths = {name: presets.find(name).layout.width for name, _ in VARIANTS}
    assert widths == {"chexnet": 0, "wang2017": 0, "baltruschat2018": 3, "guendel2018": 0}
    for name in widths:
        layout = presets.find(name).layout
        assert replace(layout, history=True).summary_width == len(FINDINGS)
