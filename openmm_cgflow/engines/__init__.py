"""OpenMM at frozen slow atoms: Langevin dynamics of the fast ones, many replicas at once."""

__all__: list[str] = []
