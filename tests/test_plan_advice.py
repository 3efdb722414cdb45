"""What a plan says to set and warns of: losses that are not means of their parts', and a CPU that is not the GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from planned import (  # noqa: F401
    Clock,
    clock_of_the_test,
    conv,
    fingerprint,
    gpt,
    mlp,
    old_objects_aside,
    same,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import accumkern
from accumkern.planning.advice import settings_of, verdict_reason
from accumkern.planning.parts import parts_warnings
from accumkern.planning.protocol import Setup
from accumkern.planning.speed import Split
from accumkern.planning.trial import Preserved

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside")
WAY = Split(1, 32, 3)


def with_loss(loss: Callable[[nn.Module, Any], Tensor], batch: Callable[[int], Any] | None = None) -> Setup:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 16))
    return Setup(
        model, torch.optim.SGD(model.parameters(), lr=0.1), batch or (lambda size: torch.randn(size, 16)), loss
    )


def contrastive() -> Setup:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(F.normalize(model(batch)) @ F.normalize(batch).T, torch.arange(len(batch)))

    return with_loss(loss)


def ragged(unequal: bool = True) -> Setup:
    """Losses that are means over the tokens of a batch, one number each."""

    def batch(size: int) -> tuple[Tensor, Tensor]:
        lengths = torch.arange(1, size + 1) ** 2 if unequal else torch.full((size,), 4)
        labels = torch.randint(4, (size, int(lengths.max())))
        labels[torch.arange(labels.shape[1]) >= lengths[:, None]] = -100
        return torch.randn(*labels.shape, 16), labels

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0])[..., :4].flatten(0, 1), batch[1].flatten())

    return with_loss(loss, batch)


def noisy() -> Setup:
    return with_loss(lambda model, batch: model(batch + torch.randn_like(batch)).square().mean())


def graph() -> Setup:
    def batch(size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(size, 16), torch.randint(size, (5 * size,))

    return with_loss(lambda model, batch: model(batch[0])[batch[1]].square().mean(), batch)


class TrainingOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, batch: Tensor) -> Tensor:
        if not self.training:
            raise NotImplementedError("no eval mode")
        return (batch @ self.weight).std()


def training_only() -> Setup:
    model = TrainingOnly()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Setup(model, optimizer, lambda size: torch.randn(size, 16), lambda model, batch: model(batch))


def warned(setup: Setup, way: Split = WAY, largest: int = 32) -> list[str]:
    """Return the warnings, with everything as it was before."""
    before = fingerprint(setup)
    with Preserved(setup) as preserved:
        found = parts_warnings(preserved, way, largest)
        assert same(fingerprint(setup), before)  # at once, for what is measured next
    return found


# ---- the mean of parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setup", [mlp, gpt, conv, lambda: ragged(unequal=False)], ids=["mlp", "gpt", "conv", "equal"])
def test_means_over_samples_or_equally_many_tokens_are_not_warned_of(setup: Callable[[], Setup]) -> None:
    assert warned(setup()) == []


@pytest.mark.parametrize("largest", [32, 2])
def test_means_over_tokens_are_told_to_be_weighed(largest: int) -> None:
    (warning,) = warned(ragged(), largest=largest)
    assert (
        f"the gradient of {min(4, largest)} samples is not the mean of the gradients of their halves (they" in warning
    )
    assert "as with a mean over tokens" in warning
    assert "acc.backward(..., count=...), see docs/averaging.md" in warning


def test_a_loss_in_which_samples_see_each_other_is_another_one() -> None:
    (warning,) = warned(contrastive())
    assert "is not between those of the halves" in warning
    assert "of 32 samples at a time and not of 96: keep the micro-batch" in warning


def test_what_cannot_be_compared_is_not_warned_of() -> None:
    for setup in (noisy(), graph(), training_only()):
        assert warned(setup) == []
    assert warned(contrastive(), Split(1, 96, 1)) == []
    assert warned(contrastive(), largest=1) == []


def test_a_measured_plan_has_the_warning_and_a_prediction_has_not(clock: Clock) -> None:
    asked = {"effective_batch": 24, "largest_micro_batch": 8, "noise_windows": 0}
    plan = accumkern.plan(lambda: clock.pass_with(contrastive()), **asked)  # type: ignore[arg-type]
    assert plan.choice.accumulation_steps == 3
    (warning,) = plan.warnings
    assert "samples see each other" in warning
    assert f"- warning: {warning}" in str(plan)
    assert accumkern.plan(contrastive, **asked, memory="1GB", measure=False).warnings == ()  # type: ignore[arg-type]


# ---- the machine -------------------------------------------------------------------------------------------------


def test_the_first_line_says_what_was_measured(clock: Clock) -> None:
    def setup() -> Setup:
        return clock.pass_with(mlp())

    asked = {"effective_batch": 8, "largest_micro_batch": 8, "noise_windows": 0}
    plan = accumkern.plan(setup, **asked)  # type: ignore[arg-type]
    assert str(plan).splitlines()[:2] == [
        "measured on: CPU, 1 thread",
        "micro-batch 8, accumulation steps 1, ranks 1: effective batch 8",
    ]
    assert plan.warnings == ()
    (warning,) = accumkern.plan(setup, **asked, memory="24GB").warnings  # type: ignore[arg-type]
    assert warning.startswith("setup() puts the model on the CPU, so this is a plan for this machine's CPU with 24 GB,")
    predicted = accumkern.plan(setup, effective_batch=8, memory="24GB", measure=False)
    assert str(predicted).splitlines()[0] == "predicted for a GPU on fake tensors"
    assert predicted.warnings == ()


# ---- what to set -------------------------------------------------------------------------------------------------


def test_a_plan_ends_with_what_to_set() -> None:
    plan = accumkern.plan(mlp, effective_batch=96, largest_micro_batch=24, memory="1GB", measure=False)
    lines = str(plan).splitlines()
    lines = lines[lines.index("What to set: micro-batch 24, accumulation steps 4, ranks 1: effective batch 96") + 1 :]
    attach = "accumkern.attach(optimizer, 'split24', master_weights='split32'"
    assert lines[0] == f"  {attach}, average_over=4)" == f"  {plan.attach_line}"
    assert lines[1] == "  Loss: the mean of each micro-batch, not divided by anything; average_over does that."
    assert lines[2].startswith("  Learning rate: that of your recipe for an effective batch of 96")
    assert lines[3:] == [
        f"  Or, without a loop over micro-batches: acc = {attach}) and acc.backward(loss_fn, batch, micro_batch=24, "
        "model=model) with batches of 96 (docs/any-batch.md)."
    ]
    assert plan.to_dict()["settings"] == [line.removeprefix("  ") for line in lines]


def test_what_is_set_by_hand_is_what_it_says() -> None:
    """The loop and acc.backward, as the settings have them, give the gradient of the whole batch."""
    way, batch = Split(1, 4, 3), torch.randn(12, 16)
    found = []
    for buffer in (None, "split32"):
        attach = None if buffer is None else "accumkern.attach(optimizer, 'split32', average_over=3)"
        settings = settings_of(way, 12, attach, buffer, None, adam=True)
        by_hand, by_itself = contrastive(), contrastive()
        for setup in (by_hand, by_itself):
            setup.model.eval()
        names = {"accumkern": accumkern, "optimizer": by_hand.optimizer}
        if attach is not None:
            eval(attach, names)
        for part in batch.split(4):
            loss = by_hand.model(part).square().mean()
            line = re.search(r"\(loss / 3\)\.backward\(\)", settings[0]) if attach is None else None
            eval(line[0] if line else "loss.backward()", {"loss": loss})
        model = by_itself.model
        words = re.search(
            r"acc = (accumkern\.attach\(.*?\)) and (acc\.backward\(.*?\)) with batches of 12 ", settings[-1]
        )
        assert words is not None
        acc = eval(words[1], {"accumkern": accumkern, "optimizer": by_itself.optimizer})
        eval(
            words[2],
            {"acc": acc, "loss_fn": lambda part, model=model: model(part).square().mean(), "batch": batch}
            | {"model": model},
        )
        found += [[param.grad for param in setup.model.parameters()] for setup in (by_hand, by_itself)]
    whole = contrastive()
    whole.model.eval()
    whole.model(batch).square().mean().backward()
    for grads in found:
        for grad, param in zip(grads, whole.model.parameters(), strict=True):
            torch.testing.assert_close(grad, param.grad)


@pytest.mark.parametrize(("adam", "words"), [(True, "square root of 64 / its effective batch"), (False, "times 64 / ")])
def test_a_batch_that_is_not_the_recipes_has_a_rule_for_its_learning_rate(adam: bool, words: str) -> None:
    for target in (None, 65):
        (line,) = settings_of(Split(1, 64, 1), target, None, None, None, adam)
        assert line.startswith("Learning rate: that of your recipe times")
        assert words in line
        assert ("beta2" in line) is adam


def test_a_batch_far_from_the_recipes_has_no_rule_for_beta2() -> None:
    near, far = (verdict_reason(Split(2, 4, steps), None, False, True) for steps in (4, 5))
    assert "an effective batch of 8, without accumulation, with Adam's beta2 raised to the power 0.25 so" in near
    assert "beta2" not in far
    assert "8, without accumulation, is far from 40, so let a sweep try some between" in far
    assert "beta2" not in verdict_reason(Split(2, 4, 4), None, False, False)


def test_a_prediction_without_a_batch_says_that_it_is_no_reason_to_train_with_it() -> None:
    plan = accumkern.plan(mlp, memory="1GB", measure=False)
    assert "the largest that fits, without accumulation. That it fits is no reason to train with it: ask" in str(plan)
