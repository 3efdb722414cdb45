"""Which batch size: what fits, what would fit elsewhere, what is fast, what helps training, and the plan from it.

The road through the files, from the ground up; each imports only from those before it::

    memory.py          sizes as people write them; what a device has, and what a piece of code allocates under a limit
    protocol.py        what a script's setup() provides, and the checks of it
    samples.py         batches of any size from a data set or a data loader
    frameworks.py      setups derived from transformers' Trainer, Lightning's modules, and models with data loaders
    derived.py         the setup function of whatever was named
    script.py          the script of a command: imported and run as Python would, its prints apart from the result
    precision.py       what FP32 it trains in: buffer and master weights, and attach() with them
    ranks.py           what data-parallel ranks agree on
    trial.py           windows trained before everything is put back; what fits
    speed.py           what is fast, and how to split an effective batch by it
    noise.py           what helps training: the gradient noise scale, and which effective batches it makes useful
    predict.py         what would fit elsewhere, on fake tensors
    plan_result.py     what plan() returns, and its reasons in words; plan.py: all of this, and the decision
    sweep_result.py    what sweep() returns, and what follows; sweep.py: training at several effective batches
    report.py          a folder of results: JSON, CSV, figures, and one page; report.html is its template
    cli.py             the two commands, in the terminal
"""

from accumkern import torch_private

torch_private.check("planning")
