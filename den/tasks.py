"""A task: a pair of data sets with its classes, image size and transforms, shared by training and prediction."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .data.augment import Augment, channel_statistics, normalise
from .data.batches import Batches
from .data.images import MEMORY_LIMIT, Images, decode, stratified
from .data.sources import SOURCES, load

PREPROCESSING_KEYS = ("image_size", "channels", "grey", "mean", "std", "class_names")


@dataclass(frozen=True)
class Task:
    """One classification task. Build it with `load_task` or `make_task`.

    Images of several labels (the paper's M3: coarse and fine) are read as one task; `by_head` makes of it those that a
    model is trained on.

    name: the key of its head in a model.
    train, test: image sets of one shape and the same classes.
    val: images held out of train, for the selector or for calibration; None: none.
    joint: a name that tasks share which label the same images in the same order, such as coarse and fine classes: in
        training each image then takes one path, which all their heads read (scenario M3). None: by itself.
    mean, std: of each channel of the training images, in units of full scale (255 is 1).
    augment: for training batches; None: none.
    """

    name: str
    train: Images
    test: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | None = None
    val: Images | None = None
    joint: str | None = None

    def __post_init__(self) -> None:
        for split, images in (("test", self.test), ("val", self.val)):
            if images is not None and images.shape != self.train.shape:
                raise ValueError(
                    f"task {self.name!r}: {split} images are {images.shape} (C, H, W), "
                    f"training images {self.train.shape}: give image_size to resize them"
                )
            if images is not None and images.all_names != self.train.all_names:
                raise ValueError(f"task {self.name!r}: the {split} split has other classes than the training split")

    def __repr__(self) -> str:
        held_out = "" if self.val is None else f", val {len(self.val)}"
        classes = " and ".join(f"{count} classes" for count in self.heads.values())
        return (
            f"Task({self.name!r}, train {len(self.train)}{held_out}, test {len(self.test)}, "
            f"{classes}, images {self.train.shape})"
        )

    @property
    def heads(self) -> dict[str, int]:
        """Number of classes of each head that reads these images: its own name's, or one by the name of each label."""
        named = self.train.heads or {self.name: self.class_names}
        return {head: len(names) for head, names in named.items()}

    def by_head(self) -> list[Task]:
        """A task of one label for each head, on the same images (not copied), joint under this one's name: in training
        an image takes one path, which all of them read. Itself where there is one label."""
        if not self.train.heads:
            return [self]
        return [
            replace(
                self,
                name=head,
                joint=self.name,
                train=self.train.head(head),
                test=self.test.head(head),
                val=None if self.val is None else self.val.head(head),
            )
            for head in self.heads
        ]

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class, in label order; of the last of several labels."""
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        """The number of classes; of the last of several labels."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Channels of an image: 1 or 3."""
        return self.train.shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of an image."""
        return self.train.shape[1:]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What `preprocess` needs to turn any image into the model's input: plain values, for config.json."""
        return {
            "image_size": list(self.image_size),
            "channels": self.channels,
            "grey": self.train.grey,
            "mean": list(self.mean),
            "std": list(self.std),
            "class_names": list(self.class_names),
        }

    def split(self, name: str) -> Images:
        """The images of "train", "val" or "test". Raises ValueError for another name, and for "val" without one."""
        if name not in ("train", "val", "test"):
            raise ValueError(f'split is {name!r}; it must be "train", "val" or "test"')
        images = {"train": self.train, "val": self.val, "test": self.test}[name]
        if images is None:
            raise ValueError(f"task {self.name!r} has no val images: build it with val_fraction above 0")
        return images

    def batches(
        self, split: str, batch_size: int, *, training: bool | None = None, seed: int = 0,
        device: torch.device | str = "cpu", num_workers: int = 0, share: tuple[int, int] = (0, 1),
    ) -> Batches:  # fmt: skip
        """Batches of "train", "val" or "test": float32 [N, C, H, W] normalised channels_last, and labels int64 [N], or
        [N, T] where an image has several.

        training: shuffle, augment and leave out a smaller last batch (unless it is the only one); default: for
            "train" alone.
        The rest as `den.data.Batches`.
        """
        images = self.split(split)
        if training is None:
            training = split == "train"
        return Batches(
            images, batch_size, mean=self.mean, std=self.std, shuffle=training,
            drop_last=training and len(images) // share[1] >= batch_size, augment=self.augment if training else None,
            seed=seed, device=device, num_workers=num_workers, share=share,
        )  # fmt: skip


def make_task(
    name: str, train: Images, test: Images, *, augment: Augment | None = None, subset: int | None = None,
    val_fraction: float = 0.0, seed: int = 0, channels: int = 3,
) -> Task:  # fmt: skip
    """A task of two image sets (`den.data.from_dataset` makes one of any PyTorch dataset).

    Args:
        subset: the number of training images to keep, every class its share; None: all.
        val_fraction: share of those held out as `val`, from 0 to below 1, every class its share.
        seed: of both draws.
        channels: of the images a model gets: 3 (grey is repeated) or 1.
    Mean and deviation are those of the training images kept. Raises ValueError for numbers out of range.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must be at least 0 and below 1")
    if subset is not None:
        if not 1 <= subset <= len(train):
            raise ValueError(f"subset is {subset}; {name} has {len(train)} training images")
        train = train.subset(stratified(train.labels, subset, seed)[0])
    val = None
    if val_fraction:
        held_out, kept = stratified(train.labels, round(len(train) * val_fraction), seed + 1)
        train, val = train.subset(kept), train.subset(held_out)
    if train.grey and not test.grey:  # what the model learned from was grey
        test = test.with_channels(1)
    train, test = train.with_channels(channels), test.with_channels(channels)
    mean, std = channel_statistics(train)
    return Task(name, train, test, mean, std, augment, None if val is None else val.with_channels(channels))


def load_task(
    dataset: str, root: str | os.PathLike[str] | None = None, subset: int | None = None, seed: int = 0,
    channels: int = 3, *, name: str | None = None, val_fraction: float = 0.0,
    image_size: int | Sequence[int] | None = None, labels: str = "fine", group: Sequence[int] | None = None,
    augment: Augment | str | None = "default", memory_limit: int = MEMORY_LIMIT,
) -> Task:  # fmt: skip
    """Read a data set (`den.data.load`) as a task.

    Args:
        dataset, root, image_size, labels, group, memory_limit: as `den.data.load`.
        subset, seed, channels, val_fraction: as `make_task`.
        name: of the task; default: the data set's, with "_coarse" for coarse labels, and the index of a group.
        augment: "default" is the data set's own: the paper's flip and 4-pixel crop, 2 pixels for 28x28 images, 1 for
            8x8, no flip for digits. None: nothing.
    Raises as `den.data.load` and `make_task`.
    """
    splits = [
        load(dataset, root, split, image_size=image_size, labels=labels, group=group, memory_limit=memory_limit)
        for split in ("train", "test")
    ]
    if isinstance(augment, str):
        if augment != "default":
            raise ValueError(f'augment is {augment!r}; it must be "default", None or a den.data.Augment')
        augment = SOURCES[dataset].augment
    if name is None:
        coarse = labels == "coarse" and "labels" in SOURCES[dataset].options
        name = dataset + ("_coarse" if coarse else "") + ("" if group is None else f"_{group[0]}")
    return make_task(
        name,
        splits[0],
        splits[1],
        augment=augment,
        subset=subset,
        val_fraction=val_fraction,
        seed=seed,
        channels=channels,
    )


def preprocess(images: Sequence[Any], preprocessing: Mapping[str, Any]) -> Tensor:
    """Turn images of any size into a model's input: float32 [N, C, H, W], normalised as in training, channels_last.

    Args:
        images: files, PIL images, arrays [H, W, C] or tensors [C, H, W]. Scaled to cover the task's size and cut
            about the centre; made grey if the training images were.
        preprocessing: a task's `preprocessing`, perhaps read back from config.json.
    Raises ValueError for an unreadable image or a `preprocessing` of another form; FileNotFoundError for a missing
    file.
    """
    missing = [key for key in PREPROCESSING_KEYS if key not in preprocessing]
    if missing:
        raise ValueError(f"preprocessing lacks {', '.join(missing)}; it must have {', '.join(PREPROCESSING_KEYS)}")
    height, width = preprocessing["image_size"]
    channels = preprocessing["channels"]
    if not len(images):
        return torch.empty(0, channels, height, width).contiguous(memory_format=torch.channels_last)
    pixels = decode(images, preprocessing["grey"], (height, width)).expand(-1, channels, -1, -1)
    return normalise(pixels, preprocessing["mean"], preprocessing["std"])
