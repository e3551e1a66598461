"""Labatie (2019): well-behaved and pathological deep networks.

Characterizing Well-behaved vs. Pathological Deep Neural Networks, ICML 2019,
arXiv 1811.03087; public code and stored results alabatie/moments-dnns.
"""
