"""Passes of a network over a batch: what every measure stands on."""
