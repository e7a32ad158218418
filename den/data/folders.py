"""Readers of image folders: one folder a class, and Tiny-ImageNet's own layout."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .classes import class_group
from .images import GREY_MODES, MEMORY_LIMIT, Images, LazyImages, as_size, stratified, unequal_sizes
from .readers import require

TINY_IMAGENET_ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
IMAGENET_ADDRESS = "https://www.image-net.org/"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"})
TEST_FOLDERS = ("test", "val", "valid", "validation")


def find_images(folder: Path) -> list[Path]:
    """The image files under `folder`, by their suffix, in order of path; hidden files are left out."""
    return sorted(
        path for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )  # fmt: skip


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _probe(path: Path) -> tuple[tuple[int, int], bool]:
    """(H, W) and whether it is grey, from the file's head."""
    try:
        with Image.open(path) as image:
            return (image.height, image.width), image.mode in GREY_MODES
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is not a readable image: {error}") from error


def _read_files(
    paths: Sequence[Path], labels: Tensor, names: Sequence[str], image_size: int | Sequence[int] | None,
    memory_limit: int, grey: bool | None = None,
) -> Images:  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        heads = list(pool.map(_probe, paths))
    if image_size is not None:
        size = as_size(image_size)
    else:
        size = heads[0][0]
        for path, (other, _) in zip(paths, heads, strict=True):
            if other != size:
                raise ValueError(f"{unequal_sizes(size, other)}; they are {paths[0]} and {path}")
    grey = all(head[1] for head in heads) if grey is None else grey
    images = LazyImages(paths, labels, names, size, grey)
    fits = len(paths) * (1 if grey else 3) * size[0] * size[1] <= memory_limit
    return images.in_memory() if fits else images


def read_folder(
    folder: Path, split: str, image_size: int | Sequence[int] | None = None, memory_limit: int = MEMORY_LIMIT,
    group: Sequence[int] | None = None, address: str = "",
) -> Images:  # fmt: skip
    """An image folder: train/CLASS/* and one of test, val, valid, validation /CLASS/*; or CLASS/* alone.

    Class names are the folders' names, sorted; images may lie deeper. Without train/, a fixed stratified fifth of
    CLASS/* is the test split. Images are grey (one channel) if every file of the split is.

    group: only the classes of `class_group(names, group)`; files of the others are not opened.
    address: where to get the folder, told when it is missing.
    Raises FileNotFoundError for a missing folder, ValueError for a class that train/ lacks, no images, a broken file,
    unequal sizes without image_size, or a group that `class_group` refuses.
    """
    if not folder.is_dir():
        source_of = f"get the data set from {address}; " if address else ""
        raise FileNotFoundError(
            f"{folder} is missing: {source_of}an image folder has train/CLASS/*.png and test/CLASS/*.png (or val/)"
        )
    train = folder / "train"
    divided = train.is_dir()
    source = train if divided else folder
    if divided and split == "test":
        present = [folder / name for name in TEST_FOLDERS if (folder / name).is_dir()]
        if not present:
            raise FileNotFoundError(
                f"{folder / 'test'} is missing (so are {', '.join(TEST_FOLDERS[1:])}): it holds the test images"
            )
        source = present[0]
    every_name = [path.name for path in _class_folders(train if divided else folder)]
    names = every_name if group is None else class_group(every_name, group)
    paths: list[Path] = []
    labels: list[int] = []
    for class_folder in _class_folders(source):
        if class_folder.name not in every_name:
            raise ValueError(
                f"{class_folder} is a class that {train} does not have; its classes are {', '.join(every_name[:10])}"
            )
        if class_folder.name not in names:
            continue
        found = find_images(class_folder)
        paths += found
        labels += [names.index(class_folder.name)] * len(found)
    if not paths:
        raise ValueError(f"{source} holds no images in class folders; expected {source}/CLASS/*.png (or .jpg, ...)")
    label_N = torch.tensor(labels)
    if not divided:
        test_indices, train_indices = stratified(label_N, len(paths) // 5, seed=0)
        chosen = test_indices if split == "test" else train_indices
        paths, label_N = [paths[i] for i in chosen.tolist()], label_N[chosen]
    return _read_files(paths, label_N, names, image_size, memory_limit)


def read_mini_imagenet(
    folder: Path, split: str, image_size: int | Sequence[int] | None = None, memory_limit: int = MEMORY_LIMIT,
    group: Sequence[int] | None = None,
) -> Images:  # fmt: skip
    """Classes of ImageNet in its own layout, train/WNID/*.JPEG and val/WNID/*.JPEG, at 224x224 unless told otherwise.

    The paper's Mini-ImageNet has 50 classes: 800 images of each to train on, and the 50 that ImageNet has to test. A
    `group` of (i, 10, 5) gives its task i whether the folder holds those 50 or all 1000. Images are scaled to cover the
    size and cut about the centre (the paper: squeezed to 256x256, of which the middle 224x224). As `read_folder`.
    """
    return read_folder(folder, split, image_size or 224, memory_limit, group, IMAGENET_ADDRESS)


def read_tiny_imagenet(
    folder: Path, split: str, image_size: int | Sequence[int] | None = None, memory_limit: int = MEMORY_LIMIT
) -> Images:
    """Tiny-ImageNet: wnids.txt, train/WNID/images/*.JPEG, val/images/*.JPEG with val_annotations.txt, words.txt if
    present.

    Classes are in the order of wnids.txt. The test split is val/: the published test/ has no labels. Always RGB.
    """
    wnids = require(folder / "wnids.txt", TINY_IMAGENET_ADDRESS).read_text().split()
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    paths: list[Path] = []
    labels: list[int] = []
    if split == "train":
        for wnid in wnids:
            images = folder / "train" / wnid / "images"
            if not images.is_dir():
                raise FileNotFoundError(
                    f"{images} is missing: get the data set from {TINY_IMAGENET_ADDRESS} "
                    "and unpack it so that this folder exists"
                )
            found = find_images(images)
            paths += found
            labels += [label_of[wnid]] * len(found)
    else:
        annotations = require(folder / "val" / "val_annotations.txt", TINY_IMAGENET_ADDRESS)
        for number, line in enumerate(annotations.read_text().splitlines(), 1):
            fields = line.split("\t")
            if not line.strip():
                continue
            if len(fields) < 2 or fields[1] not in label_of:
                raise ValueError(
                    f"{annotations}, line {number}: {line!r}; expected FILE<tab>WNID<tab>..., a WNID of wnids.txt"
                )
            paths.append(require(folder / "val" / "images" / fields[0], TINY_IMAGENET_ADDRESS))
            labels.append(label_of[fields[1]])
    if not paths:
        raise ValueError(
            f"{folder} holds no images of the {split} split; expected {folder}/train/WNID/images/*.JPEG and val/images"
        )
    words = folder / "words.txt"
    named = (
        dict(line.split("\t", 1) for line in words.read_text().splitlines() if "\t" in line) if words.is_file() else {}
    )
    names = [named.get(wnid, wnid).strip() for wnid in wnids]
    return _read_files(paths, torch.tensor(labels), names, image_size, memory_limit, grey=False)
