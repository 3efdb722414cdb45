"""Runs that stop in the middle of a window on some ranks, and go on from their checkpoint on another number of ranks.

Every sum of gradients is exact in these runs, so that the order of additions does not show: what is compared are the
bits of a run on the new number of ranks that nobody has stopped, over the same micro-batches.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device, full
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import accumkern

pytestmark = pytest.mark.integration("torch.distributed.checkpoint on another number of ranks")

WINDOW = 16  # micro-batches of all ranks together
STOPPED_AT, LAST = WINDOW + 8, 2 * WINDOW
SCALES = 1, 512, 8, 64  # of four micro-batches each: bfloat16 does not hold the sums


class Layers(nn.Module):
    """Layers side by side, whose gradients are whole numbers and do not depend on weights."""

    def __init__(self) -> None:
        super().__init__()
        # 7 rows on 4 ranks are 2, 2, 2 and 1; 3 rows leave a rank without any.
        self.layers = nn.ModuleList([nn.Linear(5, 7), nn.Linear(5, 3), nn.Linear(5, 8)])

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([layer(inputs) for layer in self.layers], dim=1)


class Run:
    """A run on any number of ranks: the global micro-batch of number n is that of rank ``n % ranks``.

    Args:
        kind: ``"DDP"``, ``"fully_shard"`` or ``"hybrid"``, with replicas.
        divides: whether ``finish`` takes the mean of a window, and not the folds.
        options: of ``attach``.
    """

    def __init__(self, kind: str, divides: bool = False, **options: Any) -> None:
        torch.manual_seed(1)
        self.model: nn.Module = Layers().to(device())
        self.has_masters = "master_weights" in options
        if self.has_masters:
            self.model = accumkern.to_bfloat16(self.model)
        self.model = self.model.to(torch.bfloat16)
        self.ranks = dist.get_world_size()
        if kind == "DDP":
            self.model = DistributedDataParallel(self.model)
        else:
            shape = (2, self.ranks // 2) if kind == "hybrid" else (self.ranks,)
            mesh = init_device_mesh(device().type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
            for layer in self.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.divides = divides
        self.ranks_of_window = self.ranks  # that the mean over ranks is of
        average_over = None if divides else WINDOW // self.ranks
        self.acc = accumkern.attach(self.optimizer, average_over=average_over, **options)
        if kind == "DDP":
            self.acc.reduce_in_fp32(self.model)

    def train(self, first: int, last: int) -> None:
        for n in range(first + dist.get_rank(), last, self.ranks):
            ends = n % WINDOW + self.ranks >= WINDOW
            leaves = isinstance(self.model, DistributedDataParallel) and not ends
            with self.model.no_sync() if leaves else nullcontext():
                outputs = self.model(micro_batch(n))
                outputs.backward(torch.full_like(outputs, SCALES[n // 4 % 4]))
            if ends and self.divides:
                self.acc.finish(divide_by=WINDOW / self.ranks_of_window)
                self.ranks_of_window, self.acc.scale = self.ranks, 1.0
            if ends:
                found: list[Any] = [self.acc.gradient(p) for p in self.model.parameters()]
                self.gradients = [full(gradient) for gradient in found]
                self.optimizer.step()
                self.optimizer.zero_grad()

    def state(self, accumulator: dict[str, Any]) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "accumulator": accumulator}

    def save(self, folder: Path) -> None:
        self.acc.mean_over_ranks(self.model)
        checkpoint.save(self.state(self.acc.state_dict()), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        state = self.state(self.acc.empty_state_dict())
        checkpoint.load(state, checkpoint_id=folder)
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.acc.load_state_dict(state["accumulator"])

    def result(self) -> list[Tensor]:
        """Return weights, or their masters, states of the optimizer, and the last gradients in FP32."""
        params = list(self.model.parameters())
        weights = [full(self.acc.master_weight(p) if self.has_masters else p.detach()) for p in params]
        states = [full(self.optimizer.state[p][key]) for p in params for key in ("exp_avg", "exp_avg_sq")]
        return [*weights, *states, *self.gradients]


def micro_batch(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(-3, 4, (4, 5), generator=generator).to(device(), torch.bfloat16)


def uninterrupted(kind: str, options: dict[str, Any]) -> list[Tensor]:
    run = Run(kind, **options)
    run.train(0, LAST)
    return run.result()


def until_it_stops(kind: str, options: dict[str, Any], folder: Path) -> None:
    run = Run(kind, **options)
    run.train(0, STOPPED_AT)
    run.save(folder)


def from_there(kind: str, options: dict[str, Any], folder: Path, old: int) -> list[Tensor]:
    run = Run(kind, **options)
    run.load(folder)
    if run.divides:  # this window stays a mean over the old ranks
        run.ranks_of_window, run.acc.scale = old, run.ranks / old
    run.train(STOPPED_AT, LAST)
    return run.result()


CHANGES = [(4, 2), (2, 4), (2, 1), (1, 2)]
CASES = [
    *(("DDP", "DDP", old, new) for old, new in CHANGES),
    *(("fully_shard", "fully_shard", old, new) for old, new in CHANGES),
    ("hybrid", "fully_shard", 4, 2),
    ("fully_shard", "hybrid", 2, 4),
    ("DDP", "fully_shard", 2, 4),
    ("fully_shard", "DDP", 4, 2),
]


@pytest.mark.parametrize("options", [{}, {"buffer": "split32", "master_weights": "split32"}], ids=["sums", "masters"])
@pytest.mark.parametrize(("saved_by", "loaded_by", "old", "new"), CASES)
def test_a_window_goes_on_on_another_number_of_ranks(
    ranks: Ranks, tmp_path: Path, saved_by: str, loaded_by: str, old: int, new: int, options: dict[str, Any]
) -> None:
    expected = ranks.run(uninterrupted, loaded_by, options, ranks=new, at_least=new)
    ranks.run(until_it_stops, saved_by, options, tmp_path, ranks=old, at_least=old)
    for found in ranks.run(from_there, loaded_by, options, tmp_path, old, ranks=new, at_least=new):
        assert all(map(torch.equal, found, expected[0]))


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4)])
@pytest.mark.parametrize("kind", ["DDP", "fully_shard"])
def test_a_window_that_is_divided_at_its_end_stays_a_mean_over_the_old_ranks(
    ranks: Ranks, tmp_path: Path, kind: str, old: int, new: int
) -> None:
    test_a_window_goes_on_on_another_number_of_ranks(
        ranks, tmp_path, kind, kind, old, new, {"divides": True, "buffer": "split32", "master_weights": "split32"}
    )


# ---- the mean over ranks of what has been accumulated so far -------------------------------------------------------


def random_batch(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * n + dist.get_rank())
    return torch.randn(4, 5, generator=generator).to(device(), torch.bfloat16)


def means(in_fp32: bool) -> float:
    """Return the error of a mean that is taken at once, and go on to the same mean as without."""
    taken, other = (DistributedDataParallel(Layers().to(device(), torch.bfloat16)) for _ in range(2))
    other.load_state_dict(taken.state_dict())
    accs = []
    for model in (taken, other):
        acc = accumkern.attach(torch.optim.SGD(model.parameters()), "split32")
        if in_fp32:
            acc.reduce_in_fp32(model)
        accs.append(acc)
        with model.no_sync():
            for n in range(3):
                model(random_batch(n)).float().square().sum().backward()
    sums: list[Any] = [accs[1].gradient(p) for p in other.parameters()]
    truth = [gradient.double() for gradient in sums]
    for total in truth:
        dist.all_reduce(total)
    accs[0].mean_over_ranks(taken)
    found: list[Any] = [accs[0].gradient(p) for p in taken.parameters()]
    error = relative_error(found, [total / dist.get_world_size() for total in truth])
    for gradient in found:
        least, most = gradient.clone(), gradient.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        assert torch.equal(least, most)  # all ranks go on from the same
    for model in (taken, other):
        model(random_batch(3)).float().square().sum().backward()
    ends: list[Any] = [
        [acc.gradient(p) for p in model.parameters()] for acc, model in zip(accs, (taken, other), strict=True)
    ]
    assert relative_error(*ends) < (1e-6 if in_fp32 else 1e-2)
    return error


def relative_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    a, b = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (found, wanted))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("in_fp32", [True, False], ids=["FP32", "bfloat16"])
def test_the_mean_is_that_of_the_sums_with_their_residuals(ranks: Ranks, in_fp32: bool) -> None:
    for error in ranks.run(means, in_fp32, ranks=3, at_least=2):
        assert error < (1e-6 if in_fp32 else 1e-2)
        assert in_fp32 or error > 1e-4


def goes_on_after_saving(folder: Path) -> list[Tensor]:
    """Save after the mean, and go on; the data are not exact."""
    run = Run("DDP")
    train_random(run, 0, 6)
    run.save(folder)
    train_random(run, 6, 9)
    return run.result()


def goes_on_after_loading(folder: Path) -> list[Tensor]:
    run = Run("DDP")
    run.load(folder)
    train_random(run, 6, 9)
    return run.result()


def train_random(run: Run, first: int, last: int) -> None:
    for n in range(first, last):
        ends = n % 4 == 3
        with nullcontext() if ends else run.model.no_sync():  # type: ignore[operator]
            run.model(random_batch(n)).float().square().sum().backward()
        run.gradients = [run.acc.gradient(p) for p in run.model.parameters()]  # type: ignore[misc]
        if ends:
            run.optimizer.step()
            run.optimizer.zero_grad()


def test_a_run_that_saved_goes_on_with_the_bits_of_one_that_loads(ranks: Ranks, tmp_path: Path) -> None:
    expected = ranks.run(goes_on_after_saving, tmp_path, ranks=3)
    for a, b in zip(ranks.run(goes_on_after_loading, tmp_path, ranks=3), expected, strict=True):
        assert all(map(torch.equal, a, b))


def refused() -> None:
    run = Run("DDP")
    with (
        run.model.no_sync(),
        pytest.raises(ValueError, match=r"inside of model.no_sync\(\)"),
    ):
        run.acc.mean_over_ranks(run.model)
    with pytest.raises(TypeError, match=r"model is a dict; it must be a torch\.nn\.Module"):
        run.acc.mean_over_ranks({})
    with pytest.raises(ValueError, match="model is None, and there are 2 ranks"):
        run.acc.mean_over_ranks(None)
    run = Run("fully_shard")
    run.model.set_requires_gradient_sync(False)
    run.model(random_batch(0)).sum().backward()
    run.model.set_requires_gradient_sync(True)
    with pytest.raises(ValueError, match="fully_shard keeps gradients of earlier passes that were not reduced"):
        run.acc.mean_over_ranks(run.model)


def test_what_has_no_mean_yet_is_an_error(ranks: Ranks) -> None:
    ranks.run(refused, at_least=2)


def measured() -> int:
    model = DistributedDataParallel(Layers().to(device(), torch.bfloat16))
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), "split32", stats=True, report=True)
    acc.reduce_in_fp32(model)
    for n in range(5):
        if n == 2:
            acc.mean_over_ranks(model)
        with model.no_sync():
            model(random_batch(n)).float().square().sum().backward()
    with pytest.raises(RuntimeError, match=r"\.grad was changed in the middle of the window"):
        acc.noise_scale()
    report = acc.report()
    assert report.error < 1e-6
    return report.parameters[0].micro_batches


def test_what_is_measured_begins_again_with_the_mean(ranks: Ranks) -> None:
    assert set(ranks.run(measured, at_least=2)) == {3}


# ---- torchrun ------------------------------------------------------------------------------------------------------


def main(kind: str, folder: Path) -> None:
    """What torchrun starts: go on from the last checkpoint, save every eight micro-batches; of four ranks one dies."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run = Run(kind)
    begins = max((int(found.parent.name) for found in folder.glob("*/.metadata")), default=0)
    if begins:
        run.load(folder / str(begins))
    for n in range(begins, LAST, 4):
        if n % 8 == 0 and n > begins:
            run.save(folder / str(n))
        run.train(n, n + 4)
        if (n, run.ranks, dist.get_rank()) == (STOPPED_AT, 4, 2):
            os.kill(os.getpid(), signal.SIGKILL)
    result = run.result()
    if dist.get_rank() == 0:
        torch.save((begins, result), folder / "result.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Without Python's end: gloo's threads outlive the group under fully_shard, and abort the process if they let go of
    # a tensor while Python ends (https://github.com/pytorch/pytorch/issues/190489).
    os._exit(0)


def torchrun(ranks: int, kind: str, folder: Path) -> tuple[int, str]:
    """Return its exit code and what it wrote to stderr."""
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    how = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__, kind, str(folder)]
    with subprocess.Popen([sys.executable, *how], env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, told = process.communicate(timeout=240)
        finally:
            process.terminate()  # it ends its ranks then
    return process.returncode, told


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DDP", "fully_shard"])
def test_two_ranks_go_on_where_one_of_four_was_killed(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    if ranks.backend == "nccl":
        pytest.skip("torchrun starts it over gloo here")
    code, told = torchrun(4, kind, tmp_path)
    assert code
    assert "Signal 9 (SIGKILL)" in told, told
    code, told = torchrun(2, kind, tmp_path)
    assert code == 0, told
    begins, found = torch.load(tmp_path / "result.pt")
    assert begins == STOPPED_AT
    assert all(map(torch.equal, found, ranks.run(uninterrupted, kind, {}, ranks=2)[0]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
