"""The front of two faults."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.presets import pareto_front

small = st.integers(0, 6).map(float)


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1.0, 1.0)], [0]),
        ([(2.0, 2.0), (1.0, 3.0), (3.0, 1.0), (2.0, 3.0), (4.0, 4.0)], [1, 0, 2]),
        ([(1.0, 1.0), (1.0, 2.0), (2.0, 1.0)], [0]),
        ([(1.0, 1.0), (1.0, 1.0)], [0, 1]),
    ],
)
def test_front_by_hand(points: list[tuple[float, float]], front: list[int]) -> None:
    assert pareto_front(points) == front


@given(st.lists(st.tuples(small, small)))
def test_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    def dominated(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    front = pareto_front(points)
    assert sorted(front) == [index for index, point in enumerate(points) if not dominated(point)]
    assert [points[index] for index in front] == sorted(points[index] for index in front)
