"""The life of an experiment, in the order in which it happens."""

import contextlib
import os

import jax

from train import checkpoint
from train import config as config_lib
from train import control
from train import evaluate
from train import program as program_lib
from train import progress as progress_lib
from train import signals
from train import state as state_lib
from train import transfer
from train import workdir as workdir_lib
from train import writer as writer_lib
from train.data import pipeline
from train.data import sources


def train_and_evaluate(
  config: config_lib.Config,
  workdir: str | os.PathLike,
  *,
  dataset: sources.Dataset | None = None,
) -> dict[str, float]:
  """Trains, evaluates and saves; a workdir already begun goes on from there.

  Args:
    config: the experiment.
    workdir: where config.json, metrics.jsonl, checkpoints/ and evaluations/ go.
    dataset: in place of the one that `config.data` names.

  Returns:
    The metrics on the test split after the last step, {'test/loss': ..., ...}.

  Raises:
    UserError: a mistake in the config or the workdir, before anything compiles.
    NonFiniteError: the run diverged; earlier checkpoints stay.
    Stopped: a signal ended the run early, after saving.
    SaveError: the disk did not take what was to be saved.
  """
  with signals.listen():
    return run(program_lib.create(config, dataset), workdir)


def run(
  program: program_lib.Program, workdir: str | os.PathLike
) -> dict[str, float]:
  """As train_and_evaluate, for a program whose config has been checked."""
  if not workdir_lib.is_begun(workdir):
    transfer.check(program)  # Before anything is written.
  config, say = program.config, progress_lib.say
  with contextlib.ExitStack() as stack:
    stack.enter_context(signals.listen())  # From here Ctrl-C ends cleanly.
    workdir = stack.enter_context(workdir_lib.claimed(workdir, config, say))
    progress = stack.enter_context(progress_lib.Progress(config.total_steps))
    writer = stack.enter_context(writer_lib.Writer(workdir, program, progress))
    if finished := writer.finished():
      progress.say(f'{workdir} had finished before')
      return finished
    signals.check('stopped before training began; nothing to save')
    checkpoints = stack.enter_context(
      checkpoint.Checkpoints(workdir, config, writer.scores, say=progress.say)
    )
    state, step = checkpoints.restore_newest(program) or (
      transfer.initial_state(program, progress.say), 0
    )  # fmt: skip
    writer.resume(step)  # Lines may be ahead of the newest checkpoint.
    progress.start(step)
    with jax.transfer_guard('disallow'):  # A hidden wait is an error.
      state, step = fit(program, state, step, writer, checkpoints)
    checkpoints.require(step)
    state, step = checkpoints.restore_final(program, state, step)
    # Where there is a validation part, test was never looked at until here.
    results = evaluate.evaluate(
      program,
      state,
      program.test_split,
      between=lambda: signals.check('stopped before the test, trained, saved'),
    )
    evaluate.write(workdir, program.test_split, step, results)
    program.dataset.say_damage(progress.say)
    writer.evaluated(step, evaluate.scalars(results, 'test'))  # Says: finished.
    if checkpoints.failed:
      raise workdir_lib.SaveError('finished, but a checkpoint was not saved')
    return evaluate.scalars(results, 'test')


def fit(
  program: program_lib.Program,
  state: state_lib.TrainState,
  step: int,
  writer: writer_lib.Writer,
  checkpoints: checkpoint.Checkpoints,
) -> tuple[state_lib.TrainState, int]:
  """The state after the last step, and that step; `state` has done `step`."""
  config = program.config
  batches = writer.watch(
    pipeline.train_batches(
      program.dataset.splits['train'],
      seed=config.seed,
      batch_size=config.data.batch_size,
      first_step=step,
      mesh=program.mesh,
      num_workers=config.data.num_workers,
    )
  )

  def is_due(every: int) -> bool:
    return step > 0 and (step % every == 0 or step == config.total_steps)

  def stop_if_asked():
    signals.check(f'stopped at step {step} of {config.total_steps}, saved')

  try:
    while True:
      # Before the save, which must know whether this step is the best. A run
      # that was stopped while it evaluated evaluates now.
      if is_due(config.eval_every) and not writer.find('eval', step):
        state_lib.check_finite(state, config)
        results = evaluate.evaluate(
          program, state, program.eval_split, between=stop_if_asked
        )
        writer.evaluated(step, evaluate.scalars(results, 'eval'))
      over = control.is_over(config, step, writer.scores)
      if is_due(config.checkpoint_every) or checkpoints.is_best(step) or over:
        state_lib.check_finite(state, config)
        checkpoints.save(state, step)
      stop_if_asked()
      if over:
        return state, step
      if is_due(config.eval_every):
        state = control.judged(state, config, writer.scores)
      state, metrics = program.train_step(state, next(batches))
      step += 1
      writer.stepped(step, metrics)
      checkpoints.poll()  # A save that failed is heard of now.
      if is_due(config.log_every):
        state_lib.check_finite(state, config)
        writer.train(step, metrics)
  except (signals.Stopped, pipeline.ReaderError):
    state_lib.check_finite(state, config)
    checkpoints.save(state, step)
    checkpoints.require(step)
    raise
  finally:
    batches.close()  # Worker processes end with it.
