"""Setups derived from transformers' Trainer, Lightning's modules, and models with data loaders: what trains there."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planned import old_objects_aside  # noqa: F401
from tiny import LIGHTNING
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import accumkern
from accumkern.planning import speed
from accumkern.planning.derived import setup_of
from accumkern.planning.fakes import fake_setup
from accumkern.planning.frameworks import from_lightning, from_model, from_trainer
from accumkern.planning.predict import predict
from accumkern.planning.protocol import Setup, SetupError, make_batch, run_setup
from accumkern.planning.samples import Samples
from accumkern.torch_private import FakeTensorMode, is_fake

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.usefixtures("one_thread", "old_objects_aside"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|GPU available|TreeSpec)"),
]


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LEAST_SECONDS", 0.01)


def gradients(model: nn.Module) -> list[Tensor]:
    return [param.grad.clone() for param in model.parameters() if param.grad is not None]


def assert_same(setup: Setup, batch: Any, loss: Tensor, grads: list[Tensor]) -> None:
    """The derived loss of a batch and its gradients are, bit for bit, those that were recorded in training."""
    setup.optimizer.zero_grad()
    found = setup.loss(setup.model, batch)
    found.backward()
    assert found.detach().equal(loss)
    derived = gradients(setup.model)
    assert len(derived) == len(grads) > 0
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(derived, grads, strict=True))
    setup.optimizer.zero_grad()


# ---- samples -----------------------------------------------------------------------------------------------------


def numbers(count: int) -> list[Tensor]:
    return [torch.tensor(i) for i in range(count)]


def test_samples_are_drawn_by_seed_and_as_often_as_they_come() -> None:
    draws = [Samples("data", numbers(5), seed).draw(200) for seed in (1, 1, 2)]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])
    assert set(draws[0].tolist()) == set(range(5))
    samples = Samples("data", numbers(5), 1)
    assert samples.draw(2).equal(draws[0][:2])
    assert samples.draw(3).equal(draws[0][2:5])  # goes on


def test_ranks_draw_other_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        draws.append(Samples("data", numbers(1000), 1).draw(50))
    assert not draws[0].equal(draws[1])


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (None, set(range(10))),
        (RandomSampler(numbers(10), num_samples=3), set(range(10))),
        (SubsetRandomSampler([2, 5, 7]), {2, 5, 7}),
        (WeightedRandomSampler([0.0] * 8 + [1.0, 3.0], 4), {8, 9}),
    ],
    ids=["in order", "shuffled", "subset", "weighted"],
)
def test_a_sampler_that_is_more_than_an_order_is_kept(sampler: Any, expected: set[int]) -> None:
    loader = DataLoader(numbers(10), batch_size=3, sampler=sampler)  # type: ignore[arg-type]
    assert set(Samples("data", loader, 0).draw(200).tolist()) == expected


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(10**9))


def test_an_iterable_data_set_is_drawn_from_its_beginning() -> None:
    class Short(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(numbers(3))

    assert set(Samples("data", DataLoader(Short(), batch_size=2), 0).draw(100).tolist()) == {0, 1, 2}


def test_the_longest_sample_is_found_and_repeated() -> None:
    class Padding:
        def __call__(self, samples: list[dict[str, Any]]) -> UserDict[str, Any]:
            longest = max(len(sample["ids"]) for sample in samples)
            for sample in samples:  # writes into what it gets, as those of transformers do
                sample["ids"] = sample["ids"] + [len(sample.pop("text"))] * (longest - len(sample["ids"]))
            return UserDict(ids=torch.tensor([sample["ids"] for sample in samples]))

    data = [{"ids": [1] * (1 + i % 7), "text": "x"} for i in range(2000)]
    data[8 * 4] = {"ids": [1] * 50, "text": "x"}
    before = copy.deepcopy(data)
    samples = Samples("data", DataLoader(data, collate_fn=Padding()), 0)  # type: ignore[arg-type]
    assert samples.longest(3)["ids"].shape == (3, 50)
    assert samples.longest(2)["ids"].shape == (2, 50)
    assert samples.draw(64)["ids"].shape[1] <= 50
    assert data == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the data has no samples"),
        (3, "the data is a int; it must be a DataLoader or a data set"),
        (DataLoader(numbers(3), batch_size=None), "has batch_size=None"),  # type: ignore[arg-type]
    ],
)
def test_what_has_no_samples_is_refused(data: Any, message: str) -> None:
    with pytest.raises(SetupError, match=message):
        Samples("data", data, 0)


def test_an_empty_sampler_is_named() -> None:
    samples = Samples("data", DataLoader(numbers(3), sampler=SubsetRandomSampler([])), 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the sampler, a SubsetRandomSampler, is empty"):
        samples.draw(1)


# ---- models with data loaders ------------------------------------------------------------------------------------


class Output(nn.Module):
    """Returns its loss in some way."""

    def __init__(self, way: Callable[[Tensor], Any] = lambda loss: loss) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(4, 1)
        self.register_buffer("scale", torch.ones(1))
        self.way = way

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.way((self.linear(x * self.scale)[:, 0] - y).square().mean())


def pairs(count: int = 20) -> TensorDataset:
    return TensorDataset(torch.randn(count, 4), torch.randn(count))


def named(samples: list[Any]) -> dict[str, Tensor]:
    x, y = zip(*samples, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


@pytest.mark.parametrize(
    ("way", "collate"),
    [
        (lambda loss: loss, None),
        (lambda loss: SimpleNamespace(loss=loss), named),
        (lambda loss: UserDict(loss=loss, logits=3), lambda samples: UserDict(named(samples))),
    ],
    ids=["scalar, tuple", "attribute, dict", "key, mapping"],
)
def test_a_model_that_returns_its_loss(way: Callable[[Tensor], Any], collate: Any) -> None:
    model = Output(way)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    setup = from_model(model, optimizer, DataLoader(pairs(), collate_fn=collate))
    batch = make_batch(setup, 7)
    expected = Output()(**batch) if collate else Output()(*batch)
    assert setup.loss(model, batch).equal(expected)
    assert make_batch(setup, 5, "longest_batch") is not None
    assert setup.validation_batch is None
    held_out = from_model(model, optimizer, pairs(), validation=pairs(1))
    assert make_batch(held_out, 3, "validation_batch")[0].unique(dim=0).shape == (1, 4)


def test_what_a_model_cannot_be_planned_with_is_named() -> None:
    model = Output()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for arguments, message in [
        ((optimizer, model, pairs()), "the model is a SGD; it must be a torch Module"),
        ((model, model, pairs()), "the optimizer is a Output; it must be a torch Optimizer"),
        ((model, optimizer, 3), "the training data is a int"),
        ((model, optimizer, pairs(), 3), "the loss is a int"),
        ((Output().eval(), optimizer, pairs()), "the model, a Output, is in evaluation mode; call its train()"),
    ]:
        with pytest.raises(SetupError) as raised:
            from_model(*arguments)
        assert message in str(raised.value)
    plain = nn.Linear(4, 2)
    setup = from_model(plain, torch.optim.SGD(plain.parameters(), 0.1), [torch.ones(4)])
    with pytest.raises(TypeError, match=r"Linear returned a tensor of shape \(3, 2\), which is no loss"):
        setup.loss(plain, setup.make_batch(3))


# ---- what is named -----------------------------------------------------------------------------------------------


def plain_tuple() -> tuple[Any, ...]:
    model = Output()
    return model, torch.optim.AdamW(model.parameters(), 0.1), DataLoader(pairs(), shuffle=True)


def test_a_thing_is_copied_each_time_and_handed_out_first_where_asked() -> None:
    thing = plain_tuple()
    thing[0](*next(iter(thing[2]))).backward()
    thing[1].step()  # states are copied too
    setup = setup_of(thing)
    made = [run_setup(setup) for _ in range(2)]
    for of in made:
        assert of.model is not thing[0]
        assert set(of.model.parameters()).isdisjoint(thing[0].parameters())
        assert all(a.equal(b) for a, b in zip(of.model.parameters(), thing[0].parameters(), strict=True))
        assert of.optimizer.param_groups[0]["params"] == list(of.model.parameters())
        assert set(of.optimizer.state) == set(of.model.parameters())
        assert of.optimizer.param_groups[0]["lr"] == 0.1
    assert set(made[0].model.parameters()).isdisjoint(made[1].model.parameters())
    setup = setup_of(thing, in_place=True)
    assert run_setup(setup).model is thing[0]
    assert run_setup(setup).model is not thing[0]


def test_a_function_is_called_each_time_with_the_callers_seed() -> None:
    def function() -> Any:
        thing = plain_tuple()
        torch.manual_seed(42)  # as a Trainer does
        return thing

    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn.append(run_setup(setup_of(function)).make_batch(8)[1])
        assert torch.initial_seed() == seed
    assert not drawn[0].equal(drawn[1])


def test_what_is_a_setup_already_is_left_alone() -> None:
    model = Output()
    made = model, torch.optim.SGD(model.parameters(), 0.1), lambda size: size, lambda model, batch: batch
    assert setup_of(lambda: made)() is made
    assert setup_of(lambda: Setup(*made))() == Setup(*made)


@pytest.mark.parametrize("thing", [3, nn.Linear(2, 2), (1, 2), ()], ids=["number", "model alone", "tuple", "nothing"])
def test_what_cannot_be_planned_for_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"what is to be planned for is a .*; it must be a function that returns model"):
        setup_of(thing)


def test_an_optimizer_that_is_not_copied_whole_is_refused() -> None:
    model, optimizer, loader = plain_tuple()
    optimizer.table = {}
    with pytest.raises(RuntimeError, match=r"a copy of AdamW has no table.*name a function instead"):
        setup_of((model, optimizer, loader))()


def test_nothing_new_is_imported() -> None:
    code = """
        import sys, torch
        from torch.utils.data import DataLoader
        from accumkern.planning.derived import setup_of
        model = torch.nn.Linear(2, 1)
        loss = lambda model, batch: model(batch).square().mean()
        thing = model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(torch.ones(4, 2)), loss
        setup = setup_of(thing)()
        setup.loss(setup.model, setup.make_batch(3)).backward()
        print(sorted({"transformers", "accelerate", "lightning", "pytorch_lightning", "rich"} & set(sys.modules)))
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


# ---- transformers ------------------------------------------------------------------------------------------------

VOCABULARY = 64


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("accelerate")
    return pytest.importorskip("transformers")


@functools.cache
def sequences(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for i in range(count):
        ids = torch.randint(1, VOCABULARY, (4 + i % 5,), generator=generator)
        found.append({"input_ids": ids.tolist(), "labels": ids.tolist(), "not for the model": i})
    return found


def padded(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    length = max(len(sample["input_ids"]) for sample in samples)
    ids = [sample["input_ids"] + [0] * (length - len(sample["input_ids"])) for sample in samples]
    labels = [sample["labels"] + [-100] * (length - len(sample["labels"])) for sample in samples]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def trainer_of(
    transformers: Any, folder: Path, kind: Any = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    others = {name: changes.pop(name) for name in ("compute_loss_func", "callbacks", "optimizers") if name in changes}
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()  # as from_pretrained() returns it
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 3,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "weight_decay": 0.25,
        "learning_rate": 1e-2,
        "warmup_steps": 10,
    }
    return (kind or transformers.Trainer)(
        model,
        transformers.TrainingArguments(**settings | changes),
        data_collator=padded,
        train_dataset=sequences(40),
        eval_dataset=sequences(3),
        **others,
    )


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    loss = nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / num_items_in_batch


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": True},
        {"dtype": torch.bfloat16},
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": summed},
        {"gradient_checkpointing": True, "bf16": True},
    ],
    ids=["fp32", "autocast", "bf16", "label smoothing", "loss function", "activation checkpointing"],
)
def test_loss_and_gradients_are_those_of_the_trainer(
    transformers: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    recorded = {}

    class Recording(transformers.Trainer):  # type: ignore[misc,name-defined]
        def training_step(self, model: Any, inputs: Any, *others: Any, **more: Any) -> Tensor:
            recorded["inputs"] = copy.deepcopy(dict(inputs))
            recorded["loss"] = super().training_step(model, inputs, *others, **more)
            recorded["grads"] = gradients(model)
            recorded["optimizer"] = self.optimizer
            return recorded["loss"]

    trainer_of(transformers, tmp_path, Recording, **changes).train()
    setup = from_trainer(trainer_of(transformers, tmp_path, **changes))
    for _ in range(2):  # labels are not taken out of the batch for good
        assert_same(setup, recorded["inputs"], recorded["loss"], recorded["grads"])
    assert setup.model.training
    assert setup.model.is_gradient_checkpointing == ("gradient_checkpointing" in changes)
    theirs = recorded["optimizer"].optimizer
    assert type(setup.optimizer) is type(theirs)
    assert [group["weight_decay"] for group in setup.optimizer.param_groups] == [0.25, 0.0]
    for ours, their in zip(setup.optimizer.param_groups, theirs.param_groups, strict=True):
        assert ours["lr"] == their["initial_lr"] == 1e-2
        assert [p.shape for p in ours["params"]] == [p.shape for p in their["params"]]


def test_a_compiled_model_is_what_trains(transformers: Any, tmp_path: Path) -> None:
    setup = from_trainer(trainer_of(transformers, tmp_path, torch_compile=True, torch_compile_backend="eager"))
    assert isinstance(setup.model, torch._dynamo.OptimizedModule)
    loss = setup.loss(setup.model, make_batch(setup, 3))
    loss.backward()
    assert len(gradients(setup.model)) == len(list(setup.model.parameters()))


def test_batches_are_those_of_the_trainers_collator(transformers: Any, tmp_path: Path) -> None:
    setup = run_setup(setup_of(lambda: trainer_of(transformers, tmp_path)))
    for size in (1, 7, 100):
        batch = make_batch(setup, size)
        assert set(batch) == {"input_ids", "labels"}
        assert batch["input_ids"].shape[0] == size
    assert make_batch(setup, 4, "longest_batch")["input_ids"].shape == (4, 8)
    rows = make_batch(setup, 50, "validation_batch")["input_ids"].unique(dim=0)
    assert len(rows) == 3


def test_a_trainer_is_stopped_before_anybody_hears_of_it(transformers: Any, tmp_path: Path) -> None:
    heard: list[str] = []

    class Callback(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_train_begin(self, *_arguments: Any, **_more: Any) -> None:
            heard.append("begin")

    trainer = trainer_of(transformers, tmp_path, callbacks=[Callback()])
    callbacks, weights = list(trainer.callback_handler.callbacks), copy.deepcopy(trainer.model.state_dict())
    from_trainer(trainer)
    assert heard == []
    assert trainer.callback_handler.callbacks == callbacks
    assert not trainer.is_in_train
    assert not trainer.accelerator._models  # which would keep every copy
    assert not trainer.accelerator._optimizers
    assert all(value.equal(weights[name]) for name, value in trainer.model.state_dict().items())
    trainer.train()  # can be trained afterwards
    assert heard == ["begin"]


def test_a_trainer_is_copied_with_its_optimizer(transformers: Any, tmp_path: Path) -> None:
    trainer = trainer_of(transformers, tmp_path, bf16=True)
    of_ones_own = trainer_of(transformers, tmp_path, bf16=True)
    of_ones_own.optimizer = torch.optim.SGD(of_ones_own.model.parameters(), 0.5)
    in_place = from_trainer(trainer_of(transformers, tmp_path, bf16=True))
    for thing, kind in ((trainer, torch.optim.AdamW), (of_ones_own, torch.optim.SGD)):
        setup = setup_of(thing)
        first, second = run_setup(setup), run_setup(setup)
        assert thing.model is not first.model
        assert first.model is not second.model
        assert isinstance(first.optimizer, kind)
        batch = make_batch(first, 3)
        assert first.loss(first.model, batch).equal(in_place.loss(in_place.model, batch))  # with autocast
        losses = []
        for made in (first, second):
            made.loss(made.model, batch).backward()
            made.optimizer.step()
            losses.append(made.loss(made.model, batch))
        assert losses[0].equal(losses[1])  # both began with the same weights


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("is_deepspeed_enabled", True, "the Trainer has is_deepspeed_enabled; a plan is of a model that is whole"),
        ("is_fsdp_enabled", True, "the Trainer has is_fsdp_enabled"),
        ("train_dataset", None, "raised ValueError: Trainer: training requires a train_dataset"),
    ],
)
def test_a_trainer_that_cannot_be_planned_for_is_refused(
    transformers: Any, tmp_path: Path, name: str, value: Any, message: str
) -> None:
    trainer = trainer_of(transformers, tmp_path)
    setattr(trainer, name, value)
    with pytest.raises((SetupError, RuntimeError), match=message):
        run_setup(setup_of(trainer, in_place=True))
    trainer = trainer_of(transformers, tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(SetupError, match="would train on 2 GPUs of one process"):
        run_setup(setup_of(trainer, in_place=True))


# ---- Lightning ---------------------------------------------------------------------------------------------------

TRAINER = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
TRAINER |= {"enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def lightning() -> Any:
    return pytest.importorskip("lightning.pytorch" if LIGHTNING == "lightning" else "pytorch_lightning")


def module_of(lightning: Any, **methods: Any) -> Any:
    """A LightningModule with some methods in place of its own."""

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
            self.recorded: dict[str, Any] = {}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            loss = (self.net(x)[:, 0] - y).square().mean()
            self.log("loss", loss, on_step=True)
            self.log_dict({"count": float(len(y))})
            self.recorded |= {"batch": (x.clone(), y.clone()), "loss": loss.detach().clone()}
            return {"loss": loss, "more": batch_idx}

        def on_after_backward(self) -> None:
            self.recorded["grads"] = gradients(self)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return type("Module", (Module,), methods)()


def loader_of(count: int = 20) -> DataLoader[Any]:
    return DataLoader(pairs(count), batch_size=5, shuffle=True)


@pytest.mark.parametrize("precision", [None, "bf16-mixed", "bf16-true"])
def test_loss_and_gradients_are_those_of_lightning(
    lightning: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: Any, precision: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = TRAINER if precision is None else TRAINER | {"precision": precision}
    module, loader = module_of(lightning), loader_of()
    lightning.Trainer(**settings, max_steps=1).fit(module, loader)
    theirs = module.recorded
    recwarn.clear()
    like = None if precision is None else lightning.Trainer(**settings, max_steps=1)
    setup = from_lightning(module_of(lightning), loader, like)
    assert_same(setup, theirs["batch"], theirs["loss"], theirs["grads"])
    batch = make_batch(setup, 7)
    assert [tensor.dtype for tensor in batch] == [tensor.dtype for tensor in theirs["batch"]]
    assert batch[0].shape == (7, 4)
    assert isinstance(setup.optimizer, torch.optim.AdamW)
    assert not [warning for warning in recwarn if "self.log" in str(warning.message)]
    assert not list(tmp_path.iterdir())  # no logs, no checkpoints


def schedule(optimizer: Any, steps: int = 10) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)


FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "a list": lambda module, optimizer: [optimizer],
    "two lists": lambda module, optimizer: ([optimizer], [schedule(optimizer)]),
    "a dict": lambda module, optimizer: {"optimizer": optimizer, "lr_scheduler": schedule(optimizer)},
    "a dict of dicts": lambda module, optimizer: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step", "monitor": "loss"},
    },
    "by the number of steps": lambda module, optimizer: {
        "optimizer": optimizer,
        "lr_scheduler": schedule(optimizer, int(module.trainer.estimated_stepping_batches)),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_configure_optimizers(lightning: Any, form: str) -> None:
    made = []

    def configure(module: Any) -> Any:
        made.append(torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
        return FORMS[form](module, made[-1])

    module = module_of(lightning, configure_optimizers=configure)
    setup = run_setup(setup_of((module, loader_of()), in_place=True))
    assert setup.optimizer is made[0]
    assert setup.optimizer.param_groups[0]["lr"] == 0.1  # not where a schedule begins
    assert setup.model is module
    with fake_setup(setup_of((module, loader_of()))) as fake:
        assert all(is_fake(param) for param in fake.model.parameters())
        assert predict(fake, 4, "split24").memory.parameters == 4 * (4 * 8 + 8 + 8 + 1)


def test_lightning_modules_that_cannot_be_planned_for(lightning: Any) -> None:
    def two(module: Any) -> Any:
        return [torch.optim.SGD(module.parameters(), lr=0.1) for _ in range(2)]

    manual = module_of(lightning)
    manual.automatic_optimization = False
    for module, data, message in [
        (manual, loader_of(), "Module has automatic_optimization = False"),
        (
            module_of(lightning, configure_optimizers=two),
            loader_of(),
            "multiple optimizers is only supported with manual",
        ),
        (module_of(lightning, configure_optimizers=lambda module: None), loader_of(), "must return one optimizer"),
        (module_of(lightning), {"a": loader_of()}, "trains with a dict; it must be one DataLoader"),
        (module_of(lightning), None, "train_dataloader"),
    ]:
        with pytest.raises((SetupError, RuntimeError)) as raised:
            run_setup(setup_of((module, data), in_place=True))
        assert message in str(raised.value)


def test_a_data_module_brings_its_hooks_and_validation(lightning: Any) -> None:
    calls: list[str] = []

    class Data(lightning.LightningDataModule):  # type: ignore[misc,name-defined]
        def prepare_data(self) -> None:
            calls.append("prepare_data")

        def setup(self, stage: str) -> None:
            calls.append(stage)
            self.train, self.held_out = pairs(20), pairs(2)

        def train_dataloader(self) -> Any:
            return DataLoader(self.train, batch_size=4)

        def val_dataloader(self) -> Any:
            return [DataLoader(self.held_out), DataLoader(pairs(3))]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 0 + 5, batch[1]]

    def doubled(_module: Any, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0], batch[1] * 0 + 2]

    setup = run_setup(setup_of(lambda: (module_of(lightning, on_before_batch_transfer=doubled), Data())))
    assert calls == ["prepare_data", "fit"]
    x, y = make_batch(setup, 6)
    assert x.eq(5).all()
    assert y.eq(2).all()
    assert make_batch(setup, 9, "validation_batch")[0].shape == (9, 4)
    own = module_of(lightning, train_dataloader=lambda module: loader_of(), val_dataloader=lambda module: loader_of(1))
    setup = run_setup(setup_of(own))
    assert make_batch(setup, 4, "validation_batch")[1].unique().numel() == 1


def test_what_a_script_attaches_is_detached(transformers: Any, lightning: Any, tmp_path: Path) -> None:
    def configure(module: Any) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        accumkern.attach(optimizer)
        return optimizer

    trainer = trainer_of(transformers, tmp_path)
    accumkern.attach(trainer.create_optimizer())
    model, optimizer, loader = plain_tuple()
    accumkern.attach(optimizer)
    module = module_of(lightning, configure_optimizers=configure)
    for thing in (trainer, (module, loader_of()), (model, optimizer, loader)):
        setup = run_setup(setup_of(thing, in_place=True))
        accumkern.attach(setup.optimizer).detach()


def test_a_rank_makes_a_lightning_module_ready_by_itself(
    lightning: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)  # as torchrun does for two processes; the other one is not needed
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        setup = run_setup(setup_of((module_of(lightning), loader_of())))
    finally:
        torch.distributed.destroy_process_group()
    assert setup.loss(setup.model, make_batch(setup, 3)).dim() == 0
    assert os.environ["WORLD_SIZE"] == "2"


# ---- all the way -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["Trainer", "Lightning", "model"])
def make(request: pytest.FixtureRequest, transformers: Any, lightning: Any, tmp_path: Path) -> Callable[[], Any]:
    makers: dict[str, Callable[[], Any]] = {
        "Trainer": lambda: trainer_of(transformers, tmp_path, dtype=torch.bfloat16),
        "Lightning": lambda: (module_of(lightning), loader_of()),
        "model": plain_tuple,
    }
    return makers[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["itself", "function"])
def test_a_plan(make: Callable[[], Any], way: str) -> None:
    thing = make()
    setup = setup_of(thing, in_place=True) if way == "itself" else setup_of(make)
    is_trainer = not isinstance(thing, tuple)
    model = thing.model if is_trainer else thing[0]
    weights = copy.deepcopy(model.state_dict())
    plan = accumkern.plan(setup, effective_batch=8, largest_micro_batch=2, noise_windows=4)
    assert plan.choice.effective_batch == 8
    assert plan.noise is not None
    assert plan.prediction_problem is None, plan.prediction_problem
    assert [prediction.micro_batch for prediction in plan.predictions] == [1, 2]
    assert (plan.master_weights == "split32") == is_trainer
    assert all(value.equal(weights[key]) for key, value in model.state_dict().items())
    assert json.dumps(plan.to_dict())


def test_a_trainer_that_cannot_be_made_a_second_time_can_be_planned_for(transformers: Any, tmp_path: Path) -> None:
    def function() -> Any:
        transformers.TrainingArguments(str(tmp_path), use_cpu=True)  # empties what all Accelerators share
        torch.ones(1).item()  # which fake tensors don't have: then it is made for real
        return trainer_of(transformers, tmp_path)

    plan = accumkern.plan(setup_of(function), effective_batch=4, largest_micro_batch=2, noise_windows=0)
    assert plan.choice.effective_batch == 4
    assert plan.prediction_problem is None


@pytest.mark.slow
def test_a_sweep_begins_each_run_anew(make: Callable[[], Any], tmp_path: Path) -> None:
    thing = make()
    arguments: dict[str, Any] = {"effective_batches": [4], "samples": 32, "seeds": [0, 1], "micro_batch": 4}
    sweep = accumkern.sweep(setup_of(thing), folder=tmp_path / "out", validation_samples=8, evaluations=2, **arguments)
    losses = [[point.loss for point in run.points] for run in sweep.runs]
    assert [run.status for run in sweep.runs] == ["finished"] * 2
    assert losses[0][0] == losses[1][0]  # the same weights and validation samples
    assert losses[0][-1] != losses[1][-1]  # and other samples to train with
    again = accumkern.sweep(setup_of(thing), folder=tmp_path / "b", validation_samples=8, evaluations=2, **arguments)
    assert [[point.loss for point in run.points] for run in again.runs] == losses


TARGETS = """
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    def make():
        model = nn.Linear(4, 1)
        return model, torch.optim.SGD(model.parameters(), 0.1), loader, loss

    def loss(model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square().mean()

    loader = DataLoader(TensorDataset(torch.randn(50, 4), torch.randn(50)), batch_size=5, shuffle=True)
    thing = make()
    alone = thing[0]
    in_evaluation = (nn.Linear(4, 1).eval(), *thing[1:])
"""


def test_a_script_names_a_thing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for library in ("matplotlib", "rich", "jinja2"):
        pytest.importorskip(library)
    from accumkern.__main__ import main

    script = tmp_path / "things.py"
    script.write_text(textwrap.dedent(TARGETS))
    sweep = ["--effective-batches", "4", "--samples", "16", "--micro-batch", "4", "--json"]
    for name in ("thing", "make"):
        assert (
            main(["plan", f"{script}:{name}", "--predict", "--memory", "1GB", "--effective-batch", "64", "--json"]) == 0
        )
        assert json.loads(capsys.readouterr().out)["choice"]["effective_batch"] == 64
        plan = ["--effective-batch", "8", "--largest-micro-batch", "2", "--noise-windows", "4", "--json"]
        assert main(["plan", f"{script}:{name}", *plan]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["choice"]["effective_batch"], found["prediction_problem"]) == (8, None)
        assert main(["sweep", f"{script}:{name}", *sweep, "--output", str(tmp_path / name)]) in (0, 1)
        assert json.loads(capsys.readouterr().out)["runs"][0]["status"] == "finished"
        settings = json.loads((tmp_path / name / "sweep.json").read_text())
        assert settings["script_sha256"] == hashlib.sha256(script.read_bytes()).hexdigest()
    for name, message in [
        ("alone", "what is to be planned for is a Linear; it must be a function that returns model"),
        ("in_evaluation", "accumkern plan: the model, a Linear, is in evaluation mode; call its train()"),
    ]:
        assert main(["plan", f"{script}:{name}"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_batches_are_fake_in_a_prediction_though_their_data_is_real() -> None:
    class Looking:
        def __call__(self, samples: list[Any]) -> dict[str, Tensor]:
            assert all(sample[1].item() < 100 for sample in samples)  # which fake tensors don't tell
            return named(samples)

    model = Output()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        setup = from_model(model, optimizer, DataLoader(pairs_made_before, collate_fn=Looking(), shuffle=True))
        for make in (setup.make_batch, setup.longest_batch):
            assert make is not None
            assert all(is_fake(tensor) and len(tensor) == 3 for tensor in make(3).values())


pairs_made_before = pairs()
