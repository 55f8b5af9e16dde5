"""Each config over several seeds, beside scikit-learn's estimators."""

import json
import statistics
import tempfile
import time
from typing import Any

from experiments import command
from experiments.benchmarks import silence

# The configs whose data needs no download.
EMBEDDED = (
  'cancer_logistic', 'cancer_perceptron', 'cancer_svm', 'diabetes_linear',
  'digits_cnn', 'digits_linear', 'digits_mlp',
)  # fmt: skip


def main(configs: list[str], seeds: int):
  """Prints the mean and range of each config; of none, the embedded ones'."""
  names = configs or EMBEDDED
  references = scikit_learn(seeds) if set(names) & set(EMBEDDED) else {}
  for name in names:
    row = result(name, seeds)
    row['scikit_learn'] = references.get(name)
    print(json.dumps(row), flush=True)


def result(name: str, seeds: int) -> dict[str, Any]:
  """A config's metric on test, over seeds 0 to `seeds` - 1."""
  from train import loop as loop_lib

  values, seconds = [], []
  for seed in range(seeds):
    config, _, _ = command.load_config(name, [('seed', str(seed))])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, silence.silence():
      final = loop_lib.train_and_evaluate(config, folder)
    seconds.append(time.perf_counter() - start)
    error = 'test/mean_squared_error'
    key = 'test/accuracy' if 'test/accuracy' in final else error
    values.append(final[key])
  return {
    'config': name,
    'metric': key,
    'mean': statistics.mean(values),
    'min': min(values),
    'max': max(values),
    'seeds': seeds,
    'median_seconds': round(statistics.median(seconds), 1),
  }


def scikit_learn(seeds: int) -> dict[str, float]:
  """config -> scikit-learn's test accuracy or squared error on that split.

  Estimators with their own defaults; the perceptron's depends on its seed, so
  it is the mean of as many seeds as ours.
  """
  import numpy as np
  from sklearn import linear_model
  from sklearn import preprocessing
  from sklearn import svm

  from train.data import sources

  def arrays(name: str):
    splits = sources.load(name).splits
    train, test = splits['train'].arrays, splits['test'].arrays
    flat = [a.reshape(len(a), -1).astype(float) for a in (
      train[sources.load(name).input_key], test[sources.load(name).input_key]
    )]  # fmt: skip
    scaler = preprocessing.StandardScaler().fit(flat[0])
    return (
      scaler.transform(flat[0]),
      train['label'],
      scaler.transform(flat[1]),
      test['label'],
    )

  def score(estimator, data) -> float:
    x, y, x_test, y_test = data
    return float(estimator.fit(x, y).score(x_test, y_test))

  cancer, diabetes, digits = map(
    arrays, ('breast_cancer', 'diabetes', 'digits')
  )
  x, y, x_test, y_test = diabetes
  line = linear_model.LinearRegression().fit(x, y)
  return {
    'cancer_perceptron': statistics.mean(
      score(linear_model.Perceptron(random_state=seed), cancer)
      for seed in range(seeds)
    ),
    'cancer_logistic': score(linear_model.LogisticRegression(), cancer),
    'cancer_svm': score(
      svm.LinearSVC(loss='hinge', max_iter=100_000, random_state=0), cancer
    ),
    'diabetes_linear': float(np.square(line.predict(x_test) - y_test).mean()),
    'digits_linear': score(
      linear_model.LogisticRegression(max_iter=5_000), digits
    ),
  }
