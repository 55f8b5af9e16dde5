"""Pallas kernels, one folder an op. None has been written yet."""
