"""Softmax cross-entropy with integer labels."""
