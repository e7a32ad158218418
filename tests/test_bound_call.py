"""Calls of a frozen model that leave out what earlier calls checked: the same results, errors and effects."""

import copy
import pickle

import pytest
import torch
from cpu_cases import Recorder
from den_cases import TWO_TASKS, bottleneck, image_shape, resnext, wrn

import den

MAKERS = [wrn, resnext, bottleneck]


def same(ours: den.DENOutput, wanted: den.DENOutput) -> None:
    for name, own, other in zip(wanted._fields, ours, wanted, strict=True):
        assert (own is None) == (other is None), name
        if own is not None:
            assert torch.equal(own, other), name
            assert not own.requires_grad, name


def is_kept(frozen: den.FrozenDEN) -> bool:
    return frozen._bound is not None and any(call is not None for call in frozen._bound._kept.values())


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given_as", [torch.float32, torch.bfloat16], ids=lambda dtype: f"images in {dtype}")
def test_results_are_those_of_the_full_call(make, dtype, given_as):
    frozen = den.freeze(make(TWO_TASKS, task_norm="per_task"), dtype, backend="cpu")
    x = torch.randn(5, *image_shape(make)).to(given_as)
    levels = torch.randint(frozen.num_levels, (frozen.num_blocks, 5)).T  # not contiguous
    for task in TWO_TASKS:
        for level in (None, levels, levels[0], levels[1].tolist(), levels.to(torch.int32)):
            for layout in (torch.contiguous_format, torch.channels_last):
                given = x.contiguous(memory_format=layout)
                with Recorder() as seen:
                    wanted = frozen(given, task, level)
                assert "den_kernels.residual_chain.default" in seen.names
                for _ in range(2):
                    same(frozen(given, task, level), wanted)
    assert is_kept(frozen)


def test_blocks_of_one_level_take_the_full_call():
    frozen = den.freeze(wrn(ratios=(1,)), backend="cpu")
    x = torch.randn(2, *image_shape(wrn))
    same(frozen(x), frozen(x, level=[0] * frozen.num_blocks)._replace(level_probs=torch.ones(2, frozen.num_blocks, 1)))
    assert not is_kept(frozen)


def test_errors_stay():
    frozen = den.freeze(wrn(TWO_TASKS), backend="cpu")
    x, level = torch.randn(2, *image_shape(wrn)), torch.zeros(2, frozen.num_blocks, dtype=torch.long)
    for _ in range(2):
        frozen(x, "a", level)
        assert is_kept(frozen)
        for wrong, error, message in (
            ((x, "c", level), ValueError, "'c'"),
            ((x, None, level), ValueError, "task"),
            ((x, "a", level + 9), ValueError, "9"),
            ((x, "a", level[:1]), ValueError, "level has shape"),
            ((x, "a", level.float()), TypeError, "float32"),
            ((x[:, :1], "a", level), ValueError, "x has shape"),
            ((x.long(), "a", level), TypeError, "int64"),
            (("x", "a", level), TypeError, "str"),
        ):
            with pytest.raises(error, match=message):
                frozen(*wrong)


def test_what_is_put_in_place_is_used():
    frozen = den.freeze(wrn(), backend="cpu")
    x = torch.randn(3, *image_shape(wrn))
    before = frozen(x)
    assert is_kept(frozen)

    class Least(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(-torch.ones(()))

        def forward(self, x):
            return self.scale * torch.arange(frozen.num_levels).expand(len(x), frozen.num_blocks, -1)

    own, frozen.selector = frozen.selector, Least()
    for _ in range(2):
        out = frozen(x)
        assert not out.level.any(), "selector"
        assert not out.level_probs.requires_grad, "selector"
    frozen.selector = own
    same(frozen(x), before)

    own, frozen.selector.head = frozen.selector.head, copy.deepcopy(frozen.selector.head)
    frozen.selector.head.shift[..., :: frozen.num_levels].add_(100)  # of level 0
    assert not frozen(x).level.any(), "the selector's head"
    frozen.selector.head = own
    same(frozen(x), before)

    (task,) = frozen.heads
    frozen.heads[task] = copy.deepcopy(frozen.heads[task])
    frozen.heads[task].shift.add_(1)
    torch.testing.assert_close(frozen(x).logits, before.logits + 1)


def test_hooks_of_the_selector_run():
    frozen = den.freeze(wrn(), backend="cpu")
    x = torch.randn(3, *image_shape(wrn))
    before = frozen(x)
    seen = []
    anywhere = torch.nn.modules.module
    for register in (
        frozen.selector.register_forward_hook,
        frozen.selector.register_forward_pre_hook,
        anywhere.register_module_forward_hook,
        anywhere.register_module_forward_pre_hook,
    ):
        hook = register(lambda module, *_: seen.append(module))
        same(frozen(x), before)
        hook.remove()
        assert frozen.selector in seen, register
        seen.clear()


def test_weights_put_in_place_are_used():
    frozen = den.freeze(wrn(), backend="cpu")
    x, level = torch.randn(3, *image_shape(wrn)), [3] * frozen.num_blocks
    before, logits = frozen(x), frozen(x, level=level).logits
    zeroed = [frozen.blocks[0], frozen.selector.blocks[0]]
    for layer in zeroed:
        layer.move_packed({name: torch.zeros_like(tensor) for name, tensor in layer.packed().items()})
    assert not torch.equal(frozen(x, level=level).logits, logits)
    assert not torch.equal(frozen(x).level_probs, before.level_probs)


def test_copies_have_calls_of_their_own():
    frozen = den.freeze(wrn(), backend="cpu")
    x = torch.randn(3, *image_shape(wrn))
    before = frozen(x)
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert not is_kept(other)
        same(other(x), before)
        same(other(x), before)


def test_images_with_a_gradient_leave_none():
    frozen = den.freeze(wrn(), backend="cpu")
    x = torch.randn(3, *image_shape(wrn), requires_grad=True)
    same(frozen(x), frozen(x.detach()))
    with torch.inference_mode():
        same(frozen(x), frozen(x.detach()))
