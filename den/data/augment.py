"""The paper's augmentation (section 4.1) and normalisation, on whole batches.

Legend: N images, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import Images, ImageSet

STATISTICS_SAMPLE = 10_000  # images of a lazily read set whose mean and deviation stand for all


@dataclass(frozen=True)
class Augment:
    """Random horizontal flip, then a random crop of the image zero-padded on every side.

    Args:
        flip: mirror each image with probability 1/2.
        padding: pixels of zeros on each side before a crop of the original size; 0: no crop. The paper uses 4.
        cutout: side, in pixels, of one square a sample set to zero, centred anywhere in the image (so it may be cut
            by the border); 0: none. Not in the paper.
    Raises ValueError for a negative number.
    """

    flip: bool = True
    padding: int = 4
    cutout: int = 0

    def __post_init__(self) -> None:
        if self.padding < 0 or self.cutout < 0:
            raise ValueError(f"padding is {self.padding} and cutout is {self.cutout} pixels; neither may be negative")

    def __call__(self, images_NCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch, each image by its own draw.

        images: [N, C, H, W], any dtype and device; zero is what is padded (black, for uint8).
        generator: on the CPU, so that every device sees the same draws, or on the images' device.
        Returns a new tensor of the same shape, dtype and device; the images themselves if there is nothing to do.
        """
        count, channels, height, width = images_NCHW.shape
        device = images_NCHW.device

        def draw(high: int) -> Tensor:
            drawn = torch.randint(high, (count, 1), generator=generator, device=generator.device)
            return drawn.to(device, non_blocking=True)

        if self.flip or self.padding:
            row_NH = torch.arange(height, device=device).expand(count, height)
            column_NW = torch.arange(width, device=device).expand(count, width)
            if self.padding:
                row_NH = row_NH + draw(2 * self.padding + 1)
                column_NW = column_NW + draw(2 * self.padding + 1)
                images_NCHW = F.pad(images_NCHW, (self.padding,) * 4)
            padded_width = width + 2 * self.padding
            if self.flip:  # a mirrored image is one whose columns are read from the right
                column_NW = torch.where(draw(2).bool(), padded_width - 1 - column_NW, column_NW)
            source = (row_NH[:, :, None] * padded_width + column_NW[:, None, :]).view(count, 1, height * width)
            images_NCHW = (
                images_NCHW.flatten(2).gather(2, source.expand(-1, channels, -1)).view(count, channels, height, width)
            )
        if self.cutout:
            inside_NH = _within(draw(height), height, self.cutout)
            inside_NW = _within(draw(width), width, self.cutout)
            hole_N1HW = (inside_NH[:, :, None] & inside_NW[:, None, :])[:, None]
            images_NCHW = images_NCHW.masked_fill(hole_N1HW, 0)
        return images_NCHW


def _within(centre_N1: Tensor, length: int, side: int) -> Tensor:
    """Whether each of `length` positions lies in the span of `side` about each centre: bool [N, length]."""
    offset = torch.arange(length, device=centre_N1.device) - (centre_N1 - side // 2)
    return (offset >= 0) & (offset < side)


def channel_statistics(dataset: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels of a set, in units of full scale (255 is 1).

    A lazily read set is represented by at most 10,000 of its images, evenly spaced. A channel of one constant value
    gets a deviation of one grey level, so that it can be divided by. Raises ValueError for an empty set.
    """
    if len(dataset) == 0:
        raise ValueError("an empty set of images has no mean; give at least one training image")
    if not isinstance(dataset, ImageSet):
        chosen = torch.linspace(0, len(dataset) - 1, min(len(dataset), STATISTICS_SAMPLE)).round().long()
        dataset = dataset.subset(chosen).in_memory()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, deviation = [], []
    for plane in dataset.images[:, :1].unbind(1) if dataset.grey else dataset.images.unbind(1):
        histogram = torch.zeros(256, dtype=torch.float64)
        for part in plane.split(4096):  # bincount makes int64 of its input
            histogram += torch.bincount(part.flatten(), minlength=256)
        share = histogram / plane.numel()
        mean.append(float(share @ levels))
        deviation.append(max(float(share @ (levels - mean[-1]) ** 2) ** 0.5, 1 / 255))
    repeats = dataset.shape[0] // len(mean)
    return tuple(mean) * repeats, tuple(deviation) * repeats


def normalise(images_NCHW: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """(images / 255 - mean) / std as float32, channels_last.

    images: uint8 [N, C, H, W], any device; mean, std: C numbers, in units of full scale (255 is 1).
    """
    mean_C = torch.as_tensor(mean, dtype=torch.float32, device=images_NCHW.device)
    std_C = torch.as_tensor(std, dtype=torch.float32, device=images_NCHW.device)
    scale, shift = (1 / (255 * std_C)).view(-1, 1, 1), (-mean_C / std_C).view(-1, 1, 1)
    return images_NCHW.to(torch.float32).contiguous(memory_format=torch.channels_last).mul_(scale).add_(shift)
