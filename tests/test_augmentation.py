"""Augmentation and test-time views: reference values, geometry read off the result, and what stays out of chance's reach."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cxr_ray.augmentation import BLACK, ERASED_SHARE, augment, views
from cxr_ray.train_settings import Augmentation
from cxr_ray.vision import as_input
from ingest.phantom import simulate_patients
from ingest.phantom_drawing import draw

KINDS = get_args(Augmentation)
WHITE = (1 - 0.449) / 0.226
every_kind = pytest.mark.parametrize("kind", KINDS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_films(images: int = 8, edge: int = 32) -> torch.Tensor:
    return as_input(torch.randint(0, 256, (images, edge, edge), generator=seeded(1), dtype=torch.uint8))


def films_of(picture: torch.Tensor, images: int) -> torch.Tensor:
    """One picture (H, W) as a batch of the same film, in the numbers that it has."""
    return picture.expand(images, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def coordinates(edge: int) -> torch.Tensor:
    """Centres of pixels from -1 to 1."""
    return (torch.arange(edge) + 0.5) * 2 / edge - 1


@every_kind
def test_strength_zero_changes_nothing(kind):
    images = noise_films()
    generator = seeded()
    assert torch.equal(augment(images, kind, 0.0, generator), images)


@every_kind
def test_images_of_no_pixels_pass(kind):
    for empty in (torch.zeros(5, 3, 0, 0), torch.zeros(0, 3, 8, 8)):
        assert augment(empty, kind, 1.0, seeded()).shape == empty.shape


@every_kind
def test_form_is_kept_and_the_generator_decides(kind):
    images = noise_films()
    before = images.clone()
    one = augment(images, kind, 1.0, seeded(3))
    assert (one.shape, one.dtype, one.device) == (images.shape, images.dtype, images.device)
    assert one.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(one).all()
    assert torch.equal(one, augment(images, kind, 1.0, seeded(3)))
    assert not torch.allclose(one, augment(images, kind, 1.0, seeded(4)))
    # The channels stay one grey, and the films that came in are as they were.
    assert torch.equal(one[:, 0], one[:, 2])
    assert torch.equal(images, before)


@every_kind
def test_a_batch_takes_as_many_draws_whatever_it_shows(kind):
    after = []
    for images, strength in ((noise_films(), 1.0), (noise_films() * 0, 1.0), (noise_films(), 0.3)):
        generator = seeded(5)
        augment(images, kind, strength, generator)
        after.append(torch.rand(1, generator=generator).item())
    assert after[0] == after[1] == after[2]
    assert after[0] != torch.rand(1, generator=seeded(5)).item()


@every_kind
def test_a_film_does_not_depend_on_the_others_of_its_batch(kind):
    images = noise_films()
    others = images.clone()
    others[3] = 0.5
    one, other = (augment(batch, kind, 1.0, seeded(2)) for batch in (images, others))
    kept = [number for number in range(8) if number != 3]
    assert torch.equal(one[kept], other[kept])
    assert not torch.equal(one[3], other[3])


@every_kind
def test_films_are_not_turned_over(kind):
    """A bright upper half stays the upper half at full strength; a small crop may lie in one half, with a black corner."""
    pixels = torch.zeros(64, 32, 32, dtype=torch.uint8)
    pixels[:, :16] = 255
    moved = augment(as_input(pixels), kind, 1.0, seeded())
    upper, lower = moved[:, 0, :12].mean(dim=(1, 2)), moved[:, 0, 20:].mean(dim=(1, 2))
    if kind == "crop":
        assert (upper > lower - 0.3).all()
        assert (upper > lower + 3).float().mean() > 0.5
    else:
        assert (upper > lower + (1 if kind == "strong" else 3)).all()


@every_kind
def test_no_value_is_read_back_from_the_device(kind):
    """On the meta device there are no values: whatever asks for one fails."""
    moved = augment(torch.zeros(4, 3, 16, 16, device="meta"), kind, 1.0, seeded())
    assert (moved.device.type, moved.shape) == ("meta", (4, 3, 16, 16))


def test_flip_is_a_mirror_or_nothing_bitwise():
    images = noise_films(200, 16)
    moved = augment(images, "flip", 1.0, seeded())
    same = (moved == images).all(dim=(1, 2, 3))
    mirrored = (moved == torch.flip(images, [3])).all(dim=(1, 2, 3))
    assert (same ^ mirrored).all()
    # Half of 200, within four standard deviations.
    assert 72 <= same.sum() <= 128
    # The share does not follow the strength.
    assert torch.equal(augment(images, "flip", 0.1, seeded()), moved)


@pytest.mark.parametrize("kind", ["mild", "crop", "strong"])
def test_the_faintest_change_is_a_mirror_or_nothing(kind):
    images = noise_films(32)
    moved = augment(images, kind, 1e-6, seeded())
    same = (moved - images).abs().amax(dim=(1, 2, 3)) < 1e-2
    mirrored = (moved - images.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-2
    assert (same ^ mirrored).all()
    assert 8 <= same.sum() <= 24


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_mild_image_by_image(strength):
    """Matrices written out in float64, and draws in the order angle, scale, mirror, shift across, shift down, contrast."""
    images = noise_films(20, 24)
    moved = augment(images, "mild", strength, seeded(7))
    generator = seeded(7)
    draws = [torch.rand(20, generator=generator).double().numpy() for _ in range(6)]
    for number in range(20):
        angle, scale, mirror, across, down, contrast = (draw[number] for draw in draws)
        turn = math.radians(5) * strength * (2 * angle - 1)
        size = 1 + 0.05 * strength * (2 * scale - 1)
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        linear = rotation @ np.diag([-size if mirror < 0.5 else size, size])
        # 4 % of the film in coordinates from -1 to 1.
        shift = 0.08 * strength * (2 * np.array([across, down]) - 1)
        matrix = torch.from_numpy(np.column_stack([linear, shift]))[None]
        film = images[number : number + 1].double()
        grid = F.affine_grid(matrix, [1, 3, 24, 24], align_corners=False)
        expected = F.grid_sample(film, grid, padding_mode="border", align_corners=False)
        expected = expected * (1 + 0.10 * strength * (2 * contrast - 1))
        torch.testing.assert_close(moved[number].double(), expected[0], rtol=1e-3, atol=1e-3)


def test_crops_are_those_of_inception_and_lie_in_the_film():
    """Films that hold their own coordinates tell where each pixel came from, and so the rectangle that was cut."""
    edge, count = 32, 1000
    ramp = coordinates(edge)
    across = augment(films_of(ramp.expand(edge, edge), count), "crop", 1.0, seeded())[:, 0]
    down = augment(films_of(ramp[:, None].expand(edge, edge), count), "crop", 1.0, seeded())[:, 0]
    source = torch.stack([across, down], dim=1).double()
    middle = slice(edge // 2 - 1, edge // 2 + 1)
    inner = source[:, :, middle, middle]
    centre = inner.mean(dim=(2, 3))
    along_x = (inner[..., 1] - inner[..., 0]).mean(dim=2) * edge / 2
    along_y = (inner[..., 1, :] - inner[..., 0, :]).mean(dim=2) * edge / 2
    width, height = along_x.norm(dim=1), along_y.norm(dim=1)
    area, aspect = (width * height).numpy(), (width / height).numpy()
    assert area.min() >= 0.08 - 1e-4
    assert area.max() <= 1 + 1e-4
    # Uniform from 0.08 to 1.
    np.testing.assert_allclose(np.quantile(area, [0.1, 0.5, 0.9]), [0.172, 0.54, 0.908], atol=0.05)
    assert aspect.min() >= 3 / 4 - 1e-3
    assert aspect.max() <= 4 / 3 + 1e-3
    assert np.quantile(aspect, 0.05) < 0.8
    assert np.quantile(aspect, 0.95) > 1.25
    assert (centre[:, 0].abs() <= 1 - width + 1e-3).all()
    assert (centre[:, 1].abs() <= 1 - height + 1e-3).all()
    angle = torch.rad2deg(torch.atan2(-along_y[:, 0], along_y[:, 1]))
    assert angle.abs().max() <= 7 + 1e-2
    assert angle.abs().quantile(0.9) > 5.5
    # Mirrored or not, the edges stay at right angles.
    assert ((along_x * along_y).sum(dim=1).abs() < 1e-4).all()
    assert 420 <= (along_x[:, 0] < 0).sum() <= 580


@pytest.mark.parametrize("strength", [0.25, 3.0])
def test_strength_bounds_the_crop(strength):
    edge = 32
    ramp = films_of(coordinates(edge).expand(edge, edge), 300)
    across = augment(ramp, "crop", strength, seeded())[:, 0, edge // 2]
    width = (across[:, edge // 2] - across[:, edge // 2 - 1]).abs() * edge / 2
    smallest = max(1 - 0.92 * strength, 0.08)
    assert width.min() >= math.sqrt(smallest * (3 / 4) ** min(strength, 1)) * math.cos(math.radians(7 * strength)) - 1e-4
    assert width.max() <= 1 + 1e-4


def two_discs(edge: int) -> torch.Tensor:
    """Black with a large white disc on the left and a small one on the right."""
    x, y = coordinates(edge)[None, :], coordinates(edge)[:, None]
    left, right = (x + 0.3).hypot(y) < 0.2, (x - 0.3).hypot(y) < 0.1
    return torch.where(left | right, WHITE, BLACK)


def test_strong_geometry_stays_in_its_bounds():
    """The discs' places give turn, scale, shift and mirror of each film that has no rectangle over it."""
    edge, count = 96, 300
    moved = augment(films_of(two_discs(edge), count), "strong", 1.0, seeded())[:, 0]
    moved = moved[~(moved == 0).any(dim=(1, 2))]
    white = (moved > (BLACK + WHITE) / 2).double()
    place = coordinates(edge).double()
    angles, distances, shifts, mirrored = [], [], [], 0
    for film in white:
        # The middle between the outermost white pixels is between the discs.
        white_columns = place[film.any(dim=0)]
        middle = (white_columns[0] + white_columns[-1]) / 2
        sides = [film * (place < middle), film * (place >= middle)]
        centres = [torch.stack([(side.sum(0) * place).sum(), (side.sum(1) * place).sum()]) / side.sum() for side in sides]
        mirrored += int(sides[0].sum() < sides[1].sum())
        between = centres[1] - centres[0]
        angles.append(math.degrees(math.atan2(between[1], between[0])))
        distances.append(between.norm().item() / 0.6)
        shifts.append(((centres[0] + centres[1]) / 2).abs().max().item() / 2)
    assert 8 < max(map(abs, angles)) < 10.5
    assert 1 / 1.15 - 0.02 < min(distances) < 0.9
    assert 1.1 < max(distances) < 1 / 0.85 + 0.02
    # A shift of 8 % along both edges, turned by 10 degrees and enlarged, moves one of them by 11 %.
    assert 0.06 < max(shifts) < 0.11
    assert 0.35 < mirrored / len(white) < 0.65


def test_strong_greys_stay_between_black_and_white():
    films = np.stack([draw(visit, 64) for visit in simulate_patients(8, 0)])
    images = as_input(torch.from_numpy(films)).repeat(8, 1, 1, 1)
    moved = augment(images, "strong", 1.0, seeded())
    assert moved.min() >= BLACK - 1e-5
    assert moved.max() <= WHITE + 1e-5
    # Most of each film keeps its greys apart.
    assert (moved[:, 0].flatten(1).std(dim=1) > 0.4 * images[:, 0].flatten(1).std(dim=1)).all()


def test_strong_tone_and_noise():
    """A film of one grey: its centre tells the tone, the scatter there the noise."""
    level = 0.6
    images = films_of(torch.full((48, 48), (level - 0.449) / 0.226), 600)
    moved = augment(images, "strong", 1.0, seeded())[:, 0, 12:36, 12:36] * 0.226 + 0.449
    moved = moved[~((moved - 0.449).abs() < 1e-6).any(dim=(1, 2))].flatten(1)
    mean, scatter = moved.mean(dim=1), moved.std(dim=1)
    darkest, brightest = ((level**power - 0.5) * 1.2 + 0.5 + sign * 0.1 for power, sign in ((1.4, -1), (1 / 1.4, 1)))
    assert darkest - 0.01 < mean.min() < level - 0.12
    assert level + 0.12 < mean.max() < brightest + 0.01
    assert scatter.max() < 0.023
    assert scatter.mean().item() == pytest.approx(0.01, rel=0.1)
    # Two films of a batch do not have the same noise in the same place.
    scattered = moved[scatter > 0.005]
    correlation = torch.corrcoef(scattered[:40] - scattered[:40].mean(dim=1, keepdim=True))
    assert (correlation - torch.eye(40)).abs().max() < 0.5


def test_strong_contrast():
    """Black above white, between which no tone curve and no brightness comes: their distance is the contrast, up to 1."""
    halves = torch.full((48, 48), BLACK)
    halves[24:] = WHITE
    moved = augment(films_of(halves, 600), "strong", 1.0, seeded())[:, 0, :, 20:28] * 0.226 + 0.449
    distance = moved[:, 31:36].mean(dim=(1, 2)) - moved[:, 12:17].mean(dim=(1, 2))
    uncovered = ~((moved - 0.449).abs() < 1e-6).any(dim=(1, 2))
    assert 0.79 < distance[uncovered].min() < 0.82
    # Half of the contrasts are below 1, the others clip to it.
    assert 0.35 < (distance[uncovered] < 0.97).float().mean() < 0.65


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_strong_erases_one_rectangle_on_a_share_of_the_films(strength):
    edge, count = 50, 800
    images = films_of(torch.full((edge, edge), WHITE), count)
    # Exactly the mean grey; the tone leaves a white film far above it.
    erased = augment(images, "strong", strength, seeded())[:, 0] == 0
    has_one = erased.any(dim=1).any(dim=1)
    share = ERASED_SHARE * strength
    assert abs(has_one.float().mean().item() - share) < 4 * math.sqrt(share * (1 - share) / count)
    height, width = (erased[has_one].any(dim=axis).sum(dim=1) for axis in (2, 1))
    assert torch.equal(height * width, erased[has_one].sum(dim=(1, 2)))
    for lengths in (height, width):
        assert lengths.min() >= math.floor(0.08 * edge)
        assert lengths.max() <= math.ceil(0.30 * edge)
        assert lengths.max() - lengths.min() >= 8


def test_no_view_but_the_film():
    images = noise_films()
    assert [view is images for view in views(images, "none")] == [True]


def test_views_of_flip():
    images = noise_films()
    upright, mirrored = views(images, "flip")
    assert torch.equal(upright, images)
    assert torch.equal(mirrored, torch.flip(images, [3]))
    assert mirrored.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("edge", "crop"), [(32, 28), (64, 56), (256, 224)])
def test_ten_crop_is_that_of_torchvision(edge, crop):
    from torchvision.transforms.functional import ten_crop

    images = noise_films(2, edge)
    found = views(images, "ten-crop")
    assert len(found) == 10
    for view in found:
        assert view.shape == (2, 3, crop, crop)
        assert view.is_contiguous(memory_format=torch.channels_last)
    left = list(range(10))
    for expected in ten_crop(images, crop):
        matching = [number for number in left if torch.equal(found[number], expected)]
        assert len(matching) == 1
        left.remove(matching[0])
    torch.testing.assert_close(found[4], images[:, :, (edge - crop) // 2 :, (edge - crop) // 2 :][:, :, :crop, :crop])


@pytest.mark.parametrize("kind", ["flip", "ten-crop"])
def test_views_of_a_mirrored_film_are_the_same_views(kind):
    images = noise_films(2)

    def sums(batch):
        return sorted(view[:, :, :, :5].double().sum().item() for view in views(batch, kind))

    assert sums(images) == pytest.approx(sums(images.flip(3)), abs=1e-6)


@pytest.mark.parametrize("kind", ["none", "flip", "ten-crop"])
def test_images_of_no_pixels_have_one_view(kind):
    assert [view.shape for view in views(torch.zeros(5, 3, 0, 0), kind)] == [(5, 3, 0, 0)]
