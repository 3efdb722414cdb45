"""An FP32 model comes in without loss: to_bfloat16(), and the masters that begin with what it has cut off."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from masters import Masters, adamw, assert_equal, backward, fp32_model
from torch import nn

import accumkern
from accumkern import casting
from accumkern.formats import Format, decode, encode

pytestmark = pytest.mark.usefixtures("one_thread")


def attach(model: nn.Module, master_weights: str = "split32") -> accumkern.GradAccumulator:
    return accumkern.attach(adamw(list(model.parameters())), master_weights=master_weights)


def masters(model: nn.Module, acc: accumkern.GradAccumulator) -> list[torch.Tensor]:
    return [acc.master_weight(param) for param in model.parameters()]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [param.detach() for param in model.parameters()]


def test_first_masters_are_the_fp32_weights() -> None:
    fp32 = fp32_model()
    model = accumkern.to_bfloat16(fp32_model())
    assert_equal(weights(model), [encode(Format.SPLIT32, weight)[0] for weight in weights(fp32)])
    assert_equal(masters(model, attach(model)), weights(fp32))
    assert not any(part in casting._cut_off for part in model)


def test_a_model_that_is_cast_after_attach_keeps_all_bits_too() -> None:
    fp32, model = fp32_model(), fp32_model()
    with pytest.warns(
        UserWarning, match=r"'split32', and no parameter of optimizer is bfloat16: .*to_bfloat16\(model\)"
    ):
        acc = attach(model)
    accumkern.to_bfloat16(model)
    assert_equal(masters(model, acc), weights(fp32))
    assert not any(part in casting._cut_off for part in model)
    optimizer = acc._optimizer
    backward(model, 0)
    optimizer.step()
    assert not torch.equal(masters(model, acc)[0], weights(fp32)[0])
    assert acc.memory().master_residuals == 2 * acc.memory().numel


def test_split24_masters_are_the_fp32_weights_rounded() -> None:
    fp32 = fp32_model()
    with torch.no_grad():
        fp32[0].weight.view(torch.int32).fill_(0x3F80807F)  # rounds up to a tie, which goes away from zero
    model = accumkern.to_bfloat16(copy.deepcopy(fp32))
    rounded = [decode(Format.SPLIT24, *encode(Format.SPLIT24, weight)) for weight in weights(fp32)]
    assert_equal(masters(model, attach(model, "split24")), rounded)
    assert_equal(weights(model), [encode(Format.SPLIT24, weight)[0] for weight in weights(fp32)])


def test_the_optimizer_may_be_made_before() -> None:
    model = fp32_model()
    optimizer = adamw(list(model.parameters()))
    accumkern.to_bfloat16(model)
    acc = accumkern.attach(optimizer, master_weights="split32")
    assert_equal(masters(model, acc), weights(fp32_model()))


def test_moved_and_reordered_weights_keep_what_was_cut_off() -> None:
    fp32 = nn.Conv2d(3, 8, 3)
    model = accumkern.to_bfloat16(copy.deepcopy(fp32)).to(memory_format=torch.channels_last)
    model.weight.data = model.weight.data.clone()
    assert_equal(masters(model, attach(model)), weights(fp32))


def test_replaced_parameters_and_two_optimizers() -> None:
    model = accumkern.to_bfloat16(fp32_model())
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    params = list(model.parameters())
    first = accumkern.attach(adamw(params[:3]), master_weights="split32")
    second = accumkern.attach(adamw(params[3:]), master_weights="split32")
    found = [(first if i < 3 else second).master_weight(param) for i, param in enumerate(params)]
    assert_equal(found, weights(fp32_model()))


def test_changed_weights_have_nothing_cut_off() -> None:
    model = accumkern.to_bfloat16(fp32_model())
    with torch.no_grad():
        model[0].weight[0, 0] += 1
        model[1].weight.data.mul_(2)
    model[2].weight = nn.Parameter(torch.randn(5, 40).bfloat16())
    found = masters(model, attach(model))
    for i in (0, 2, 4):
        assert torch.equal(found[i], weights(model)[i].float())
    assert torch.equal(found[1], weights(fp32_model())[1])


def test_attached_without_masters_and_again_with() -> None:
    model = accumkern.to_bfloat16(fp32_model())
    optimizer = adamw(list(model.parameters()))
    accumkern.attach(optimizer).detach()
    assert_equal(masters(model, accumkern.attach(optimizer, master_weights="split32")), weights(fp32_model()))


def test_in_several_calls_and_of_parts_of_a_model() -> None:
    model = fp32_model()
    accumkern.to_bfloat16(nn.ModuleList([model[0], model[1]]))
    accumkern.to_bfloat16(model, keep=["3"])
    accumkern.to_bfloat16(model)
    accumkern.to_bfloat16(model)
    gc.collect()
    assert_equal(masters(model, attach(model)), weights(fp32_model()))


def test_parameters_that_are_added_later() -> None:
    model = accumkern.to_bfloat16(fp32_model())
    params = list(model.parameters())
    optimizer = adamw(params[:2])
    acc = accumkern.attach(optimizer, master_weights="split32")
    optimizer.add_param_group({"params": params[2:]})
    assert_equal(masters(model, acc), weights(fp32_model()))


def test_gradients_of_what_stays_fp32_are_left_alone() -> None:
    model = fp32_model()
    model[1].weight.grad = torch.ones_like(model[1].weight)
    accumkern.to_bfloat16(model, keep=[nn.LayerNorm])
    assert model[1].weight.grad.dtype is torch.float32


def test_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    fp32 = model[0].weight.detach().clone()
    accumkern.to_bfloat16(model)
    assert model[1].weight is model[0].weight
    acc = attach(model)
    assert torch.equal(acc.master_weight(model[0].weight), fp32)
    exported = acc.master_state_dict(model)
    assert exported["0.weight"] is exported["1.weight"]
    assert torch.equal(exported["0.weight"], fp32)


KEPT: dict[str, tuple[Any, set[str]]] = {
    "nothing": ([], set()),
    "type": ([nn.LayerNorm], {"1.weight", "1.bias"}),
    "name of a parameter": (["0.bias"], {"0.bias"}),
    "name of a module": (["1", "3"], {"1.weight", "1.bias", "3.weight", "3.bias"}),
    "pattern": (["*.bias"], {"0.bias", "1.bias", "3.bias"}),
    "several": ([nn.LayerNorm, "0.*"], {"0.weight", "0.bias", "1.weight", "1.bias"}),
    "everything": ([nn.Module], {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "3.weight", "3.bias"}),
}


@pytest.mark.parametrize(("keep", "names"), KEPT.values(), ids=KEPT)
def test_what_stays_fp32_is_the_users_choice(keep: list[Any], names: set[str]) -> None:
    model = accumkern.to_bfloat16(fp32_model(), keep=keep)
    kept = {name for name, param in model.named_parameters() if param.dtype is torch.float32}
    assert kept == names
    assert_equal(masters(model, attach(model)), weights(fp32_model()))


def test_buffers_and_other_dtypes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 4).double(), nn.Linear(4, 4).half())
    accumkern.to_bfloat16(model, keep=["1"])
    assert model[0].running_mean.dtype is torch.bfloat16
    assert model[0].num_batches_tracked.dtype is torch.int64
    assert {t.dtype for t in (*model[1].parameters(), model[1].running_var)} == {torch.float32}
    assert (model[2].weight.dtype, model[3].weight.dtype) == (torch.float64, torch.float16)


def test_nothing_is_held_for_a_module_that_is_gone() -> None:
    before = len(casting._cut_off)
    accumkern.to_bfloat16(fp32_model())
    gc.collect()
    assert len(casting._cut_off) <= before


def test_a_saved_module_carries_nothing() -> None:
    model = accumkern.to_bfloat16(fp32_model())
    assert all(not vars(param) for param in model.parameters())
    assert set(model.state_dict()) == set(fp32_model().state_dict())


def test_it_trains() -> None:
    mine = Masters(adamw)
    for step in range(3):
        mine.window(step)
    assert all(param.dtype is torch.bfloat16 for param in mine.params)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no list": ("1", TypeError, "keep is '1'; it must be a list of types of modules and of names"),
    "a type": (nn.LayerNorm, TypeError, "it must be a list of types of modules and of names"),
    "a number": ([3], TypeError, "keep holds 3; it must hold types of modules, and names"),
    "another type": ([int], TypeError, "it must hold types of modules, and names"),
    "misspelt": (["norm1"], ValueError, "keep holds 'norm1', which fits no module, parameter or buffer"),
    "absent": ([nn.Conv2d], ValueError, "which fits no module"),
}


@pytest.mark.parametrize(("keep", "error", "message"), BAD.values(), ids=BAD)
def test_wrong_keep(keep: Any, error: type[Exception], message: str) -> None:
    model = fp32_model()
    with pytest.raises(error, match=message):
        accumkern.to_bfloat16(model, keep=keep)
    assert all(param.dtype is torch.float32 for param in model.parameters())


def test_wrong_module() -> None:
    with pytest.raises(TypeError, match=r"module is a Parameter; it must be a torch.nn.Module"):
        accumkern.to_bfloat16(nn.Parameter(torch.ones(3)))  # type: ignore[arg-type]
    model = fp32_model()
    model(torch.ones(1, 24)).sum().backward()
    with pytest.raises(ValueError, match=r"parameter '0.weight' of module has a gradient, of float32"):
        accumkern.to_bfloat16(model)
    backward_dtype = model[0].weight.dtype
    assert backward_dtype is torch.float32
    model.zero_grad()
    accumkern.to_bfloat16(model)
    backward(model, 0)
