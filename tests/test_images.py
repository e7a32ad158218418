"""Image sets: channels, sizes, the forms an image may come in, any PyTorch dataset, stratified draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from den.data import ImageSet, LazyImages, from_dataset, stratified, to_uint8


def random_images(count: int, channels: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def equal(images: torch.Tensor, expected: np.ndarray) -> bool:
    return images.dtype == torch.uint8 and np.array_equal(images.numpy(), expected)


def test_channels() -> None:
    grey = ImageSet(torch.from_numpy(random_images(3, 1, 5)), torch.arange(3), "abc")
    rgb = grey.with_channels(3)
    assert rgb.images.shape == (3, 3, 5, 5)
    assert all(torch.equal(rgb.images[:, c], grey.images[:, 0]) for c in range(3))
    assert rgb.grey
    assert torch.equal(rgb.with_channels(1).images, grey.images)
    assert torch.equal(rgb.subset(torch.tensor([2])).images, rgb.images[2:])
    colour = ImageSet(torch.from_numpy(random_images(3, 3, 5)), torch.arange(3), "abc")
    as_pillow = [np.asarray(Image.fromarray(image.numpy().transpose(1, 2, 0)).convert("L")) for image in colour.images]
    assert equal(colour.with_channels(1).images, np.stack(as_pillow)[:, None])


def test_resized_covers_and_cuts_about_the_centre() -> None:
    image = np.zeros((1, 1, 4, 8), np.uint8)
    image[..., 2:6] = 200
    resized = ImageSet(torch.from_numpy(image), torch.zeros(1), ["a"]).resized(4)
    assert resized.images.shape == (1, 1, 4, 4)
    assert (resized.images == 200).all()


def test_image_set_refuses() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"images have dtype torch.float32"):
        ImageSet(images.float(), torch.zeros(2), ["a"])
    with pytest.raises(ValueError, match=r"shape \(2, 4, 4\)"):
        ImageSet(images[:, 0], torch.zeros(2), ["a"])
    with pytest.raises(ValueError, match=r"labels have shape \(3,\)"):
        ImageSet(images, torch.zeros(3), ["a"])
    with pytest.raises(ValueError, match="labels run from 0 to 1, but there are 1 classes"):
        ImageSet(images, torch.tensor([0, 1]), ["a"])


def test_to_uint8_forms(tmp_path: Path) -> None:
    pixels = random_images(1, 3, 6)[0]
    expected = torch.from_numpy(pixels)
    hwc = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    Image.fromarray(hwc).save(tmp_path / "a.png")
    for form in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(hwc), hwc, expected, expected / 255):
        assert torch.equal(to_uint8(form, grey=False), expected)
    deep = Image.fromarray((np.arange(16, dtype=np.uint16) * 4096).reshape(4, 4))  # 16 bits
    assert to_uint8(deep, grey=True).flatten().tolist() == [16 * n for n in range(16)]
    with pytest.raises(ValueError, match=r"values from -1 to 1; they must lie in \[0, 1\]"):
        to_uint8(torch.tensor([[[-1.0, 1.0]]]), grey=True)
    with pytest.raises(ValueError, match="2 channels"):
        to_uint8(torch.zeros(2, 4, 4), grey=True)
    with pytest.raises(TypeError, match="dtype int64"):
        to_uint8(torch.zeros(3, 4, 4, dtype=torch.int64), grey=True)
    with pytest.raises(TypeError, match="an image is a list"):
        to_uint8([1, 2], grey=True)
    with pytest.raises(FileNotFoundError):
        to_uint8(tmp_path / "none.png", grey=True)


class Pairs(torch.utils.data.Dataset):
    classes = ("cat", "dog", "eel")

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[index]) / 255, index % 3


def test_from_dataset() -> None:
    images = random_images(7, 3, 6)
    eager, lazy = from_dataset(Pairs(images)), from_dataset(Pairs(images), lazy=True)
    assert isinstance(eager, ImageSet)
    assert isinstance(lazy, LazyImages)
    assert isinstance(from_dataset(Pairs(images), memory_limit=100), LazyImages)
    assert equal(eager.images, images)
    assert equal(lazy.in_memory().images, images)
    assert eager.labels.tolist() == lazy.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert eager.class_names == ("cat", "dog", "eel")
    assert from_dataset(Pairs(images), "xyz", image_size=4).images.shape == (7, 3, 4, 4)
    with pytest.raises(ValueError, match="labels run from 0 to 2, but there are 2 classes"):
        from_dataset(Pairs(images), ["a", "b"])
    with pytest.raises(ValueError, match="the dataset is empty"):
        from_dataset(Pairs(images[:0]))
    with pytest.raises(TypeError, match=r"item 0 .* must be a pair \(image, label\)"):
        from_dataset(torch.utils.data.TensorDataset(torch.zeros(2, 3, 4, 4)))
    unequal = [(np.zeros((4, 4), np.uint8), 0), (np.zeros((5, 4), np.uint8), 1)]
    with pytest.raises(ValueError, match=r"unequal sizes, such as \(4, 4\) and \(5, 4\)"):
        from_dataset(unequal)
    assert from_dataset(unequal, image_size=(4, 4)).images.shape == (2, 1, 4, 4)


def test_stratified() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    chosen, rest = stratified(labels, 10, seed=3)
    assert torch.bincount(labels[chosen]).tolist() == [6, 3, 1]
    assert sorted(chosen.tolist() + rest.tolist()) == list(range(100))
    assert torch.equal(chosen, stratified(labels, 10, seed=3)[0])
    assert not torch.equal(chosen, stratified(labels, 10, seed=4)[0])
    assert [len(stratified(labels, n)[0]) for n in (0, 1, 99, 100)] == [0, 1, 99, 100]
    with pytest.raises(ValueError, match="cannot draw 101 of 100"):
        stratified(labels, 101)
