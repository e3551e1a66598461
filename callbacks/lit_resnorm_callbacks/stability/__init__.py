"""Twins of a run that lack single examples: the probe, and how it follows the run."""
