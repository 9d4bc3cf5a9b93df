"""Only what reproduces the publication: synthetic systems with exact answers, linear map, DimeNet++."""

__all__: list[str] = []
