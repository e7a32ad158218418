"""How a run is trained: plain values, so that the command line can describe them without importing PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

Schedule = Literal["constant", "step", "cosine"]
SCHEDULES = get_args(Schedule)
Initial = Literal["equation_8", "selector"]
INITIALS = get_args(Initial)
Baseline = Literal["none", "leave_one_out", "self_critical", "moving_average"]
BASELINES = get_args(Baseline)
CostUnit = Literal["parameters", "flops", "latency"]
COST_UNITS = get_args(CostUnit)


Rule = tuple[str, object, bool, str]  # name, value, whether it holds, what is right


@dataclass
class EstimatorConfig:
    """How the estimator is trained. The paper: SGD, Nesterov momentum 0.9, rate 0.1, divided by 10 at convergence."""

    lr: float = 0.1
    """Learning rate of the first stage."""
    momentum: float = 0.9
    """Nesterov momentum; 0: none."""
    weight_decay: float = 5e-4
    """Unstated in the paper; the usual value for CIFAR."""
    first_epochs: int = 200
    """Most epochs of the first stage (the authors' code: 200)."""
    epochs: int = 40
    """Most epochs of a later stage (the authors' code: 40)."""
    schedule: Schedule = "step"
    """Within a phase: constant, step (divided by 10 at half and three quarters, as the authors' code) or cosine."""
    decay: float = 0.1
    """Factor on the rate after a stage."""
    decays: int = 4
    """Most decays ("three or four decays happened in all experiments")."""
    patience: int = 0
    """Epochs without progress that count as convergence; 0 runs the epochs given."""
    levels: Literal["sample", "argmax"] = "sample"
    """Later stages: paths sampled from the selector (the paper) or its argmax (the authors' code)."""
    settle_epochs: int = 0
    """Epochs after the last stage on the final selector's paths as they will run: its argmax. They gain, the paths not
    chosen lose; with `sandwich` the full path, which teaches them, does not. 0 is the paper, which ends on a selector
    phase."""
    full_share: float = 0.0
    """Later stages: share of each batch kept at the full path; equation 8's reason, held on to. 0 is the paper."""
    full_epochs: int = 0
    """First epochs of the first stage on the full path alone: sub-networks are cut late from a good start. 0 is the
    paper."""
    warmup_epochs: int = 0
    """First epochs of the first stage in which the rate rises from 0: for large rates and batches. 0 is the paper."""
    sandwich: bool = False
    """Each step trains the full path on the labels, and one more path of each image (smallest, random or drawn) on
    what the full path says: the sandwich rule with in-place distillation (Yu and Huang 2019). While settling the other
    path is the chosen one, and learns from the labels too. False is the paper."""
    label_smoothing: float = 0.0
    """Share of the label spread over all classes (Szegedy et al. 2016). 0 is the paper."""
    rare_boost: float = 0.0
    """Gradient of a channel that share p of the images run is multiplied by p**-this, at most 10: rarely chosen
    channels have learned less. 1 is a mean over the images that ran it, 0 the paper's mean over all."""
    ema: float = 0.0
    """Decay of a running average of the weights over steps, on which each estimator phase ends, such as 0.997.
    0: none, the paper."""

    def rules(self) -> list[Rule]:
        """Every field that has a range, with what holds."""
        e = self
        return [
            ("estimator.lr", e.lr, e.lr > 0, "above 0"),
            ("estimator.momentum", e.momentum, 0 <= e.momentum < 1, "at least 0 and below 1"),
            ("estimator.weight_decay", e.weight_decay, e.weight_decay >= 0, "at least 0"),
            ("estimator.first_epochs", e.first_epochs, e.first_epochs >= 1, "at least 1"),
            ("estimator.epochs", e.epochs, e.epochs >= 0, "at least 0"),
            ("estimator.schedule", e.schedule, e.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("estimator.decay", e.decay, 0 < e.decay <= 1, "above 0 and at most 1"),
            ("estimator.decays", e.decays, e.decays >= 0, "at least 0"),
            ("estimator.patience", e.patience, e.patience >= 0, "at least 0"),
            ("estimator.levels", e.levels, e.levels in ("sample", "argmax"), "sample or argmax"),
            ("estimator.settle_epochs", e.settle_epochs, e.settle_epochs >= 0, "at least 0"),
            ("estimator.full_epochs", e.full_epochs, e.full_epochs >= 0, "at least 0"),
            ("estimator.warmup_epochs", e.warmup_epochs, 0 <= e.warmup_epochs < e.first_epochs, "below first_epochs"),
            ("estimator.label_smoothing", e.label_smoothing, 0 <= e.label_smoothing < 1, "at least 0 and below 1"),
            ("estimator.rare_boost", e.rare_boost, 0 <= e.rare_boost <= 1, "between 0 and 1"),
            ("estimator.ema", e.ema, 0 <= e.ema < 1, "at least 0 and below 1"),
            ("estimator.full_share", e.full_share, 0 <= e.full_share <= 1, "between 0 and 1"),
        ]


@dataclass
class SelectorConfig:
    """How the selector is trained. The paper: Adam, rate 1e-5, policy gradient of equation 7."""

    lr: float = 1e-5
    """Learning rate of the first stage."""
    epochs: int = 12
    """Most epochs of a stage (the authors' code: 12)."""
    schedule: Schedule = "constant"
    """Within a phase: constant, step (divided by 10 at half and three quarters) or cosine."""
    decay: float = 0.1
    """Factor on the rate after a stage."""
    decays: int = 4
    """Most decays."""
    patience: int = 0
    """Epochs without progress that count as convergence; 0 runs the epochs given."""
    paths: int = 4
    """|Z|, paths sampled for each image; unstated in the paper."""
    epsilon_decay: float = 0.99
    """epsilon-greedy: at step t a path is uniform with probability epsilon_decay**t (the authors' code). 0: never."""
    baseline: Baseline = "none"
    """What is subtracted from the reward, for the same expected gradient with less variance: none (the paper), the mean
    of the image's other paths (leave_one_out), that of its argmax path (self_critical, BlockDrop), or a moving_average
    of past rewards."""
    cost: Literal["sampled", "expected"] = "sampled"
    """S(z) of the sampled paths (the paper), or its expectation, which is known exactly and has no variance."""
    entropy: float = 0.0
    """Weight of the mean entropy of a block's levels, added to what is sought: against early collapse (Williams 1992).
    0 is the paper."""
    gradient: Literal["policy", "gumbel"] = "policy"
    """policy: equation 7. gumbel: one path, by straight-through Gumbel-softmax (Jang et al. 2017), whose gradient is
    biased, but needs no sampling of rewards; each step runs every level of every block once."""
    temperature: float = 5.0
    """Of the Gumbel-softmax in the first epoch."""
    temperature_end: float = 0.5
    """Of the Gumbel-softmax in the last epoch; between them it falls by a constant factor."""
    split: Literal["train", "val"] = "train"
    """Images that it learns from: train, or val, held out from the estimator."""

    def rules(self) -> list[Rule]:
        """Every field that has a range, with what holds."""
        s = self
        enough = s.baseline != "leave_one_out" or s.paths >= 2
        return [
            ("selector.lr", s.lr, s.lr > 0, "above 0"),
            ("selector.epochs", s.epochs, s.epochs >= 0, "at least 0"),
            ("selector.schedule", s.schedule, s.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("selector.decay", s.decay, 0 < s.decay <= 1, "above 0 and at most 1"),
            ("selector.decays", s.decays, s.decays >= 0, "at least 0"),
            ("selector.patience", s.patience, s.patience >= 0, "at least 0"),
            ("selector.paths", s.paths, s.paths >= 1, "at least 1"),
            ("selector.epsilon_decay", s.epsilon_decay, 0 <= s.epsilon_decay < 1, "at least 0 and below 1"),
            ("selector.baseline", s.baseline, s.baseline in BASELINES, f"one of {', '.join(BASELINES)}"),
            ("selector.cost", s.cost, s.cost in ("sampled", "expected"), "sampled or expected"),
            ("selector.entropy", s.entropy, s.entropy >= 0, "at least 0"),
            ("selector.gradient", s.gradient, s.gradient in ("policy", "gumbel"), "policy or gumbel"),
            ("selector.temperature", s.temperature, s.temperature > 0, "above 0"),
            ("selector.temperature_end", s.temperature_end, s.temperature_end > 0, "above 0"),
            ("selector.split", s.split, s.split in ("train", "val"), "train or val"),
            ("selector.paths", s.paths, enough, "at least 2 with the leave_one_out baseline"),
        ]


@dataclass
class RunConfig:
    """What every kind of training run has, the baselines' too."""

    batch_size: int = 128
    """Images of each task in a step, on each process."""
    seed: int = 0
    """Of the order of images, augmentation and sampled paths."""
    accelerator: str = "auto"
    """auto, cpu, cuda, ...: devices, precision and machines are Lightning Fabric's."""
    devices: int = 1
    """How many of them on each machine; a process each."""
    nodes: int = 1
    """Machines."""
    precision: str = "32-true"
    """Lightning Fabric's name of it, such as bf16-mixed."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Run folder: config.json, metrics.jsonl, summary.json, checkpoint/. None (in Python alone): nothing is
    written."""
    sync_bn: bool = True
    """With several processes: batch norm over the whole batch, so that training is that of one process. False: over
    each process's share, without waiting for the others."""
    resume: bool = False
    """Go on from the run folder's checkpoint, if it has one."""
    progress: bool = True
    """Show a progress bar where standard error is a terminal."""

    def rules(self) -> list[Rule]:
        """Every field that has a range, with what holds."""
        return [
            ("batch_size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("devices", self.devices, self.devices >= 1, "at least 1"),
            ("nodes", self.nodes, self.nodes >= 1, "at least 1"),
        ]

    def check(self) -> None:
        """Raise ValueError naming the first field that is out of range."""
        for name, value, holds, allowed in self.rules():
            if not holds:
                raise ValueError(f"{name} is {value!r}; it must be {allowed}")


@dataclass
class TrainConfig(RunConfig):
    """A whole training run."""

    rho: float = 0.1
    """Weight of the sparsity term, equation 5."""
    tau: float = 0.75
    """Weight of the full path in the initial distribution, equation 8; 0: uniform."""
    initial: Initial = "equation_8"
    """Paths of the first stage: equation 8 (the paper), or drawn from the untrained selector (its appendix A.2)."""
    stages: int = 4
    """S of Algorithm 1."""
    cost_unit: CostUnit = "parameters"
    """What a path costs in S(z): share of each block's parameters, all blocks alike (the paper); share of the blocks'
    FLOPs; or of their time, measured on this machine (kept in latency.json)."""
    target_cost: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Mean cost of the chosen paths to be met: log rho rises while they cost more, and falls while they cost less (dual
    ascent). None is the paper: rho as given."""
    dual_rate: float = 0.05
    """Change of log rho in a step, for each 1 of cost above the target or the budget."""
    task_weights: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT [FLOAT ...]")] = ()
    """Weight of each task's loss; none: all 1, the paper."""
    weighting: Literal["fixed", "uncertainty"] = "fixed"
    """uncertainty: the weights of the estimator's losses are learned (Kendall et al. 2018). fixed is the paper."""
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    """How the estimator is trained."""
    selector: SelectorConfig = field(default_factory=SelectorConfig)
    """How the selector is trained."""

    def rules(self) -> list[Rule]:
        """Every field that has a range, with what holds."""
        return [*super().rules(), *self._own_rules(), *self.estimator.rules(), *self.selector.rules()]

    def _own_rules(self) -> list[Rule]:
        target = self.target_cost
        return [
            ("rho", self.rho, self.rho >= 0, "at least 0"),
            ("tau", self.tau, 0 <= self.tau <= 1, "between 0 and 1"),
            ("initial", self.initial, self.initial in INITIALS, f"one of {', '.join(INITIALS)}"),
            ("stages", self.stages, self.stages >= 1, "at least 1"),
            ("cost_unit", self.cost_unit, self.cost_unit in COST_UNITS, f"one of {', '.join(COST_UNITS)}"),
            ("target_cost", target, target is None or 0 < target <= 1, "above 0 and at most 1"),
            ("dual_rate", self.dual_rate, self.dual_rate > 0, "above 0"),
            ("task_weights", self.task_weights, min(self.task_weights, default=1) > 0, "above 0 each"),
            ("weighting", self.weighting, self.weighting in ("fixed", "uncertainty"), "fixed or uncertainty"),
        ]
