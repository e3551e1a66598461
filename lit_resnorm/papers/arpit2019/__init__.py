"""Arpit & Bengio (2019): norms of states and gradients in deep rectifier nets."""
