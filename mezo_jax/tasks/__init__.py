"""What a row of data becomes: prompts, answers, scores and a loss."""

from mezo_jax.tasks.classification import Classification

__all__ = ('Classification',)
