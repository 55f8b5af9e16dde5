"""What a person runs: `python -m experiments` lists it."""

import os.path
import sys

# `python -m` puts the current folder first on the path, where a jax.py that
# somebody left in a workdir would be taken for the library. While Python looks
# for the module to run, argv[0] is '-m'.
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if (
  sys.argv[0] == '-m'
  and not sys.flags.safe_path
  and os.path.abspath(sys.path[0]) != _ROOT
):
  del sys.path[0]
