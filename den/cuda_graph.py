"""Whole calls of a frozen model as CUDA graphs: one launch for the selector, the plan and every block.

A graph replays what was captured, on the same memory. Images, levels and budgets are copied into it, and results out of
it, so that a call looks like any other. Levels stay on the device, so one graph serves every path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

WARM_UPS = 3  # what is compiled, chosen or allocated once must be there before a capture

Outputs = tuple[Tensor | None, ...]
Run = Callable[..., Outputs]
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]


def check_batches(cuda_graph: Any) -> tuple[int, ...]:
    """The batch sizes that `freeze(cuda_graph=...)` names; () for True: whatever the first call brings.

    Raises TypeError or ValueError for anything but a bool or batch sizes.
    """
    if cuda_graph is True:
        return ()
    if isinstance(cuda_graph, str) or not isinstance(cuda_graph, Sequence):
        raise TypeError(f"cuda_graph is {cuda_graph!r}; it must be True, False or batch sizes such as (1, 64)")
    sizes = tuple(cuda_graph)
    if not sizes or any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
        raise TypeError(f"cuda_graph is {cuda_graph!r}; it must be True, False or batch sizes such as (1, 64)")
    if min(sizes) < 1:
        raise ValueError(f"cuda_graph is {cuda_graph!r}; batch sizes must be at least 1")
    return sizes


def check_capturable(device: torch.device, backends: Sequence[str]) -> None:
    """Raise RuntimeError unless a model on this device, of blocks on these backends, can be captured."""
    if device.type != "cuda":
        raise RuntimeError(
            f"cuda_graph is given, but the model is on {device}: a CUDA graph needs an NVIDIA GPU; move the model to "
            "one before freezing it, or leave cuda_graph out"
        )
    waiting = sorted(set(backends) - {"triton"})
    if waiting:
        raise RuntimeError(
            f"cuda_graph is given, but blocks run on the backend {', '.join(map(repr, waiting))}, which waits for the "
            "GPU at every block: freeze with backend='triton', or leave cuda_graph out"
        )


class _Recorded(NamedTuple):
    """One captured call: the memory that it reads, how it is run again, and the memory that it writes."""

    inputs: Outputs
    replay: Callable[[], None]
    outputs: Outputs


class StaticCalls:
    """Captured calls of one function of images, by task, batch size, and which of its other inputs there are.

    Each is captured when it is first needed. All share their scratch memory, so they must not run at the same time.

    Args:
        batches: the batch sizes allowed; (): that of the first call.
        dtype: of the images' copies.
        capture: how a call is recorded; `captured` by default.
    """

    def __init__(self, batches: Sequence[int], dtype: torch.dtype, capture: Capture | None = None):
        self.batches, self.dtype = tuple(batches), dtype
        self._capture = capture
        self.clear()

    def clear(self) -> None:
        """Forget what was captured, the sizes of the first call included."""
        self._recorded: dict[tuple, _Recorded] = {}
        self._pool: Any = None
        self._stream: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # A graph belongs to its process and its memory: copies capture their own.
        return {**self.__dict__, "_recorded": {}, "_pool": None, "_stream": None}

    def __call__(self, run: Run, tasks: tuple[str, ...], x: Tensor, *others: Tensor | None) -> Outputs:
        """What run(tasks, x, *others) returns, of its own memory.

        Raises ValueError for a batch or image size that there is no graph for.
        """
        self._check(x)
        key = tasks, len(x), *(other is not None for other in others)
        if key not in self._recorded:
            with torch.inference_mode(False), torch.no_grad():
                self._recorded[key] = self._record(run, tasks, x, *others)
        call = self._recorded[key]
        for own, given in zip(call.inputs, (x, *others), strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        call.replay()
        return tuple(None if output is None else output.clone() for output in call.outputs)

    def _check(self, x: Tensor) -> None:
        known = next(iter(self._recorded.values()), None)
        images = None if known is None else cast(Tensor, known.inputs[0])
        batches = self.batches or (() if images is None else (len(images),))
        if batches and len(x) not in batches:
            sizes = " or ".join(map(str, batches))
            raise ValueError(
                f"x has {len(x)} images, but this model was frozen for a CUDA graph of {sizes}: pad the batch, or "
                f"freeze the model with cuda_graph={(*batches, len(x))}"
            )
        if not len(x):
            raise ValueError("x has no images; a CUDA graph needs at least one")
        if images is not None and x.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"x holds images of {tuple(x.shape[1:])}, but the CUDA graphs of this model are for "
                f"{tuple(images.shape[1:])}: resize them, or freeze the model once more for that size"
            )

    def _record(self, run: Run, tasks: tuple[str, ...], x: Tensor, *others: Tensor | None) -> _Recorded:
        own_x = x.detach().to(self.dtype, copy=True).contiguous(memory_format=torch.channels_last)
        own = own_x, *(None if other is None else other.clone() for other in others)
        if self._capture is None and self._pool is None:
            # One stream with the pool: the allocator gives a free block only to the stream that it was freed on.
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(x.device)
        capture = self._capture or (lambda call: captured(call, x.device, self._pool, self._stream))
        return _Recorded(own, *capture(lambda: run(tasks, *own)))


def captured(
    run: Callable[[], Outputs], device: torch.device, pool: Any = None, stream: Any = None
) -> tuple[Callable[[], None], Outputs]:
    """A run of CUDA work as a graph, warmed up and captured on a side stream: how to replay it, and its outputs.

    pool, stream: of the captures that share memory, which they do on one stream alone; None: of its own.

    Raises RuntimeError where the work cannot be captured: something in it waits for the GPU.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream() if stream is None else stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=side):
                outputs = run()
        except RuntimeError as error:
            raise RuntimeError(
                f"this cannot be captured in a CUDA graph: {error}; every part, a selector of your own included, must "
                "work without waiting for the GPU"
            ) from error
    return graph.replay, outputs
