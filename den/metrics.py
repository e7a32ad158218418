"""Measuring a model on a task: accuracy, cost, and the paths that its images take.

N samples, B blocks, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from den.flops import active_parameters, cost_ratios, count_parameters, flops, selector_macs
from den.losses import path_cost
from den.selector import Selector
from den.tasks import Task

Policy = str | Tensor | Sequence[int]
POLICIES = ("selector", "shuffled", "random", "full")


@dataclass(frozen=True)
class Evaluation:
    """What one policy does on one split of a task.

    prediction, label: int64 [N]; level: int64 [N, B]; probs: float [N, B, L] where the selector decided, else None.
    cost: float [N], the mean over blocks of the share of parameters run (inside equation 5).
    own_cost: float [N], the same in the unit that the run was trained with (`den.costs`); None: not known.
    flops: int64 [N], of the estimator.
    parameters: int64 [N], the estimator's that the path uses, counted as the paper does; None: not known.
    stored_parameters: of the whole estimator, which all paths share; None: not known.
    selector_flops: an image, spent on choosing; 0 where no selector ran. None: not known.
    """

    prediction: Tensor
    label: Tensor
    level: Tensor
    probs: Tensor | None
    cost: Tensor
    flops: Tensor
    parameters: Tensor | None = None
    stored_parameters: int | None = None
    selector_flops: int | None = None
    own_cost: Tensor | None = None

    @property
    def correct(self) -> Tensor:
        """bool [N]: the images classified right."""
        return self.prediction == self.label

    @property
    def accuracy(self) -> float:
        """Share of images classified right, in percent."""
        classes = int(max(self.label.max(), self.prediction.max())) + 1
        return 100 * float(multiclass_accuracy(self.prediction, self.label, max(classes, 2), average="micro"))

    def summary(self) -> dict[str, Any]:
        """Plain numbers: accuracy (%), mean and deviation of cost, mean FLOPs, level usage and the number of paths; and
        what is known of `parameters` (stored), `parameters_mean` (used by an image), `selector_flops` and
        `own_cost_mean`."""
        num_levels = int(self.level.max()) + 1 if self.probs is None else self.probs.shape[2]
        usage = torch.nn.functional.one_hot(self.level, num_levels).double().mean(0)
        paths, counts = self.level.unique(dim=0, return_counts=True)
        known: dict[str, Any] = {"parameters": self.stored_parameters, "selector_flops": self.selector_flops}
        if self.parameters is not None:
            known["parameters_mean"] = round(float(self.parameters.double().mean()))
        if self.own_cost is not None:
            known["own_cost_mean"] = round(float(self.own_cost.mean()), 6)
        return {
            "images": len(self.label),
            "accuracy": round(self.accuracy, 4),
            "cost_mean": round(float(self.cost.mean()), 6),
            "cost_std": round(float(self.cost.std(correction=0)), 6),
            "flops_mean": round(float(self.flops.double().mean())),
            "unique_paths": len(paths),
            "top_path_share": round(float(counts.max()) / len(self.label), 6),
            "level_usage": [[round(float(share), 4) for share in row] for row in usage],
            **{name: value for name, value in known.items() if value is not None},
        }


def choose_level(policy: Policy, num_samples: int, model: Any, generator: torch.Generator | None) -> Tensor | None:
    """The levels that a policy gives a batch: None for the selector, else int64 [N, B] or [B].

    policy: "selector"; "random" (every level of every block alike: the paper's random selector); "full"; or levels [B].
        "shuffled", the selector's levels permuted over all images of a split, is drawn by `evaluate`.
    """
    if isinstance(policy, str):
        if policy == "selector":
            return None
        if policy == "random":
            return torch.randint(model.num_levels, (num_samples, model.num_blocks), generator=generator)
        if policy == "full":
            return torch.full((model.num_blocks,), model.num_levels - 1)
        raise ValueError(f"policy is {policy!r}; it must be one of {', '.join(POLICIES)}, or a path [blocks]")
    return torch.as_tensor(policy)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    task: Task,
    *,
    policy: Policy = "selector",
    split: str = "test",
    batch_size: int = 256,
    seed: int = 0,
    budget: float | None = None,
    cost_BL: Tensor | None = None,
    progress: Callable | None = None,
) -> Evaluation:
    """Run a model (a DEN or its frozen form) over a split of a task under a policy: see `choose_level`.

    seed: of the policies "random" and "shuffled". budget: for the selector of a model that takes one; None: the model's
    own. cost_BL: the costs that the model was trained with (`den.costs.cost_table`), for `own_cost`. progress: wraps
    the batches, such as tqdm. The model's training mode is put back.

    "shuffled" runs the selector first and then gives each image the levels of another one: the same cost, none of it
    fitted to the image. Its FLOPs have the selector's.

    Raises ValueError for a budget that the model does not take, or with a policy that asks no selector.
    """
    device = next(tensor.device for tensor in (*model.parameters(), *model.buffers()))
    source: Any = getattr(model, "source", model)
    generator = torch.Generator().manual_seed(seed)
    dealt_NB: Tensor | None = None
    if isinstance(policy, str) and policy == "shuffled":
        chosen = evaluate(model, task, split=split, batch_size=batch_size, budget=budget, progress=progress)
        dealt_NB, budget = chosen.level[torch.randperm(len(chosen.level), generator=generator)], None
    batches = task.batches(split, batch_size, training=False, device=device)
    predictions, labels, levels, probs, seen = [], [], [], [], 0
    was_training = model.training
    model.eval()
    for x, y in batches if progress is None else progress(batches):
        if dealt_NB is None:
            level = choose_level(policy, len(x), source, generator)
        else:
            level = dealt_NB[seen : seen + len(x)]
        seen += len(x)
        told = {} if budget is None else {"budget": budget}
        out = model(x, task=task.name, level=None if level is None else level.to(device), **told)
        predictions.append(out.logits.argmax(1).cpu())
        labels.append(y.cpu())
        levels.append(out.level.cpu().long())
        if out.level_probs is not None:
            probs.append(out.level_probs.float().cpu())
    model.train(was_training)
    level_NB = torch.cat(levels)
    return Evaluation(
        prediction=torch.cat(predictions),
        label=torch.cat(labels),
        level=level_NB,
        probs=torch.cat(probs) if probs else None,
        selector_flops=_selector_flops(source, task) if probs or dealt_NB is not None else 0,
        own_cost=None if cost_BL is None else path_cost(level_NB, cost_BL.cpu()),
        **_account(source, level_NB, task.image_size),
    )


def _account(model: Any, level_NB: Tensor, image_size: tuple[int, int]) -> dict[str, Any]:
    """What paths cost. A network that is no DEN, such as a competitor's, tells it by an `account` of its own."""
    if hasattr(model, "account"):
        return model.account(level_NB, image_size)
    return {
        "cost": path_cost(level_NB, cost_ratios(model)),
        "flops": flops(model, level_NB, image_size),
        "parameters": active_parameters(model, level_NB),
        "stored_parameters": count_parameters(model),
    }


def _selector_flops(model: Any, task: Task) -> int | None:
    """0 for a network without a selector, None for a selector of the caller's own, whose cost is not known."""
    if not hasattr(model, "selector"):
        return 0
    return 2 * selector_macs(model, task.image_size) if isinstance(model.selector, Selector) else None
