"""Reads and writes the files of a run's working directory, and resumes from it.

A working directory contains checkpoints, the log of steps, and the metrics.
`replay` reads and writes the log; it can be used in your own training loop,
too. Only `checkpoint` depends on orbax, and nothing here depends on the
training loop.
"""

from mezo_jax.runs import replay

__all__ = ('replay',)
