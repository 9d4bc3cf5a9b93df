"""A run on disk: directory, log, metrics, checkpoints, trajectories. No torch and no OpenMM."""

__all__: list[str] = []
