"""Which batch size: what fits, what would fit elsewhere, what is fast, what helps training, and the plan from it.

The road through the files, from the ground up; each imports only from those before it::

    memory.py          what a device has, and what a piece of code allocates under a limit
    protocol.py        what a script's setup() provides, and the checks of it
    samples.py         batches of any size from a data set or a data loader
    frameworks.py      setups derived from transformers' Trainer, Lightning's modules, and models with data loaders
    derived.py         the setup function of whatever was named
    script.py          the script of a command: imported and run as Python would, its prints apart from the result
    precision.py       what FP32 it trains in: buffer and master weights, and attach() with them
    trial.py           windows trained before everything is put back
    fit.py             what fits: the smallest micro-batch that trains, and the largest
    speed.py           what is fast, and how to split an effective batch by it
    noise.py           what helps training: the gradient noise scale, and which effective batches it makes useful
    parts.py           whether the loss of a batch is the mean of its parts'
    options.py         how large the options may be; caveats.py: what a plan warns of
    kernels.py         what kernels need inside themselves, and what a GPU's differ in; convolutions.py: those of oneDNN
    fakes.py           a setup whose tensors are fake; tracker.py: the memory of all tensors, and its peak
    predict.py         what would fit elsewhere, on fake tensors
    scaling_laws.py    what published laws say of the batch for a budget of tokens
    token_budget.py    the laws in words, and when to raise the batch during a run
    link.py            what the exchange between ranks takes, and how few exchanges accumulation leaves
    advice.py          what to set, in words
    plan_result.py     what plan() returns; plan_reasons.py: that with its reasons in words
    plan.py            all of this, and the decision
    sweep_runs.py      a run of a sweep and its file; sweep_settings.py: what makes a sweep another one
    critical_batch.py  the largest effective batch that loses nothing, from the runs of a sweep
    sweep_result.py    what sweep() returns, and what follows
    checkpoint.py      where training can begin; sweep_training.py: one run; sweep_jobs.py: several at once
    sweep.py           training at several effective batches
    report.py          a folder of results: JSON, CSV, figures, and one page; report.html is its template
    cli.py             the two commands, in the terminal
"""

from accumkern import torch_private

torch_private.check("planning")
