"""BlockDrop (Wu et al. 2018): a policy network drops whole residual blocks, image by image.

Its section 3 in DEN's terms: levels 0 (dropped) and 1 (kept), a Bernoulli variable a block, and a reward that counts a
right answer and few blocks. The estimator is trained first; then the policy on it, opening one block after another from
the last (the curriculum); then both.

Suffixes: N samples, B blocks, L = 2 levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from den.baselines.base import SELECTED, BaselineConfig, Method, levels, supervised
from den.config import Rule
from den.freeze import freeze
from den.loop import Batch, Means, Phase, Rate
from den.model import DEN

POLICY = {"widths": (16, 32, 64), "blocks_per_stage": 1}  # a ResNet-8, as the authors' for CIFAR


@dataclass
class BlockDropConfig(BaselineConfig):
    """BlockDrop's settings; `lr`, `epochs` and what goes with them are of the network that blocks are dropped from."""

    policy_lr: float = 1e-3
    """Adam's rate in the curriculum (the authors' code)."""
    curriculum_epochs: int = 100
    """Epochs of the policy on the fixed network. Over the first of them, at most one a block, the blocks open."""
    joint_lr: float = 1e-4
    """Adam's rate, of both, in the joint phase (the authors' code)."""
    joint_epochs: int = 100
    """Epochs in which the network learns with the policy."""
    penalty: float = 1.0
    """gamma of the reward, in the curriculum (the authors' code)."""
    joint_penalty: float = 5.0
    """gamma in the joint phase (the authors' code)."""
    bound: float = 0.8
    """alpha: the probability s of keeping a block is drawn as alpha s + (1 - alpha) (1 - s), never near 0 or 1."""
    entropy: float = 0.1
    """beta: weight of the policy's entropy in the curriculum (the authors' code)."""

    def rules(self) -> list[Rule]:
        """Every field that has a range, with what holds."""
        return [
            *super().rules(),
            ("policy_lr", self.policy_lr, self.policy_lr > 0, "above 0"),
            ("curriculum_epochs", self.curriculum_epochs, self.curriculum_epochs >= 1, "at least 1"),
            ("joint_lr", self.joint_lr, self.joint_lr > 0, "above 0"),
            ("joint_epochs", self.joint_epochs, self.joint_epochs >= 0, "at least 0"),
            ("penalty", self.penalty, self.penalty >= 0, "at least 0"),
            ("joint_penalty", self.joint_penalty, self.joint_penalty >= 0, "at least 0"),
            ("bound", self.bound, 0.5 <= self.bound < 1, "at least 0.5 and below 1"),
            ("entropy", self.entropy, self.entropy >= 0, "at least 0"),
        ]


def reward(keep_NB: Tensor, right_N: Tensor, penalty: float) -> Tensor:
    """Equation 3 of BlockDrop, [N]: 1 - (share of blocks kept)^2 where the answer is right, else -penalty."""
    saved_N = 1 - keep_NB.float().mean(1).square()
    return torch.where(right_N, saved_N, -penalty)


def open_blocks(epoch: int, epochs: int, blocks: int) -> int:
    """How many of the last blocks the policy decides over in an epoch of the curriculum: one more each time, or more
    where there are fewer epochs than blocks, so that all are open in the last."""
    ramp = min(epochs, blocks)
    return min(blocks, -(-(epoch + 1) * blocks // ramp))


class BlockDrop(Method):
    """The backbone needs residual blocks."""

    name = "blockdrop"
    policy = SELECTED
    Config = BlockDropConfig
    network: DEN

    def build(self) -> DEN:
        network = self.create(self.tasks, ratios=(0, 1), selector=POLICY)
        if network.estimator.hierarchy.ratios != (0, 1):
            raise ValueError(f"ratios is {network.estimator.hierarchy.ratios}; BlockDrop's levels are (0, 1)")
        return network

    def set_up(self) -> None:
        estimator, policy = self.network.estimator, self.network.selector
        c = self.config
        self.net = self.loop.setup("network", estimator, self.sgd(estimator.parameters()))
        self.chooser = self.loop.setup("policy", policy, torch.optim.Adam(policy.parameters(), c.policy_lr))
        joint = torch.optim.Adam([*estimator.parameters(), *policy.parameters()], c.joint_lr)
        self.loop.optimizers["joint"] = self.loop.fabric.setup_optimizers(joint)  # type: ignore[assignment]

    def phases(self) -> list[Phase]:
        c = self.config
        full = [1] * self.network.num_blocks
        step = supervised(lambda batch: self.net(batch.x, levels(full, batch.x), batch.task.name))
        curriculum = Phase(
            "policy",
            self._curriculum_step,
            {"policy": Rate(c.policy_lr)},
            c.curriculum_epochs,
            stage=1,
            watch="negative_reward",
            begin=self._begin_curriculum,
        )
        joint = Phase(
            "joint",
            self._joint_step,
            {"joint": Rate(c.joint_lr)},
            c.joint_epochs,
            stage=2,
            begin=self._begin_joint,
        )
        return [self.weights_phase("network", step, begin=self.net.train), curriculum, joint]

    def _begin_curriculum(self) -> None:
        self.chooser.train()
        self.net.eval()
        self.frozen = freeze(self.network)  # the network does not change in this phase

    def _begin_joint(self) -> None:
        self.chooser.train()
        self.net.train()

    def draw(self, keep_NB: Tensor) -> Tensor:
        """Zeros and ones of probabilities; several processes draw what one would."""
        drawn_NB = torch.bernoulli(self.loop.of_all(keep_NB).cpu(), generator=self.loop.generator)
        return self.loop.mine(drawn_NB)

    def _curriculum_step(self, batches: list[Batch], means: Means) -> Tensor:
        c, blocks = self.config, self.network.num_blocks
        count = open_blocks(self.loop.position.epoch, c.curriculum_epochs, blocks)
        losses = []
        for batch in batches:
            choice = Choice(self.chooser(batch.x), c.bound, count, self.draw)
            rewards = []
            for keep_NB in (choice.drawn_NB, choice.greedy_NB):
                logits = self.frozen(batch.x, task=batch.task.name, level=keep_NB).logits
                rewards.append(reward(keep_NB, logits.argmax(1) == batch.y, c.penalty))
            losses.append(choice.loss(*rewards) - c.entropy * choice.entropy())
            means.add("negative_reward", -rewards[0].mean())
            means.add("cost", choice.greedy_NB.float().mean())
        means.add("open_blocks", count)
        return torch.stack(losses).mean()

    def _joint_step(self, batches: list[Batch], means: Means) -> Tensor:
        c, blocks = self.config, self.network.num_blocks
        losses = []
        for batch in batches:
            choice = Choice(self.chooser(batch.x), c.bound, blocks, self.draw)
            logits = self.net(batch.x, choice.drawn_NB, batch.task.name)
            with torch.no_grad():
                greedy = self.net(batch.x, choice.greedy_NB, batch.task.name)
            right = [found.argmax(1) == batch.y for found in (logits.detach(), greedy)]
            rewards = [
                reward(keep_NB, right_N, c.joint_penalty)
                for keep_NB, right_N in zip((choice.drawn_NB, choice.greedy_NB), right, strict=True)
            ]
            losses.append(choice.loss(*rewards) + F.cross_entropy(logits, batch.y))
            means.add("reward", rewards[0].mean())
            means.add("accuracy", 100 * right[1].float().mean())
            means.add("cost", choice.greedy_NB.float().mean())
        return torch.stack(losses).mean()


class Choice:
    """What the policy makes of a batch.

    Args:
        logits_NBL: of the policy network; the probability of keeping a block is the second of its softmax.
        bound: alpha.
        count: of the last blocks that are open; the others are kept.
        draw: zeros and ones of their probabilities [N, B].

    Attributes:
        drawn_NB, greedy_NB: int64, 1 for a block that is kept: drawn, and the more probable.
    """

    def __init__(self, logits_NBL: Tensor, bound: float, count: int, draw: Callable[[Tensor], Tensor]):
        s_NB = logits_NBL.float().softmax(2)[:, :, 1]
        self.keep_NB = bound * s_NB + (1 - bound) * (1 - s_NB)
        self.open_B = torch.arange(s_NB.shape[1], device=s_NB.device) >= s_NB.shape[1] - count
        drawn = draw(self.keep_NB.detach()).to(s_NB.device).long()
        self.drawn_NB = torch.where(self.open_B, drawn, 1)
        self.greedy_NB = torch.where(self.open_B, logits_NBL.detach().argmax(2), 1)

    def loss(self, drawn_reward_N: Tensor, greedy_reward_N: Tensor) -> Tensor:
        """Whose gradient is the policy gradient with the greedy choice as its baseline (self-critical), equation 6."""
        log_NB = torch.where(self.drawn_NB == 1, self.keep_NB, 1 - self.keep_NB).log()
        advantage_N = drawn_reward_N - greedy_reward_N
        return -(advantage_N * (log_NB * self.open_B).sum(1)).mean()

    def entropy(self) -> Tensor:
        """Mean over samples of the entropy of all blocks' draws, in nats."""
        p = self.keep_NB
        return -(p * p.log() + (1 - p) * (1 - p).log()).sum(1).mean()
