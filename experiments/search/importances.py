"""How much of the metric's variance each parameter explains, by Optuna."""

from typing import Any

from experiments.search import results
from experiments.search import scales
from train import config as config_lib

_FEWEST = 4  # Finished trials.


def importances(
  sweep: results.Sweep,
) -> tuple[dict[str, float], str]:
  """Parameter -> Optuna's share, the greatest first; or why there is none."""
  import optuna

  trials = sweep.best_first
  if len(trials) < _FEWEST:
    return {}, f'it takes {_FEWEST} finished trials, of which are {len(trials)}'
  if len({t.value for t in trials}) == 1:
    return {}, f'all finished trials have the value {trials[0].value:.4g}'
  common = [n for n in trials[0].params if all(n in t.params for t in trials)]
  spread = {
    name: _distribution(sweep, name, [t.params[name] for t in trials])
    for name in common
  }
  spread = {name: d for name, d in spread.items() if d is not None}
  if not spread:
    return {}, 'no parameter varies that all finished trials have'
  loud = optuna.logging.get_verbosity()
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  try:
    study = optuna.create_study(
      direction='maximize' if sweep.maximize else 'minimize'
    )
    for trial in sorted(trials, key=lambda t: t.number):
      study.add_trial(
        optuna.create_trial(
          value=trial.value,
          params={n: _plain(d, trial.params[n]) for n, d in spread.items()},
          distributions=spread,
        )
      )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(
      study, evaluator=evaluator
    ), ''
  except (ValueError, RuntimeError) as error:  # Values outside of the space.
    return {}, config_lib.first_line(error)
  finally:
    optuna.logging.set_verbosity(loud)


def _distribution(sweep: results.Sweep, name: str, values: list[Any]):
  """Optuna's, of the space or of a list's values; None: they do not vary."""
  import optuna

  words = (sweep.space or {}).get(name)
  scale = scales.Scale(words, values)
  if len(set(map(repr, values))) == 1:
    return None
  if scale.choices:
    return optuna.distributions.CategoricalDistribution(scale.order)
  kind, low, high = words or (None, min(values), max(values))
  if kind == 'int':
    return optuna.distributions.IntDistribution(low, high)
  return optuna.distributions.FloatDistribution(low, high, log=scale.is_log)


def _plain(distribution, value: Any) -> float | str:
  """Optuna's choices are words and numbers: a tuple goes by its words."""
  return repr(value) if hasattr(distribution, 'choices') else value
