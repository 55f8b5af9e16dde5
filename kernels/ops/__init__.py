"""One folder an op: its public function, and an implementation a chip.

In each, `api.py` checks the arguments, chooses and differentiates;
`reference.py` is plain JAX, which the others are held against; `pallas_tpu.py`
is for Mosaic TPU, `pallas_gpu.py` for Mosaic GPU; `shapes.py` has the sizes of
blocks and says what a kernel cannot take.
"""
