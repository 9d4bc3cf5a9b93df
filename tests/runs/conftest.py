import re

import pytest

from openmm_cgflow.cli import main


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with exit code 2 and one message that has the given words; returns the message."""

    def run(*arguments, says):
        capsys.readouterr()
        try:
            code = main([str(item) for item in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
        error = capsys.readouterr().err
        assert code == 2, error
        assert len(re.findall(r"^openmm-cgflow( \w+)?: error: ", error, re.MULTILINE)) == 1, error
        assert "Traceback" not in error
        for word in says:
            assert word in error, error
        return error

    return run
