"""Reward functions that tests call in other processes."""

import os
import sys
import time


def share(text, row):
  """Returns the share of the word 'good' in 16 words."""
  return text.split().count('good') / 16


def parts(text, row):
  """Returns two named parts."""
  return {'length': 0.5 * len(text), 'label': float(row['label'])}


def length(text, row):
  """Returns the number of characters."""
  del row
  return len(text)


def mischief(text, row):
  """Fails in the way that the text says; other texts have the reward 2."""
  if text == 'raise':
    raise KeyError('no such thing')
  if text == 'hang':
    time.sleep(60)
  if text == 'exit':
    os._exit(3)
  if text == 'leave':
    sys.exit(3)
  if text == 'huge':
    return 1e39  # not a float32
  if text == 'text':
    return 'good'
  return float('nan') if text == 'nan' else 2


def always(text, row):
  """Fails always."""
  raise RuntimeError('not today')


def one(text):
  """Takes one argument only."""
  return 1.0
