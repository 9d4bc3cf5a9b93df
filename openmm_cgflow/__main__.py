"""``python -m openmm_cgflow``, the same as the command ``openmm-cgflow``."""

from __future__ import annotations

import sys

from openmm_cgflow.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
