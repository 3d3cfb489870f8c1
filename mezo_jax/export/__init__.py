"""Makes a model to share from a run, or from a base model and a log.

`export` writes the best step of a run as a Hugging Face directory, an adapter
or a log. `rebuild` makes the fine-tuned weights again from a base model and
such a log.
"""

from mezo_jax.export.from_run import export, rebuild

__all__ = ('export', 'rebuild')
