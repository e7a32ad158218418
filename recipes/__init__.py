"""Experiments: a function each, returning everything that a run needs."""
