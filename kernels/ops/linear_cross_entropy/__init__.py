"""The last linear layer and the softmax cross-entropy after it, together."""
