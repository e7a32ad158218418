"""Batches that can be resumed, and the tasks that make them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from den.data import Augment, Batches, Images, ImageSet, LazyImages, normalise
from den.tasks import Task, load_task, make_task, preprocess

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)


def image_set(count: int = 23, channels: int = 3, classes: int = 4) -> ImageSet:
    images = torch.randint(
        256, (count, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )
    return ImageSet(images, torch.arange(count) % classes, [f"class{i}" for i in range(classes)])


def as_lazy(dataset: ImageSet) -> LazyImages:
    return LazyImages(list(dataset.images), dataset.labels, dataset.class_names, dataset.shape[1:], dataset.grey)


def batches(dataset: Images, batch_size: int = 5, **options: object) -> Batches:
    return Batches(dataset, batch_size, mean=MEAN, std=STD, **options)  # type: ignore[arg-type]


def training(dataset: Images, **options: object) -> Batches:
    return batches(dataset, shuffle=True, augment=Augment(padding=2), seed=7, **options)


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(left, right, strict=True)
    )


def test_plain_batches_are_the_data_in_order() -> None:
    dataset = image_set()
    got = list(batches(dataset))
    assert [len(labels) for _, labels in got] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat([images for images, _ in got]), normalise(dataset.images, MEAN, STD))
    assert torch.equal(torch.cat([labels for _, labels in got]), dataset.labels)
    images, labels = got[0]
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("count", "drop_last", "expected"), [(23, False, 5), (23, True, 4), (20, True, 4), (3, True, 0), (0, False, 0)]
)
def test_length(count: int, drop_last: bool, expected: int) -> None:
    source = batches(image_set(count), drop_last=drop_last)
    assert len(source) == len(list(source)) == expected


def test_shuffle_covers_all_and_differs_by_epoch_and_seed() -> None:
    dataset = image_set()
    source, again = training(dataset), training(dataset)
    epochs = [list(source) for _ in range(2)]
    assert same(epochs[0], list(again))
    assert same(epochs[1], list(again))
    assert not same(epochs[0], epochs[1])
    assert sorted(source.order(0).tolist()) == list(range(23))
    assert not torch.equal(source.order(0), source.order(1))
    assert not same(epochs[0], list(batches(dataset, shuffle=True, augment=Augment(padding=2), seed=8)))


def test_every_batch_and_epoch_has_its_own_augmentation() -> None:
    one = image_set(1)
    source = batches(one.subset(torch.zeros(15, dtype=torch.int64)), augment=Augment(padding=4))
    seen = [images for _ in range(2) for images, _ in source]
    assert not any(torch.equal(left, right) for left, right in itertools.combinations(seen, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_lazy_batches_equal_those_in_memory(workers: int) -> None:
    dataset = image_set()
    assert same(list(training(as_lazy(dataset), num_workers=workers)), list(training(dataset)))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_resume_continues_identically(stop: int, lazy: bool) -> None:
    dataset: Images = as_lazy(image_set()) if lazy else image_set()
    source = training(dataset)
    list(source)
    state = source.state_dict()
    rest = []
    for number, batch in enumerate(source, 1):
        if number == stop:
            state = json.loads(json.dumps(source.state_dict()))
        elif number > stop:
            rest.append(batch)
    resumed = training(dataset)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert same(list(resumed), rest)
    assert same(list(resumed), list(source))


def test_a_loop_left_early_is_followed_by_another_epoch() -> None:
    source, other = training(image_set()), training(image_set())
    next(iter(source))
    list(other)
    assert same(list(source), list(other))


def test_forever() -> None:
    source, other = training(image_set()), training(image_set())
    assert same(list(itertools.islice(source.forever(), 12)), (list(other) + list(other) + list(other))[:12])
    with pytest.raises(ValueError, match="23 samples make no batch of 50"):
        next(batches(image_set(), 50, drop_last=True).forever())


def test_state_of_other_batches_is_refused() -> None:
    source = training(image_set())
    for key, value, message in [
        ("batch_size", 6, "saved with batch_size 6; here it is 5"),
        ("samples", 24, "saved with samples 24"),
        ("batch", 9, "epoch 0, batch 9 is no position"),
    ]:
        with pytest.raises(ValueError, match=message):
            source.load_state_dict({**source.state_dict(), key: value})
    with pytest.raises(ValueError, match="a position has the keys"):
        source.load_state_dict({"epoch": 1})


def test_shares_divide_an_epoch() -> None:
    dataset = image_set()
    shares = [training(dataset, share=(i, 3)) for i in range(3)]
    orders = [share.order(0).tolist() for share in shares]
    assert [len(order) for order in orders] == [7, 7, 7]
    assert len(set(itertools.chain(*orders))) == 21
    evaluated = [batches(dataset, share=(i, 3)).order(0).tolist() for i in range(3)]
    assert sorted(itertools.chain(*evaluated)) == list(range(23))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"share": (2, 2)}, "share is"),
        ({"mean": (0.5,)}, "3 channels"),
        ({"std": (1, 0, 1)}, "above 0"),
    ],
)
def test_bad_batches(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(image_set(), **{"batch_size": 4, "mean": MEAN, "std": STD, **options})


def test_make_task() -> None:
    train, test = image_set(200), image_set(40)
    task = make_task("things", train, test, subset=100, val_fraction=0.2, seed=3)
    assert [len(task.split(split)) for split in ("train", "val", "test")] == [80, 20, 40]
    for split in ("train", "val"):
        assert len(set(torch.bincount(task.split(split).labels).tolist())) == 1
    seen = [image.numpy().tobytes() for split in ("train", "val") for image in task.split(split).images]
    assert len(set(seen)) == 100
    assert (task.num_classes, task.channels, task.image_size) == (4, 3, (8, 8))
    again = make_task("things", train, test, subset=100, val_fraction=0.2, seed=3)
    assert torch.equal(again.train.images, task.train.images)
    assert "train 80, val 20, test 40, 4 classes" in repr(task)


def test_task_of_several_labels() -> None:
    fine = torch.arange(40) % 4
    names = {"coarse": ["low", "high"], "fine": ["a", "b", "c", "d"]}
    images = image_set(40).images
    both = ImageSet(images, torch.stack([fine // 2, fine], 1), names)
    task = make_task("things", both, both.subset(torch.arange(8)), val_fraction=0.2)
    assert task.heads == {"coarse": 2, "fine": 4}
    assert "2 classes and 4 classes" in repr(task)
    x, y = next(iter(task.batches("train", 5)))
    assert (x.shape[0], y.shape) == (5, (5, 2))
    assert torch.equal(y[:, 0], y[:, 1] // 2)
    for part, count in zip(task.by_head(), (2, 4), strict=True):
        assert (part.num_classes, part.heads, part.mean) == (count, {part.name: count}, task.mean)
        assert part.joint == "things"
        assert part.train.images.data_ptr() == task.train.images.data_ptr()
        x_part, y_part = next(iter(part.batches("train", 5)))  # the same images in the same order
        assert torch.equal(x_part, x)
        column = task.train.column(part.name)
        assert torch.equal(y_part, y[:, column])
        assert torch.equal(part.split("val").labels, task.split("val").labels[:, column])
    plain = make_task("things", image_set(8), image_set(8))
    assert plain.by_head() == [plain]
    assert plain.heads == {"things": 4}
    assert plain.joint is None


def test_task_batches() -> None:
    task = make_task("things", image_set(23), image_set(10), augment=Augment(padding=2))
    assert [len(y) for _, y in task.batches("train", 5)] == [5, 5, 5, 5]
    assert [len(y) for _, y in task.batches("test", 4)] == [4, 4, 2]
    assert [len(y) for _, y in task.batches("train", 64)] == [23]  # the only batch is not left out
    still = next(iter(task.batches("train", 23, training=False)))[0]
    assert torch.equal(still, normalise(task.train.images, task.mean, task.std))
    assert abs(still.mean()) < 1e-5


def test_task_refuses() -> None:
    train = image_set()
    with pytest.raises(ValueError, match=r"test images are .* training images"):
        make_task("things", train, image_set(5).resized(4))
    with pytest.raises(ValueError, match="other classes"):
        make_task("things", train, image_set(5, classes=3))
    with pytest.raises(ValueError, match="subset is 24; things has 23"):
        make_task("things", train, train, subset=24)
    with pytest.raises(ValueError, match="val_fraction is 1"):
        make_task("things", train, train, val_fraction=1)
    task = make_task("things", train, train)
    with pytest.raises(ValueError, match="no val images"):
        task.batches("val", 4)
    with pytest.raises(ValueError, match="split is 'dev'"):
        task.batches("dev", 4)


def test_grey_training_images_make_a_grey_task() -> None:
    task = make_task("things", image_set(8, channels=1), image_set(8))
    assert task.train.shape == task.test.shape == (3, 8, 8)
    assert task.test.grey
    assert make_task("things", image_set(8), image_set(8), channels=1).train.shape == (1, 8, 8)


def test_preprocess_is_what_training_saw(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    task = load_task("digits")
    expected = next(iter(task.batches("test", 5)))[0]
    settings = json.loads(json.dumps(task.preprocessing))
    paths = []
    for n in range(5):
        paths.append(tmp_path / f"{n}.png")
        Image.fromarray(task.test.images[n, 0].numpy()).convert("RGB").save(paths[-1])
    assert torch.equal(preprocess(paths, settings), expected)
    assert preprocess([Image.new("RGB", (40, 20))], settings).shape == (1, 3, 8, 8)
    assert preprocess([], settings).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match="preprocessing lacks mean"):
        preprocess(paths, {key: value for key, value in settings.items() if key != "mean"})
    with pytest.raises(FileNotFoundError):
        preprocess([tmp_path / "none.png"], settings)


def test_load_task_names_and_augmentation() -> None:
    pytest.importorskip("sklearn")
    task = load_task("digits", subset=100)
    assert isinstance(task, Task)
    assert (task.name, len(task.train), task.augment) == ("digits", 100, Augment(flip=False, padding=1))
    assert task.preprocessing["grey"]
    named = load_task("digits", name="small", augment=None, channels=1, image_size=12)
    assert (named.name, named.augment, named.train.shape) == ("small", None, (1, 12, 12))
    with pytest.raises(ValueError, match="augment is 'paper'"):
        load_task("digits", augment="paper")
