"""Everything that a run leaves on disk, and how a run resumes from it.

A working directory holds checkpoints, the log of steps, and the numbers that
trackers show. `replay` reads and writes the log, in a training loop of your own
too. Only `checkpoint` knows orbax, and nothing here knows the training loop.
"""

from mezo_jax.runs import replay

__all__ = ('replay',)
