import pytest

from openmm_cgflow.files.log import append_row, drop_rows_after, read_rows


@pytest.fixture
def metrics(tmp_path):
    return tmp_path / "metrics.csv"


def test_metrics_are_exact_and_truncated(metrics):
    rows = [{"step": k, "value": 0.1 * k, "odd": float("nan") if k == 2 else 1e-300} for k in range(1, 6)]
    for row in rows:
        append_row(metrics, row)
    assert repr(read_rows(metrics)) == repr([{key: float(value) for key, value in row.items()} for row in rows])
    whole = metrics.read_bytes()
    with metrics.open("a") as file:
        file.write("6,0.")  # a crash in the middle of a row
    assert len(read_rows(metrics)) == 5
    drop_rows_after(metrics, 3)
    assert [row["step"] for row in read_rows(metrics)] == [1, 2, 3]
    for row in rows[3:]:
        append_row(metrics, row)
    assert metrics.read_bytes() == whole
    drop_rows_after(metrics, 0)
    assert read_rows(metrics) == []


def test_metrics_columns_are_fixed(metrics):
    append_row(metrics, {"step": 1, "a": 2})
    with pytest.raises(ValueError, match="columns"):
        append_row(metrics, {"step": 2, "b": 2})
