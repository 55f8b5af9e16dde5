"""2-D convolution with what follows it, and with what a batch norm needs."""
