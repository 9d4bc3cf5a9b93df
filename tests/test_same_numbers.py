"""Same seed, same numbers: short runs of all methods against their records in tests/data.

To the last bit where the record was made; elsewhere within what other processors do to it. Where a change means to
change the numbers: `python benchmarks/same_numbers.py record tests/data/same_numbers`.
"""

from pathlib import Path

import numpy as np
import pytest
from same_numbers import CASES, differences, fingerprint, numbers, read_record

RECORDS = Path(__file__).resolve().parent / "data" / "same_numbers"
# On another processor: how far, relative to themselves, numbers may be off in the first two steps and in all of them,
# and positions of frames in nm. Ten times and more what torch without AVX and other paths of MKL and OpenBLAS do
# (ATEN_CPU_CAPABILITY, MKL_CBWR, OPENBLAS_CORETYPE). A wrong sign of the slow Jacobian moves butane_reverse_kl by 1e-4;
# from its third step on, gradients that are shortened make another run of any difference.
FIRST = 2
TOLERANCES = {
    "ala2_pmf": (5e-4, 0.02, 2e-3),
    "ala2_reverse_kl": (1e-6, 1e-5, 1e-5),
    "butane_pmf": (5e-5, 5e-3, 2e-4),
    "butane_reverse_kl": (1e-6, None, None),
    "butane_joint": (5e-5, 5e-4, 1e-5),
    "double_well_pmf": (2e-4, 0.1, 0.05),
    "double_well_joint": (5e-4, 1e-3, 1e-4),
}
# No molecular dynamics, whose random numbers differ between versions of OpenMM.
WITHOUT_DYNAMICS = {"butane_joint", "double_well_joint"}


def _far(old, new, first, later, positions):
    """What is further off than other processors explain, a line each."""
    lines = [f"{name}: only in one of the two" for name in sorted(old.keys() ^ new.keys())]
    columns = sorted(name for name in old.keys() & new.keys() if name != "frames")
    parts = [(slice(FIRST), first)] + ([] if later is None else [(slice(None), later)])
    for name in columns:
        for part, tolerance in parts:
            one, other = old[name][part], new[name][part]
            if not _near(one, other, rtol=tolerance):
                lines.append(f"{name}: {other}, was {one}")
                break
    if positions is not None and not _near(old["frames"], new["frames"], atol=positions):
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
    assert (differences(old, new) if where == here else _far(old, new, *TOLERANCES[case])) == []


def test_every_case_has_its_record():
    assert {path.stem for path in RECORDS.iterdir()} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_what_is_noticed(case):
    """Elsewhere, too: any number that is twice its tolerance off, a column more or less, a step more, moved frames."""
    old, _ = read_record(RECORDS / f"{case}.npz")
    first, later, positions = TOLERANCES[case]
    assert differences(old, old) == _far(old, old, *TOLERANCES[case]) == []
    for name in old.keys() - {"frames"}:
        for row in range(FIRST if later is None else len(old[name])):
            if old[name][row] != 0 and not np.isnan(old[name][row]):
                changed = {**old, name: old[name].copy()}
                changed[name][row] *= 1 + 2 * (first if row < FIRST else later)
                assert _far(old, changed, *TOLERANCES[case])
                assert differences(old, changed)
        assert _far(old, {key: value for key, value in old.items() if key != name}, *TOLERANCES[case])
    if positions is not None:
        moved = {**old, "frames": old["frames"] + np.array([2 * positions, 0, 0], dtype=np.float32)}
        assert differences(old, moved)
        assert _far(old, moved, *TOLERANCES[case])
        longer = {name: np.concatenate([value, value[-1:]]) for name, value in old.items()}
        assert differences(old, longer)
        assert _far(old, longer, *TOLERANCES[case])
