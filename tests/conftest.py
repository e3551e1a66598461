"""Settings that must stand before torch is imported."""

import os

# Small tensors are faster on one thread a process, and the processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
