"""Experiments, one file each: `python -m experiments` lists them."""
