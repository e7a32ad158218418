"""The results that the paper prints, Tables 2 to 5, as printed: to stand beside ours, never to be computed with.

arXiv:1909.04860v1. A cell is the text of the paper, "-" where it prints a dash, "" where it prints nothing. FLOPs are
2 x multiply-adds in Tables 2 and 4, 1 x multiply-adds in Table 3, and the ratio to the baseline in Table 5. Parameters
are those stored in Tables 2 to 4, and those used on average in Table 5. What is counted: see den/flops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One printed row.

    name: as printed, without the citation.
    method: the name that a run's `about` has for it; None: one that is only cited here.
    accuracy: of each of the table's tasks, percent; Table 2 has their average last.
    rho: of equation 5, for a DEN. level: of a NestedNet, L, M or H. image_size: where the table has rows of several.
    """

    name: str
    method: str | None
    accuracy: tuple[str, ...]
    flops: str
    parameters: str
    rho: float | None = None
    level: str | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class Table:
    """One printed table, or the part of one for one backbone or one task.

    number: "2a", "5"; title. backbone: as printed; model: `den.create_model`'s name of it. scenario: of section 4.1.
    columns: of each row's accuracy. tasks: names that a run's tasks may have, in the columns' order.
    notes: what in it does not fit together, or is counted otherwise.
    """

    number: str
    title: str
    scenario: str
    backbone: str
    model: str
    columns: tuple[str, ...]
    tasks: tuple[tuple[str, ...], ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


_M1_COLUMNS = ("CIFAR-100", "Tiny-ImageNet", "STL-10", "average")
_M1_TASKS = (("cifar100",), ("tiny_imagenet",), ("stl10",))
_TABLE_2 = (
    "The baseline is three networks, one a task; its parameters are those of all three.",
    "FLOPs are of the estimator alone: the selector's 0.15G (ResNet-42) and 0.11G (WRN-32-4) come on top.",
    "Each task's network runs at a 32x32 first-stage map, whatever the images' size: our reading of equal FLOPs.",
)
_TABLE_4 = (
    "The printed FLOPs are ResNet-42's (2.91G, half of it 1.46G), the printed parameters WRN-32-4's (7.35M): WRN-32-4 "
    "itself takes 2.13G, and 1.07G at half width.",
)
_TABLE_5 = (
    "FLOPs are printed as the baseline's divided by the row's. Parameters are the mean that an image uses.",
    "VGG-16 is the paper's: 16 convolutions (configuration E), 38.9M parameters without the classifier.",
)


def _compression(task: str, number: str, backbone: str, model: str, rows: Sequence[Row], *notes: str) -> Table:
    names = {"CIFAR-10": ("cifar10",), "CIFAR-100": ("cifar100",)}
    title = f"Network compression on {task}, {backbone}"
    return Table(number, title, "c1", backbone, model, (task,), (names[task],), tuple(rows), (*_TABLE_5, *notes))


def _nested(level: str, accuracy: str, flops: str, parameters: str) -> Row:
    return Row(f"NestedNet, {level}", "nestednet", (accuracy,), flops, parameters, level=level)


def _den(rho: float, accuracy: str, flops: str, parameters: str) -> Row:
    return Row(f"DEN (rho = {rho:g})", "den", (accuracy,), flops, parameters, rho=rho)


def _one(name: str, method: str | None, accuracy: str, flops: str, parameters: str) -> Row:
    return Row(name, method, (accuracy,), flops, parameters)


TABLES = (
    Table(
        "2a",
        "Three tasks of different input scales, ResNet-42",
        "m1",
        "ResNet-42",
        "resnet_42",
        _M1_COLUMNS,
        _M1_TASKS,
        (
            Row("Baseline", "independent", ("75.05", "57.22", "76.25", "69.51"), "2.91G", "89.4M [3]"),
            Row("NestedNet", "nestednet", ("74.53", "56.71", "82.54", "71.26"), "1.70G", "29.8M [1]"),
            Row("PackNet*", "packnet", ("72.22", "56.49", "80.78", "69.83"), "1.70G", "29.8M [1]"),
            Row("DEN (rho = 1)", "den", ("74.30", "56.74", "83.90", "71.65"), "1.35G", "29.8M [1]", rho=1),
            Row("DEN (rho = 0.1)", "den", ("75.11", "60.21", "87.58", "74.30"), "1.61G", "29.8M [1]", rho=0.1),
        ),
        _TABLE_2,
    ),
    Table(
        "2b",
        "Three tasks of different input scales, WRN-32-4",
        "m1",
        "WRN-32-4",
        "wrn_32_4",
        _M1_COLUMNS,
        _M1_TASKS,
        (
            Row("Baseline", "independent", ("75.01", "58.89", "79.88", "71.26"), "2.13G", "22.0M [3]"),
            Row("NestedNet", "nestednet", ("74.09", "57.87", "83.78", "71.91"), "1.24G", "7.35M [1]"),
            Row("PackNet*", "packnet", ("73.56", "57.17", "84.15", "71.63"), "1.24G", "7.35M [1]"),
            Row("DEN (rho = 1)", "den", ("75.43", "58.17", "87.54", "73.71"), "1.13G", "7.35M [1]", rho=1),
            Row("DEN (rho = 0.1)", "den", ("75.65", "58.25", "87.56", "73.82"), "1.14G", "7.35M [1]", rho=0.1),
        ),
        _TABLE_2,
    ),
    Table(
        "3",
        "Mini-ImageNet, ten tasks of five classes, SimpleConvNet",
        "m2",
        "SimpleConvNet",
        "simple_conv_net",
        ("mean of 10 tasks",),
        ((),),
        (
            Row("Baseline", "dense", ("51.03",), "27.4M", "0.14M", image_size=84),
            Row("Cross-stitch", "cross_stitch", ("56.03",), "> 27.4", "> 0.14M", image_size=84),
            Row("Routing", "routing", ("58.97",), "27.4M", "> 0.14M", image_size=84),
            Row("DENs (rho = 1)", "den", ("60.78",), "18.7M", "0.14M", rho=1, image_size=84),
            Row("DENs (rho = 0.1)", "den", ("62.62",), "19.4M", "0.14M", rho=0.1, image_size=84),
            Row("DEN (rho = 1)", "den", ("63.20",), "33.3M", "0.85M", rho=1, image_size=224),
            Row("DEN (rho = 0.1)", "den", ("65.23",), "39.1M", "0.85M", rho=0.1, image_size=224),
        ),
        (
            "FLOPs are multiply-adds here, not doubled as in Table 2.",
            'Cross-stitch\'s "> 27.4" is printed without its M.',
            "DENs: images of 84x84. DEN: 224x224, where 33.3M and 39.1M fit only a first convolution of stride 2.",
            "27.46M multiply-adds and 0.148M parameters are printed cut off, as 27.4M and 0.14M.",
        ),
    ),
    Table(
        "4a",
        "Hierarchical classification, CIFAR-100's 20 coarse classes, WRN-32-4",
        "m3",
        "WRN-32-4",
        "wrn_32_4",
        ("coarse",),
        (("cifar100_coarse", "coarse"),),
        (
            _one("Baseline", "independent", "83.53", "2.91G", "14.7M"),
            _one("NestedNet", "nestednet", "84.55", "1.46G", "7.35M"),
            _one("PackNet*", "packnet", "84.53", "1.46G", "7.35M"),
            _den(1, "84.87", "1.37G", "7.35M"),
        ),
        _TABLE_4,
    ),
    Table(
        "4b",
        "Hierarchical classification, CIFAR-100's 100 fine classes, WRN-32-4",
        "m3",
        "WRN-32-4",
        "wrn_32_4",
        ("fine",),
        (("cifar100", "fine"),),
        (
            _one("Baseline", "independent", "76.32", "2.91G", "14.7M"),
            _one("NestedNet", "nestednet", "75.84", "2.91G", "7.35M"),
            _one("PackNet*", "packnet", "75.65", "2.91G", "7.35M"),
            _den(1, "75.93", "1.37G", "7.35M"),
        ),
        _TABLE_4,
    ),
    _compression(
        "CIFAR-10",
        "5",
        "VGG-16",
        "vgg_16",
        (
            _one("Baseline", "dense", "92.52", "1.0x", "38.9M"),
            _nested("L", "91.29", "2.0x", "19.4M"),
            _nested("H", "92.40", "1.0x", "38.9M"),
            _den(0.1, "92.31", "2.4x", "18.5M"),
        ),
        "Half the width is 19.45M parameters, printed cut off as 19.4M.",
    ),
    _compression(
        "CIFAR-100",
        "5",
        "VGG-16",
        "vgg_16",
        (
            _one("Baseline", "dense", "69.64", "1.0x", "38.9M"),
            _nested("L", "68.10", "2.0x", "19.4M"),
            _nested("H", "69.01", "1.0x", "38.9M"),
            _den(0.1, "68.87", "1.7x", "18.9M"),
        ),
        "Half the width is 19.45M parameters, printed cut off as 19.4M.",
    ),
    _compression(
        "CIFAR-10",
        "5",
        "ResNet",
        "resnet_50",
        (
            _one("N2N (ResNet-18)", None, "91.97", "-", "2.12M"),
            _one("N2N (ResNet-34)", None, "93.54", "-", "3.87M"),
            _one("Pruning (ResNet-50)", "pruned", "94.15", "-", "6.44M"),
            Row("DEN (rho = 1) (ResNet-50)", "den", ("94.50",), "-", "4.25M", rho=1),
        ),
        "No baseline is printed for ResNet-50, so there is no ratio.",
    ),
    _compression(
        "CIFAR-100",
        "5",
        "ResNet",
        "resnet_50",
        (
            _one("N2N (ResNet-18)", None, "69.64", "-", "4.76M"),
            _one("N2N (ResNet-34)", None, "70.11", "-", "4.25M"),
            _one("Pruning (ResNet-50)", "pruned", "74.10", "-", "9.24M"),
            Row("DEN (rho = 1) (ResNet-50)", "den", ("77.98",), "-", "4.67M", rho=1),
        ),
        "No baseline is printed for ResNet-50, so there is no ratio.",
    ),
    _compression(
        "CIFAR-10",
        "5",
        "ResNeXt-29 (8x64d)",
        "resnext_29_8x64d",
        (
            _one("Baseline", "dense", "94.61", "1.0x", "22.4M"),
            _nested("L", "93.56", "4.0x", "5.6M"),
            _nested("M", "93.64", "2.0x", "11.2M"),
            _nested("H", "94.13", "1.0x", "22.4M"),
            _one("BlockDrop", "blockdrop", "93.56", "1.2x", "16.9M"),
            _one("DEN + rand sel", "random", "90.55", "2.3x", "9.8M"),
            _den(1, "91.45", "5.5x", "4.1M"),
            _den(0.1, "94.61", "2.7x", "8.7M"),
        ),
    ),
    _compression(
        "CIFAR-100",
        "5",
        "ResNeXt-29 (8x64d)",
        "resnext_29_8x64d",
        (
            _one("Baseline", "dense", "78.73", "1.0x", "22.4M"),
            _nested("L", "74.83", "4.0x", "5.6M"),
            _nested("M", "74.98", "2.0x", "11.2M"),
            _nested("H", "76.16", "1.0x", "22.4M"),
            _one("BlockDrop", "blockdrop", "78.35", "1.4x", "15.5M"),
            _one("DEN + rand sel", "random", "69.67", "2.3x", "9.8M"),
            _den(1, "78.27", "3.0x", "7.3M"),
            _den(0.1, "78.68", "1.9x", "13.5M"),
        ),
        "Parameters and FLOPs of a DEN need not have one ratio: 13.5M is 1.7 times less than 22.4M, beside 1.9x.",
    ),
    _compression(
        "CIFAR-10",
        "5",
        "ResNeXt-29 (4x64d)",
        "resnext_29_4x64d",
        (
            _one("Baseline", "dense", "94.37", "1.0x", "11.2M"),
            _nested("L", "93.59", "2.0x", "5.6M"),
            _nested("H", "94.11", "1.0x", "11.2M"),
            _one("BlockDrop", "blockdrop", "93.07", "1.7x", "6.53M"),
            _one("DEN (rand sel)", "random", "87.33", "2.0x", "5.6M"),
            _den(1, "93.38", "2.1x", "5.4M"),
            _den(0.1, "94.47", "1.9x", "5.8M"),
        ),
    ),
    _compression(
        "CIFAR-100",
        "5",
        "ResNeXt-29 (4x64d)",
        "resnext_29_4x64d",
        (
            _one("Baseline", "dense", "77.95", "1.0x", "11.2M"),
            _nested("L", "75.70", "2.0x", "5.6M"),
            _nested("H", "76.36", "1.0x", "11.2M"),
            _one("BlockDrop", "blockdrop", "77.23", "1.5x", "7.47M"),
            _one("DEN (rand sel)", "random", "65.44", "2.0x", "5.6M"),
            _den(1, "76.71", "2.0x", "5.6M"),
            _den(0.1, "77.58", "1.8x", "6.3M"),
        ),
    ),
    _compression(
        "CIFAR-10",
        "5",
        "ResNeXt-29 (2x64d)",
        "resnext_29_2x64d",
        (_one("Baseline", "dense", "93.60", "-", "5.6M"),),
    ),
    _compression(
        "CIFAR-100",
        "5",
        "ResNeXt-29 (2x64d)",
        "resnext_29_2x64d",
        (_one("Baseline", "dense", "76.54", "-", "5.6M"),),
    ),
)
