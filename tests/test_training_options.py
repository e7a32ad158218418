"""What may be added to Algorithm 1: each option against a hand computation or an exact reference.

N samples, B blocks, L levels.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import den_cases as cases
import pytest
import torch
import torch.nn.functional as F

import den
from den import losses
from den.budget import RhoControl
from den.config import EstimatorConfig, SelectorConfig, TrainConfig
from den.costs import cost_table, measure_blocks
from den.joint import Part, TaskLoss, parts
from den.loop import Batch, Means
from den.metrics import evaluate
from den.train_estimator import channel_shares
from den.train_selector import MovingBaseline

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

RATIO_BL = torch.tensor([[0.0, 0.25, 1.0], [0.0, 0.5, 1.0]], dtype=torch.float64)


def digits(**changes) -> den.Task:
    task = den.load_task("digits", **{"subset": 64, **changes})
    return replace(task, test=task.test.subset(torch.arange(32)))


def trainer(model: den.DEN, tasks: list[den.Task], **changes) -> den.Trainer:
    """A trainer of one stage, ready to step."""
    settings = {"stages": 1, "batch_size": 32, "progress": False, **changes}
    made = den.Trainer(model, tasks, TrainConfig(**settings))
    made._set_costs()
    return made


def batch(task: den.Task, count: int = 8) -> Batch:
    return Batch(task, *next(iter(task.batches("test", count))))


# The selector


def all_paths() -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(3), repeat=2))).unsqueeze(1)


def test_expected_square_cost_is_the_sum_over_all_paths() -> None:
    logits = torch.randn(1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    P = losses.log_prob(logits, all_paths()).exp()[:, 0]
    enumerated = (P * losses.path_cost(all_paths()[:, 0], RATIO_BL).square()).sum()
    exact = losses.expected_square_cost(logits, RATIO_BL)[0]
    torch.testing.assert_close(exact, enumerated)
    (d_exact,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (d_enumerated,) = torch.autograd.grad(enumerated, logits)
    torch.testing.assert_close(d_exact, d_enumerated)


@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "self_critical", "moving_average"])
@pytest.mark.parametrize("cost", ["sampled", "expected"])
def test_policy_gradient_is_that_of_the_expectation(baseline: str, cost: str) -> None:
    """Equation 7 as the trainer computes it, against the gradient of equation 6 summed over every path.

    The losses of the paths are looked up; that the trainer's are the estimator's is shown in test_joint.py.
    """
    model = cases.wrn({"digits": 10}).double()
    task = digits(augment=None)
    settings = SelectorConfig(paths=4, baseline=baseline, cost=cost, epsilon_decay=0.0)
    work = trainer(model, [task], rho=2.0, selector=settings, precision="64-true").selecting
    work.begin()
    x, y = (t[:1] for t in batch(task)[1:])
    x = x.double()
    logits = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    paths = cases.all_paths(model).unsqueeze(1)
    with torch.no_grad():
        outputs = work.frozen(x.expand(64, -1, -1, -1), level=paths[:, 0]).logits.double()
    task_loss = F.cross_entropy(outputs, y.expand(64), reduction="none")
    reward = task_loss + 2.0 * losses.path_cost(paths[:, 0], work.tables["digits"]).square()
    (expected,) = torch.autograd.grad((losses.log_prob(logits, paths)[:, 0].exp() * reward).sum(), logits)

    count = 20_000
    work._task_loss = lambda part, level: task_loss[level @ torch.tensor([16, 4, 1])]  # type: ignore[method-assign]
    part = work_part(task, x.expand(count, -1, -1, -1), y.expand(count))
    work.moving.mean[0] = 2.0  # as after some steps
    loss, _ = work._policy(0, part, logits.expand(count, -1, -1), 2.0, work.tables["digits"], Means())
    (actual,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(actual, expected, atol=0.03 if baseline == "none" else 0.015, rtol=0)
    assert float(expected.abs().max()) > 0.1


def work_part(task: den.Task, x: torch.Tensor, y: torch.Tensor) -> Part:
    return parts([Batch(task, x, y)])[0]


@pytest.mark.parametrize("make", [cases.wrn, cases.resnet, cases.vgg])
def test_gate_gradients_are_those_of_masked_channels(make) -> None:
    """d loss / d gate through `gated`, against the sum over levels of gate * (the block's output at that level)."""
    model = make().double()
    estimator = model.estimator.requires_grad_(False)
    n, blocks, levels = 3, model.num_blocks, model.num_levels
    x = torch.randn(n, *cases.image_shape(make), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    level = torch.randint(levels, (n, blocks), generator=torch.Generator().manual_seed(1))
    gate = F.one_hot(level, levels).double().requires_grad_()
    logits = estimator(x, level, "a", gate)
    torch.testing.assert_close(logits, estimator(x, level, "a"))
    (actual,) = torch.autograd.grad(logits.square().sum(), gate)

    h = x if estimator.stem is None else estimator.stem(x, 1, 0)
    mixed = F.one_hot(level, levels).double().requires_grad_()
    for index, block in enumerate(estimator.blocks):
        entry = (1,) if index == 0 and estimator.stem is None else ()
        outputs = [block(h, torch.full((n,), l), 0, *entry) for l in range(levels)]
        h = sum(mixed[:, index, l].view(-1, *[1] * (out.dim() - 1)) * out for l, out in enumerate(outputs))
    out = estimator.heads["a"](estimator.tail(h, 0))
    (expected,) = torch.autograd.grad(out.square().sum(), mixed)
    torch.testing.assert_close(actual, expected)
    assert float(expected.abs().max()) > 0


def test_gumbel_gates_follow_the_selector() -> None:
    logits = torch.tensor([[[2.0, 0.0, -1.0]]]).requires_grad_()
    uniform = torch.rand(40_000, 1, 3, generator=torch.Generator().manual_seed(0))
    gates = losses.gumbel_gates(logits.expand(40_000, -1, -1), 0.7, uniform)
    assert torch.equal(gates.detach().round(), F.one_hot(gates.argmax(2), 3).float())
    torch.testing.assert_close(gates.detach().mean(0), logits.detach().softmax(2)[0], atol=0.01, rtol=0)
    assert float(torch.autograd.grad(gates[..., 0].sum(), logits)[0][0, 0, 0]) > 0


def test_gumbel_selector_learns_to_save_and_leaves_the_estimator() -> None:
    model = cases.wrn({"digits": 10})
    before = {name: t.clone() for name, t in model.estimator.state_dict().items()}
    settings = SelectorConfig(lr=0.1, epochs=8, gradient="gumbel", temperature=2.0)
    made = trainer(model, [digits()], rho=20.0, selector=settings)
    made.loop.run([made._selector_phase(0)])
    assert all(torch.equal(before[name], t) for name, t in model.estimator.state_dict().items())
    assert float(evaluate(model, made.loop.tasks[0]).cost.mean()) < 0.15
    made.loop.position.epoch = 7
    assert made.selecting._temperature(0) == pytest.approx(0.5)  # the last epoch's


def test_moving_baseline_follows_the_mean_of_earlier_steps() -> None:
    baseline = MovingBaseline(1)
    for reward, expected in ((4.0, 0.0), (6.0, 2.0), (4.0, -0.2)):
        value = torch.full((2, 3), reward)
        torch.testing.assert_close(baseline.subtract(0, value, value.mean()), torch.full((2, 3), expected))


def test_entropy_bonus_spreads_the_levels() -> None:
    logits = torch.tensor([[[3.0, 0.0, 0.0]]]).requires_grad_()
    (gradient,) = torch.autograd.grad(-losses.entropy(logits).mean(), logits)
    assert float(gradient[0, 0, 0]) > 0  # descent lowers the level that is too sure
    torch.testing.assert_close(losses.entropy(torch.zeros(2, 3, 4)), torch.full((2,), 4.0).log())


# What a path costs


def test_cost_tables_of_flops_and_time() -> None:
    model = cases.wrn()
    level = torch.tensor([[0, 0, 0], [3, 3, 3], [1, 2, 3]])
    table = cost_table(model, "flops", (8, 8))
    macs = den.flops(model, level, 8).double()
    stem = macs[0]
    torch.testing.assert_close(losses.path_cost(level, table).double(), (macs - stem) / (macs[1] - stem))
    ms = torch.tensor([[0.0, 1, 2, 3], [0, 1, 1, 2], [1, 1, 1, 1]])
    torch.testing.assert_close(losses.path_cost(level, cost_table(model, "latency", (8, 8), ms))[2].item(), 3 / 6)
    assert torch.equal(cost_table(model, "parameters", (8, 8)), den.cost_ratios(model))
    with pytest.raises(ValueError, match="unit is 'joules'"):
        cost_table(model, "joules", (8, 8))


@pytest.mark.parametrize("make", [cases.wrn, cases.vgg, cases.conv_net])
def test_blocks_are_measured_alone(make) -> None:
    model = make()
    ms = measure_blocks(model, cases.image_shape(make)[1:], batch=2, seconds=0.0)
    assert ms.shape == (model.num_blocks, model.num_levels)
    assert bool((ms.diff(dim=1) >= 0).all())
    assert bool((ms[:, -1] > 0).all())


def test_measured_times_are_kept_for_a_resumed_run(tmp_path: Path) -> None:
    def start(resume: bool) -> den.Trainer:
        made = den.Trainer(
            cases.wrn({"digits": 10}), [digits()], TrainConfig(cost_unit="latency", out=tmp_path, resume=resume)
        )
        made.loop.open()
        made._set_costs()
        return made

    first, again = start(False), start(True)
    assert torch.equal(first.selecting.tables["digits"], again.selecting.tables["digits"])
    ms = torch.tensor(json.loads((tmp_path / "latency.json").read_text())["ms"]["digits"])
    torch.testing.assert_close(first.selecting.tables["digits"], cost_table(first.model, "latency", (8, 8), ms))


def test_rho_rises_while_paths_are_too_dear() -> None:
    control = RhoControl(1.0, target=0.5, rate=0.1, budgets=False)
    control.update(torch.tensor([0.9, 0.7]), None)
    assert float(control.rho(None).log()) == pytest.approx(0.1 * 0.3 + 5 * 0.2 * 0.3)
    of_budgets = RhoControl(1.0, target=None, rate=0.1, budgets=True)
    of_budgets.update(torch.tensor([0.9, 0.7, 0.1]), torch.tensor([0.5, 0.5, 0.8]))
    rho = of_budgets.rho(torch.tensor([0.5, 0.8, 0.65, 0.2])).log()
    torch.testing.assert_close(rho, torch.tensor([0.33, -0.77, 0.0, 0.0]), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_target_cost_is_met() -> None:
    """On an estimator for which dear paths pay, rho settles where the argmax paths cost what is wanted."""
    records: list[dict] = []
    torch.manual_seed(0)
    model = den.create_model("wrn_8_1", {"digits": 10}, selector=cases.TINY_SELECTOR, base_size=8)
    config = TrainConfig(
        rho=1.0,
        stages=1,
        batch_size=64,
        target_cost=0.5,
        dual_rate=0.2,
        estimator=EstimatorConfig(first_epochs=8, schedule="cosine"),
        selector=SelectorConfig(lr=2e-2, epochs=24, baseline="leave_one_out", cost="expected", epsilon_decay=0.0),
        progress=False,
    )
    made = den.Trainer(model, [digits(subset=256)], config, on_epoch=records.append)
    made._set_costs()
    made.loop.run(made.phases())
    late = records[-8:]
    assert sum(r["cost"] for r in late) / 8 == pytest.approx(0.5, abs=0.06)
    assert all(r["cost"] == pytest.approx(0.5, abs=0.15) for r in late)


# The estimator


@pytest.mark.parametrize("labelled", [False, True])
def test_sandwich_is_labels_for_the_full_path_and_distillation_for_another(labelled: bool) -> None:
    model, task = cases.wrn({"digits": 10}), digits(augment=None)
    work = trainer(model, [task], estimator=EstimatorConfig(sandwich=True)).estimating
    work.begin()
    work.estimator.eval()  # so that the two halves can be computed apart
    part = work_part(task, *batch(task)[1:])
    level = work._mixed(torch.full((len(part.x), 3), 2))
    means = Means()
    loss = work._sandwich(part, level, labelled, means)["digits"]
    full = model.estimator(part.x, torch.full_like(level, 3), "digits")
    other = model.estimator(part.x, level, "digits")
    expected = F.cross_entropy(full, part.labels[0]) + F.cross_entropy(other, full.detach().softmax(1))
    if labelled:
        expected = expected + F.cross_entropy(other, part.labels[0])
    torch.testing.assert_close(loss, expected)
    gradient = torch.autograd.grad(loss, model.estimator.heads["digits"].weight)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, model.estimator.heads["digits"].weight)[0])


def test_sandwich_mixes_smallest_random_and_drawn() -> None:
    work = trainer(cases.wrn({"digits": 10}), [digits()], estimator=EstimatorConfig(sandwich=True)).estimating
    level = work._mixed(torch.full((6000, 3), 3))
    share = [float((level == l).all(1).float().mean()) for l in (0, 3)]
    assert share == pytest.approx([1 / 3 + 1 / 192] * 2, abs=0.02)


def test_full_epochs_come_first() -> None:
    records: list[dict] = []
    estimator = EstimatorConfig(lr=0.01, first_epochs=2, full_epochs=1, warmup_epochs=1, settle_epochs=0)
    config = TrainConfig(stages=1, tau=0.0, batch_size=32, estimator=estimator, progress=False)
    made = den.Trainer(cases.wrn({"digits": 10}), [digits()], config, on_epoch=records.append)
    made._set_costs()
    made.loop.run([made._estimator_phase(0)])
    assert [r["cost"] == 1 for r in records] == [True, False]
    assert [r["lr"] for r in records] == pytest.approx([0.0, 0.001])  # rising; then half is done: a tenth


@pytest.mark.parametrize("make", [cases.wrn, cases.resnext, cases.bottleneck])
def test_rare_channels_are_told_by_their_width(make) -> None:
    """Shares of the weights, counted over samples; then gradients by p ** -1/2."""
    model = make()
    level = torch.tensor([0, 1, 1, 2, 3, 3, 3, 3])
    ran = torch.tensor([float((level >= l).float().mean()) for l in range(4)])
    for block in model.estimator.blocks:
        width = torch.tensor(block.widths)[level]
        for name, layer in block.named_modules():
            if not isinstance(layer, den.estimator.dk.DENConv2d):
                continue
            share = channel_shares(layer, ran).expand_as(layer.weight)
            counted = torch.zeros_like(layer.weight)
            for w in width.tolist():
                used = torch.ones_like(layer.weight)
                if layer.out_widths is not None:
                    used[w:] = 0
                if layer.in_widths is not None and layer.groups == 1:
                    used[:, w:] = 0
                counted += used / len(level)
            torch.testing.assert_close(share, counted, msg=name)


def test_rare_boost_scales_gradients() -> None:
    model, task = cases.wrn({"digits": 10}), digits(augment=None)
    gradients = []
    for boost in (0.0, 0.5):
        work = trainer(model, [task], estimator=EstimatorConfig(rare_boost=boost)).estimating
        work.begin()
        model.estimator.eval()
        work._levels = lambda stage, x: torch.tensor([[1, 3, 3]] * 3 + [[3, 3, 3]])  # type: ignore[method-assign]
        model.zero_grad()
        work.step(0, [batch(task, 4)], Means()).backward()
        work.before_update()
        gradients.append([block.conv1.weight.grad.clone() for block in model.estimator.blocks])
    plain, boosted = gradients
    width = model.estimator.blocks[0].widths[1]
    torch.testing.assert_close(boosted[0][:width], plain[0][:width])
    torch.testing.assert_close(boosted[0][width:], 2 * plain[0][width:])  # a quarter of the images ran them
    torch.testing.assert_close(boosted[1], plain[1])


def test_phases_end_on_the_running_average() -> None:
    model, task = cases.wrn({"digits": 10}), digits()
    made = trainer(model, [task], estimator=EstimatorConfig(lr=0.05, first_epochs=2, ema=0.8))
    work, seen = made.estimating, []
    follow = work.after_update

    def watch() -> None:
        follow()
        seen.append({name: t.clone() for name, t in model.estimator.state_dict().items()})

    phase = made._estimator_phase(0)
    phase.after_update = watch
    made.loop.run([phase])
    average = seen[0]["heads.digits.weight"]
    for state in seen[1:]:
        average = 0.8 * average + 0.2 * state["heads.digits.weight"]
    torch.testing.assert_close(model.estimator.heads["digits"].weight.data, average)


def test_learned_task_weights() -> None:
    """exp(-s) L + s / 2 has its least value at exp(s) = 2 L; weights of noisy tasks fall."""
    weighting = TaskLoss({"a": 1.0, "b": 2.0}, True)
    values = {"a": torch.tensor(0.5), "b": torch.tensor(2.0)}
    torch.testing.assert_close(weighting(values), torch.tensor((0.5 + 4.0) / 2))
    optimizer = torch.optim.SGD(weighting.parameters(), 0.5)
    for _ in range(200):
        optimizer.zero_grad()
        weighting(values).backward()
        optimizer.step()
    torch.testing.assert_close(weighting.log_variance.exp(), torch.tensor([2 * 0.5, 2 * 4.0]))
    torch.testing.assert_close(TaskLoss({"a": 1.0, "b": 2.0}, False)(values), torch.tensor(2.25))


def test_mixed_precision_follows_full_precision() -> None:
    """bf16: logits, gradients and rewards near those of float32, and weights that stay float32."""
    found = []
    for precision in ("32-true", "bf16-mixed"):
        records: list[dict] = []
        model = cases.wrn({"digits": 10})
        config = TrainConfig(
            stages=1,
            batch_size=32,
            precision=precision,
            progress=False,
            estimator=EstimatorConfig(lr=0.02, first_epochs=2),
            selector=SelectorConfig(lr=1e-3, epochs=1),
        )
        den.Trainer(model, [digits()], config, on_epoch=records.append).fit()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        found.append([record["loss"] for record in records])
    assert found[1] != found[0]
    assert found[1] == pytest.approx(found[0], rel=0.05)
