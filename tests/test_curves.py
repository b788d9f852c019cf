from pathlib import Path

from pipeline.curves import Curves, parse_curve, read_curve, write_curve

POINTS = [(0, 4.222), (51, 0.1 + 0.2), (102, float("inf"))]


def test_a_curve_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_curve(tmp_path / "loss.csv", POINTS)
    assert (tmp_path / "loss.csv").read_bytes().startswith(b"step,loss\r\n0,4.222\r\n")
    assert read_curve(tmp_path / "loss.csv") == POINTS
    assert parse_curve((tmp_path / "loss.csv").read_text()) == POINTS


def test_the_base_is_not_the_best_checkpoint() -> None:
    assert Curves(validation=[(0, 1.0), (10, 3.0), (20, 2.0)]).best_validation == (20, 2.0)
