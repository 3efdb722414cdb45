"""The simulated mean over ranks: its arithmetic against loops over single numbers, its bytes against counts by hand."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

for needed in ("jsonschema", "matplotlib", "rich"):  # a GPU machine may lack them
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_scale  # noqa: E402
import figures  # noqa: E402
import report  # noqa: E402
import scale_means  # noqa: E402
import scale_wire  # noqa: E402
from scale_means import EXACT, MEANS, STOCK, WAYS, Parts  # noqa: E402
from tables.scale import scale_summary, scale_tables  # noqa: E402

from accumkern.formats import Format, decode, encode  # noqa: E402

CPU = torch.device("cpu")
LINKS = scale_wire.Links(node_us=2.0, node_gb_per_s=100.0, network_us=10.0, network_gb_per_s=10.0)


def parts(ranks: int, numel: int) -> tuple[Parts, Tensor]:
    """Return what the ranks send, and its FP64 mean."""
    generator = torch.Generator().manual_seed(3)
    halves, residuals = encode(Format.SPLIT24, torch.randn(ranks, numel, generator=generator) + 1)
    wide = decode(Format.SPLIT24, halves, residuals)
    return Parts(halves, wide, torch.arange(numel) * ranks // numel), wide.double().mean(0)


def bf16(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).bfloat16())


def fp32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).float())


def split24(x: float) -> float:
    upper, low = encode(Format.SPLIT24, torch.tensor([x], dtype=torch.float32))
    return float(decode(Format.SPLIT24, upper, low))


def chain(numbers: list[float], rounded: object) -> float:
    total = numbers[0]
    for number in numbers[1:]:
        total = rounded(total + number)  # type: ignore[operator]
    return total


@pytest.mark.parametrize(("dtype", "rounded"), [(torch.bfloat16, bf16), (torch.float32, fp32)], ids=["bf16", "fp32"])
def test_a_ring_adds_in_its_order(dtype: torch.dtype, rounded: object) -> None:
    values = torch.randn(3, 12, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = scale_means.ring(values, torch.arange(12) // 4)
    assert found.dtype is dtype
    order = {0: (1, 2, 0), 1: (2, 0, 1), 2: (0, 1, 2)}  # piece -> ranks
    expected = [chain([float(values[rank, i]) for rank in order[i // 4]], rounded) for i in range(12)]
    assert found.tolist() == expected
    other = [chain([float(values[rank, i]) for rank in range(3)], rounded) for i in range(12)]
    assert expected != other  # so the order is seen


def test_a_tree_adds_in_the_order_of_nccl() -> None:
    sent, _ = parts(64, 40)

    def of_node(node: int, i: int) -> float:
        return chain([float(sent.halves[8 * node + gpu, i]) for gpu in reversed(range(8))], bf16)

    # The tree of eight nodes drawn in nccl/src/graph/trees.cc: 0 - 4, 4 - (2, 6), 2 - (1, 3), 6 - (5, 7).
    expected = []
    for i in range(40):
        s = [of_node(node, i) for node in range(8)]
        two, six = chain([s[2], s[1], s[3]], bf16), chain([s[6], s[5], s[7]], bf16)
        expected.append(chain([s[0], chain([s[4], two, six], bf16)], bf16))
    assert scale_means.tree(sent.halves).tolist() == expected
    assert scale_means.tree(sent.halves[:8]).tolist() == [of_node(0, i) for i in range(40)]
    sixteen = [bf16(of_node(0, i) + of_node(1, i)) for i in range(40)]
    assert scale_means.tree(sent.halves[:16]).tolist() == sixteen


def test_exchanges_add_in_fp32_by_rank_and_round_what_travels() -> None:
    sent, _ = parts(24, 60)
    assert sent.wide is not None
    columns = [[float(sent.wide[rank, i]) for rank in range(24)] for i in range(60)]
    halves = [[float(sent.halves[rank, i]) for rank in range(24)] for i in range(60)]
    by_hand = {
        "bf16 all-to-all": [bf16(fp32(chain(c, fp32) / 24)) for c in halves],
        "split24 all-to-all": [split24(fp32(chain(c, fp32) / 24)) for c in columns],
        "split24 two levels": [
            split24(fp32(chain([split24(chain(c[n : n + 8], fp32)) for n in (0, 8, 16)], fp32) / 24)) for c in columns
        ],
    }
    for way, expected in by_hand.items():
        grad, of_step = MEANS[way](sent)
        assert of_step.tolist() == expected, way
        assert grad.dtype is torch.bfloat16
    assert by_hand["split24 all-to-all"] != by_hand["split24 two levels"]
    values = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    found = scale_means.in_rank_order(values).tolist()
    assert found == [chain(values[:, i].tolist(), fp32) for i in range(40)]
    assert found != [chain(values.flip(0)[:, i].tolist(), fp32) for i in range(40)]


@pytest.mark.parametrize("way", MEANS)
def test_every_way_takes_the_mean(way: str) -> None:
    for ranks in (2, 8, 32):
        sent, mean = parts(ranks, 512)
        grad, of_step = MEANS[way](sent)
        exact = not way.startswith("bf16")
        torch.testing.assert_close(grad.double(), mean, rtol=0, atol=5e-2)
        torch.testing.assert_close(of_step.double(), mean, rtol=0, atol=5e-5 if exact else 5e-2)
        assert torch.equal(grad, of_step) == (not exact)


def test_a_bf16_ring_stops_growing_and_an_exchange_does_not() -> None:
    ones = torch.ones(1024, 4)
    sent = Parts(ones.bfloat16(), ones, torch.zeros(4, dtype=torch.int64))
    assert MEANS["bf16 ring"](sent)[0].tolist() == [0.25] * 4  # 256 + 1 is 256
    for way in ("bf16 tree", "bf16 all-to-all", "FP32 ring", "split24 all-to-all", "split24 two levels"):
        assert MEANS[way](sent)[1].tolist() == [1.0] * 4


# ---- what is sent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "messages", "sent", "of_card"),
    [
        # 16 ranks, 2 nodes; a rank sends 15/16 of the gradient in each phase.
        ("bf16 ring", 30, 2 * 2 * 15 / 16, 2 * 2 * 15 / 16 / 8),
        ("FP32 ring", 30, 2 * 4 * 15 / 16, 2 * 4 * 15 / 16 / 8),
        ("bf16 tree", 4 * 15 / 16, 2 * 2 * 15 / 16, 2 * 2 * 1 / 16),  # 15 links, of which one is between the nodes
        ("bf16 all-to-all", 30, 2 * 2 * 15 / 16, 2 * 2 * 8 / 16),
        ("split24 all-to-all", 30, 2 * 3 * 15 / 16, 2 * 3 * 8 / 16),
        ("split24 two levels", 2 * (7 + 1), 2 * 3 * (7 / 8 + 1 / 16), 2 * 3 / 16),
    ],
)
def test_bytes_and_messages_by_hand(way: str, messages: float, sent: float, of_card: float) -> None:
    found = scale_wire.wire(way, 16, LINKS, [1])
    assert found["messages"] == pytest.approx(messages)
    assert found["bytes_per_element"] == pytest.approx(sent)
    assert found["card_bytes_per_element"] == pytest.approx(of_card)
    assert found["node_bytes_per_element"] == pytest.approx(8 * of_card)
    inside = scale_wire.wire(way, 8, LINKS, [1])
    assert inside["card_bytes_per_element"] == 0
    assert inside["bytes_per_element"] == pytest.approx(2 * scale_wire.BYTES[way.split()[0]] * 7 / 8)


def test_what_crosses_the_border_of_a_node() -> None:
    def out(way: str) -> float:
        return float(sum(phase.network_bytes for phase in scale_wire.phases(way, 4096)))

    assert out("bf16 all-to-all") / out("bf16 ring") == pytest.approx(8, rel=2e-3)
    assert out("split24 all-to-all") / out("split24 two levels") == pytest.approx(8, rel=2e-3)


def test_the_time_by_hand() -> None:
    found = scale_wire.wire("split24 two levels", 16, LINKS, [10**6])
    assert found["latency_ms"] == pytest.approx(2 * (7 * 2 + 10) / 1e3)
    in_node, between = 3 * 7 / 8 / 100, 3 / 16 / 10  # ns for an element: bytes over GB/s
    times = found["modelled_ms"]
    assert isinstance(times, dict)
    assert times["1000000"] == pytest.approx(found["latency_ms"] + 2 * (in_node + between))
    ring = scale_wire.wire("FP32 ring", 16, LINKS, [10**6])
    assert ring["latency_ms"] == pytest.approx(2 * 15 * (7 / 8 * 2 + 1 / 8 * 10) / 1e3)
    times = ring["modelled_ms"]
    assert isinstance(times, dict)
    assert scale_wire.wire("bf16 tree", 64, LINKS, [1])["latency_ms"] == pytest.approx(2 * (7 * 2 + 3 * 10) / 1e3)
    slower = 4 * 15 / 16 / 8 / 10  # an eighth goes through the cards, at a tenth of the bandwidth
    assert times["1000000"] == pytest.approx(ring["latency_ms"] + 2 * slower)


# ---- the program -------------------------------------------------------------------------------------------------


def simulated(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    monkeypatch.setattr(bench_scale, "BLOCK", 48)  # which does not divide the gradient
    found = bench_scale.simulate(3.0, [2, 16], 64, CPU, lambda done, total: None)
    return [
        {"way": way, "held": held, "ranks": ranks}
        | {"errors": [{"mean_over_std": 3.0, "error_of_grad": of_grad, "error_of_step": of_step}]}
        | scale_wire.wire(way, ranks, LINKS, [bench_scale.BUCKET])
        for (way, held, ranks), of_grad, of_step in found
    ]


def test_a_simulation_has_every_way_and_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    results = simulated(monkeypatch)
    assert sorted((r["way"], r["held"], r["ranks"]) for r in results) == sorted((*w, n) for w in WAYS for n in (2, 16))
    for result in results:
        report.check(result, "scale", "results")
        (error,) = result["errors"]  # type: ignore[misc, attr-defined]
        bits = 16 if str(result["way"]).startswith(("FP32", "split24")) else 8
        assert 2.0 ** -(bits + 6) < error["error_of_step"] < 2.0 ** -(bits - 2)
        assert 2.0**-11 < error["error_of_grad"] < 2.0**-6
    content = {"method": {"micro_batches": 8}, "results": results}
    full = "\n".join(scale_tables(content))
    assert "| 16 | split24 two levels | 5.62 | 16.0 | 0.38 | 3.00 |" in full
    assert full.count("| split24 two levels | split24 |") == 2
    assert full.count("| bf16 ring | bf16 |") == 1  # it has no residual
    assert "Mean over 16 ranks, simulated" in " ".join(scale_summary(content))
    axes = figures.error_against_ranks("a machine", content).axes
    assert [line.get_label() for line in axes[0].lines] == list(MEANS)


def test_a_gradient_is_simulated_whole_and_its_pieces_are_those_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def watched(sent: Parts) -> scale_means.Mean:
        if len(sent.halves) == 16:
            seen.append(sent.pieces)
        return scale_means.fp32_ring(sent)

    monkeypatch.setitem(MEANS, "FP32 ring", watched)
    simulated(monkeypatch)
    assert torch.cat(seen).tolist() == [i // 4 for i in range(64)]


def test_sums_of_a_rank_are_those_of_its_micro_batches() -> None:
    stock, (halves, wide), truth = bench_scale.accumulate(3.0, 4, 100, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    mean = 3.0 * torch.randn(100, generator=generator)
    draws = [(mean + torch.randn(4, 100, generator=generator)).bfloat16() for _ in range(bench_scale.MICRO_BATCHES)]
    assert torch.equal(truth, torch.stack(draws).double().sum(0))
    assert torch.equal(stock, sum(draws[1:], draws[0]))
    torch.testing.assert_close(wide.double(), truth, rtol=2**-14, atol=2**-12)
    torch.testing.assert_close(halves.float(), wide, rtol=2**-8, atol=0)
    assert not torch.equal(stock, halves)


def test_a_link_without_bandwidth_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "-3", "inf", "nan"):
        with pytest.raises(SystemExit):
            bench_scale.options().parse_args([f"--network-gb-per-s={text}"])
        assert f"{text} is not a positive number" in capsys.readouterr().err
    assert {held for _, held in WAYS} == {STOCK, EXACT}
