"""What a plan advises: whether to accumulate at all, and what is to be set."""

from __future__ import annotations

from accumkern.planning.speed import Split

_FAR = 4  # times the batch: beyond it a recipe's beta2 and learning rate are not carried over by a rule


def attach_line(buffer: str | None, master_weights: str | None, average_over: int = 1) -> str:
    """Return the call of :func:`accumkern.attach`; ``buffer`` None leaves it to its default."""
    arguments = ["optimizer"]
    if buffer is not None:
        arguments.append(repr(buffer))
    if master_weights is not None:
        arguments.append(f"master_weights={master_weights!r}")
    if average_over > 1:
        arguments.append(f"average_over={average_over}")
    return f"accumkern.attach({', '.join(arguments)})"


def settings_of(
    way: Split, target: int | None, attach: str | None, buffer: str | None, master_weights: str | None, adam: bool
) -> list[str]:
    """Return what is to be set beside micro-batch and accumulation steps, in words and as lines of code.

    Args:
        way: how it is to be trained.
        target: the effective batch that was asked for.
        attach: the call that the plan has; None where there is no reason for it.
        buffer: of that call.
        master_weights: likewise.
        adam: whether the optimizer is of Adam's kind.
    """
    steps, batch = way.accumulation_steps, way.effective_batch
    settings = [] if attach is None else [attach]
    if steps > 1 and attach is not None:
        settings.append("Loss: the mean of each micro-batch, not divided by anything; average_over does that.")
    elif steps > 1:
        settings.append(f"Loss: the mean of each micro-batch, divided by {steps}: (loss / {steps}).backward().")
    if batch == target:
        settings.append(f"Learning rate: that of your recipe for an effective batch of {batch}; nothing else changes.")
    elif adam:
        settings.append(
            f"Learning rate: that of your recipe times the square root of {batch} / its effective batch is usual with "
            f"Adam, and beta2 to the power of that ratio, where it is between 1/{_FAR} and {_FAR}; a sweep tells."
        )
    else:
        settings.append(
            f"Learning rate: that of your recipe times {batch} / its effective batch, or the square root of that; a "
            "sweep tells."
        )
    if steps > 1:
        settings.append(
            f"Or, without a loop over micro-batches: acc = {attach_line(buffer, master_weights)} and "
            f"acc.backward(loss_fn, batch, micro_batch={way.micro_batch}, model=model) with batches of "
            f"{way.micro_batch * steps} (docs/any-batch.md)."
        )
    return settings


def verdict_reason(way: Split, pays: bool | None, is_by_laws: bool, adam: bool) -> str:
    """Return in words whether accumulation is worth it.

    Args:
        way: how it is to be trained.
        pays: whether it trains faster so than without accumulation; None where that was not measured.
        is_by_laws: whether published laws chose the batch.
        adam: whether the optimizer is of Adam's kind.
    """
    if way.accumulation_steps == 1:
        return "Accumulation: not needed; the effective batch is one micro-batch."
    smaller = way.ranks * way.micro_batch
    if way.accumulation_steps > _FAR:
        advice = (
            "smaller effective batches, with less accumulation or none and learning rates of their own, often train as "
            f"well per sample (arXiv 2507.07101); {smaller}, without accumulation, is far from {way.effective_batch}, "
            "so let a sweep try some between"
        )
    else:
        beta2 = ""
        if adam:
            power = f"{1 / way.accumulation_steps:.3g}"
            beta2 = f", with Adam's beta2 raised to the power {power} so that it forgets as many samples as before,"
        advice = (
            f"an effective batch of {smaller}, without accumulation{beta2} and its own learning rate, often trains as "
            "well per sample (arXiv 2507.07101)"
        )
    if is_by_laws:
        return f"Accumulation: it makes the batch that the laws say is best for so many tokens; {advice}."
    if pays:
        return (
            "Accumulation: worth it here. Its windows spread the optimizer's step over more samples than the noise "
            "scale says they waste."
        )
    if pays is False:
        return (
            f"Accumulation: probably not worth it here. It makes no sample faster, and {advice}. Accumulate if the "
            "recipe needs the batch, if ranks have to communicate less often, or if a sweep says so."
        )
    return f"Accumulation: whether it is worth it was not measured; {advice}."
