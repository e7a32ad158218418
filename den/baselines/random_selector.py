"""Random selector: every block of every image takes any level alike, in training and in use.

The paper's "rand sel" (Table 5) is the DEN that was trained with its selector, at random levels: that is the policy
"random" of every `den.Trainer` run. Here the estimator has also been *trained* on random levels, and on nothing else.
"""

from __future__ import annotations

from torch import Tensor

from den.baselines.base import Method, supervised
from den.loop import Batch, Phase
from den.losses import initial_levels
from den.metrics import Policy
from den.model import DEN
from den.tasks import Task


class RandomSelector(Method):
    """Equation 8 with tau 0, to the end."""

    name = "random"
    policy = "random"
    network: DEN

    def build(self) -> DEN:
        return self.create(self.tasks)

    def set_up(self) -> None:
        self.net = self.loop.setup("network", self.network.estimator, self.sgd(self.network.estimator.parameters()))

    def phases(self) -> list[Phase]:
        return [self.weights_phase("network", supervised(self._logits), begin=self.net.train)]

    def _logits(self, batch: Batch) -> Tensor:
        everywhere = len(batch.x) * self.loop.fabric.world_size
        shape = everywhere, self.network.num_blocks, self.network.num_levels
        level_NB = self.loop.mine(initial_levels(*shape, 0.0, self.loop.generator)).to(batch.x.device)
        return self.net(batch.x, level_NB, batch.task.name)

    def policies(self, task: Task) -> dict[str, Policy]:
        return {"random": "random", "full": "full"}
