"""Estimators on tensors and plain modules: torch only, no Trainer needed."""
