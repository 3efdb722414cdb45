"""FP32 models become bfloat16 ones without loss: what is cut off is kept for the master weights."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from accumkern import backends
from accumkern.dtensor import distributed_as, is_dtensor, is_in_group, shard, with_shard
from accumkern.formats import Format, decode
from accumkern.master_weights import MasterWeights, checksums, dense, local_of


class _CutOff(NamedTuple):
    """What a weight lacks of the FP32 number that it was, in its shape; and the checksum of the weight."""

    residual: Any
    checksum: Tensor


# By name: a parameter may be moved, sharded or replaced before it gets a master.
_cut_off: weakref.WeakKeyDictionary[nn.Module, dict[str, _CutOff]] = weakref.WeakKeyDictionary()


def to_bfloat16(module: nn.Module, keep: Iterable[type[nn.Module] | str] = ()) -> nn.Module:
    """Cast the float32 parameters and buffers of a module to bfloat16, in place, without loss for master weights.

    Each weight is rounded to the nearest, ties away from zero, and the int16 residual that it lacks is kept for the
    next ``attach(optimizer, master_weights=...)``: the first masters are the FP32 weights that there were, with
    ``"split24"`` rounded to 16 bits. A weight that is changed until then has none. Buffers are only rounded.

    Call it after ``fully_shard()``, or before it, and before training.

    Args:
        module: the model. 2 bytes per weight are kept beside it until its parameters are attached.
        keep: what stays float32: types of modules, such as ``nn.LayerNorm``, and names of modules, parameters or
            buffers, with the wildcards of :mod:`fnmatch`, such as ``"*.norm"``.

    Returns:
        ``module``.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an entry of ``keep`` fits nothing, or a parameter has a gradient.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; it must be a torch.nn.Module")
    kept = _kept(module, keep)
    names = {id(param): name for name, param in module.named_parameters() if id(param) not in kept}
    for name, param in module.named_parameters():
        if param.grad is not None and id(param) in names:
            raise ValueError(f"parameter {name!r} of module has a gradient, of float32; call zero_grad() before")
    residuals: dict[str, Any] = {}

    def cast(tensor: Any) -> Any:
        if tensor.dtype is not torch.float32 or tensor.layout is not torch.strided or id(tensor) in kept:
            return tensor
        if id(tensor) not in names:
            return tensor.to(torch.bfloat16)
        local = dense(local_of(tensor))
        weight = torch.empty_like(local, dtype=torch.bfloat16)
        residual = torch.empty_like(local, dtype=torch.int16)
        kernels = backends.kernels(backends.choose(None, local.device))
        kernels.encode(Format.SPLIT32, [local], 1.0, [weight], [residual])
        residuals[names[id(tensor)]] = with_shard(residual, tensor) if is_dtensor(tensor) else residual
        return with_shard(weight, tensor) if is_dtensor(tensor) else weight

    module._apply(cast)
    sums = checksums([module.get_parameter(name) for name in residuals])
    _cut_off[module] = {
        name: _CutOff(residual, checksum) for (name, residual), checksum in zip(residuals.items(), sums, strict=True)
    }
    return module


@torch.no_grad()
def take_cut_off(masters: MasterWeights, params: Mapping[Tensor, Any]) -> None:
    """Begin masters with what :func:`to_bfloat16` has cut off, of parameters that are as it has left them."""
    changed, written = 0, []
    for module, of_names in _cut_off.items():
        found = []
        for name in list(of_names):
            param: Any = dict(module.named_parameters()).get(name)
            if param is not None and param in params:
                found.append((param, of_names.pop(name)))
        for (param, (residual, checksum)), now in zip(found, checksums([param for param, _ in found]), strict=True):
            if param.shape != residual.shape or int(now) != int(checksum):
                changed += 1
                continue
            if is_dtensor(param):
                residual = shard(residual if is_dtensor(residual) else distributed_as(residual, param))
            local = dense(local_of(param))
            low = torch.empty_like(local, dtype=torch.int16).copy_(residual)
            master = decode(Format.SPLIT32, local, low)
            masters.read([param], [torch.empty_like(master)])
            masters.write([param], [master])
            written.append(param)
    masters.count_changes(written)
    if changed and is_in_group():
        warnings.warn(
            f"{changed} weights have changed on this rank since to_bfloat16(), and what it had cut off of them is left "
            "out. DistributedDataParallel hands on the weights of rank 0, but not that: give all ranks the same FP32 "
            "weights before to_bfloat16(), or else their master weights differ",
            stacklevel=4,  # attach() is called by the user, and torch.no_grad() is between
        )


def set_cut_off_aside() -> Callable[[], None]:
    """Let ``attach()`` find nothing that was cut off; calling what is returned puts it back.

    Until then it lies in the host's memory; the shards of DTensors stay on their device.
    """
    aside = [(module, dict(of_names)) for module, of_names in _cut_off.items()]
    _cut_off.clear()
    devices = [{name: cut.residual.device for name, cut in of_names.items()} for _, of_names in aside]
    for _, of_names in aside:
        for name, cut in of_names.items():
            if not is_dtensor(cut.residual):
                of_names[name] = cut._replace(residual=cut.residual.cpu())

    def put_back() -> None:
        for (module, of_names), on in zip(aside, devices, strict=True):
            _cut_off[module] = {
                name: cut._replace(residual=cut.residual.to(on[name])) for name, cut in of_names.items()
            }

    return put_back


def _kept(module: nn.Module, keep: Any) -> set[int]:
    """Return the ids of the parameters and buffers that ``keep`` names."""
    if isinstance(keep, (str, type)) or not isinstance(keep, Iterable):
        raise TypeError(f"keep is {keep!r}; it must be a list of types of modules and of names")
    kept: set[int] = set()
    for entry in keep:
        if not (isinstance(entry, str) or (isinstance(entry, type) and issubclass(entry, nn.Module))):
            raise TypeError(f"keep holds {entry!r}; it must hold types of modules, and names")
        tensors: list[Tensor] = []
        for name, part in module.named_modules(remove_duplicate=False):
            if fnmatchcase(name, entry) if isinstance(entry, str) else isinstance(part, entry):
                tensors += [*part.parameters(), *part.buffers()]
        if isinstance(entry, str):
            named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
            tensors += [tensor for name, tensor in named if fnmatchcase(name, entry)]
        if not tensors:
            raise ValueError(f"keep holds {entry!r}, which fits no module, parameter or buffer with values")
        kept.update(map(id, tensors))
    return kept
