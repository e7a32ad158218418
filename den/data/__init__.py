"""Images: readers of the published formats, augmentation, batches."""

from __future__ import annotations

from .augment import Augment, channel_statistics, normalise
from .batches import Batches
from .classes import class_group, with_classes
from .folders import find_images
from .images import Images, ImageSet, LazyImages, from_dataset, stratified, to_uint8
from .sources import SOURCES, Source, load

__all__ = [
    "SOURCES",
    "Augment",
    "Batches",
    "ImageSet",
    "Images",
    "LazyImages",
    "Source",
    "channel_statistics",
    "class_group",
    "find_images",
    "from_dataset",
    "load",
    "normalise",
    "stratified",
    "to_uint8",
    "with_classes",
]
