"""What published power laws say of the batch for a budget of D tokens, of language models pretrained with AdamW.

Power Lines (S. Bergsma et al., arXiv 2505.13738), batches in sequences of 2,048 tokens, D in tokens::

    B_opt  = 0.0306 * D ** 0.383             the batch of the lowest loss
    B_crit = 0.0471 * D_min ** 0.462         reaching a loss takes D = D_min * (1 + B / B_crit) tokens
    tau    = 1.084 * (D / N) ** -0.527       the best timescale of AdamW, tau = B / (learning rate * weight decay * D)

``D_min`` is what a very small batch would need for the same loss. N counts all parameters. Runs were of about 111
million to 3.3 billion of them, about 20 to 1,280 tokens for each, D about 2e9 to 1e11; the larger ones were not fitted
but predicted.

Step Law (H. Li et al., arXiv 2503.04715), batches in tokens::

    B_opt = 0.58 * D ** 0.571                learning rate = 1.79 * N ** -0.713 * D ** 0.307

N counts parameters that are not of embeddings, about 60 million to 1 billion; D about 2e9 to 1e11.

Neither batch depends on N. These are fits, and the loss is flat near the optimum: twice the batch is nearly as good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from accumkern.planning.protocol import Setup

_SEQUENCE = 2048  # tokens of a sequence in Power Lines
POWER_LINES, STEP_LAW = "Power Lines (arXiv 2505.13738)", "Step Law (arXiv 2503.04715)"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
#: Where the laws were fitted, about: outside, they choose nothing.
TOKENS = 2e9, 1e11
PARAMETERS = {POWER_LINES: (1.11e8, 3.3e9), STEP_LAW: (6e7, 1e9)}
TOKENS_PER_PARAMETER = 20, 1280  # Power Lines only


def power_lines_optimum(tokens: float) -> float:
    """Return Power Lines' optimal batch in tokens, for a run of so many tokens."""
    return float(_SEQUENCE * 0.0306 * tokens**0.383)


def power_lines_critical(tokens: float) -> float:
    """Return Power Lines' critical batch in tokens; ``tokens`` is D_min, what a very small batch would need."""
    return float(_SEQUENCE * 0.0471 * tokens**0.462)


def tokens_until_critical(batch: float) -> float:
    """Return the tokens for which a batch, in tokens, is Power Lines' critical one."""
    return float((batch / (_SEQUENCE * 0.0471)) ** (1 / 0.462))


def power_lines_timescale(tokens: float, parameters: float) -> float:
    """Return Power Lines' best timescale of AdamW, a part of the run."""
    return float(1.084 * (tokens / parameters) ** -0.527)


def step_law_optimum(tokens: float) -> float:
    """Return Step Law's optimal batch in tokens, for a run of so many tokens."""
    return float(0.58 * tokens**0.571)


def step_law_learning_rate(tokens: float, parameters: float) -> float:
    """Return Step Law's peak learning rate at its optimal batch; ``parameters`` leaves embeddings out."""
    return float(1.79 * parameters**-0.713 * tokens**0.307)


def format_count(number: float) -> str:
    """Return a number of tokens, samples or parameters for people: ``"10B"``."""
    for unit in ("T", "B", "M", "K"):
        if number >= 10 * UNITS[unit] or (unit != "K" and number >= UNITS[unit]):
            return f"{number / UNITS[unit]:.3g}{unit}"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


@dataclass(frozen=True)
class LawBatch:
    """A batch by a law.

    Attributes:
        law: its name and source.
        tokens: of the batch.
        samples: of the batch.
        out_of_range: why the law was not fitted for such a run; None where it was.
    """

    law: str
    tokens: float
    samples: float
    out_of_range: str | None


@dataclass(frozen=True)
class BatchLaws:
    """What the laws say of a run.

    Attributes:
        tokens: of the run.
        tokens_per_sample: of the setup.
        parameters: that are trained.
        other_parameters: those of them that are not of embeddings.
        optima: optimal batches, by Power Lines and by Step Law.
        critical: the critical batch by Power Lines, with the run's tokens for D_min.
        best_samples: the geometric mean of the optimal batches by laws in whose range the run is; None without any.
        learning_rate: by Step Law.
        timescale: of AdamW, by Power Lines.
    """

    tokens: int
    tokens_per_sample: float
    parameters: int
    other_parameters: int
    optima: tuple[LawBatch, ...]
    critical: LawBatch
    best_samples: float | None
    learning_rate: float
    timescale: float


def law_batch(laws: BatchLaws | None, ranks: int) -> int | None:
    """Return the effective batch that the laws choose, of powers of two per rank; None where they choose nothing.

    The nearest by ratio: the loss is flat around the optimum within a factor of two, and powers of two are divided by
    the micro-batches that are timed.
    """
    if laws is None or laws.best_samples is None:
        return None
    return int(ranks * 2 ** max(0, round(math.log2(laws.best_samples / ranks))))


def laws_of(setup: Setup, tokens: int) -> BatchLaws:
    """Return what the laws say of training a setup's model with so many tokens.

    Raises:
        ValueError: the setup does not say how many tokens a sample has.
    """
    per_sample = setup.tokens_per_sample
    if per_sample is None:
        raise ValueError(
            "tokens (--tokens) is given, and setup() does not say how many tokens a sample has; return an "
            "accumkern.planning.protocol.Setup with tokens_per_sample, or what accumkern.planning.frameworks has "
            "derived with ._replace(tokens_per_sample=...)"
        )
    trained = {param for param in setup.model.parameters() if param.requires_grad}
    embeddings = {module.weight for module in setup.model.modules() if isinstance(module, nn.Embedding)} & trained
    parameters = sum(param.numel() for param in trained)
    others = parameters - sum(param.numel() for param in embeddings)
    is_adam = "betas" in setup.optimizer.param_groups[0]
    name = type(setup.optimizer).__name__

    def law(law: str, batch: float) -> LawBatch:
        problem = _out_of_range(law, tokens, parameters if law == POWER_LINES else others)
        if not is_adam:
            problem = f"it is of AdamW, and the optimizer is {name}"
        return LawBatch(law, batch, batch / per_sample, problem)

    optima = law(POWER_LINES, power_lines_optimum(tokens)), law(STEP_LAW, step_law_optimum(tokens))
    fitted = [law.samples for law in optima if law.out_of_range is None]
    return BatchLaws(
        tokens=tokens,
        tokens_per_sample=per_sample,
        parameters=parameters,
        other_parameters=others,
        optima=optima,
        critical=law(POWER_LINES, power_lines_critical(tokens)),
        best_samples=math.prod(fitted) ** (1 / len(fitted)) if fitted else None,
        learning_rate=step_law_learning_rate(tokens, max(1, others)),
        timescale=power_lines_timescale(tokens, parameters),
    )


def _out_of_range(law: str, tokens: int, parameters: int) -> str | None:
    """Return where a run is beyond what a law was fitted on; ``parameters`` are those that the law counts."""
    kind = "parameters" if law == POWER_LINES else "parameters without embeddings"
    found: list[tuple[float, str, float, float]] = [(tokens, "tokens", *TOKENS), (parameters, kind, *PARAMETERS[law])]
    if law == POWER_LINES:
        found.append((tokens / parameters, "tokens per parameter", *TOKENS_PER_PARAMETER))
    problems = [
        f"{format_count(number)} {what}, and it was fitted on about {format_count(low)} to {format_count(high)}"
        for number, what, low, high in found
        if not low <= number <= high
    ]
    return "; ".join(problems) or None
