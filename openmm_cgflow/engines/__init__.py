"""OpenMM at frozen slow atoms: Contexts, platforms, worker processes, many copies of a molecule in one System."""

__all__: list[str] = []
