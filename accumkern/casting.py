"""FP32 models become bfloat16 ones without loss: what is cut off is kept for the master weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from accumkern import backends
from accumkern.dtensor import is_dtensor, shard, shard_as, with_shard
from accumkern.formats import Format, decode
from accumkern.master_weights import MasterWeights, checksums, dense, local_of, warn_of_ranks


class _CutOff(NamedTuple):
    """What a weight lacks of the FP32 number that it was, in its shape; and the checksum of the weight."""

    residual: Any
    checksum: Tensor


# By the module that has a weight, and its name there: a parameter may be moved, sharded or replaced before it gets a
# master.
_cut_off: weakref.WeakKeyDictionary[nn.Module, dict[str, _CutOff]] = weakref.WeakKeyDictionary()
_calls = 0  # of to_bfloat16()


def to_bfloat16(module: nn.Module, keep: Iterable[type[nn.Module] | str] = ()) -> nn.Module:
    """Cast the float32 parameters and buffers of a module to bfloat16, in place, without loss for master weights.

    Each weight is rounded to the nearest, ties away from zero, and the int16 residual that it lacks is kept for the
    next ``attach(optimizer, master_weights=...)``: the first masters are the FP32 weights that there were, with
    ``"split24"`` rounded to 16 bits. A weight that is changed until then has none. Buffers are only rounded.

    Call it after ``fully_shard()``, or before it; before ``attach()``, or after it and before the next step.

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
    for name, param in module.named_parameters():
        if param.grad is not None and id(param) not in kept:
            raise ValueError(f"parameter {name!r} of module has a gradient, of float32; call zero_grad() before")
    owners = {
        id(param): (part, name)
        for part in module.modules()
        for name, param in part.named_parameters(recurse=False)
        if id(param) not in kept
    }
    buffers = {id(buffer) for buffer in module.buffers()} - kept  # and no gradients, which come here too
    residuals: dict[tuple[nn.Module, str], Any] = {}

    def cast(tensor: Any) -> Any:
        if tensor.dtype is not torch.float32 or tensor.layout is not torch.strided:
            return tensor
        if id(tensor) not in owners:
            return tensor.to(torch.bfloat16) if id(tensor) in buffers else tensor
        local = dense(local_of(tensor))
        weight = torch.empty_like(local, dtype=torch.bfloat16)
        residual = torch.empty_like(local, dtype=torch.int16)
        kernels = backends.kernels(backends.choose(None, local.device))
        kernels.encode(Format.SPLIT32, [local], 1.0, [weight], [residual])
        residuals[owners[id(tensor)]] = with_shard(residual, tensor) if is_dtensor(tensor) else residual
        return with_shard(weight, tensor) if is_dtensor(tensor) else weight

    module._apply(cast)
    sums = checksums([getattr(part, name) for part, name in residuals])
    for ((part, name), residual), checksum in zip(residuals.items(), sums, strict=True):
        _cut_off.setdefault(part, {})[name] = _CutOff(residual, checksum)
    global _calls
    _calls += 1
    return module


def count_calls() -> int:
    """Return how often :func:`to_bfloat16` has cast a module."""
    return _calls


@torch.no_grad()
def take_cut_off(masters: MasterWeights, params: Mapping[Tensor, Any]) -> None:
    """Begin masters with what :func:`to_bfloat16` has cut off, of parameters that are as it has left them."""
    found: list[tuple[Any, _CutOff]] = []
    for part, of_names in list(_cut_off.items()):
        for name in list(of_names):
            param: Any = getattr(part, name, None)
            if isinstance(param, Tensor) and param in params:
                found.append((param, of_names.pop(name)))
        if not of_names:
            del _cut_off[part]
    changed, written = 0, []
    for (param, (residual, checksum)), now in zip(found, checksums([param for param, _ in found]), strict=True):
        if param.shape != residual.shape or int(now) != int(checksum):
            changed += 1
            continue
        if is_dtensor(param):
            residual = shard(residual) if is_dtensor(residual) else shard_as(residual, param)
        local = dense(local_of(param))
        low = torch.empty_like(local, dtype=torch.int16).copy_(residual)
        master = decode(Format.SPLIT32, local, low)
        masters.read([param], [torch.empty_like(master)])
        masters.write([param], [master])
        masters.watch(param)
        written.append(param)
    masters.count_changes(written)
    if changed:
        warn_of_ranks(changed)


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
