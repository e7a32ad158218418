"""Data sets cut into tasks by their classes, as the paper's scenario M2 cuts ImageNet.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .images import Images

GROUPS_SEED = 0  # of the order in which classes fall into groups: the same tasks in every run, whatever its seed


def class_group(names: Sequence[str], group: Sequence[int]) -> list[str]:
    """The classes of one of several disjoint groups of one size, drawn at random once and for all.

    Section 4.1: "50 labels are randomly chosen ... and the chosen labels are separated into 10 disjoint subsets (tasks)
    each of which has 5 labels".

    Args:
        names: every class of the data set.
        group: (index, groups, size): which group, from 0; how many there are; classes in each.
    Returns `size` names in the data set's order. Raises ValueError for a group out of range, or too many classes.
    """
    if len(group) != 3 or not all(isinstance(number, int) for number in group):
        raise ValueError(f"group is {group!r}; it must be three integers: index, groups, classes in each")
    index, groups, size = group
    if not (0 <= index < groups and size >= 1):
        raise ValueError(f"group is {tuple(group)}; the index must be from 0 to groups - 1, and the size at least 1")
    if groups * size > len(names):
        raise ValueError(f"group is {tuple(group)}: {groups} x {size} classes, but the data set has {len(names)}")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(GROUPS_SEED)).tolist()
    return [names[i] for i in sorted(order[index * size : (index + 1) * size])]


def with_classes(images: Images, names: Sequence[str]) -> Images:
    """The images of these classes alone, labelled in the order of `names`.

    Raises ValueError for a class that the set lacks, a class twice, and images of several labels.
    """
    if images.heads:
        raise ValueError(f"the images have several labels ({', '.join(images.heads)}); choose one of them first")
    if len(set(names)) < len(names) or not set(names) <= set(images.class_names):
        raise ValueError(f"classes are {list(names)}; each must be one of {', '.join(images.class_names[:20])}, once")
    label_of = torch.full((len(images.class_names),), -1)
    label_of[[images.class_names.index(name) for name in names]] = torch.arange(len(names))
    label_N = label_of[images.labels]
    kept = torch.nonzero(label_N >= 0)[:, 0]
    return images.subset(kept).relabelled(label_N[kept], names)
