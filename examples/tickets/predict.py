"""Names the team of each message in new.csv."""
import csv

import jax
import jax.numpy as jnp
import mine

from mezo_jax import models

task = mine.get_config().task
model, params = models.load('ticket-model')
tokenizer = models.load_tokenizer('ticket-model')
apply = jax.jit(lambda params, ids: model.apply({'params': params}, ids))


def score(prompt, answer):
  """Returns the mean log-likelihood of the answer's tokens."""
  before = tokenizer(prompt)['input_ids']
  after = tokenizer(answer, add_special_tokens=False)['input_ids']
  log_p = jax.nn.log_softmax(apply(params, jnp.array([before + after]))[0])
  rows = range(len(before) - 1, len(before) + len(after) - 1)
  return float(jnp.mean(jnp.stack([log_p[i, t] for i, t in zip(rows, after)])))


with open('new.csv', newline='') as file:
  for row in csv.DictReader(file):
    scores = [score(task.prompt(row), word) for word in task.candidates(row)]
    best = max(range(len(scores)), key=scores.__getitem__)
    print(f'{task.label_names[best]:10}{row["text"]}')
