"""Checks of arguments that every room shares: numbers of any library, and names of a table; how errors are told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

#: The least and the greatest positive number that FP32 holds.
LEAST_FP32 = 2.0**-149
GREATEST_FP32 = 2.0**128 - 2.0**104


def real(name: str, value: Any, right: str) -> float:
    """Return a real number, numpy's or a Fraction but no bool, as a float of Python's own, or an int of 64 bits.

    Args:
        name: of the argument.
        value: what was given.
        right: the end of the message: ``"it must be ..."``.

    Raises:
        TypeError: it is no such number.
        ValueError: FP64 cannot hold it.
    """
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a {type(value).__name__}; {right}")
    try:
        number = float(value)
    except OverflowError:
        number = 0.0
    if number == 0 and value != 0:
        raise ValueError(f"{name} is a {type(value).__name__} beyond the range of FP64; {right}")
    return int(value) if isinstance(value, Integral) and abs(number) < 2**63 else number


def integer(name: str, value: Any, right: str, least: int = 0) -> int:
    """Return an integer of at least ``least`` as Python's own; otherwise as :func:`real`.

    Raises:
        TypeError: it is no integer.
        ValueError: it is less, or 64 bits cannot hold it.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is a {type(value).__name__}; {right}")
    number = int(value)
    if not least <= number < 2**63:
        found = str(number) if abs(number) < 2**63 else f"a {type(value).__name__} beyond the range of 64 bits"
        raise ValueError(f"{name} is {found}; {right}")
    return number


def is_fp32(number: float) -> bool:
    """Return whether FP32 holds a number as one that is finite and not zero."""
    return LEAST_FP32 <= abs(number) <= GREATEST_FP32


def items(name: str, values: Any, right: str) -> list[Any]:
    """Return what is in a sequence, or in what has ``tolist()``: a tensor or an array of one dimension.

    Raises:
        TypeError: it is something else.
        ValueError: it is a tensor or an array of another number of dimensions.
    """
    found = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(found, (str, bytes)) or not (isinstance(found, Sequence) or hasattr(values, "tolist")):
        raise TypeError(f"{name} is a {type(values).__name__}; {right}")
    if len(getattr(values, "shape", (1,))) != 1:
        raise ValueError(f"{name} is a {type(values).__name__} of shape {tuple(values.shape)}; {right}")
    return list(found)


def one_of(name: str, value: Any, names: Iterable[str], otherwise: str = "") -> None:
    """Raise unless ``value`` is one of ``names``.

    Raises:
        TypeError: it is no text.
        ValueError: it is another one.
    """
    right = f"it must be one of {', '.join(names)}{otherwise}"
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type(value).__name__}; {right}")
    if value not in names:
        raise ValueError(f"{name} is {value!r}; {right}")


def describe(error: BaseException) -> str:
    """Return an error's type and message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
