"""Frozen networks against the specification in float64, with random and with trained weights: within 1e-4 of the
largest logit directly in float32, 1e-3 by Winograd's algorithm, 2e-2 in bfloat16. N samples, B blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import den

FORMS = {
    "direct": ({"winograd": False}, 1e-4),
    "winograd": ({}, 1e-3),
    "bfloat16": ({"dtype": torch.bfloat16}, 2e-2),
    "bfloat16 direct": ({"dtype": torch.bfloat16, "winograd": False}, 2e-2),
}


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits at 16x16, normalised, and their classes."""
    task = den.load_task("digits", augment=None, channels=1, image_size=16)
    return next(iter(task.batches("train", count, training=False)))


def network() -> den.DEN:
    torch.manual_seed(0)
    return den.create_model("wrn_8_4", tasks={"digits": 10}, in_channels=1, base_size=16)


@pytest.fixture(scope="module")
def random_model() -> den.DEN:
    return network().eval()


@pytest.fixture(scope="module")
def trained_model() -> den.DEN:
    """After some steps at random levels: norms, widths and weights are no longer those of the start."""
    model = network().train()
    x, y = images(320)
    optimizer = torch.optim.SGD(model.estimator.parameters(), 0.05, momentum=0.9)
    losses = []
    for step in range(20):
        batch = slice(step % 10 * 32, step % 10 * 32 + 32)
        level = torch.randint(model.num_levels, (32, model.num_blocks))
        level[:16] = model.num_levels - 1
        loss = F.cross_entropy(model(x[batch], level=level).logits, y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5]), f"the network did not learn: {losses}"
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [2, 20], ids=["few", "many"])
@pytest.mark.parametrize("kind", ["random", "trained"])
def test_frozen_logits_are_within_the_bound(request, kind: str, batch: int, form: str) -> None:
    model = request.getfixturevalue(f"{kind}_model")
    options, bound = FORMS[form]
    x, _ = images(batch)
    torch.manual_seed(1)
    level = torch.randint(model.num_levels, (batch, model.num_blocks))
    exact = den.create_model(**{**model.config, "backend": "reference"})
    exact.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        expected = exact.double().eval()(x.double(), level=level).logits
        actual = den.freeze(model, **options)(x, level=level).logits.double()
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= bound, f"{form}: error {error:.2e} of the largest logit, allowed {bound:.0e}"
