"""A requeue by SLURM, done where a checkpoint of the run is exact.

SLURM's signal comes at any moment. Lightning saves a checkpoint then and there: amid a
batch its loader is a batch ahead, amid a measurement the weights may be others.
"""

from __future__ import annotations

from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

_HANDLER = "_slurm_sigusr_handler_fn"


def requeues(trainer: Trainer) -> bool:
    """Say whether SLURM runs a Trainer, which has its job begin again."""
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, SLURMEnvironment) and environment.auto_requeue


class DeferredRequeue:
    """Lightning's handler of SLURM's signal, put off until `due` is asked for.

    It is done once a fit: the job begins again then. Ranks that got the signal at
    different batches do it together.

    Args:
        trainer: About to register its handlers.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._connector: Any = trainer._signal_connector
        self._handle = getattr(type(self._connector), _HANDLER)
        self._received: int | None = None
        self._done = False
        setattr(self._connector, _HANDLER, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._received is None:
            rank_zero_info(f"Signal {number}: a requeue, once the batch has ended")
        self._received = number

    def do_if_due(self) -> None:
        """Save the checkpoint and requeue the job where a rank got the signal.

        All ranks call it at the same batch.
        """
        if self._done or not self._is_received():
            return
        self._done = True
        self._handle(self._connector, self._received or 0, None)

    def _is_received(self) -> bool:
        received = self._received is not None
        if self._trainer.world_size == 1:
            return received
        return self._trainer.strategy.reduce_boolean_decision(received, all=False)
