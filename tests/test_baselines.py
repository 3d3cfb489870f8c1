"""The linear probe, against what it is by definition."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mezo_jax import models, peft
from mezo_jax.training import linear_probe


@pytest.mark.parametrize('classes,bias', [(2, False), (2, True), (3, True)])
def test_a_probe_written_into_the_head_scores_as_the_probe(classes, bias):
  rng = np.random.RandomState(0)
  labels = np.arange(60) % classes
  x = (rng.randn(60, 8) + 2 * np.eye(8)[labels]).astype(np.float32)
  probe = linear_probe.fit_probe(x, labels, bias)
  scores = linear_probe.probe_scores(probe, x, classes)
  np.testing.assert_array_equal(scores.argmax(1), probe.predict(x))
  log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
  np.testing.assert_allclose(np.exp(log_p), probe.predict_proba(x), rtol=1e-5)
  ids = np.array([7, 2, 5])[:classes]
  params = linear_probe.write_probe(
      {'lm_head': {'embedding': jnp.zeros((9, 8))},
       'head': {'bias': jnp.zeros(9)}}, probe, ids)
  logits = x @ params['lm_head']['embedding'][ids].T + params['head']['bias'][
      ids]
  np.testing.assert_allclose(logits, scores, rtol=1e-4, atol=1e-5)


def test_an_untied_model_is_the_same_model(tiny_dir, tmp_path):
  model, params = models.load(tiny_dir, progress=False)
  ids = np.arange(12).reshape(2, 6)
  free, separate = peft.untie(model, params)
  assert not free.config.tied_head and model.config.tied_head
  np.testing.assert_array_equal(
      jax.jit(model.apply)({'params': params}, ids),
      jax.jit(free.apply)({'params': separate}, ids))
  models.save(tmp_path / 'm', free, separate, progress=False)
  again, loaded = models.load(tmp_path / 'm', progress=False)
  assert not again.config.tied_head
  helpers.assert_bitwise(loaded, separate)
