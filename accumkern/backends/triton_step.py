"""An optimizer's step in Triton: the formulas of accumkern/updates.py, for one block, one tensor and a list.

Coefficients are a row of float32 in memory, read where they are used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accumkern.backends.triton_blocks import CONTINUE, RESIDUAL_DTYPES, VECTOR, load_value, pointer, store_value
from accumkern.backends.triton_kernels import entry, load_scalar, tensor_of_program
from accumkern.updates import COEFFICIENTS, Update

# Update as numbers that a kernel can compare.
ADAM = tl.constexpr(int(Update.ADAM))
AMSGRAD = tl.constexpr(int(Update.AMSGRAD))
MOMENTUM = tl.constexpr(int(Update.MOMENTUM))

ROW = tl.constexpr(COEFFICIENTS)
# Elements of a program: a thread of eight warps has one vector of each tensor. More would not fit in its registers.
STEP_NUMEL = 2048
STEP_SIZE = tl.constexpr(STEP_NUMEL)


# ---- formulas ----------------------------------------------------------------------------------------------------


@triton.jit
def with_decay(decay, weight, x):
    """Return fma(decay, weight, x), or x where the decay is zero: an infinite weight stays what it is."""
    return tl.where(decay == 0.0, x, tl.fma(decay, weight, x))


@triton.jit
def adam_moments(by_ptr, g, weight, m, v):
    """Return (exp_avg, exp_avg_sq) of Adam after the gradient g."""
    sign, coupled_decay = tl.load(by_ptr), tl.load(by_ptr + 1)
    one_minus_beta1, beta2, one_minus_beta2 = tl.load(by_ptr + 3), tl.load(by_ptr + 4), tl.load(by_ptr + 5)
    g = with_decay(coupled_decay, weight, sign * g)
    from_m = one_minus_beta1 < 0.5
    m = tl.fma(tl.where(from_m, one_minus_beta1, one_minus_beta1 - 1.0), g - m, tl.where(from_m, m, g))
    return m, tl.fma(one_minus_beta2 * g, g, beta2 * v)


@triton.jit
def adam_weight(by_ptr, weight, m, v):
    """Return Adam's new weight; v is exp_avg_sq or its maximum."""
    decay, root_of_correction2 = tl.load(by_ptr + 2), tl.load(by_ptr + 6)
    eps, step_size = tl.load(by_ptr + 7), tl.load(by_ptr + 8)
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + root_of_correction2) + eps
    return weight - with_decay(decay, weight, tl.div_rn(step_size * m, denominator))


@triton.jit
def greatest(old, new):
    """Return the maximum; a NaN of either stays."""
    return tl.where((old >= new) | (old != old), old, new)


@triton.jit
def sgd_gradient(by_ptr, g, weight):
    """Return SGD's gradient, with its sign and weight decay."""
    return with_decay(tl.load(by_ptr + 1), weight, tl.load(by_ptr) * g)


@triton.jit
def sgd_momentum(by_ptr, g, b):
    """Return (momentum_buffer, what the weight moves along) of SGD after the gradient g."""
    momentum, one_minus_dampening, nesterov_momentum = tl.load(by_ptr + 2), tl.load(by_ptr + 3), tl.load(by_ptr + 4)
    b = tl.fma(one_minus_dampening, g, momentum * b)
    return b, tl.where(nesterov_momentum == 0.0, b, tl.fma(nesterov_momentum, b, g))


@triton.jit
def sgd_weight(by_ptr, weight, g):
    """Return SGD's new weight."""
    # Some versions of triton have 0 - x for -x, which makes the other zero of a learning rate of zero.
    return tl.fma(-1.0 * tl.load(by_ptr + 5), g, weight)


# ---- blocks ------------------------------------------------------------------------------------------------------


@triton.jit
def store_state(state_ptr, left, x):
    """Store FP32 values: the halves of each vector one by one, because a store is 16 bytes wide at most.

    Left to itself, the compiler would give a thread other four values, by way of shared memory.
    """
    first, second = tl.split(tl.permute(tl.reshape(x, (STEP_SIZE // VECTOR, 2, VECTOR // 2)), (0, 2, 1)))
    vectors = tl.arange(0, STEP_SIZE // VECTOR) * VECTOR
    offsets = vectors[:, None] + tl.arange(0, VECTOR // 2)[None, :]
    tl.store(state_ptr + offsets, first, mask=None if left is None else offsets < left)
    offsets += VECTOR // 2
    tl.store(state_ptr + offsets, second, mask=None if left is None else offsets < left)


@triton.jit
def step_elements(
    weight_ptr,
    weight_residual_ptr,
    grad_ptr,
    grad_residual_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    by_ptr,
    left,
    divisor,
    factor,
    UPDATE: tl.constexpr,
    WEIGHT_FORMAT: tl.constexpr,
    GRAD_FORMAT: tl.constexpr,
    START: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Step STEP_SIZE elements, or the first `left` if that is not None."""
    offsets = tl.max_contiguous(tl.arange(0, STEP_SIZE), VECTOR)
    mask = None if left is None else offsets < left
    g = load_value(grad_ptr, grad_residual_ptr, offsets, mask, GRAD_FORMAT, START)
    weight = load_value(weight_ptr, weight_residual_ptr, offsets, mask, WEIGHT_FORMAT, CONTINUE)
    if SCALES:
        g = tl.div_rn(g, tl.zeros_like(g) + divisor) * factor
    if UPDATE == ADAM or UPDATE == AMSGRAD:
        m, v = tl.load(first_ptr + offsets, mask=mask), tl.load(second_ptr + offsets, mask=mask)
        m, v = adam_moments(by_ptr, g, weight, m, v)
        store_state(first_ptr, left, m)
        store_state(second_ptr, left, v)
        if UPDATE == AMSGRAD:
            v = greatest(tl.load(third_ptr + offsets, mask=mask), v)
            store_state(third_ptr, left, v)
        weight = adam_weight(by_ptr, weight, m, v)
    else:
        g = sgd_gradient(by_ptr, g, weight)
        if UPDATE == MOMENTUM:
            b, g = sgd_momentum(by_ptr, g, tl.load(first_ptr + offsets, mask=mask))
            store_state(first_ptr, left, b)
        weight = sgd_weight(by_ptr, weight, g)
    store_value(weight_ptr, weight_residual_ptr, offsets, mask, weight, WEIGHT_FORMAT)


@triton.jit
def step_block(
    weight_address,
    weight_residual_address,
    grad_address,
    grad_residual_address,  # unused for FROM_SUM
    first_address,  # float32: the update's states; unused where it has fewer
    second_address,
    third_address,
    by_ptr,  # (COEFFICIENTS,) float32
    numel,
    block,
    divisor,
    factor,
    skip_ptr,  # float32; unused without SKIPS
    ALIGNED: tl.constexpr,
    UPDATE: tl.constexpr,
    WEIGHT_FORMAT: tl.constexpr,
    GRAD_FORMAT: tl.constexpr,
    START: tl.constexpr,
    SCALES: tl.constexpr,
    SKIPS: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    FACTOR_IS_POINTER: tl.constexpr,
):
    """weight, states = update((gradient / divisor) * factor, weight, states), for a tensor's block."""
    begin = block.to(tl.int64) * STEP_SIZE
    left = numel - begin
    if SKIPS:
        left = tl.where(tl.load(skip_ptr) == 0.0, left, 0)
    divide_by, multiply_by = load_scalar(divisor, DIVISOR_IS_POINTER), load_scalar(factor, FACTOR_IS_POINTER)
    weight_ptr = pointer(weight_address, tl.bfloat16, ALIGNED) + begin
    weight_residual_ptr = pointer(weight_residual_address, RESIDUAL_DTYPES[WEIGHT_FORMAT], ALIGNED) + begin
    grad_ptr = pointer(grad_address, tl.bfloat16, ALIGNED) + begin
    grad_residual_ptr = pointer(grad_residual_address, RESIDUAL_DTYPES[GRAD_FORMAT], ALIGNED) + begin
    first_ptr = pointer(first_address, tl.float32, ALIGNED) + begin
    second_ptr = pointer(second_address, tl.float32, ALIGNED) + begin
    third_ptr = pointer(third_address, tl.float32, ALIGNED) + begin
    if left >= STEP_SIZE:
        step_elements(
            weight_ptr,
            weight_residual_ptr,
            grad_ptr,
            grad_residual_ptr,
            first_ptr,
            second_ptr,
            third_ptr,
            by_ptr,
            None,
            divide_by,
            multiply_by,
            UPDATE,
            WEIGHT_FORMAT,
            GRAD_FORMAT,
            START,
            SCALES,
        )
    elif left > 0:
        step_elements(
            weight_ptr,
            weight_residual_ptr,
            grad_ptr,
            grad_residual_ptr,
            first_ptr,
            second_ptr,
            third_ptr,
            by_ptr,
            left,
            divide_by,
            multiply_by,
            UPDATE,
            WEIGHT_FORMAT,
            GRAD_FORMAT,
            START,
            SCALES,
        )


# ---- kernels -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=range(13))
def step_kernel(
    weight_address: tl.int64,
    weight_residual_address: tl.int64,
    grad_address: tl.int64,
    grad_residual_address: tl.int64,
    first_address: tl.int64,
    second_address: tl.int64,
    third_address: tl.int64,
    numel: tl.int64,
    row: tl.int64,
    coefficients_ptr,  # (rows, COEFFICIENTS) float32
    divisor,
    factor,
    skip_ptr,
    ALIGNED: tl.constexpr,
    UPDATE: tl.constexpr,
    WEIGHT_FORMAT: tl.constexpr,
    GRAD_FORMAT: tl.constexpr,
    START: tl.constexpr,
    SCALES: tl.constexpr,
    SKIPS: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    FACTOR_IS_POINTER: tl.constexpr,
):
    """Step one tensor: program b does block b."""
    step_block(
        weight_address,
        weight_residual_address,
        grad_address,
        grad_residual_address,
        first_address,
        second_address,
        third_address,
        coefficients_ptr + row * ROW,
        numel,
        tl.program_id(0),
        divisor,
        factor,
        skip_ptr,
        ALIGNED,
        UPDATE,
        WEIGHT_FORMAT,
        GRAD_FORMAT,
        START,
        SCALES,
        SKIPS,
        DIVISOR_IS_POINTER,
        FACTOR_IS_POINTER,
    )


@triton.jit(do_not_specialize=range(6))
def step_list_kernel(
    table_ptr,
    count: tl.int32,
    coefficients_ptr,
    divisor,
    factor,
    skip_ptr,
    ALIGNED: tl.constexpr,
    UPDATE: tl.constexpr,
    WEIGHT_FORMAT: tl.constexpr,
    GRAD_FORMAT: tl.constexpr,
    START: tl.constexpr,
    SCALES: tl.constexpr,
    SKIPS: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    FACTOR_IS_POINTER: tl.constexpr,
):
    """Step a list of tensors, as the list kernels of a fold do."""
    index, block = tensor_of_program(table_ptr, count)
    step_block(
        entry(table_ptr, count, index, 1),
        entry(table_ptr, count, index, 2),
        entry(table_ptr, count, index, 3),
        entry(table_ptr, count, index, 4),
        entry(table_ptr, count, index, 5),
        entry(table_ptr, count, index, 6),
        entry(table_ptr, count, index, 7),
        coefficients_ptr + entry(table_ptr, count, index, 9) * ROW,
        entry(table_ptr, count, index, 8),
        block,
        divisor,
        factor,
        skip_ptr,
        ALIGNED,
        UPDATE,
        WEIGHT_FORMAT,
        GRAD_FORMAT,
        START,
        SCALES,
        SKIPS,
        DIVISOR_IS_POINTER,
        FACTOR_IS_POINTER,
    )
