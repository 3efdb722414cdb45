"""Hugging Face's Trainer: one line before train(), and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fp32_twin import Fp32Twin, assert_same_masters
from tiny import MicroGradients, assert_same_weights

import accumkern

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.integration("HF Trainer", version_of="transformers")]

VOCABULARY, LENGTH = 64, 16


def llama(dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def sequences(count: int) -> list[dict[str, Any]]:
    """Token sequences; each has another number of tokens that count for the loss."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    labels = ids.clone()
    for i in range(count):
        labels[i, : 7 * i % (LENGTH - 2)] = -100
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def arguments(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
    }
    return transformers.TrainingArguments(**settings | changes)


def logs(trainer: Any) -> list[dict[str, float]]:
    """What was logged at each step, but for the times."""
    return [
        {name: entry[name] for name in ("loss", "grad_norm", "learning_rate", "epoch")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def assert_same_runs(found: Any, expected: Any, steps: int) -> None:
    assert len(logs(found)) == steps
    assert logs(found) == logs(expected)
    assert_same_weights(found.model, expected.model)


# 22 sequences in micro-batches of 2: windows of 4, 4 and 3, twice.
@pytest.mark.parametrize("way", ["optimizer of one's own", "the trainer's optimizer"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"bf16": True}, {"activation_checkpointing": True}, {"max_grad_norm": 0.0}, {"optim": "adafactor"}],
    ids=["fp32", "autocast-bf16", "activation-checkpointing", "unclipped", "adafactor"],
)
def test_fp32_weights_train_as_stock_bit_for_bit(way: str, changes: dict[str, Any], tmp_path: Path) -> None:
    if "activation_checkpointing" in changes and not hasattr(
        transformers.TrainingArguments, "activation_checkpointing"
    ):
        changes = {"gradient_checkpointing": True}  # its name before transformers 5.20
    runs = []
    for attached in (True, False):
        model = llama(torch.float32)
        trainer = transformers.Trainer(model, arguments(tmp_path, **changes), train_dataset=sequences(22))
        if way == "optimizer of one's own":
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            trainer = transformers.Trainer(
                model, arguments(tmp_path, **changes), train_dataset=sequences(22), optimizers=(optimizer, None)
            )
            if attached:
                accumkern.attach(optimizer)
        elif attached:
            attach(trainer)
        trainer.train()
        runs.append(trainer)
    assert_same_runs(*runs, steps=6)


def attach(trainer: Any) -> accumkern.GradAccumulator:
    return accumkern.attach(trainer.create_optimizer())


def test_bf16_gradients_and_norms_are_nearer_to_fp64_than_stock(tmp_path: Path) -> None:
    # One gradient again and again: bfloat16 stops at 512 times the power of two below it, whatever its bits are, while
    # errors of several gradients may cancel in the norm.
    micro_batches = 640
    errors, norm_errors = {}, {}

    class Trainer(transformers.Trainer):  # type: ignore[name-defined,misc]
        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            """The last thing that happens before the optimizer steps."""
            errors[attached] = truth.error()
            return super()._get_grad_norm(model, grad_norm=grad_norm)

    for attached in (True, False):
        model = llama(torch.bfloat16)
        settings = arguments(
            tmp_path,
            gradient_accumulation_steps=micro_batches,
            per_device_train_batch_size=1,
            num_train_epochs=1,
            max_grad_norm=0.0,  # the norm is logged all the same
        )
        trainer = Trainer(model, settings, train_dataset=sequences(1) * micro_batches)
        if attached:
            attach(trainer)
        truth = MicroGradients(model)
        trainer.train()
        (log,) = logs(trainer)
        norm_errors[attached] = abs(log["grad_norm"] / truth.norm() - 1)
    assert errors[True] < 2.5e-3  # one rounding to bfloat16
    assert errors[False] > 4 * errors[True]
    assert norm_errors[True] < 2**-7  # torch computes norms of bfloat16 gradients in bfloat16
    assert norm_errors[False] > 2 * norm_errors[True]


def test_attaching_where_the_trainer_makes_its_optimizer(tmp_path: Path) -> None:
    """The way for code that has no hand on the trainer between its making and train(), and for a second train()."""

    class Trainer(transformers.Trainer):  # type: ignore[name-defined,misc]
        def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
            if self.optimizer is None:
                self.accumulator = accumkern.attach(super().create_optimizer(*args))
            return self.optimizer

    runs = []
    for trainer_type in (Trainer, transformers.Trainer):
        trainer = trainer_type(llama(torch.float32), arguments(tmp_path), train_dataset=sequences(10))
        trainer.train()
        trainer.train()
        runs.append(trainer)
    assert_same_weights(runs[0].model, runs[1].model)
    param = runs[0].model.lm_head.weight
    assert runs[0].accumulator.gradient(param) is None  # attached, and between windows


def test_resuming_from_the_trainers_own_checkpoint(tmp_path: Path) -> None:
    """The trainer saves between windows only, where there is nothing of accumkern's to save."""
    whole = transformers.Trainer(
        llama(torch.bfloat16), arguments(tmp_path / "whole", save_strategy="steps"), train_dataset=sequences(22)
    )
    attach(whole)
    whole.train()

    class Interrupted(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        def on_substep_end(self, _args: Any, state: Any, _control: Any, **_more: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt  # in the middle of the fourth window

    settings = arguments(tmp_path / "parts", save_strategy="steps", save_steps=2)
    first = transformers.Trainer(llama(torch.bfloat16), settings, train_dataset=sequences(22), callbacks=[Interrupted])
    attach(first)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = transformers.Trainer(llama(torch.bfloat16), settings, train_dataset=sequences(22))
    attach(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert_same_runs(resumed, whole, steps=6)


def test_batch_size_that_is_found_by_running_out_of_memory(tmp_path: Path) -> None:
    """The trainer begins again with smaller micro-batches; what the failed window had added up must be gone."""

    class Trainer(transformers.Trainer):  # type: ignore[name-defined,misc]
        calls = 0

        def training_step(self, model: Any, inputs: Any, *more: Any) -> Any:
            loss = super().training_step(model, inputs, *more)
            self.calls += 1
            if self.calls == 3:
                torch.empty(2**50)  # more than a process can address
            return loss

    runs = []
    for attached in (True, False):
        settings = arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=4)
        trainer = Trainer(llama(torch.float32), settings, train_dataset=sequences(22))
        if attached:
            attach(trainer)
        trainer.train()
        runs.append(trainer)
    assert runs[0].state.train_batch_size < 4
    assert_same_runs(*runs, steps=len(logs(runs[1])))


# ---- master weights ----------------------------------------------------------------------------------------------

masters_feature = pytest.mark.integration("Master weights: HF Trainer", version_of="transformers")


class SaveMasters(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
    """The recipe of docs/integrations.md."""

    def on_save(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
        if state.is_world_process_zero:
            masters = accumkern.accumulator_of(optimizer).state_dict()
            torch.save(masters, f"{args.output_dir}/checkpoint-{state.global_step}/accumkern.pt")

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
        if state.global_step:  # it goes on from a checkpoint
            path = f"{args.output_dir}/checkpoint-{state.global_step}/accumkern.pt"
            accumkern.accumulator_of(optimizer).load_state_dict(torch.load(path, weights_only=True))


class BesideFp32(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
    """Compares each step with one of FP32 weights."""

    def __init__(self, acc: accumkern.GradAccumulator, model: Any) -> None:
        self.twin = Fp32Twin(acc, model.parameters(), torch.optim.AdamW)
        self.steps = 0

    def on_pre_optimizer_step(self, *_args: Any, **_named: Any) -> None:
        self.twin.step()

    def on_optimizer_step(self, *_args: Any, **_named: Any) -> None:
        self.twin.check()
        self.steps += 1


def with_masters(folder: Path, callbacks: list[Any], **changes: Any) -> tuple[Any, accumkern.GradAccumulator]:
    settings = arguments(folder, **{"save_strategy": "steps", "save_steps": 2, **changes})
    model = accumkern.to_bfloat16(llama(torch.float32))
    trainer = transformers.Trainer(model, settings, train_dataset=sequences(22), callbacks=callbacks)
    return trainer, accumkern.attach(trainer.create_optimizer(), master_weights="split32", bucket=10_000)


@masters_feature
@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.0}, {"bf16": True}], ids=["clipped", "unclipped", "bf16"])
def test_master_weights_have_the_bits_of_fp32_weights(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer, acc = with_masters(tmp_path, [], save_strategy="no", **changes)
    for param, start in zip(trainer.model.parameters(), llama(torch.float32).parameters(), strict=True):
        assert torch.equal(acc.master_weight(param), start)
    beside = BesideFp32(acc, trainer.model)
    trainer.add_callback(beside)
    trainer.train()
    assert beside.steps == 6


@masters_feature
def test_master_weights_go_on_from_the_trainers_checkpoint(tmp_path: Path) -> None:
    class Interrupted(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        def on_substep_end(self, _args: Any, state: Any, _control: Any, **_more: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt  # in the middle of the fourth window

    whole, whole_acc = with_masters(tmp_path / "whole", [SaveMasters])
    whole.train()
    first, _ = with_masters(tmp_path / "parts", [SaveMasters, Interrupted])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed, acc = with_masters(tmp_path / "parts", [SaveMasters])
    resumed.train(resume_from_checkpoint=True)
    assert_same_runs(resumed, whole, steps=6)
    assert_same_masters(acc, resumed.model, whole_acc, whole.model)


@masters_feature
def test_masters_of_another_checkpoint_are_an_error(tmp_path: Path) -> None:
    for name, learning_rate in (("one", 1e-2), ("other", 1e-3)):
        trainer, _ = with_masters(tmp_path / name, [SaveMasters], max_steps=2, learning_rate=learning_rate)
        trainer.train()
    resumed, _ = with_masters(tmp_path / "one", [SaveMasters], max_steps=4)
    with pytest.raises(ValueError, match="load the state of the model before this one"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2"))
