"""What experiments.benchmark measures, one suite a file."""
