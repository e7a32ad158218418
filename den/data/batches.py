"""Batches of a data set, ready for a model, whose position can be saved and restored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .augment import Augment, normalise
from .images import Images, ImageSet

STATE_KEYS = ("epoch", "batch", "seed", "samples", "batch_size", "shares")


def _generator(*place: int | str) -> torch.Generator:
    """A CPU generator for one place in training. Every place has its own, so a position is plain numbers."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class Batches:
    """Iterates over (images float32 [N, C, H, W] normalised channels_last, labels int64 [N] or [N, T]) on `device`.

    One `for` loop is one epoch; the next loop is the next epoch, in another order if `shuffle`. The order and the
    augmentation depend on seed, epoch and batch number alone, so a restored position continues identically.

    Args:
        dataset: an ImageSet (indexed in memory, on `device`, without workers) or LazyImages (through a torch
            DataLoader).
        batch_size: samples a batch, at least 1. The last one is smaller, or left out if drop_last.
        mean, std: C numbers each, in units of full scale (255 is 1).
        augment: applied before normalisation; None: nothing.
        seed: of order and augmentation.
        device: where the batches are.
        num_workers: processes that read a LazyImages; 0: this one.
        share: (i, n): only samples i, i + n, ... of each epoch's order, for process i of n. With shuffle or drop_last
            every process gets the same number (up to n - 1 samples are left out of an epoch); else all samples are
            covered.
    Raises ValueError for arguments out of range.
    """

    def __init__(
        self, dataset: Images, batch_size: int, *, mean: Sequence[float], std: Sequence[float], shuffle: bool = False,
        drop_last: bool = False, augment: Augment | None = None, seed: int = 0, device: torch.device | str = "cpu",
        num_workers: int = 0, share: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        channels = dataset.shape[0]
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if not len(mean) == len(std) == channels:
            raise ValueError(f"mean has {len(mean)} numbers and std {len(std)}; the images have {channels} channels")
        if not all(deviation > 0 for deviation in std):
            raise ValueError(f"std is {tuple(std)}; each must be above 0")
        if not 0 <= share[0] < share[1]:
            raise ValueError(f"share is {share}; it must be (i, n) with 0 <= i < n")
        self.dataset, self.batch_size, self.shuffle, self.drop_last = dataset, batch_size, shuffle, drop_last
        self.augment, self.seed, self.share, self.num_workers = augment, seed, share, num_workers
        self.device = torch.device(device)
        self.mean, self.std = torch.tensor(mean, device=self.device), torch.tensor(std, device=self.device)
        self.images = dataset.images.to(self.device) if isinstance(dataset, ImageSet) else None
        self.labels = dataset.labels.to(self.device)
        self.epoch = 0  # the epoch being gone through, or the next one
        self.batch = 0  # the next batch in it
        self._fresh = True  # no loop has begun since this position was set

    @property
    def samples(self) -> int:
        """Samples that one epoch goes through, in this share."""
        index, shares = self.share
        even = self.shuffle or self.drop_last
        mine = len(self.dataset) // shares if even else len(range(index, len(self.dataset), shares))
        return mine // self.batch_size * self.batch_size if self.drop_last else mine

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """Indices of the data set, int64 [samples], in the order of an epoch."""
        count, (index, shares) = len(self.dataset), self.share
        everything = (
            torch.randperm(count, generator=_generator("order", self.seed, epoch))
            if self.shuffle
            else torch.arange(count)
        )
        return everything[index::shares][: self.samples]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self._fresh and self.batch:  # the last loop was left early: this one is another epoch
            self.epoch, self.batch = self.epoch + 1, 0
        self._fresh = False
        return self._epoch(self.epoch, self.batch)

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        chunks = list(self.order(epoch).split(self.batch_size))[start:] if self.samples else []
        for batch, (images, labels) in enumerate(self._read(chunks), start):
            if self.augment is not None:
                images = self.augment(images, _generator("augment", self.seed, epoch, batch, self.share[0]))
            self.epoch, self.batch = epoch, batch + 1
            yield normalise(images, self.mean, self.std), labels
        self.epoch, self.batch = epoch + 1, 0

    def _read(self, chunks: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if self.images is not None:
            for chunk in chunks:
                indices = chunk.to(self.device, non_blocking=True)
                yield self.images.index_select(0, indices), self.labels.index_select(0, indices)
        elif chunks:
            loader = DataLoader(
                self.dataset, batch_sampler=[chunk.tolist() for chunk in chunks], num_workers=self.num_workers,
                pin_memory=self.device.type == "cuda", generator=_generator("workers", self.seed),
            )  # fmt: skip
            for images, labels in loader:
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def forever(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one epoch after another, without end. Raises ValueError if an epoch has none."""
        if not len(self):
            raise ValueError(
                f"{len(self.dataset)} samples make no batch of {self.batch_size} (drop_last={self.drop_last})"
            )
        while True:
            yield from self

    def state_dict(self) -> dict[str, int]:
        """The position: plain integers. Taken inside a loop, it is the one after the batch in hand."""
        values = (self.epoch, self.batch, self.seed, len(self.dataset), self.batch_size, self.share[1])
        return dict(zip(STATE_KEYS, values, strict=True))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position: the next loop goes through what was left of that epoch (nothing, after its last
        batch).

        Raises ValueError when it was saved with other data, batch size, seed or shares, and would not continue alike.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(f"a position has the keys {sorted(own)}; this one has {sorted(state)}")
        for key in STATE_KEYS[2:]:
            if state[key] != own[key]:
                raise ValueError(f"the position was saved with {key} {state[key]}; here it is {own[key]}")
        if not (state["epoch"] >= 0 and 0 <= state["batch"] <= len(self)):
            raise ValueError(
                f"epoch {state['epoch']}, batch {state['batch']} is no position: an epoch has {len(self)} batches"
            )
        self.epoch, self.batch, self._fresh = state["epoch"], state["batch"], True
