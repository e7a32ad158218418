"""The gradients of the primitive's weight and bias: deterministic, over the samples that ran each part of them.

    dweight[co, i, j, ci] = sum over samples n with co < out_width[n] and ci < in_width[n], and pixels (y, x), of
                            grad[n, y, x, co] * input[n, y S - P + i D, x S - P + j D, ci]

Three launches. `members_kernel` lists, for each tile of (output, input) channels, the samples that run any of it.
`weight_gradient_kernel` multiplies, for each tile and tap, grad [co, pixels] by input [pixels, ci] over the pixels of
the listed samples alone, cut into `splits` equal parts; each part goes to a float32 workspace of its own, and
`sum_kernel` adds the parts in their order. Which parts there are follows from shapes and the batch size; there are no
atomics, so the same batch gives the same bits.
"""

from __future__ import annotations

import torch

from den_kernels.backends.triton import configs
from den_kernels.backends.triton.launch import Launch, Sweep, check_indexable, dot_precision, multiprocessors
from den_kernels.backends.triton.weight_gradient_kernels import (
    bias_gradient_kernel,
    members_kernel,
    sum_kernel,
    weight_gradient_kernel,
)

_SAMPLES = 1024  # that a program of `members_kernel` takes at a time
_ELEMENTS = 1024  # that a program of `sum_kernel` adds
_WAVES = 4  # programs a multiprocessor that the splits aim at
_WORKSPACE_BYTES = 16 * 2**20  # or as much as the maps take


def plan_sum(workspace: torch.Tensor, out: torch.Tensor) -> Launch:
    """``out`` [...] from ``workspace`` [splits, ...]; both contiguous."""
    elements = out.numel()
    return Launch(
        kernel=sum_kernel,
        programs=-(-elements // _ELEMENTS),
        arguments={"workspace_ptr": workspace, "out_ptr": out, "elements": elements, "splits": workspace.shape[0]},
        constants={},
        tile=Sweep(_ELEMENTS, None, 4),
    )


def plan_weight_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    in_width: torch.Tensor | None,
    out_width: torch.Tensor | None,
    dweight_OHWI: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> list[Launch]:
    """The launches of the weight gradient, in order; ``grad`` and ``x`` are channels_last and not empty."""
    samples, in_channels, in_h, in_w = x.shape
    out_channels, kernel_h, kernel_w, group_in = dweight_OHWI.shape
    _, _, out_h, out_w = grad.shape
    check_indexable(dweight_OHWI, grad, x)
    group_out = out_channels // groups
    span = configs.group_span(group_in, group_out, groups)
    chunks, chunk_in, chunk_out = groups // span, span * group_in, span * group_out
    granule_in, granule_out = configs.granule(chunk_in), configs.granule(chunk_out)
    precision = dot_precision(x.dtype)
    tile, packed = configs.choose_weight_gradient(
        configs.kind(x.dtype, precision),
        pixels=out_h * out_w,
        outputs=chunk_out,
        inputs=chunk_in,
        vectors=min(granule_in, granule_out) > 1,
    )
    tiles_m, tiles_n = -(-chunk_out // tile.block_m), -(-chunk_in // tile.block_n)
    programs = chunks * tiles_m * tiles_n * kernel_h * kernel_w
    # Enough parts to fill the device, each of a few steps, in a workspace of bounded size.
    splits = max(
        1,
        min(
            _WAVES * multiprocessors(x.device) // programs,
            samples * out_h * out_w // (4 * tile.block_k),
            max(_WORKSPACE_BYTES, (x.numel() + grad.numel()) * x.element_size()) // (4 * dweight_OHWI.numel()),
        ),
    )
    tiles = chunks * tiles_m * tiles_n
    count = x.new_empty((tiles, 2), dtype=torch.int32)
    record = x.new_empty((tiles, samples), dtype=torch.int64)
    workspace = x.new_empty((splits, *dweight_OHWI.shape), dtype=torch.float32)
    widths = {"in_width_ptr": in_width, "out_width_ptr": out_width}
    lists = {"count_ptr": count, "record_ptr": record}
    sizes = {
        "samples": samples,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "tiles_m": tiles_m,
        "tiles_n": tiles_n,
    }
    granules = {"GRANULE_IN": granule_in, "GRANULE_OUT": granule_out}
    return [
        Launch(
            kernel=members_kernel,
            programs=tiles,
            arguments=widths | lists | sizes | {"chunk_in": chunk_in, "chunk_out": chunk_out},
            constants=granules | {"TILE_M": tile.block_m, "TILE_N": tile.block_n},
            tile=Sweep(min(_SAMPLES, max(16, 1 << (samples - 1).bit_length())), None, 4),
        ),
        Launch(
            kernel=weight_gradient_kernel,
            programs=programs * splits,
            arguments=lists
            | sizes
            | {
                "grad_ptr": grad,
                "x_ptr": x,
                "workspace_ptr": workspace,
                "in_h": in_h,
                "in_w": in_w,
                "out_w": out_w,
                "out_pixels": out_h * out_w,
                "group_in": group_in,
                "group_out": group_out,
                "splits": splits,
            },
            constants=granules
            | {
                "KERNEL_H": kernel_h,
                "KERNEL_W": kernel_w,
                "STRIDE_H": stride[0],
                "STRIDE_W": stride[1],
                "PAD_H": padding[0],
                "PAD_W": padding[1],
                "DILATION_H": dilation[0],
                "DILATION_W": dilation[1],
                "SPAN": span,
                "PACKED": packed,
                "PRECISION": precision,
            },
            tile=tile,
        ),
        plan_sum(workspace, dweight_OHWI),
    ]


def plan_bias_gradient(grad: torch.Tensor, out_width: torch.Tensor | None, dbias: torch.Tensor) -> list[Launch]:
    """The launches of the bias gradient, in order; ``grad`` is channels_last and not empty."""
    samples, out_channels, height, columns = grad.shape
    tile = Sweep(64, min(64, max(16, 1 << (out_channels - 1).bit_length())), 4)
    tiles = -(-out_channels // tile.blocks["BLOCK_CHANNELS"])
    share = -(-samples * tiles // (_WAVES * multiprocessors(grad.device)))
    splits = -(-samples // share)
    workspace = grad.new_empty((splits, out_channels), dtype=torch.float32)
    return [
        Launch(
            kernel=bias_gradient_kernel,
            programs=splits * tiles,
            arguments={
                "grad_ptr": grad,
                "out_width_ptr": out_width,
                "workspace_ptr": workspace,
                "samples": samples,
                "share": share,
                "out_channels": out_channels,
                "pixels": height * columns,
                "tiles": tiles,
            },
            constants={"GRANULE": configs.granule(out_channels)},
            tile=tile,
        ),
        plan_sum(workspace, dbias),
    ]
