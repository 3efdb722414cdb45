"""What the exchange between ranks takes: bytes against torch's own collectives, times by hand, and what a plan says."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from planned import (  # noqa: F401
    Clock,
    clock_of_the_test,
    mlp,
    old_objects_aside,
    short_timings,
)
from ranks import Ranks, device
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import accumkern
from accumkern.__main__ import main
from accumkern.planning import speed as speed_module
from accumkern.planning.link import (
    FSDP_ONCE,
    Exchange,
    Link,
    Payload,
    Way,
    exchange_of,
    exchange_of_model,
    exchange_rows,
    fewest,
    link_reasons,
    payload_of,
    ways_of,
)
from accumkern.planning.plan_result import Plan
from accumkern.planning.speed import Speed, Split

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside", "short_timings")

BF16 = torch.bfloat16
MILLION = Payload(gradients=2 * 10**6, precise=3 * 10**6, fp32=4 * 10**6, weights=2 * 10**6, layer=0.25)
DDP_EACH, DDP_ONCE, DDP_PRECISE = "DDP in each micro-batch", "DDP once (no_sync)", "DDP once with reduce_in_fp32"
FSDP_EACH = "FSDP2 in each micro-batch"


# ---- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "name", "each", "once"),
    [
        (2, DDP_EACH, 2e6, 0),
        (2, DDP_ONCE, 0, 2e6),
        (2, DDP_PRECISE, 0, 3e6),
        (4, DDP_ONCE, 0, 3e6),
        (4, DDP_PRECISE, 0, 4.5e6),
        (2, FSDP_EACH, 3e6, 0),
        (2, FSDP_ONCE, 2e6, 2e6),
        (4, FSDP_EACH, 4.5e6, 0),
        (4, FSDP_ONCE, 3e6, 3e6),
    ],
)
def test_bytes_of_a_million_bfloat16_weights(ranks: int, name: str, each: float, once: float) -> None:
    way = next(way for way in ways_of(MILLION, ranks) if way.name == name)
    assert (way.each, way.once) == (each, once)


def test_what_cannot_be_hidden_is_a_bucket_or_a_layer() -> None:
    ways = {way.name: way for way in ways_of(MILLION, 2)}
    assert ways[DDP_ONCE].once_open == ways[DDP_ONCE].once  # all of it fits into a bucket
    assert ways[FSDP_EACH].each_open == (1e6 + 1e6) / 4  # a layer's gathering and scattering
    assert (ways[FSDP_ONCE].each_open, ways[FSDP_ONCE].once_open) == (1e6 / 4, 2e6 / 4)
    large = Payload(gradients=250 * 2**20, precise=375 * 2**20, fp32=500 * 2**20, weights=250 * 2**20, layer=1.0)
    ways = {way.name: way for way in ways_of(large, 2)}
    assert ways[DDP_EACH].each_open == 25 * 2**20
    assert ways[DDP_PRECISE].once_open == pytest.approx(1.5 * 25 * 2**20)


def test_a_payload_counts_what_is_exchanged() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 30, bias=False)).to(BF16)
    model[0].requires_grad_(False)
    assert payload_of(model, "split24") == Payload(600, 900, 1200, 800, 0.75)
    assert payload_of(model, "split32").precise == payload_of(model, "fp32").precise == 1200
    model.float()
    assert payload_of(model, None) == Payload(1200, None, 1200, 1600, 0.75)
    assert DDP_PRECISE not in [way.name for way in ways_of(payload_of(model, None), 2)]
    assert payload_of(nn.Linear(3, 3), None).layer == 1
    mixed = nn.ModuleList([nn.Linear(8, 1, bias=False).to(BF16), nn.Linear(8, 1, bias=False).half()])
    assert payload_of(mixed, "fp32").precise == 64
    assert payload_of(mixed, "split24").precise == 24 + 32


class Sent(TorchDispatchMode):
    """Counts the bytes that the collectives of a block send from a rank, by the usual algorithms."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        part = (dist.get_world_size() - 1) / dist.get_world_size()
        name = func._schema.name
        if name == "c10d::allreduce_":
            self.bytes += 2 * part * sum(tensor.nbytes for tensor in args[0])
        elif name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            self.bytes += part * max(args[0].nbytes, args[1].nbytes)
        elif name.startswith("c10d::"):
            raise AssertionError(f"{name} is not counted")
        return func(*args, **(kwargs or {}))


class Layers(nn.Module):
    """Layers whose rows the ranks can share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def bytes_sent(way: str, micro_batches: int) -> tuple[float, float]:
    """Return the bytes that torch's collectives send in a window, and those of the arithmetic."""
    model: Any = Layers().to(device(), BF16)
    payload = payload_of(model, None)
    once = way in (DDP_ONCE, FSDP_ONCE)
    if way.startswith("DDP"):
        model = DistributedDataParallel(model)
    else:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if once else None)
        for layer in model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)

    def run(is_last: bool) -> None:
        if once and not way.startswith("DDP"):
            model.set_requires_gradient_sync(is_last)
        with model.no_sync() if way.startswith("DDP") and once and not is_last else nullcontext():
            model(torch.ones(2, 16, device=device(), dtype=BF16)).float().sum().backward()

    for _ in range(2):  # in which DistributedDataParallel settles its buckets
        run(True)
    sent = Sent()
    with sent:
        for number in range(micro_batches):
            run(number == micro_batches - 1)
    window = exchange_of(payload, Link(1.0), Split(dist.get_world_size(), 1, micro_batches)).windows
    return sent.bytes, next(w.sent_bytes for w in window if (w.way, w.micro_batches) == (way, micro_batches))


@pytest.mark.parametrize("way", [DDP_EACH, DDP_ONCE, FSDP_EACH, FSDP_ONCE])
def test_bytes_are_those_that_torch_sends(ranks: Ranks, way: str) -> None:
    for found, told in ranks.run(bytes_sent, way, 3, at_least=2):
        assert told == found > 0


def bytes_sent_with_gathered_weights() -> tuple[float, float]:
    """Return the bytes that a window of three micro-batches sends by the way that the advice names, and by hand."""
    model: Any = Layers().to(device(), BF16)
    weights = payload_of(model, None).weights
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in [*model.layers, model]:
        fully_shard(module, mp_policy=policy, reshard_after_forward=False)
    sent = Sent()
    with sent:
        for is_last in (False, False, True):
            model.set_requires_gradient_sync(is_last)
            model.set_reshard_after_backward(is_last)
            model(torch.ones(2, 16, device=device(), dtype=BF16)).float().sum().backward()
    part = (dist.get_world_size() - 1) / dist.get_world_size()
    return sent.bytes, part * (weights + 2 * weights)  # gathered in bfloat16, reduced in FP32


def test_weights_that_stay_gathered_are_gathered_once(ranks: Ranks) -> None:
    for found, told in ranks.run(bytes_sent_with_gathered_weights, at_least=2):
        assert told == found > 0


# ---- times -------------------------------------------------------------------------------------------------------


def window_of(exchange: Exchange, way: str, micro_batches: int) -> Any:
    return next(w for w in exchange.windows if (w.way, w.micro_batches) == (way, micro_batches))


def test_times_and_shares_by_hand() -> None:
    # Each micro-batch takes 4 ms and a step 2 ms; 2 MB at 1 GB/s take 2 ms.
    exchange = exchange_of(MILLION, Link(1.0), Split(2, 8, 2), Speed(8, 0.004, 0.002))
    assert sorted({window.micro_batches for window in exchange.windows}) == [1, 2, 4, 16]
    window = window_of(exchange, DDP_EACH, 4)
    assert (window.sent_bytes, window.low_ms, window.high_ms) == (8_000_000, 8.0, 8.0)  # one bucket, all of it open
    assert window.high_share == pytest.approx(8 / 18)
    window = window_of(exchange, DDP_ONCE, 16)
    assert (window.sent_bytes, window.high_ms) == (2_000_000, 2.0)
    assert window.high_share == pytest.approx(2 / 66)
    window = window_of(exchange, FSDP_EACH, 4)  # 3 MB, of which 0.5 MB cannot be hidden
    assert (window.low_ms, window.high_ms) == (pytest.approx(2.0), pytest.approx(12.0))
    window = window_of(exchange, FSDP_ONCE, 2)  # 2 MB, and 2 MB once
    assert (window.low_ms, window.high_ms) == (pytest.approx(0.25 + 0.75), pytest.approx(6.0))


def test_no_more_is_hidden_than_a_micro_batch_takes() -> None:
    exchange = exchange_of(MILLION, Link(1.0), Split(2, 8, 4), Speed(8, 0.001, 0.002))
    window = window_of(exchange, FSDP_EACH, 4)  # 3 ms each, beside 1 ms
    assert window.low_ms == pytest.approx(8.0)
    assert window.low_share == pytest.approx(8 / 6)
    window = window_of(exchange, FSDP_ONCE, 4)  # 2 ms each, and 2 ms once, in the last micro-batch
    assert window.low_ms == pytest.approx(3 * 1.0 + 3.0)


@pytest.mark.parametrize(
    ("each", "once", "seconds", "step", "expected"),
    [
        (0, 4e6, 0.004, 0.0, 10),  # 4 ms <= 10% of k * 4 ms
        (0, 4e6, 0.004, 0.01, 8),  # 4 <= 0.4 k + 1: 7.5
        (0, 0.4e6, 0.004, 0.0, 1),
        (0.4e6, 0, 0.004, 0.0, 1),  # just enough with any number
        (0.41e6, 0, 0.004, 0.0, None),
        (0.41e6, 0, 0.004, 0.001, 1),  # the step makes up for it in a short window alone
        (0.2e6, 1e6, 0.004, 0.0, 5),  # 0.2 k + 1 <= 0.4 k
        (0.4e6, 1e6, 0.004, 0.0, None),
    ],
)
def test_the_fewest_micro_batches(each: float, once: float, seconds: float, step: float, expected: int | None) -> None:
    way, speed, link = Way("way", each, once, 0, 0), Speed(1, seconds, step), Link(1.0)
    found = fewest(way, link, speed)
    assert found == expected
    if found is not None:

        def share(count: int) -> float:
            return link.seconds(count * each + once) / speed.window_seconds(count)

        assert share(found) <= 0.1 + 1e-9
        assert found == 1 or share(found - 1) > 0.1


def test_words_and_rows() -> None:
    link = Link(1.5, 1.0, 25 * 2**20)
    exchange = exchange_of(MILLION, link, Split(4, 8, 2), Speed(8, 0.004, 0.0))
    speed, advice, about_fsdp = link_reasons(exchange)
    assert "1.5 GB/s for each rank and direction, the bus bandwidth of an all-reduce of 26.2 MB on 4 ranks" in speed
    assert "(of the algorithm 1 GB/s)" in speed
    assert f"{DDP_ONCE}: 5 (an effective batch of 160)" in advice  # 2 ms of 0.4 ms each
    assert f"{DDP_PRECISE}: 8 (an effective batch of 256)" in advice  # 3 ms
    assert f"no number is enough for {DDP_EACH} and {FSDP_EACH} and {FSDP_ONCE}." in advice
    assert "gathers the weights twice in each micro-batch" in about_fsdp
    fast = exchange_of(MILLION, Link(100.0), Split(4, 8, 2), Speed(8, 0.004, 0.0))
    assert len(list(link_reasons(fast))) == 2
    assert set(fast.enough.values()) == {1}
    rows = exchange_rows({"windows": [vars(window) for window in exchange.windows]})
    assert [row["way"] for row in rows[:5]] == [DDP_EACH, "", "", "", DDP_ONCE]
    assert list(rows[6].values()) == ["", "4", "3 MB", "2", "12%"]
    unknown = exchange_of(MILLION, link, Split(4, 8, 2))
    assert unknown.enough == {}
    assert {row["of the compute time"] for row in exchange_rows({"windows": [vars(w) for w in unknown.windows]})} == {
        "not measured"
    }
    assert "is known where a plan runs on the device" in list(link_reasons(unknown))[1]


# ---- plans -------------------------------------------------------------------------------------------------------


def test_one_process_plans_for_many_ranks(clock: Clock) -> None:
    plan = accumkern.plan(
        lambda: clock.pass_with(mlp()),
        effective_batch=256,
        largest_micro_batch=16,
        noise_windows=0,
        ranks=4,
        bandwidth_gb_per_s=0.001,
    )
    assert (plan.choice.ranks, plan.choice.micro_batch, plan.choice.accumulation_steps) == (4, 16, 4)
    assert plan.basis.startswith("measured on: CPU")
    assert plan.basis.endswith("on one rank for 4")
    assert "Of it 2.7 kB are for DDP's buckets." in str(plan)
    exchange = plan.exchange
    assert exchange is not None
    assert (exchange.ranks, exchange.micro_batch, exchange.link) == (4, 16, Link(0.001))
    window = window_of(exchange, DDP_ONCE, 4)
    bytes_ = 2 * 3 / 4 * plan.gradient_bytes
    assert window.sent_bytes == round(bytes_)
    assert window.high_share == pytest.approx(bytes_ / 1e6 / (4 * 0.021 + 0.005))
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["exchange"]["windows"][0]["sent_bytes"] == exchange.windows[0].sent_bytes
    assert data["exchange"]["enough"] == exchange.enough
    assert "Exchange and accumulation: the fewest micro-batches of 16 per window" in str(plan)


def test_without_a_bandwidth_a_plan_says_how_to_get_it(clock: Clock) -> None:
    asked: Any = {"effective_batch": 16, "largest_micro_batch": 4, "noise_windows": 0}
    plan = accumkern.plan(lambda: clock.pass_with(mlp()), **asked)
    assert plan.exchange is None
    assert "Exchange between ranks: not known. --ranks N --bandwidth GB/s, or this command on the ranks" in str(plan)
    plan = accumkern.plan(lambda: clock.pass_with(mlp()), **asked, ranks=2)
    assert plan.exchange is None
    assert "Exchange between ranks: not known. --bandwidth GB/s, or this command" in str(plan)


def test_a_prediction_has_times_and_no_shares() -> None:
    plan = accumkern.plan(mlp, measure=False, memory="1GB", effective_batch=64, ranks=16, bandwidth_gb_per_s=25)
    assert (plan.choice.ranks, plan.choice.effective_batch) == (16, 64)
    assert [choice.ranks for choice in plan.by_ranks] == [1, 2, 4, 8, 16]
    assert plan.exchange is not None
    assert plan.exchange.enough == {}
    assert plan.exchange.windows[0].high_share is None
    assert plan.exchange.windows[0].high_ms == pytest.approx(2 * 15 / 16 * plan.gradient_bytes / 25e6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ranks": 0}, ValueError, "ranks is 0; it must be an int of at least 1"),
        ({"ranks": 2.0}, TypeError, "ranks is a float; it must be an int of at least 1"),
        ({"ranks": 10**9}, ValueError, "ranks is 1000000000; it must be an int of at least 1, and of at most 1048576"),
        ({"ranks": 2, "bandwidth_gb_per_s": 0}, ValueError, "bandwidth_gb_per_s is 0; it must be a positive number"),
        ({"ranks": 2, "bandwidth_gb_per_s": math.inf}, ValueError, "bandwidth_gb_per_s is inf; it must be a positive"),
        ({"ranks": 2, "bandwidth_gb_per_s": "25GB"}, TypeError, "bandwidth_gb_per_s is a str; it must be a positive"),
        (
            {"bandwidth_gb_per_s": 25},
            ValueError,
            "is 25, and the plan is for one rank, which exchanges nothing; say for",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        accumkern.plan(mlp, **arguments)


SCRIPT = "from planned import mlp as setup\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


PLAN = ["--effective-batch", "64", "--largest-micro-batch", "8", "--noise-windows", "0"]


def test_the_command_prints_the_table_and_writes_it(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out"
    command = ["plan", f"{script}:setup", *PLAN, "--ranks", "2", "--bandwidth", "0.5", "--output", str(folder)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "what 2 ranks exchange in a window of micro-batches of" in out
    for part in (DDP_EACH, DDP_ONCE, DDP_PRECISE, FSDP_EACH, FSDP_ONCE, "sent by a rank", "Link between ranks: 0.5"):
        assert part in " ".join(out.split()), part
    page = (folder / "report.html").read_text()
    assert f"<td>{DDP_ONCE}</td>" in page
    assert json.loads((folder / "plan.json").read_text())["exchange"]["link"]["gb_per_s"] == 0.5


def test_wrong_options_are_named(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--bandwidth", "fast"], "argument --bandwidth: 'fast' is not a finite number"),
        (["--bandwidth", "0"], "argument --bandwidth: 0 is not a positive number"),
        (["--ranks", "0"], "argument --ranks: '0' is not a whole number of at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(["plan", f"{script}:setup", *options])
        assert message in capsys.readouterr().err
    assert main(["plan", f"{script}:setup", "--bandwidth", "25"]) == 2
    assert "say for how many ranks: ranks=8, or --ranks 8" in " ".join(capsys.readouterr().err.split())


# ---- on several ranks --------------------------------------------------------------------------------------------


def plan_on_ranks(**arguments: Any) -> Plan | str:
    """Plan in little time."""
    speed_module.LEAST_SECONDS = 0.01
    try:
        return accumkern.plan(mlp, **({"effective_batch": 16, "noise_windows": 0, "memory": "1GB"} | arguments))
    except ValueError as error:
        return str(error)


def test_several_ranks_measure_their_link(ranks: Ranks) -> None:
    if ranks.backend == "nccl":
        pytest.skip("the setup is on the CPU")
    one, other = ranks.run(plan_on_ranks)
    assert one == other
    link = one.exchange.link
    assert link.gb_per_s == pytest.approx(link.algorithm_gb_per_s)  # 2 (n - 1) / n is 1
    assert link.measured_bytes == one.gradient_bytes
    assert one.measured_ranks == 2
    assert one.basis.endswith("on 2 ranks")
    assert "the bus bandwidth of an all-reduce of" in str(one)
    assert set(one.exchange.enough) == {way.name for way in ways_of(MILLION, 2)}


def link_of_three() -> Any:
    return plan_on_ranks(effective_batch=12).exchange.link  # type: ignore[union-attr]


def test_bus_bandwidth_is_what_each_rank_sends(ranks: Ranks) -> None:
    if ranks.backend == "nccl":
        pytest.skip("the setup is on the CPU")
    for link in ranks.run(link_of_three, ranks=3):
        assert link.gb_per_s == pytest.approx(link.algorithm_gb_per_s * 4 / 3)


def given_and_wrong() -> tuple[Any, ...]:
    return plan_on_ranks(bandwidth_gb_per_s=2, ranks=2), plan_on_ranks(ranks=4)


def test_a_bandwidth_that_is_given_is_not_measured(ranks: Ranks) -> None:
    if ranks.backend == "nccl":
        pytest.skip("the setup is on the CPU")
    for given, wrong in ranks.run(given_and_wrong):
        assert given.exchange.link == Link(2)
        assert wrong == "ranks is 4, and 2 ranks make this plan; leave it out, or plan for 4 in one process"


def exchange_of_shards() -> list[Any]:
    model, split = Layers().to(device(), BF16), Split(dist.get_world_size(), 8, 2)
    speeds = [Speed(4, 1.0, 1.0), Speed(8, 0.004, 0.002)]
    link = Link(1.0)
    plain = exchange_of_model(model, "split24", link, split, speeds)
    sharded = exchange_of_model(fully_shard(model), "split24", link, split, speeds)
    return [plain, sharded, exchange_of_model(model, "split24", link, Split(1, 8, 2), speeds)]


def test_times_that_have_collectives_in_them_are_not_compared(ranks: Ranks) -> None:
    for plain, sharded, alone in ranks.run(exchange_of_shards, at_least=2):
        assert set(plain.enough) == {way.name for way in ways_of(MILLION, 2)}
        assert sharded.enough == {}
        assert [w.sent_bytes for w in sharded.windows] == [w.sent_bytes for w in plain.windows]  # whole parameters
        assert alone is None
