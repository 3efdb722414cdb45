"""The tables and sentences of every benchmark, in Markdown: each is a function of a result file's content.

A file for each benchmark. docs/benchmarks.md shows them by :data:`SECTIONS`; the README's lines are in
``headlines.py``. Nothing here needs torch.
"""

from __future__ import annotations

from tables.accuracy import accuracy_summary, accuracy_tables
from tables.batch import batch_summary, batch_tables
from tables.convergence import convergence_summary, convergence_tables
from tables.finish import finish_summary, finish_tables
from tables.kernels import kernels_summary, kernels_tables
from tables.overhead import overhead_summary, overhead_tables
from tables.parallel import parallel_summary, parallel_tables
from tables.parts import Section
from tables.plan import plan_summary, plan_tables
from tables.product import product_summary, product_tables
from tables.reduce import reduce_summary, reduce_tables
from tables.registers import registers_tables
from tables.scale import scale_summary, scale_tables
from tables.step import step_summary, step_tables
from tables.training import training_summary, training_tables
from tables.whole import whole_summary, whole_tables

#: Benchmark, which is also the name of its result file -> what is shown of it, in this order.
SECTIONS = {
    "kernels": Section("One fold of a gradient", kernels_tables, kernels_summary),
    "product": Section("A weight's gradient and its accumulation", product_tables, product_summary),
    "accuracy": Section("Error of the sum", accuracy_tables, accuracy_summary),
    "finish": Section("The end of a window", finish_tables, finish_summary),
    "overhead": Section("Host time of the hook", overhead_tables, overhead_summary),
    "batch": Section("A batch that is split at run time", batch_tables, batch_summary),
    "training": Section("Training", training_tables, training_summary),
    "step": Section("The step", step_tables, step_summary),
    "convergence": Section("Convergence", convergence_tables, convergence_summary),
    "reduce": Section("The mean over ranks", reduce_tables, reduce_summary),
    "scale": Section("The mean over many ranks, simulated", scale_tables, scale_summary),
    "parallel": Section("One global batch among ranks", parallel_tables, parallel_summary),
    "whole": Section("Whole gradients under fully_shard", whole_tables, whole_summary),
    "plan": Section("Memory, predicted and measured", plan_tables, plan_summary),
    "registers": Section("Registers of the GPU kernels", registers_tables),
}
