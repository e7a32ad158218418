"""The fused residual block for inference: one launch a convolution, levels and widths on the device.

    hidden = relu(scale[level] * conv(x or relu(pre(x))) + shift[level])      expand, and the inner one of a bottleneck
    out    = [relu](shortcut(x) + scale[level] * conv(hidden) + shift[level]) contract, in place when shapes agree

Samples are visited in the plan's order, dearest first, and the hidden buffer is in that order too: slot s of it
belongs to sample order[s]. The grid is the worst case, so that it is static; the programs of slots and channel tiles
beyond a level return after a few scalar loads. Two launches, not one: a block in place on x would race on the halos,
and recomputing the halo costs more than the round trip of `hidden` through L2 saves (WRN-32-4 stage 1 in bf16: 128 KiB
a sample written and read, against 75 MFLOP a convolution).

A batch that does not fill the device, or a deep reduction over a small map, has few programs, each of many steps: then
the reduction is split, at the cost of one more launch (`configs.splits`).

A projection shortcut is a launch of its own in front (`projection.py`): it fills `out`, and the last convolution adds
to it in place, the traffic that a dense network has.

Hidden channels from the width up to the next multiple of 16 are written as zeros, which lets the next convolution
load whole 16-byte vectors; channels beyond are never written and never read.
"""

from __future__ import annotations

import math

import torch

from den_kernels.backends.triton import configs
from den_kernels.backends.triton.block_kernels import hidden_kernel, last_kernel
from den_kernels.backends.triton.chain import Readers
from den_kernels.backends.triton.conv import empty_map, output_size
from den_kernels.backends.triton.launch import Launch, check_indexable, dot_precision, multiprocessors
from den_kernels.backends.triton.projection import plan_projection
from den_kernels.backends.triton.tile_tables import Problem, batch_class
from den_kernels.block import BlockArguments


def plan_block(
    x: torch.Tensor,
    out: torch.Tensor,
    level: torch.Tensor,
    order: torch.Tensor,
    count: torch.Tensor,
    block: BlockArguments,
    *,
    in_place: bool,
    activated: torch.Tensor | None = None,
    readers: Readers | None = None,
) -> list[Launch]:
    """The launches of one block, in order; ``x`` and ``out`` are channels_last and not empty.

    activated: relu(pre(x)), which is then read in place of x by the first convolution. readers: see `chain`.
    """
    widths, weight_OHWI, scale, shift, pre_scale, pre_shift, kernel_size, stride, groups, projection, relu = block
    precision = dot_precision(x.dtype)
    samples = x.shape[0]
    launches: list[Launch] = []
    residual, pooling = x, math.prod(stride)
    if projection:
        # The convolutions still read x when it is to be overwritten.
        residual, pooling = empty_map(out.shape, out) if in_place else out, 1
        filters, projection_scale, projection_shift = projection
        launches.append(
            plan_projection(x, filters, projection_scale, projection_shift, level, residual, math.prod(stride))
        )
        in_place = not in_place
    source = x
    if activated is not None:
        source, pre_scale, pre_shift = activated, None, None
    padded_in = True  # whether what `source` holds beyond a width, up to the next multiple of 16, is zero
    last = len(weight_OHWI) - 1
    for i, weight in enumerate(weight_OHWI):
        _, in_channels, in_h, in_w = source.shape
        out_channels, _, _, group_in = weight.shape
        kernel = kernel_size[i]
        out_h = output_size(in_h, kernel, stride[i], kernel // 2, 1)
        out_w = output_size(in_w, kernel, stride[i], kernel // 2, 1)
        group_out = out_channels // groups[i]
        span = configs.group_span(group_in, group_out, groups[i])
        chunks = groups[i] // span
        if i < last:
            target = empty_map((samples, out_channels, out_h, out_w), x)
        else:
            target = out
        check_indexable(weight, source, target)
        granule = configs.granule(span * group_in) if padded_in else 1
        kind = configs.kind(x.dtype, precision)
        name = "last" if i == last else "inner" if i > 0 else "first" if pre_scale is None else "first-pre"
        form = (in_channels, out_channels, in_h, in_w, (kernel, kernel), (stride[i], stride[i]), groups[i])
        tile = configs.tile(
            Problem(name, kind, *form, batch_class(samples)),
            x.device,
            configs.Facts(
                kind=kind,
                samples=samples * chunks,
                rows=out_h * out_w,
                reduction=span * group_in,
                columns=span * group_out,
                elastic_in=i > 0 and chunks == 1,
                elastic_out=i < last and chunks == 1,
                through_registers=i == 0 and pre_scale is not None,
                vectors=granule > 1,
                multiprocessors=multiprocessors(x.device),
            ),
        )
        tiles_m, tiles_n = -(-(out_h * out_w) // tile.block_m), -(-(span * group_out) // tile.block_n)
        programs = samples * tiles_m * chunks * tiles_n
        splits = configs.splits(
            programs, kernel * kernel * -(-(span * group_in) // tile.block_k), multiprocessors(x.device)
        )
        workspace = None
        if splits > 1:
            shape = (splits, samples, out_h * out_w, out_channels)
            workspace = torch.empty(shape, dtype=torch.float32, device=x.device)
        arguments = {
            "weight_ptr": weight,
            "scale_ptr": scale[i],
            "shift_ptr": shift[i],
            "order_ptr": order,
            "count_ptr": count,
            "widths_ptr": widths,
            "out_ptr": target,
            "workspace_ptr": workspace,
            "samples": samples,
            "out_channels": out_channels,
            "in_h": in_h,
            "in_w": in_w,
            "out_w": out_w,
            "out_pixels": out_h * out_w,
            "group_in": group_in,
            "group_out": group_out,
            "tiles_m": tiles_m,
            "tiles_n": tiles_n,
        }
        constants = {
            "LEVELS": count.shape[0],
            "PARTS": splits,
            "SUM_OF": 0,
            "KERNEL": kernel,
            "STRIDE": stride[i],
            "CHUNKS": chunks,
            "SPAN": span,
            "GRANULE": granule,
            "PRECISION": precision,
        }
        if i < last:
            arguments |= {
                "x_ptr": source,
                "pre_scale_ptr": pre_scale if i == 0 else None,
                "pre_shift_ptr": pre_shift if i == 0 else None,
                "in_channels": in_channels,
            }
            constants |= {"FIRST": i == 0}
        else:
            arguments |= {
                "hidden_ptr": source,
                "hidden_channels": in_channels,
                "x_ptr": residual,
                "x_channels": residual.shape[1],
                "x_h": residual.shape[2],
                "x_w": residual.shape[3],
            }
            arguments |= {
                "activated_ptr": None if readers is None else readers.activated,
                "reader_level_ptr": None if readers is None else readers.level,
                "reader_widths_ptr": None if readers is None else readers.widths,
                "reader_norm_ptr": None if readers is None else readers.norm,
                "readers": 0 if readers is None else readers.blocks,
            }
            constants |= {
                "IN_PLACE": in_place,
                "FRESH": readers is not None and readers.fresh,
                "READER_LEVELS": 1 if readers is None else readers.levels,
                "POOL": pooling,
                "RELU": relu,
            }
        kernel_fn = hidden_kernel if i < last else last_kernel
        launches.append(Launch(kernel_fn, programs * splits, arguments, constants, tile))
        if splits > 1:
            launches.append(Launch(kernel_fn, programs, arguments, constants | {"PARTS": 1, "SUM_OF": splits}, tile))
        source = target
        padded_in = chunks == 1 or (span * group_out) % 16 == 0
    return launches
