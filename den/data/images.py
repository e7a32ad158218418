"""The one form every reader gives its images in: uint8 [N, C, H, W] with integer labels, in memory or read as needed.

Legend: N images, C channels (1 or 3), H W pixels, T labels an image.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

MEMORY_LIMIT = 4 * 2**30  # bytes of images above which a reader leaves them on disk
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes of one plane

ClassNames = Sequence[str] | Mapping[str, Sequence[str]]  # of one label, or of each of several by its name


def unequal_sizes(first: tuple[int, ...], other: tuple[int, ...]) -> str:
    """The message for images that do not fit one tensor; sizes (H, W)."""
    return f"the images are of unequal sizes, such as {first} and {other} (H, W): give image_size to resize them"


def as_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """An image size as (H, W); one number means a square. Raises ValueError for anything not positive."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"image_size is {image_size!r}; it must be a positive integer or a pair (height, width)")
    return size[0], size[1]


def check_channels(channels: int) -> int:
    """`channels` itself, when it is 1 or 3. Raises ValueError otherwise."""
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels!r}; it must be 1 (grey) or 3 (RGB, or grey repeated)")
    return channels


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """The decoded image in a file. Raises FileNotFoundError, or ValueError naming a file that is broken or no image."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} ({Path(path).stat().st_size} bytes) is not a readable image: {error}") from error


def _as_pil(image: Any) -> Image.Image:
    """Any single image as PIL: a path, a PIL image, an array [H, W(, C)] or a tensor [(C,) H, W]."""
    if isinstance(image, str | os.PathLike):
        image = open_image(image)
    if isinstance(image, Image.Image):
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it, not scale it
            return Image.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8))
        return ImageOps.exif_transpose(image)
    if isinstance(image, Tensor):
        image = (image if image.dim() == 2 else image.movedim(0, -1)).cpu().numpy()
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
        kind = f"array of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"an image is a {kind}; give a path, a PIL image, an array [H, W, C] or a tensor [C, H, W]")
    if image.ndim == 3 and image.shape[2] not in (1, 3):
        raise ValueError(
            f"an image has {image.shape[2]} channels; 1 or 3 are read (tensors are [C, H, W], arrays [H, W, C])"
        )
    if np.issubdtype(image.dtype, np.floating):
        if image.size and not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"a floating-point image has values from {image.min():.3g} to {image.max():.3g}; "
                "they must lie in [0, 1]: give the images before normalisation, which the task does itself"
            )
        image = np.rint(image * 255).astype(np.uint8)
    elif image.dtype != np.uint8:
        raise TypeError(f"an image has dtype {image.dtype}; uint8, or floating point in [0, 1], is read")
    return Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)


def to_uint8(image: Any, grey: bool, image_size: tuple[int, int] | None = None) -> Tensor:
    """One image as a uint8 tensor [1, H, W] (grey) or [3, H, W].

    `image` is a path, a PIL image, a numpy array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W]; values are
    uint8, or floating point in [0, 1]. An image of another size is scaled (antialiased, bilinear) until it covers
    `image_size` (H, W) and cut about its centre. Raises ValueError or TypeError for anything else.
    """
    picture = _as_pil(image).convert("L" if grey else "RGB")
    if image_size is not None and picture.size != image_size[::-1]:
        picture = ImageOps.fit(picture, image_size[::-1], Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if grey else pixels.movedim(2, 0).contiguous()


def decode(images: Iterable[Any], grey: bool, image_size: tuple[int, int] | None = None) -> Tensor:
    """Several images as one uint8 tensor [N, 1 or 3, H, W], decoded on a few threads; arguments as `to_uint8`."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        decoded = list(pool.map(lambda image: to_uint8(image, grey, image_size), images))
    for image in decoded:
        if image.shape != decoded[0].shape:
            raise ValueError(unequal_sizes(tuple(decoded[0].shape[1:]), tuple(image.shape[1:])))
    return torch.stack(decoded)


def stratified(labels: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw `count` samples so that every class keeps its share (largest remainders).

    Args: labels int64 [N], or [N, T], of which the last is drawn by; count from 0 to N; the same seed draws the same
    samples.
    Returns (chosen, rest): int64 indices, ascending. Raises ValueError for a count out of range.
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"cannot draw {count} of {len(labels)} images; the number must be from 0 to {len(labels)}")
    labels = labels if labels.dim() == 1 else labels[:, -1]
    generator = torch.Generator().manual_seed(seed)
    classes = [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
    quotas = [len(members) * count / max(1, len(labels)) for members in classes]
    takes = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(classes)), key=lambda i: takes[i] - quotas[i])
    for i in by_remainder[: count - sum(takes)]:
        takes[i] += 1
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for members, take in zip(classes, takes, strict=True):
        chosen[members[torch.randperm(len(members), generator=generator)[:take]]] = True
    return torch.nonzero(chosen)[:, 0], torch.nonzero(~chosen)[:, 0]


class _Labelled(Dataset[tuple[Tensor, Any]]):
    """What both kinds of image set share: labels, class names, and the shape (C, H, W) of one image."""

    labels: Tensor  # int64 [N], or [N, T] where an image has T labels
    class_names: tuple[str, ...]  # in label order; of the last label where there are several
    heads: dict[str, tuple[str, ...]]  # where there are several: each one's name and class names, in column order
    grey: bool  # the images were grey in the first place; with 3 channels, they are one plane repeated

    def _set_labels(self, labels: Tensor, class_names: ClassNames) -> None:
        self.heads = {}
        if isinstance(class_names, Mapping):
            self.heads = {head: tuple(names) for head, names in class_names.items()}
        named = list(self.heads.values()) if self.heads else [tuple(class_names)]
        wanted = (len(labels), len(named)) if self.heads else (len(labels),)
        if labels.shape != wanted:
            raise ValueError(f"labels have shape {tuple(labels.shape)}; {len(named)} sets of classes need {wanted}")
        self.labels, self.class_names = labels.long(), named[-1]
        for column, names in zip(labels.reshape(len(labels), len(named)).unbind(1), named, strict=True):
            if len(labels) and not (int(column.min()) >= 0 and int(column.max()) < len(names)):
                raise ValueError(
                    f"labels run from {int(column.min())} to {int(column.max())}, "
                    f"but there are {len(names)} classes (labels 0 to {len(names) - 1})"
                )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def all_names(self) -> ClassNames:
        """Class names as the constructor takes them: of the one label, or of each by its name."""
        return self.heads or self.class_names

    def column(self, head: str) -> int:
        """Which of several labels has this name. Raises ValueError for a name that none has."""
        if head not in self.heads:
            raise ValueError(f"head is {head!r}; the images have {', '.join(map(repr, self.heads)) or 'one label'}")
        return list(self.heads).index(head)

    def _label(self, index: int) -> Any:
        return self.labels[index] if self.heads else int(self.labels[index])


class ImageSet(_Labelled):
    """Images in memory.

    Args:
        images: uint8 [N, C, H, W], C 1 or 3.
        labels: integers [N], each from 0 to len(class_names) - 1; or [N, T], T labels an image.
        class_names: one name a class, in label order; for T labels, those of each by the label's name, in the order of
            the columns, coarse before fine (the last is the one that `stratified` keeps the shares of).
        grey: whether the images were grey in the first place (default: C is 1).
    Raises ValueError or TypeError when they do not agree.
    """

    def __init__(self, images: Tensor, labels: Tensor, class_names: ClassNames, grey: bool | None = None) -> None:
        if images.dtype != torch.uint8:
            raise TypeError(f"images have dtype {images.dtype}; they must be uint8")
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images have shape {tuple(images.shape)}; it must be [N, C, H, W] with C 1 or 3")
        if labels.shape[:1] != images.shape[:1]:
            raise ValueError(f"labels have shape {tuple(labels.shape)}; {len(images)} images need [{len(images)}]")
        self.images = images
        self.grey = images.shape[1] == 1 if grey is None else grey
        self._set_labels(labels, class_names)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.images[index], self._label(index)

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} x {self.shape}, {len(self.class_names)} classes)"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at `indices` (int64), copied, with the same classes."""
        indices = indices.cpu()
        if self.grey:  # one plane is copied, not its repeats
            images = self.images[:, :1].index_select(0, indices).expand(-1, self.images.shape[1], -1, -1)
        else:
            images = self.images.index_select(0, indices)
        return ImageSet(images, self.labels[indices], self.all_names, self.grey)

    def relabelled(self, labels: Tensor, class_names: ClassNames) -> ImageSet:
        """The same images, not copied, with other labels."""
        return ImageSet(self.images, labels, class_names, self.grey)

    def head(self, name: str) -> ImageSet:
        """The same images, not copied, with one of their several labels. Raises ValueError for an unknown name."""
        return self.relabelled(self.labels[:, self.column(name)], self.heads[name])

    def with_channels(self, channels: int) -> ImageSet:
        """The same images with 1 channel (RGB becomes luma, as Pillow's "L") or 3 (grey is repeated, not copied)."""
        check_channels(channels)
        if channels == self.images.shape[1]:
            return self
        if self.grey:
            return ImageSet(self.images[:, :1].expand(-1, channels, -1, -1), self.labels, self.all_names, True)
        luma = torch.empty(len(self), 1, *self.shape[1:], dtype=torch.uint8)
        for start in range(0, len(self), 4096):
            red, green, blue = self.images[start : start + 4096].to(torch.int32).unbind(1)
            luma[start : start + 4096, 0] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
        return ImageSet(luma, self.labels, self.all_names, True)

    def resized(self, image_size: int | Sequence[int]) -> ImageSet:
        """The same images at another size (H, W), as `to_uint8` scales them."""
        size = as_size(image_size)
        if size == self.shape[1:]:
            return self
        planes = self.images[:, :1] if self.grey else self.images
        images = decode(planes, self.grey, size) if len(self) else planes.new_empty(0, planes.shape[1], *size)
        return ImageSet(images.expand(-1, self.images.shape[1], -1, -1), self.labels, self.all_names, self.grey)


class LazyImages(_Labelled):
    """Images read one at a time, when asked for: files, or the items of another dataset.

    Args:
        items: a sequence of what `to_uint8` reads, or of pairs (such an image, label), of which the image is taken.
        labels, class_names: as in ImageSet.
        image_size: (H, W) that every image is brought to.
        grey: decode to one plane rather than RGB.
        channels: channels delivered (default: 1 if grey, else 3); a grey plane is repeated.
    """

    def __init__(
        self, items: Sequence[Any] | Dataset[Any], labels: Tensor, class_names: ClassNames,
        image_size: tuple[int, int], grey: bool = False, channels: int | None = None,
    ) -> None:  # fmt: skip
        self.items, self.image_size, self.grey = items, as_size(image_size), grey
        self.channels = check_channels(channels or (1 if grey else 3))
        self.indices = torch.arange(len(labels))
        self._set_labels(labels, class_names)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self._read(index).expand(self.channels, -1, -1), self._label(index)

    def __repr__(self) -> str:
        return f"LazyImages({len(self)} x {self.shape}, {len(self.class_names)} classes)"

    def _read(self, index: int) -> Tensor:
        item = self.items[int(self.indices[index])]
        return to_uint8(item[0] if isinstance(item, tuple | list) else item, self.grey, self.image_size)

    def _derived(self, **changes: Any) -> LazyImages:
        other = LazyImages.__new__(LazyImages)
        other.__dict__ = {**self.__dict__, **changes}
        return other

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.channels, *self.image_size

    def subset(self, indices: Tensor) -> LazyImages:
        """The images at `indices` (int64), with the same classes."""
        return self._derived(indices=self.indices[indices], labels=self.labels[indices])

    def relabelled(self, labels: Tensor, class_names: ClassNames) -> LazyImages:
        """The same images with other labels."""
        other = self._derived()
        other._set_labels(labels, class_names)
        return other

    def head(self, name: str) -> LazyImages:
        """The same images with one of their several labels. Raises ValueError for an unknown name."""
        return self.relabelled(self.labels[:, self.column(name)], self.heads[name])

    def with_channels(self, channels: int) -> LazyImages:
        """The same images with 1 or 3 channels, as ImageSet.with_channels."""
        return self._derived(channels=check_channels(channels), grey=self.grey or channels == 1)

    def resized(self, image_size: int | Sequence[int]) -> LazyImages:
        """The same images at another size (H, W)."""
        return self._derived(image_size=as_size(image_size))

    def in_memory(self) -> ImageSet:
        """All of them read now: len * C * H * W bytes (a grey plane once, however many channels)."""
        planes = 1 if self.grey else 3
        images = torch.empty(len(self), planes, *self.image_size, dtype=torch.uint8)

        def fill(index: int) -> None:
            images[index] = self._read(index)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(fill, range(len(self))):
                pass
        return ImageSet(images.expand(-1, self.channels, -1, -1), self.labels, self.all_names, self.grey)


Images = ImageSet | LazyImages


def from_dataset(
    dataset: Dataset[Any], class_names: Sequence[str] | None = None, *, image_size: int | Sequence[int] | None = None,
    lazy: bool = False, memory_limit: int = MEMORY_LIMIT,
) -> Images:  # fmt: skip
    """Any map-style PyTorch dataset of (image, label) in the form this package trains on.

    Args:
        dataset: has len() and items (image, label); an image as in `to_uint8`, *before* normalisation.
        class_names: one a class; default: dataset.classes if it has them (torchvision's do), else "0", "1", ...
        image_size: (H, W) or one side; needed when the images are of unequal sizes.
        lazy: read items at every use (a dataset that augments by itself); else once, now, if memory_limit bytes hold
            them.
    Raises TypeError or ValueError for items of another form, labels out of range, and unequal sizes without image_size.
    """
    count = len(dataset)  # type: ignore[arg-type]
    if count == 0:
        raise ValueError("the dataset is empty; at least one (image, label) is needed")
    size = as_size(image_size) if image_size is not None else None
    labels: list[int] = []
    pictures: list[Image.Image] = []
    grey, keep = True, not lazy
    first: tuple[int, int] | None = size
    for index in range(count):
        item = dataset[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(f"item {index} of the dataset is a {type(item).__name__}; it must be a pair (image, label)")
        picture = _as_pil(item[0])
        labels.append(int(item[1]))
        grey = grey and picture.mode in GREY_MODES
        height, width = size or picture.size[::-1]
        first = first or (height, width)
        if first != (height, width):
            raise ValueError(unequal_sizes(first, (height, width)))
        keep = keep and count * (1 if grey else 3) * height * width <= memory_limit
        if keep:
            pictures.append(picture)
    names = class_names if class_names is not None else getattr(dataset, "classes", None)
    names = [str(name) for name in (names if names is not None else range(max(labels) + 1))]
    if keep:
        return ImageSet(decode(pictures, grey, size), torch.tensor(labels), names)
    return LazyImages(dataset, torch.tensor(labels), names, (height, width), grey)
