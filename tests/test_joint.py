"""Two labels for one image (scenario M3): one path, several heads, one reward."""

from __future__ import annotations

from dataclasses import replace

import den_cases as cases
import pytest
import torch
import torch.nn.functional as F

import den
from den.config import SelectorConfig, TrainConfig
from den.joint import parts
from den.loop import Batch, Means

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
CLASSES = {"fine": 10, "coarse": 2}


def coarse_and_fine() -> list[den.Task]:
    """The digits, and whether they are even."""
    fine = replace(den.load_task("digits", subset=96, name="fine"), joint="digits")
    splits = {name: getattr(fine, name) for name in ("train", "test")}
    halves = {
        name: den.data.ImageSet(images.images, images.labels % 2, ("even", "odd"), images.grey)
        for name, images in splits.items()
    }
    return [fine, replace(fine, name="coarse", **halves)]


def test_several_heads_read_one_path() -> None:
    model = cases.wrn(CLASSES)
    frozen = den.freeze(model)
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for network in (model, frozen):
        both = network.forward_tasks(x, ("fine", "coarse"))
        assert torch.equal(both["fine"].level, both["coarse"].level)
        for task, out in both.items():
            alone = network(x, task)
            assert torch.equal(out.logits, alone.logits)
            assert out.logits.shape == (5, CLASSES[task])


def test_heads_with_statistics_of_their_own_share_no_path() -> None:
    model = cases.wrn(CLASSES, task_norm="per_task")
    for network in (model, den.freeze(model)):
        with pytest.raises(ValueError, match="have statistics of their own"):
            network.forward_tasks(torch.zeros(1, 3, 8, 8), ("fine", "coarse"))


def test_joint_batches_are_the_same_images() -> None:
    tasks = coarse_and_fine()
    for (x, y), (x_coarse, y_coarse) in zip(*(task.batches("train", 32, seed=3) for task in tasks), strict=True):
        assert torch.equal(x, x_coarse)
        assert torch.equal(y % 2, y_coarse)


def test_a_step_draws_one_path_and_one_reward_for_both_labels() -> None:
    model, tasks = cases.wrn(CLASSES), coarse_and_fine()
    settings = SelectorConfig(paths=2, epsilon_decay=0.0)
    config = TrainConfig(rho=2.0, task_weights=(1.0, 3.0), batch_size=32, selector=settings, progress=False)
    made = den.Trainer(model, tasks, config)
    made._set_costs()
    batches = [Batch(task, *next(iter(task.batches("train", 8)))) for task in tasks]
    (part,) = parts(batches)
    assert part.names == ("fine", "coarse")

    asked = []
    model.estimator.eval()
    forward = model.estimator.forward
    model.estimator.forward = lambda x, level, task, *more: asked.append((level, task)) or forward(x, level, task)
    loss = made.estimating.step(0, batches, Means())
    assert len(asked) == 1
    level, heads = asked[0]
    assert heads == ("fine", "coarse")
    ce = [F.cross_entropy(model.estimator(part.x, level, name), y) for name, y in zip(heads, part.labels, strict=True)]
    torch.testing.assert_close(loss, (ce[0] + 3 * ce[1]) / 2)

    made.selecting.begin()
    paths = torch.randint(4, (2, 8, 3), generator=torch.Generator().manual_seed(0))
    found = made.selecting._task_loss(part, paths)
    for k in (0, 1):
        each = [
            F.cross_entropy(model.estimator(part.x, paths[k], name), y, reduction="none")
            for name, y in zip(heads, part.labels, strict=True)
        ]
        torch.testing.assert_close(found[k], (each[0] + 3 * each[1]).detach() / 2, atol=1e-4, rtol=1e-4)


def test_joint_tasks_of_other_images_are_refused() -> None:
    fine, coarse = coarse_and_fine()
    shuffled = replace(coarse, train=coarse.train.subset(torch.arange(95, -1, -1)))
    with pytest.raises(ValueError, match="'fine' and 'coarse' are joint 'digits', but their images differ"):
        den.Trainer(cases.wrn(CLASSES), [fine, shuffled])
    with pytest.raises(ValueError, match="share each path, so task_norm must be 'shared'"):
        den.Trainer(cases.wrn(CLASSES, task_norm="per_task"), [fine, coarse])


def test_training_jointly_learns_both(tmp_path) -> None:
    model, tasks = cases.wrn(CLASSES), coarse_and_fine()
    config = TrainConfig(stages=1, batch_size=32, out=tmp_path, progress=False)
    config.estimator.first_epochs, config.selector.epochs = 3, 1
    summary = den.Trainer(model, tasks, config).fit()
    assert summary["fine"]["selector"]["level_usage"] == summary["coarse"]["selector"]["level_usage"]
    assert summary["coarse"]["full"]["accuracy"] > 50
