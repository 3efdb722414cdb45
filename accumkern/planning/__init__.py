"""Which batch size: what fits, what would fit elsewhere, what is fast, what helps training, and the plan from it."""
