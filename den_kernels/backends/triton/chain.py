"""A chain on a GPU: layer by layer, the pre-activations of blocks worked out by the blocks in front of them.

A pre-activation block convolves relu(scale * x + shift) of its map x. Worked out as tiles are loaded, that is done for
every tap and every tile of outputs, and activations pass through registers on their way to shared memory: two thirds of
the instructions of such a loop. So the block that writes the map also writes its activation, of each sample for the
next block at which it has channels, whose convolution then reads that as it is: one more map written, none more read.

N samples, C channels, L levels, R readers: the pre-activation blocks that read one map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from den_kernels.block import BlockArguments, output_shape
from den_kernels.chain import Step, one_by_one


class Readers(NamedTuple):
    """The blocks that read a map by its activation, and where that goes.

    activated: like the map; of a sample that no reader runs it is left as it was. level: [R, N]. widths: [R, L].
    norm: [R, 2, C], scale and shift. All three are given by the first of their rows, the others behind it in memory.
    fresh: whether nothing of `activated` is written yet, also of samples that the map's own block does not run.
    """

    activated: Tensor
    level: Tensor
    widths: Tensor
    norm: Tensor
    blocks: int
    levels: int
    fresh: bool


def find_readers(x: Tensor, y: Tensor, step: Step, behind: Sequence[Step], activated: Tensor | None) -> Readers | None:
    """The readers of y, what the block ``step`` makes of x; None where what comes next is no pre-activation block.

    activated: what the block itself has read in place of x; None: x. Those of one map have as many levels each, the
    first of which ends at the first block that makes a map of another shape.
    """
    blocks: list[BlockArguments] = []
    for _, layer in behind:
        if not isinstance(layer, BlockArguments) or layer.pre_scale is None:
            break
        if blocks and (layer.levels == 1 or layer.levels != blocks[0].levels):
            break
        blocks.append(layer)
        channels, stride = layer.output
        if output_shape(y.shape, channels, (stride,)) != tuple(y.shape):
            break
    if not blocks:
        return None
    first = blocks[0]
    fresh = x is not y or activated is None or step.layer.levels != first.levels
    if fresh or activated is None:
        activated = torch.empty_like(y)
    assert first.pre_scale is not None
    return Readers(activated, behind[0].plan[0], first.widths, first.pre_scale, len(blocks), first.levels, fresh)


def handing_on(run: Callable[..., None], fused_conv2d: Callable[..., None]) -> Callable[..., None]:
    """`chain.one_by_one` for blocks that hand on activations.

    run: runs a block from x to y with its activation or None, its readers or None, then its plan and arguments.
    """

    def run_block(x: Tensor, y: Tensor, step: Step, behind: Sequence[Step], activated: Tensor | None) -> Tensor | None:
        readers = find_readers(x, y, step, behind, activated)
        run(x, y, activated, readers, *step.plan, *step.layer)
        return None if readers is None else readers.activated

    layer_by_layer = one_by_one(run_block, fused_conv2d)

    def residual_chain(x: Tensor, out: Tensor, level: Tensor | None, *rest) -> None:
        # The rows of a plan then lie behind one another, as kernels that look ahead take them.
        layer_by_layer(x, out, None if level is None else level.contiguous(), *rest)

    return residual_chain
