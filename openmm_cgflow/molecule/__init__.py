"""What is simulated: files to a System, and its atoms to slow and fast ones."""

__all__: list[str] = []
