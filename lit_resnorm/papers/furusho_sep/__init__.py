"""Furusho & Ikeda (2019): ResNet and batch-normalization improve data separability.

ACML 2019, PMLR 101:94-108. Full text available.
"""
