"""What the recurrent networks' configs reach, beside what is simpler."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model

from experiments import command
from experiments import restore
from train import loop
from train import program as program_lib
from train.data import sources

pytestmark = pytest.mark.slow


def load(config_name, **model):
  config, _, _ = command.load_config(config_name, [])
  return dataclasses.replace(config, model=config.model | model)


def arrays(config, split):
  data = config.data
  dataset = sources.load(data.name, sequence_length=data.sequence_length)
  return dataset.splits[split].arrays


@pytest.mark.long
def test_an_lstm_forecasts_better_than_a_line_through_the_same_values(tmp_path):
  config = load('series_lstm')
  found = loop.train_and_evaluate(config, tmp_path)
  train, test = (arrays(config, split) for split in ('train', 'test'))
  x, y = train['features'][..., 0], train['label']
  x_test, y_test = test['features'][..., 0], test['label']
  line = sklearn.linear_model.LinearRegression().fit(x, y)
  errors = [
    np.square(forecast - y_test).mean()
    for forecast in (x_test[:, -1], line.predict(x_test))
  ]
  assert found['test/mean_squared_error'] < 0.1 * min(errors)


@pytest.mark.long
def test_an_lstm_adds_over_a_hundred_steps_and_a_plain_network_does_not(
  tmp_path,
):
  errors = {
    name: loop.train_and_evaluate(
      load('adding_lstm', name=name), tmp_path / name
    )['test/mean_squared_error']
    for name in ('lstm', 'rnn')
  }
  assert errors['lstm'] < 0.01
  # 1/12 is the error of who remembers one of the two numbers.
  assert errors['rnn'] > 0.03


@pytest.mark.long
def test_words_are_reversed_from_what_the_model_itself_has_written(tmp_path):
  config = load('reverse_seq2seq')
  found = loop.train_and_evaluate(config, tmp_path)
  assert found['test/sequence_accuracy'] > 0.99
  program = program_lib.create(config)
  state, _ = restore.restore(tmp_path, program, 'latest')
  test = {k: v[:500] for k, v in arrays(config, 'test').items()}
  written = program.merge(state).greedy(
    jnp.asarray(test['tokens'], jnp.int32), 10, lengths=test['lengths']
  )
  right = (written == test['targets']) | (test['targets'] < 0)
  assert right.all(1).mean() > 0.99
