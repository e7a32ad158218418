"""Augmentation by its properties; statistics and normalisation by their definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from den.data import Augment, ImageSet, LazyImages, channel_statistics, normalise


def numbered(count: int, channels: int = 3, height: int = 6, width: int = 5) -> Tensor:
    """Every pixel another value, none 0: where a pixel came from can be read off it."""
    return torch.arange(1, count * channels * height * width + 1).view(count, channels, height, width)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_every_sample_is_a_crop_of_its_padded_image(padding: int, flip: bool) -> None:
    images = numbered(64)
    augmented = Augment(flip, padding)(images, seeded())
    assert augmented.shape == images.shape
    padded = F.pad(images, (padding,) * 4)
    seen = set()
    for sample, canvas in zip(augmented, padded, strict=True):
        crops = {
            (top, left, mirrored): canvas[:, top : top + 6, left : left + 5].flip(2 if mirrored else ())
            for top in range(2 * padding + 1) for left in range(2 * padding + 1) for mirrored in {False, flip}
        }  # fmt: skip
        matches = [place for place, crop in crops.items() if torch.equal(crop, sample)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > min(64, (2 * padding + 1) ** 2 * (1 + flip)) // 2  # each sample has a draw of its own


def test_every_place_is_drawn_alike() -> None:
    images = torch.ones(20_000, 1, 2, 2)
    cropped = Augment(flip=False, padding=1)(images, seeded())
    counts = torch.stack([cropped[:, 0, row, column].mean() for row in (0, 1) for column in (0, 1)])
    assert torch.allclose(
        counts, torch.full((4,), 4 / 9), atol=0.02
    )  # a corner stays inside in 2 of 3 rows and columns


def test_half_are_flipped() -> None:
    images = numbered(1, 1, 2, 2).expand(10_000, -1, -1, -1)
    flipped = Augment(flip=True, padding=0)(images, seeded())[:, 0, 0, 0] == 2
    assert abs(flipped.float().mean().item() - 0.5) < 0.02


def test_the_same_seed_gives_the_same() -> None:
    images, augment = numbered(32), Augment(flip=True, padding=4, cutout=3)
    assert torch.equal(augment(images, seeded(5)), augment(images, seeded(5)))
    assert not torch.equal(augment(images, seeded(5)), augment(images, seeded(6)))
    generator = seeded(5)
    assert not torch.equal(augment(images, generator), augment(images, generator))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    augment(images, seeded())
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_dtypes_and_layouts_agree(dtype: torch.dtype) -> None:
    images = torch.randint(256, (9, 3, 8, 8)).to(dtype)
    expected = Augment()(images, seeded())
    assert expected.dtype == dtype
    assert torch.equal(Augment()(images.contiguous(memory_format=torch.channels_last), seeded()), expected)
    grey = images[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(Augment()(grey, seeded()), Augment()(grey.contiguous(), seeded()))


def test_cutout() -> None:
    images = torch.ones(500, 2, 8, 8)
    cut = Augment(flip=False, padding=0, cutout=3)(images, seeded())
    holes = (cut == 0).sum((2, 3))
    assert torch.equal(holes[:, 0], holes[:, 1])
    assert set(holes[:, 0].tolist()) == {4, 6, 9}  # whole, cut by a border, cut by a corner


def test_nothing_to_do_and_nobody_there() -> None:
    images = numbered(3)
    assert torch.equal(Augment(flip=False, padding=0)(images, seeded()), images)
    assert Augment()(images[:0], seeded()).shape == (0, 3, 6, 5)
    with pytest.raises(ValueError, match="padding is -1"):
        Augment(padding=-1)


def test_statistics() -> None:
    images = torch.randint(256, (50, 3, 7, 7), dtype=torch.uint8)
    dataset = ImageSet(images, torch.zeros(50), ["a"])
    mean, std = channel_statistics(dataset)
    pixels = images.double() / 255
    assert torch.allclose(torch.tensor(mean).double(), pixels.mean((0, 2, 3)))
    assert torch.allclose(torch.tensor(std).double(), pixels.std((0, 2, 3), correction=0))
    normal = normalise(images, mean, std)
    assert normal.dtype == torch.float32
    assert normal.is_contiguous(memory_format=torch.channels_last)
    expected = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(normal.double(), expected, atol=1e-5)
    lazy = LazyImages(list(images), dataset.labels, ["a"], (7, 7))
    assert channel_statistics(lazy) == (mean, std)


def test_statistics_of_grey_and_of_constant_images() -> None:
    grey = ImageSet(torch.randint(256, (50, 1, 7, 7), dtype=torch.uint8), torch.zeros(50), ["a"])
    (mean,), (std,) = channel_statistics(grey)
    assert channel_statistics(grey.with_channels(3)) == ((mean,) * 3, (std,) * 3)
    constant = ImageSet(torch.full((2, 1, 4, 4), 51, dtype=torch.uint8), torch.zeros(2), ["a"])
    assert channel_statistics(constant) == ((pytest.approx(0.2),), (1 / 255,))
    with pytest.raises(ValueError, match="empty set"):
        channel_statistics(constant.subset(torch.arange(0)))
