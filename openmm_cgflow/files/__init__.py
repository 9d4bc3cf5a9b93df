"""A run on disk: its directory, log, checkpoints and trajectories. No torch and no OpenMM."""

__all__: list[str] = []
