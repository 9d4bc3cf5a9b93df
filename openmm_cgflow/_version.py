"""The version of the package, in a file that imports nothing: where it is built, read and printed."""

__all__ = ["__version__"]

__version__ = "0.2.0"
