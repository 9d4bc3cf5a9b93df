"""Same seed, same numbers: short runs of all methods against their records in tests/data.

To the last bit where the record was made; elsewhere within what other processors do to it. Where a change means to
change the numbers: `python benchmarks/same_numbers.py record tests/data/same_numbers`.
"""

from pathlib import Path

import numpy as np
import pytest
from same_numbers import CASES, differences, fingerprint, numbers, read_record

RECORDS = Path(__file__).resolve().parent / "data" / "same_numbers"
# torch without AVX, MKL and OpenBLAS for other processors (ATEN_CPU_CAPABILITY, MKL_CBWR, OPENBLAS_CORETYPE): the first
# two steps differ by up to 5e-5 of their numbers, later ones by up to 7e-3, frames by up to 0.002 nm.
FIRST, FIRST_TOLERANCE, TOLERANCE, FRAME_TOLERANCE = 2, 1e-3, 0.02, 0.01
# From its third step on, gradients that are shortened make another run of a small difference.
CHAOTIC = {"butane_reverse_kl"}
# No molecular dynamics, whose random numbers differ between versions of OpenMM.
WITHOUT_DYNAMICS = {"butane_joint", "double_well_joint"}


def _far(old, new, *, chaotic=False):
    """What is further off than other processors explain, a line each."""
    lines = [f"{name}: only in one of the two" for name in sorted(old.keys() ^ new.keys())]
    columns = sorted(name for name in old.keys() & new.keys() if name != "frames")
    parts = [(slice(FIRST), FIRST_TOLERANCE)] + ([] if chaotic else [(slice(None), TOLERANCE)])
    for name in columns:
        for part, tolerance in parts:
            one, other = old[name][part], new[name][part]
            if not _near(one, other, rtol=tolerance):
                lines.append(f"{name}: {other}, was {one}")
                break
    if not chaotic and not _near(old["frames"], new["frames"], atol=FRAME_TOLERANCE):
        lines.append("frames")
    return lines


def _near(one, other, rtol=0.0, atol=0.0):
    return one.shape == other.shape and np.allclose(other, one, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_record(case, tmp_path):
    old, where = read_record(RECORDS / f"{case}.npz")
    here = fingerprint()
    random = ("torch",) if case in WITHOUT_DYNAMICS else ("torch", "openmm")
    other = [name for name in random if where[name].split("+")[0] != here[name].split("+")[0]]
    if other:
        pytest.skip(f"recorded with other random numbers: {', '.join(f'{name} {where[name]}' for name in other)}")
    new = numbers(case, tmp_path)
    assert (differences(old, new) if where == here else _far(old, new, chaotic=case in CHAOTIC)) == []


def test_every_case_has_its_record():
    assert {path.stem for path in RECORDS.iterdir()} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_what_is_noticed(case):
    """Elsewhere, too: a number of the first steps by 0.2 %, one later, a frame, a column or a step more or less."""
    old, _ = read_record(RECORDS / f"{case}.npz")
    chaotic = case in CHAOTIC
    assert differences(old, old) == _far(old, old, chaotic=chaotic) == []
    for name in old.keys() - {"frames"}:
        for row in range(2 if chaotic else len(old[name])):
            if old[name][row] != 0 and not np.isnan(old[name][row]):
                changed = {**old, name: old[name].copy()}
                changed[name][row] *= 1.002 if row < FIRST else 1.03
                assert _far(old, changed, chaotic=chaotic)
                assert differences(old, changed)
        assert _far(old, {key: value for key, value in old.items() if key != name}, chaotic=chaotic)
    moved = {**old, "frames": old["frames"] + np.array([0.02, 0, 0], dtype=np.float32)}
    assert differences(old, moved)
    assert chaotic or _far(old, moved)
    longer = {name: np.concatenate([value, value[-1:]]) for name, value in old.items()}
    assert differences(old, longer)
    assert chaotic or _far(old, longer)
