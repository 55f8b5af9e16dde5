"""softmax and log_softmax over any axis, with masks."""
