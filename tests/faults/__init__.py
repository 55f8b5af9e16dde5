"""Faults that are made for real, and what the promises say must then be."""
