"""Writes a model to share from a run, or from a base model and a log.

`export` writes the best step of a run as a Hugging Face model, an adapter or a
log. `rebuild` reconstructs the fine-tuned weights from a base model and such a
log.
"""

from mezo_jax.export.from_run import export, rebuild

__all__ = ('export', 'rebuild')
