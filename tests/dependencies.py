"""What setup.cfg and the files for conda ask for, in one form: the constraint of each package by its name."""

import configparser
import re

# Where conda-forge has another name than PyPI.
_CONDA = {"torch": "pytorch", "openmmtorch": "openmm-torch", "openmmml": "openmm-ml", "matplotlib": "matplotlib-base"}


def read_setup(root):
    """The sections of setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(root / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text):
    """Name and version constraint of each line, with or without a space between them."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return dict(re.fullmatch(r"([A-Za-z0-9_.-]+?) *((?:[<>=]=?.*)?)", line).groups() for line in lines)


def on_conda_forge(wanted):
    """The same requirements by conda-forge's names."""
    return {_CONDA.get(name, name): version for name, version in wanted.items()}
