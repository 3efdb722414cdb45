"""The plan: what setup() has to return, what would fit elsewhere, and the plan as a whole."""

import dataclasses
import json
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from masters import OwnAdamW
from planned import (  # noqa: F401
    Clock,
    changed,
    clock_of_the_test,
    conv,
    fingerprint,
    gpt,
    hungry,
    mlp,
    old_objects_aside,
    same,
    short_timings,
)
from torch import nn

import accumkern
from accumkern import stepping
from accumkern.memory import storage_bytes
from accumkern.planning.fakes import PredictionError, fake_setup
from accumkern.planning.precision import choose_buffer, choose_masters, step_bytes
from accumkern.planning.predict import predict
from accumkern.planning.protocol import (
    Setup,
    check_setup,
    compute_loss,
    make_batch,
    run_setup,
)
from accumkern.planning.trial import Preserved, train_window, try_windows

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside", "short_timings")

CPU = torch.device("cpu")


# ---- the protocol ------------------------------------------------------------------------------------------------


def test_setup_may_return_a_plain_tuple() -> None:
    setup = mlp()
    assert check_setup(setup[:4]) == setup
    assert check_setup(setup).device == CPU


def on_meta() -> Setup:
    model = nn.Linear(16, 4, device="meta")
    return changed(model=model, optimizer=torch.optim.SGD(model.parameters()))


def frozen() -> Setup:
    setup = mlp()
    setup.model.requires_grad_(False)
    return setup


def needing_a_closure() -> Setup:
    setup = mlp()
    return setup._replace(optimizer=torch.optim.LBFGS(setup.model.parameters()))


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda: None, TypeError, "setup() returned a NoneType; it must return model, optimizer, make_batch and loss"),
        (lambda: list(mlp()[:4]), TypeError, "setup() returned a list"),
        (lambda: mlp()[:3], ValueError, "setup() returned 3 things"),
        (
            lambda: (mlp().optimizer, *mlp()[1:4]),
            TypeError,
            "model of setup() is a AdamW; it must be a torch.nn.Module",
        ),
        (lambda: changed(optimizer=0.1), TypeError, "optimizer of setup() is a float"),
        (lambda: changed(make_batch=torch.zeros(3)), TypeError, "make_batch of setup() is a Tensor"),
        (lambda: changed(loss=None), TypeError, "loss of setup() is a NoneType; it must be a function"),
        (
            needing_a_closure,
            TypeError,
            "optimizer of setup() is a LBFGS, whose step() needs closure; memory and",
        ),
        (lambda: changed(longest_batch=3), TypeError, "longest_batch of setup() is a int"),
        (lambda: changed(tokens_per_sample="64"), TypeError, "tokens_per_sample of setup() is a str"),
        (lambda: changed(tokens_per_sample=-1), ValueError, "tokens_per_sample of setup() is -1"),
        (
            lambda: changed(optimizer=mlp().optimizer),
            ValueError,
            "4 of the optimizer's 4 parameters are not the model's",
        ),
        (frozen, ValueError, "no parameter that requires a gradient"),
        (lambda: changed(model=nn.ReLU()), ValueError, "no parameter that requires a gradient"),
        (on_meta, ValueError, "model of setup() is on the meta device, without memory"),
    ],
)
def test_wrong_setups_are_named(returned: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        run_setup(returned)
    assert message in str(raised.value)


def test_a_setup_that_raises_is_named() -> None:
    def setup() -> Setup:
        raise KeyError("layers")

    with pytest.raises(RuntimeError, match=r"setup\(\) raised KeyError: 'layers'; run it by itself") as raised:
        run_setup(setup)
    assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(TypeError, match="setup is a str; it must be a function"):
        accumkern.plan("train.py:setup")


@pytest.mark.parametrize(
    ("maker", "error", "message"),
    [
        (
            lambda size: torch.zeros(size - 1, 16),
            ValueError,
            "made tensors of shape (2, 16); the first dimension of one of them must be 3",
        ),
        (lambda size: torch.zeros(16, size), ValueError, "must be 3"),
        (lambda size: [1, 2, 3], TypeError, "returned a list without a tensor"),
        (lambda size: 1 / 0, RuntimeError, "make_batch(3) of setup() raised ZeroDivisionError: division by zero"),
    ],
    ids=["too small", "transposed", "no tensor", "raises"],
)
def test_wrong_batches_are_named(maker: Callable[[int], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        make_batch(changed(make_batch=maker), 3)
    assert message in str(raised.value)
    with pytest.raises(error):
        accumkern.plan(lambda: changed(make_batch=lambda size: maker(size + 2)), effective_batch=2)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            lambda model, batch: model(batch).sum().item(),
            TypeError,
            "returned a float; it must return a floating tensor",
        ),
        (lambda model, batch: model(batch).argmax(), TypeError, "returned a torch.int64 tensor"),
        (lambda model, batch: model(batch).sum(-1), ValueError, "returned shape (3,); it must be 0-dim"),
        (lambda model, batch: model(batch).sum().detach(), ValueError, "without a graph"),
        (
            lambda model, batch: model(batch[:, 1:]).mean(),
            RuntimeError,
            "loss of setup() raised RuntimeError: mat1 and",
        ),
        (lambda model, batch: batch.missing, RuntimeError, "loss of setup() raised AttributeError"),
    ],
)
def test_wrong_losses_are_named(loss: Any, error: type[Exception], message: str) -> None:
    setup = changed(loss=loss)
    with pytest.raises(error) as raised:
        compute_loss(setup, make_batch(setup, 3))
    assert message in str(raised.value)


def test_a_step_that_raises_is_named() -> None:
    class Sharp(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            assert closure is not None, "it requires a closure"
            return super().step(closure)

    def setup() -> Setup:
        made = mlp(torch.float32)
        return made._replace(optimizer=Sharp(made.model.parameters(), lr=0.1))

    with pytest.raises(
        RuntimeError, match=r"step\(\) of the optimizer of setup\(\) raised AssertionError: it req"
    ) as raised:
        accumkern.plan(setup, effective_batch=2)
    assert str(raised.value).endswith("; it is called without arguments")


def test_a_loss_without_the_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"loss of setup\(\) gives no parameter of the optimizer a gradient"):
        accumkern.plan(lambda: changed(loss=lambda model, batch: torch.zeros((), requires_grad=True)))


# ---- what would fit elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("size", [1, 8, 32])
@pytest.mark.parametrize(
    ("maker", "least", "most"),
    [(gpt, -0.03, 0.001), (hungry, -0.001, 0.001), (conv, -0.05, 0.05)],
    ids=["gpt", "hungry", "conv"],
)
def test_predictions_are_near_what_is_measured(
    maker: Callable[[], Setup], least: float, most: float, size: int, micro_batches: int
) -> None:
    setup = maker()
    buffer = choose_buffer(setup, None)
    with Preserved(setup, buffer) as preserved:
        tried, _ = try_windows(preserved, size, 2, micro_batches, 10**10)
    with fake_setup(maker) as fake:
        memory = predict(fake, size, buffer, micro_batches).memory
    assert least <= memory.total / tried.peak_bytes - 1 <= most
    assert memory.parameters >= storage_bytes(setup.model.parameters())


def tuned(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[], Setup]:
    def make() -> Setup:
        setup = gpt()
        return setup._replace(optimizer=kind(setup.model.parameters(), lr=1e-3, **options))

    return make


@pytest.mark.parametrize("bucket_bytes", [2**18, 2**23], ids=["small buckets", "one bucket"])
@pytest.mark.parametrize("master_weights", ["split24", "split32"])
@pytest.mark.parametrize(("size", "micro_batches"), [(1, 1), (1, 2), (8, 2)])
@pytest.mark.parametrize(
    "maker",
    [
        tuned(torch.optim.AdamW, fused=True),
        tuned(torch.optim.AdamW, foreach=True),
        tuned(torch.optim.AdamW, foreach=False),
        tuned(torch.optim.SGD, momentum=0.9),
        tuned(torch.optim.SGD, momentum=0.9, foreach=True),
        tuned(OwnAdamW, fused=True),
        tuned(OwnAdamW, foreach=True),
    ],
    ids=["AdamW fused", "AdamW foreach", "AdamW", "SGD", "SGD foreach", "own AdamW fused", "own AdamW foreach"],
)
def test_predictions_with_master_weights_are_near_what_is_measured(
    maker: Callable[[], Setup],
    size: int,
    micro_batches: int,
    master_weights: str,
    bucket_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stepping, "bucket_bytes_on", lambda device: bucket_bytes)
    with Preserved(maker(), "split24", master_weights=master_weights) as preserved:
        tried, _ = try_windows(preserved, size, 2, micro_batches, 10**10)
    with fake_setup(maker) as fake:
        memory = predict(fake, size, "split24", micro_batches, master_weights).memory
    assert memory.total == pytest.approx(tried.peak_bytes, rel=0.001)


def test_categories_of_a_prediction_with_master_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_setup(tuned(torch.optim.AdamW)) as fake:
        numel = sum(p.numel() for p in fake.model.parameters())
        assert step_bytes(fake) == 0
        in_one_pass = predict(fake, 8, "split24", 2, "split32").memory.optimizer_state
        assert 8 * numel <= in_one_pass <= 8.1 * numel  # two moments
    with fake_setup(tuned(OwnAdamW, fused=True)) as fake:
        assert step_bytes(fake) == 8 * numel
        memories = {name: predict(fake, 8, "split24", 2, name).memory for name in ("split24", "split32")}
    for name, per_param in (("split24", 1), ("split32", 2)):
        assert memories[name].master_residuals == per_param * numel
        assert (memories[name].parameters, memories[name].residuals) == (2 * numel, numel)
        # Two moments and a bucket of everything, in FP32.
        assert 16 * numel <= memories[name].optimizer_state <= 16.1 * numel
    monkeypatch.setattr(stepping, "bucket_bytes_on", lambda device: 1)
    with fake_setup(tuned(OwnAdamW, fused=True)) as fake:
        largest_numel = max(p.numel() for p in fake.model.parameters())
        small = predict(fake, 8, "split24", 2, "split32").memory
        assert 8 * (numel + largest_numel) <= small.optimizer_state <= 8.1 * (numel + largest_numel)
        assert dataclasses.replace(small, optimizer_state=0) == dataclasses.replace(
            memories["split32"], optimizer_state=0
        )


def test_categories_of_a_prediction() -> None:
    with fake_setup(gpt) as fake:
        numel = sum(p.numel() for p in fake.model.parameters())
        memories = {buffer: predict(fake, 8, buffer).memory for buffer in ("split24", "split32", "fp32")}
    for buffer, per_param in (("split24", 1), ("split32", 2), ("fp32", 4)):
        assert memories[buffer].residuals == per_param * numel
        assert memories[buffer].parameters == 2 * numel
    assert memories["split24"].gradients == 2 * numel
    assert 4 * numel <= memories["split24"].optimizer_state <= 4 * numel + 400


def test_a_model_larger_than_the_machine_is_predicted_without_its_memory() -> None:
    def giant() -> Setup:
        sizes = [2**15, 2**16] * 4 + [2**15]
        model = nn.Sequential(*(nn.Linear(*pair, bias=False) for pair in pairwise(sizes))).to(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters())
        return Setup(
            model,
            optimizer,
            lambda size: torch.randn(size, 2**15, dtype=torch.bfloat16),
            lambda model, batch: model(batch).mean(),
        )

    how: Any = {"memory": "200 GB", "measure": False, "device": "cpu"}
    plan = accumkern.plan(giant, effective_batch=64, **how, master_weights=None)
    parameters = 8 * 2**32
    assert plan.predictions[0].memory.parameters == parameters  # 34 GB
    assert plan.predictions[0].memory.residuals == parameters // 2
    assert (plan.choice.micro_batch, plan.choice.accumulation_steps, plan.fit) == (64, 1, None)
    with pytest.raises(ValueError, match=r"no micro-batch would fit into 100 GB with a margin of 10%: .* 34\.4 GB"):
        accumkern.plan(giant, **how | {"memory": "100 GB"}, master_weights=None)
    with pytest.raises(ValueError, match=r"parameters 34\.4 GB, their master weights 34\.4 GB, .* residuals 51\.5 GB"):
        accumkern.plan(giant, **how)


def test_a_script_that_needs_values_is_not_predicted_and_says_why() -> None:
    def peeking() -> Setup:
        return mlp()._replace(loss=lambda model, batch: model(batch).mean() * batch.max().item())

    with pytest.raises(PredictionError, match="does not run on fake tensors"):
        accumkern.plan(peeking, memory="1 GB", measure=False)
    plan = accumkern.plan(peeking, effective_batch=2, noise_windows=0)
    assert plan.predictions == ()
    assert "does not run on fake tensors" in str(plan.prediction_problem)
    assert "does not run on fake tensors" in str(plan)


def test_a_model_that_was_made_before_is_predicted_and_not_touched() -> None:
    setup = mlp()
    before = fingerprint(setup)
    plan = accumkern.plan(lambda: setup, memory="1 GB", measure=False)
    assert plan.predictions == accumkern.plan(mlp, memory="1 GB", measure=False).predictions
    assert same(before, fingerprint(setup))
    plan = accumkern.plan(lambda: setup, effective_batch=4, noise_windows=0)  # both
    assert plan.prediction_problem is None
    assert same(before, fingerprint(setup))


def test_a_prediction_leaves_random_numbers_alone_and_needs_a_limit() -> None:
    before = torch.get_rng_state(), random.getstate()
    accumkern.plan(mlp, memory="1 GB", largest_micro_batch=4, measure=False)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    with pytest.raises(ValueError, match="memory is None; a prediction"):
        accumkern.plan(mlp, measure=False)


# ---- the plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtypes", "asked", "buffer"),
    [
        ([torch.float32], None, None),
        ([torch.float32], "split32", None),
        ([torch.bfloat16, torch.float32], None, "split24"),
        ([torch.bfloat16], "split32", "split32"),
        ([torch.float16], None, "fp32"),
    ],
)
def test_the_buffer_follows_the_dtypes(dtypes: list[torch.dtype], asked: str | None, buffer: str | None) -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes])
    setup = Setup(model, torch.optim.SGD(model.parameters()), torch.zeros, lambda model, batch: batch)
    assert choose_buffer(setup, asked) == buffer


@pytest.mark.parametrize(
    ("dtypes", "asked", "masters"),
    [
        ([torch.float32], "auto", None),
        ([torch.float32], "split32", None),  # stepped as they are
        ([torch.bfloat16, torch.float32], "auto", "split32"),
        ([torch.bfloat16], "split24", "split24"),
        ([torch.bfloat16], None, None),
        ([torch.float16, torch.bfloat16], "auto", None),
    ],
)
def test_masters_follow_the_dtypes(dtypes: list[torch.dtype], asked: str | None, masters: str | None) -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes])
    setup = Setup(model, torch.optim.SGD(model.parameters()), torch.zeros, lambda model, batch: batch)
    assert choose_masters(setup, asked) == masters
    if torch.float16 in dtypes:
        with pytest.raises(TypeError, match=r"'split32', and some of the optimizer's parameters are float16"):
            choose_masters(setup, "split32")
    model.requires_grad_(False)
    assert choose_masters(setup, asked) is None  # what is frozen is not stepped


def test_a_plan_of_a_gpt(clock: Clock) -> None:
    told = []
    plan = accumkern.plan(
        lambda: clock.pass_with(gpt()),
        effective_batch=24,
        memory="4 MB",
        noise_windows=8,
        progress=lambda stage, detail: told.append(stage),
    )
    choice = plan.choice
    assert choice.micro_batch * choice.accumulation_steps == choice.effective_batch == 24
    assert plan.buffer == "split24"
    assert plan.master_weights == "split32"
    assert plan.attach
    assert plan.fit is not None
    assert plan.is_limited_by_memory
    assert choice.memory_bytes <= 0.9 * 4e6
    assert plan.largest_micro_batch < 24
    assert plan.prediction_error is not None
    assert plan.prediction_error < 0.03
    assert plan.noise is not None
    assert [c.ranks for c in plan.by_ranks] == [1, 2, 4, 8]
    assert plan.by_ranks[0] == choice
    assert all(c.effective_batch == 24 for c in plan.by_ranks)
    assert plan.by_ranks[3].micro_batch <= 3
    assert plan.by_ranks[1].memory_bytes > plan.gradient_bytes
    assert set(told) == {"what fits", "what is fast", "what helps training", "what would fit elsewhere", "the plan"}
    text = str(plan)
    assert f"micro-batch {choice.micro_batch}, accumulation steps {choice.accumulation_steps}" in text
    assert "kept exactly" in text
    steps = choice.accumulation_steps
    assert f"accumkern.attach(optimizer, 'split24', master_weights='split32', average_over={steps})\n" in text
    assert "Master weights: 'split32', because without them updates below 1/512 of a weight are lost" in text
    assert "This costs 2 bytes per parameter (173 kB), optimizer states in FP32 (4 bytes more per parameter" in text
    assert "for the FP32 weights and gradients of a step" not in text  # which is one pass
    data = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert data["choice"]["effective_batch"] == 24


def gradient_release() -> Setup:
    """Return a setup whose optimizer cannot step FP32 weights, by its option."""
    setup = mlp()
    group = {"params": list(setup.model.parameters()), "gradient_release": True}
    return setup._replace(optimizer=torch.optim.SGD([group], lr=0.1))


def test_an_optimizer_that_cannot_step_fp32_weights_is_planned_for_without_and_told_why() -> None:
    plan = accumkern.plan(gradient_release, effective_batch=4, noise_windows=4)
    assert (plan.master_weights, plan.attach) == (None, plan.choice.accumulation_steps > 1)
    why = (
        "SGD cannot step FP32 weights: gradient_release is on: its steps are hooks in the backward pass, and not step()"
    )
    assert plan.master_problem == why
    assert (
        f"Master weights: none, and updates below 1/512 of a weight are lost in rounding it to bfloat16; {why}."
        in str(plan)
    )
    for measure in (True, False):
        with pytest.raises(TypeError, match="master_weights is 'split24', and SGD cannot step FP32 weights: gradient"):
            accumkern.plan(gradient_release, memory="1 GB", master_weights="split24", measure=measure)


@pytest.mark.parametrize(("master_weights", "dtype"), [("auto", torch.float32), (None, torch.bfloat16)])
def test_all_that_is_measured_steps_what_will_be_stepped(master_weights: str | None, dtype: torch.dtype) -> None:
    stages: dict[str, set[tuple[torch.dtype, bool]]] = {}
    stage = "what fits"

    def told(name: str, _detail: str) -> None:
        nonlocal stage
        stage = name

    def setup() -> Setup:
        made = mlp()

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if type(next(iter(made.model.parameters()))) is nn.Parameter:  # not what is predicted with
                found = {state["exp_avg"].dtype for state in optimizer.state.values()}
                attached = accumkern.accumulator_of(optimizer) is not None
                stages.setdefault(stage, set()).update((of, attached) for of in found)

        made.optimizer.register_step_post_hook(after_step)
        return made

    asked: Any = {"effective_batch": 4, "largest_micro_batch": 4, "noise_windows": 4, "progress": told}
    plan = accumkern.plan(setup, **asked, master_weights=master_weights)
    is_attached = master_weights is not None or plan.choice.accumulation_steps > 1  # by what is fast here
    assert {"what fits", "what is fast", "what helps training", "the plan"} <= set(stages)
    assert {of for found in stages.values() for of, _ in found} == {dtype}
    assert stages["the plan"] == {(dtype, is_attached)}


def test_batchnorm_gets_a_warning(clock: Clock) -> None:
    plan = accumkern.plan(lambda: clock.pass_with(conv()), effective_batch=8, largest_micro_batch=2, noise_windows=0)
    assert len(plan.warnings) == 1
    assert "BatchNorm (layers.1)" in plan.warnings[0]
    assert "statistics are those of a micro-batch of 2" in plan.warnings[0]
    assert not accumkern.plan(lambda: clock.pass_with(mlp()), effective_batch=1, noise_windows=0).warnings


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"effective_batch": 0}, ValueError, "effective_batch is 0; it must be an int of at least 1"),
        ({"effective_batch": 2.0}, TypeError, "effective_batch is a float; it must be an int of at least 1"),
        ({"memory": "lots"}, ValueError, "memory is 'lots'"),
        ({"margin": 1.0}, ValueError, "margin is 1.0; it must be a number of at least 0 and less than 1"),
        ({"margin": "10%"}, TypeError, "margin is a str"),
        ({"buffer": "split16"}, ValueError, "buffer is 'split16'; it must be one of split24, split32, fp32"),
        ({"master_weights": "fp32"}, ValueError, "is 'fp32'; it must be one of auto, split24, split32, or None"),
        ({"master_weights": True}, TypeError, "master_weights is a bool; it must be one of auto, split24, split32"),
        ({"noise_windows": 2}, ValueError, "noise_windows is 2; it must be at least 4, or 0"),
        ({"largest_micro_batch": -1}, ValueError, "largest_micro_batch is -1"),
        (
            {"effective_batch": 10**10},
            ValueError,
            "effective_batch is 10000000000; it must be an int of at least 1, a",
        ),
        ({"largest_micro_batch": 10**10}, ValueError, "and of at most 1048576: nothing gets faster by running more at"),
        ({"noise_windows": 10**10}, ValueError, "at most 10000: each trains 8 micro-batches, and 10000 are a training"),
        ({"memory": "1 kB"}, ValueError, "less than what the model and its optimizer hold already"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        accumkern.plan(mlp, **arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize("master_weights", [None, "split32"])
def test_an_attached_optimizer_is_refused_and_left_attached(master_weights: str | None) -> None:
    setup = mlp()
    accumulator = accumkern.attach(setup.optimizer, master_weights=master_weights)
    train_window(setup, [make_batch(setup, 2) for _ in range(2)], 2, accumulator)
    params = list(setup.model.parameters())
    before = fingerprint(setup)
    masters = [] if master_weights is None else [accumulator.master_weight(param) for param in params]
    with pytest.raises(ValueError, match="attached already; detach"):
        accumkern.plan(lambda: setup, effective_batch=8)
    assert accumkern.accumulator_of(setup.optimizer) is accumulator
    if master_weights is not None:
        assert any(not torch.equal(master, param) for master, param in zip(masters, params, strict=True))
        assert same(masters, [accumulator.master_weight(param) for param in params])
    assert same(before, fingerprint(setup))
    train_window(setup, [make_batch(setup, 2) for _ in range(2)], 2, accumulator)


@pytest.mark.gpu
def test_a_plan_on_a_gpu_respects_its_limit_and_gives_the_memory_back() -> None:
    def setup() -> Setup:
        made = gpt(layers=2)
        model = made.model.cuda()
        return made._replace(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), fused=True),
            make_batch=lambda size: torch.randint(256, (size, 65), device="cuda"),
        )

    made = setup()
    device = made.device
    # Libraries keep memory from their first use on, and cuBLAS lets go of its own at times: without it on both sides.
    torch.autograd.grad(made.loss(made.model, made.make_batch(2)), list(made.model.parameters()), allow_unused=True)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    allocated, fraction = torch.cuda.memory_allocated(device), torch.cuda.get_per_process_memory_fraction(device)
    limit = torch.cuda.memory_reserved(device) + 200 * 10**6
    plan = accumkern.plan(lambda: made, effective_batch=4096, memory=limit, noise_windows=8)
    assert plan.is_limited_by_memory
    assert plan.choice.memory_bytes <= 0.9 * limit
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated(device) <= allocated
    assert torch.cuda.get_per_process_memory_fraction(device) == fraction
    with fake_setup(setup) as fake:
        size = plan.choice.micro_batch
        micro_batches = min(2, plan.choice.accumulation_steps)
        predicted = predict(fake, size, "split24", micro_batches, plan.master_weights).memory.total
    print(f"predicted {predicted / plan.choice.memory_bytes - 1:+.1%} of the measured peak on {plan.machine['device']}")
    assert predicted == pytest.approx(plan.choice.memory_bytes, rel=0.25)


def test_an_optimizer_with_a_scheduler_is_planned_for() -> None:
    """The scheduler has put a function of its own in the place of step()."""

    def setup() -> Setup:
        made = mlp()
        torch.optim.lr_scheduler.ConstantLR(made.optimizer)
        return made

    assert accumkern.plan(setup, effective_batch=4, noise_windows=0, memory="1GB").choice.effective_batch == 4
