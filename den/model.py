"""A Deep Elastic Network: the selector chooses a level for each block and image, the estimator runs them (section 3).

Suffixes: N samples, C channels, H W space, B blocks, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from den import backbones
from den.blocks import BN_KINDS
from den.budget import Budget
from den.estimator import Estimator, EstimatorOptions
from den.flops import cost_ratios, full_macs
from den.hierarchy import Hierarchy
from den.selector import Selector, SelectorSpec, budget_of, light_spec

TASK_NORMS = ("shared", "per_task")
LevelLike = Tensor | Sequence[int]


class DENOutput(NamedTuple):
    """Result of a forward pass.

    logits: [N, classes of the task].
    level: int64 [N, B], the path that each sample took (z of the paper).
    level_probs: [N, B, L], C(x) of equation 3; None where the caller gave the levels, for the selector did
        not run.
    """

    logits: Tensor
    level: Tensor
    level_probs: Tensor | None


class DEN(nn.Module):
    """Estimator and selector. Made by `create_model` or `den.load`.

    Args:
        estimator: the elastic network.
        selector: images [N, C, H, W] -> logits [N, B, L].
        config: what `create_model(**config)` rebuilds the model from.
    """

    def __init__(self, estimator: Estimator, selector: nn.Module, config: Mapping[str, Any]):
        super().__init__()
        self.estimator, self.selector = estimator, selector
        self.config = dict(config)
        self.tasks: dict[str, int] = dict(config["tasks"])

    @property
    def num_blocks(self) -> int:
        """B, the number of elastic blocks."""
        return self.estimator.num_blocks

    @property
    def num_levels(self) -> int:
        """L, the number of levels of each block."""
        return self.estimator.num_levels

    @property
    def takes_budget(self) -> bool:
        """Whether the selector is told the wanted mean cost."""
        return getattr(self.selector, "condition", None) is not None

    def forward(
        self, x: Tensor, task: str | None = None, level: LevelLike | None = None, budget: Budget | None = None
    ) -> DENOutput:
        """Classify images for one task.

        Args:
            x: images [N, C, H, W], floating point, on the model's device.
            task: a key of `model.tasks`; may be left out if there is one.
            level: None: the selector decides, argmax of its probabilities (no gradient passes through the
                choice).
                Else the caller does: integers [N, B], or [B] for every sample alike; the selector does not
                    run.
            budget: for a model made with one: the mean cost that the selector is to keep to, in (0, 1], a number or
                [N]; None: the model's own. Not together with a level.

        Returns: a `DENOutput`.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value. The range of
                levels is checked on a CPU; on a GPU, where that would wait for the device, they are clamped
                to it.
        """
        task = check_task(task, self.tasks)
        return self.forward_tasks(x, (task,), level, budget)[task]

    def forward_tasks(
        self, x: Tensor, tasks: Sequence[str], level: LevelLike | None = None, budget: Budget | None = None
    ) -> dict[str, DENOutput]:
        """Classify images for several tasks at once, on one path each (scenario M3): an output by task.

        tasks: keys of `model.tasks` that share statistics. The rest, and what is raised, as `forward`.
        """
        check_tasks(tasks, self.tasks, self.estimator.set_index)
        check_images(x, self.estimator.in_channels, self.estimator.device)
        decided = check_choice(self.selector, x, level, budget, self.num_blocks, self.num_levels)
        level_NB, level_probs = choose(self.selector, x, *decided)
        logits = self.estimator(x, level_NB, tuple(tasks))
        return {task: DENOutput(l, level_NB, level_probs) for task, l in zip(tasks, logits, strict=True)}


def check_choice(
    selector: nn.Module,
    x: Tensor,
    level: LevelLike | None,
    budget: Budget | None,
    num_blocks: int,
    num_levels: int,
    checked_later: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Who decides: the caller's levels [N, B], or (None) the selector, at a budget [N] if it is told one.

    checked_later: what takes the levels raises for a value out of range. See `DEN.forward` for what is raised.
    """
    if level is None:
        return None, budget_of(getattr(selector, "condition", None), budget, x)
    if budget is not None:
        raise ValueError("level and budget are both given; a budget is for the selector, which a level stands for")
    return check_level(level, x, num_blocks, num_levels, checked_later), None


def choose(
    selector: nn.Module, x: Tensor, level_NB: Tensor | None, budget_N: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Levels [N, B] and, where the selector decides, its probabilities [N, B, L]; arguments of `check_choice`."""
    if level_NB is not None:
        return level_NB, None
    level_probs = (selector(x) if budget_N is None else selector(x, budget_N)).softmax(2, dtype=torch.float32)
    return level_probs.argmax(2), level_probs


def create_model(
    name: str,
    tasks: Mapping[str, int],
    ratios: Sequence[float] | None = None,
    in_channels: int = 3,
    bn: str = "per_level",
    selector: str | Mapping[str, Any] | nn.Module = "paper",
    *,
    task_norm: str = "shared",
    base_size: int | str | None = "default",
    budget: float | None = None,
    backend: str = "auto",
    **family: Any,
) -> DEN:
    """Build a DEN with freshly initialised weights.

    Args:
        name: a backbone, such as "wrn_32_4"; see `list_models`.
        tasks: number of classes of each task.
        ratios: share of a block's hidden channels at each level, ascending to 1; None: the paper's for this
            family, (0, 1/4, 1/2, 1) for residual networks.
        in_channels: of the images.
        bn: "per_level": batch norm behind a contract convolution keeps statistics for each level; "shared":
            one set.
        selector: "paper" (a residual network of 16/32/64 channels, 0.37M parameters), "light" (at most 3% of
            the estimator's FLOPs), the fields of a `SelectorSpec`, or any module from images to logits
            [N, B, L].
        task_norm: "shared" or "per_task": batch norm with one set of statistics, or one a task.
        base_size: image size that the network is made for; larger images enter through a stem stride of
            `min(H, W) // base_size`. None: stride 1 always. Default: the family's, 32 for residual networks.
        budget: None; or the selector is told the mean cost that it is to keep to, in (0, 1], so that one model serves
            every budget (`model(x, budget=0.4)`), and this is the one where none is given.
        backend: of `den_kernels`; how the model runs here, not part of `model.config`.
        family: arguments of the backbone's own, such as image_size of simple_conv_net.

    Raises:
        TypeError: an argument of the wrong type, or unknown.
        ValueError: a name that no family has, or a value out of range.
    """
    found, numbers = backbones.find(name)
    _check_keywords(name, family, found.keywords)
    _check_tasks(tasks)
    _check_choice("bn", bn, BN_KINDS)
    _check_choice("task_norm", task_norm, TASK_NORMS)
    _check_positive("in_channels", in_channels)
    base = found.base_size if base_size == "default" else base_size
    if base is not None:
        _check_positive("base_size", base)
    hierarchy = Hierarchy(found.ratios if ratios is None else ratios)
    options = EstimatorOptions(tasks, hierarchy, in_channels, bn, task_norm, base, backend)  # type: ignore[arg-type]
    estimator = found.build(options, *numbers, **family)
    chooser, chosen = _build_selector(selector, estimator, budget)
    config = {
        "name": name,
        "tasks": dict(tasks),
        "ratios": list(hierarchy.ratios),
        "in_channels": in_channels,
        "bn": bn,
        "selector": chosen,
        "task_norm": task_norm,
        "base_size": base,
        **family,
    }
    return DEN(estimator, chooser, config)


def _build_selector(
    selector: str | Mapping[str, Any] | nn.Module, estimator: Estimator, budget: float | None
) -> tuple[nn.Module, dict[str, Any] | str]:
    """The selector and how the config describes it; a module of the caller's is "custom"."""
    if isinstance(selector, nn.Module):
        if budget is not None:
            raise ValueError(f"budget is {budget}, but selector is a module of the caller's own, which takes none")
        return selector, "custom"
    # Selectors are small-image networks: 32 also where the estimator is made for larger images.
    base = None if estimator.base_size is None else min(estimator.base_size, 32)
    if isinstance(selector, Mapping):
        known = set(SelectorSpec.__dataclass_fields__)
        if not set(selector) <= known:
            raise ValueError(f"selector has {sorted(set(selector) - known)}; its fields are {', '.join(sorted(known))}")
        fields = {"base_size": base, **selector}
        spec = SelectorSpec(**{**fields, "widths": tuple(fields.get("widths", SelectorSpec.widths))})
    elif selector == "paper":
        spec = SelectorSpec(base_size=base)
    elif selector == "light":
        size = estimator.image_size
        spec = light_spec(estimator.in_channels, full_macs(estimator, size), size, base)
    elif selector == "custom":
        raise ValueError(
            "selector is 'custom': this model was made with a selector module of the caller's; pass that module"
        )
    else:
        raise ValueError(
            f"selector is {selector!r}; it must be 'paper', 'light', the fields of a SelectorSpec or an nn.Module"
        )
    spec = spec if budget is None else replace(spec, budget=budget)
    _check_spec(spec)
    table_BL = None if spec.budget is None else cost_ratios(estimator)
    module = Selector(estimator.num_blocks, estimator.num_levels, estimator.in_channels, spec, cost_BL=table_BL)
    return module, spec.asdict()


def _check_spec(spec: SelectorSpec) -> None:
    if not spec.widths:
        raise ValueError("selector has no widths; it needs the channels of at least one stage")
    for width in spec.widths:
        _check_positive("selector's widths", width)
    if list(spec.widths) != sorted(spec.widths):
        raise ValueError(f"selector's widths is {spec.widths}; it must not descend")
    _check_positive("selector's blocks_per_stage", spec.blocks_per_stage)
    _check_positive("selector's pool", spec.pool)
    if spec.base_size is not None:
        _check_positive("selector's base_size", spec.base_size)
    if spec.budget is not None and not (isinstance(spec.budget, (int, float)) and 0 < spec.budget <= 1):
        raise ValueError(f"budget is {spec.budget!r}; it must be a number above 0 and at most 1")


def _check_keywords(name: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        own = f"{name} takes {', '.join(known)}" if known else f"{name} has no arguments of its own"
        raise TypeError(f"create_model got {', '.join(unknown)}; {own}")


def _check_choice(argument: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} is {value!r}; it must be one of {', '.join(map(repr, choices))}")


def _check_positive(argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} is {value!r}; it must be an integer")
    if value < 1:
        raise ValueError(f"{argument} is {value}; it must be at least 1")


def _check_tasks(tasks: Any) -> None:
    if not isinstance(tasks, Mapping):
        raise TypeError(f"tasks is {tasks!r}; it must map each task's name to its number of classes")
    if not tasks:
        raise ValueError("tasks is empty; it must name at least one task")
    for task, classes in tasks.items():
        if not isinstance(task, str):
            raise TypeError(f"tasks has the name {task!r}; names must be strings")
        if not task or "." in task or hasattr(nn.ModuleDict, task):
            raise ValueError(
                f"tasks has the name {task!r}; it must be non-empty, without dots, and no method of nn.ModuleDict"
            )
        _check_positive(f"tasks[{task!r}]", classes)


def check_task(task: str | None, tasks: Mapping[str, int]) -> str:
    """The task's name; the only one if None is given. Raises ValueError naming the tasks there are."""
    if task is None and len(tasks) == 1:
        return next(iter(tasks))
    if task not in tasks:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(map(repr, tasks))}")
    return task  # type: ignore[return-value]


def check_tasks(tasks: Sequence[str], known: Mapping[str, int], set_index: Mapping[str, int]) -> None:
    """Raise ValueError unless tasks names some of those there are, which share statistics."""
    if not tasks:
        raise ValueError("tasks is empty; it must name at least one task")
    for task in tasks:
        check_task(task, known)
    if len({set_index[task] for task in tasks}) > 1:
        raise ValueError(f"tasks {tuple(tasks)} have statistics of their own, so that no path serves them together")


def check_images(x: Any, in_channels: int, device: torch.device, whose: str = "the model is on") -> None:
    """Raise TypeError or ValueError unless x is floating-point images [N, in_channels, H, W] on the device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it must be a tensor of images [N, {in_channels}, H, W]")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; images must be floating point, such as torch.float32")
    shape = x.shape
    if len(shape) != 4 or shape[1] != in_channels:
        raise ValueError(f"x has shape {tuple(shape)}; it must be [N, {in_channels}, H, W]")
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"x has shape {tuple(shape)}; images must have at least one pixel")
    if x.device != device:
        raise ValueError(f"x is on {x.device}, but {whose} {device}; they must be together")


def check_level(level: LevelLike, x: Tensor, num_blocks: int, num_levels: int, checked_later: bool = False) -> Tensor:
    """Levels as the estimator reads them: int64 [N, B] on x's device, in range unless that is checked later.

    level: integers [N, B], or [B] for every sample alike. See `DEN.forward` for what is raised.
    """
    if not isinstance(level, Tensor):
        if isinstance(level, str) or not isinstance(level, Sequence):
            raise TypeError(f"level is {level!r}; it must be integers [N, B] or [B]")
        level = torch.tensor(level, device=x.device)
    if level.dtype is not torch.int64:
        if level.dtype == torch.bool or level.is_floating_point() or level.is_complex():
            raise TypeError(f"level has dtype {level.dtype}; it must be an integer dtype, such as torch.int64")
        level = level.to(torch.int64)
    batch = x.shape[0]
    if level.shape not in ((num_blocks,), (batch, num_blocks)):
        raise ValueError(
            f"level has shape {tuple(level.shape)}; it must be [N, B], here [{batch}, {num_blocks}], or [B]"
        )
    if level.device != x.device:
        raise ValueError(f"level is on {level.device}, but x is on {x.device}; move one of them")
    if not checked_later:
        level = _in_range(level, num_levels)
    return level.expand(batch, -1) if level.dim() == 1 else level


def _in_range(level: Tensor, num_levels: int) -> Tensor:
    """The levels; where looking at them would wait for a device or break a graph, the nearest in range."""
    if level.device.type != "cpu" or torch.compiler.is_compiling():
        return level.clamp(0, num_levels - 1)
    if level.numel():
        low, high = (int(end) for end in torch.aminmax(level))
        if low < 0 or high >= num_levels:
            wrong = low if low < 0 else high
            raise ValueError(f"level holds {wrong}; every level must be in [0, {num_levels - 1}]")
    return level
