"""Results come in the order of the items, and workers end with their parent."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.corpus.parallel import RAY_ADDRESS, map_in_order, open_executor
from pipeline.errors import UserError


def square(number: int) -> int:
    if number < 0:
        raise ValueError("negative")
    return number * number


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    assert list(map_in_order(square, range(50), workers)) == [number**2 for number in range(50)]


@pytest.mark.parametrize("workers", [1, 2])
def test_items_are_drawn_as_results_are_taken(workers: int) -> None:
    numbers = iter(range(1, 1000))
    results = map_in_order(square, numbers, workers)
    assert next(results) == 1
    assert next(numbers) < 20
    results.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_error_in_a_worker_is_raised(workers: int) -> None:
    with pytest.raises(ValueError, match="negative"):
        list(map_in_order(square, [1, -1, 2], workers))


def die(number: int) -> int:
    if number:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^one of 2 worker processes was killed, perhaps for lack of memory;"):
        list(map_in_order(die, [0, 1, 0, 0], 2))


def die_once(item: tuple[Path, int]) -> int:
    marker, number = item
    if number == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_ray_calls_again_what_a_killed_worker_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (the extra ray)")
    monkeypatch.delenv(RAY_ADDRESS, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where Ray's workers find these functions
    with open_executor("ray", 2) as mapped:
        items = [(tmp_path / "died", number) for number in range(30)]
        assert list(mapped(die_once, items)) == list(range(30))
        with pytest.raises(ValueError, match="negative"):
            list(mapped(square, [1, -1, 2]))
    assert (tmp_path / "died").exists()


def test_a_ray_cluster_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (the extra ray)")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv(RAY_ADDRESS, f"127.0.0.1:{port}")
    with (
        pytest.raises(UserError, match=rf"^RAY_ADDRESS: no cluster answers at 127\.0\.0\.1:{port} \("),
        open_executor("ray", 2),
    ):
        pass


def test_ray_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UserError, match=r"^prepare\.executor: Ray is not installed; run pip install"),
        open_executor("ray", 2),
    ):
        pass


def test_workers_end_when_their_parent_is_killed() -> None:
    script = (
        "from pipeline.corpus.parallel import map_in_order\n"
        "for result in map_in_order(abs, iter(int, 1), 2): print(result, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "0\n"
        parent.kill()
        parent.communicate(timeout=30)  # ends only when no worker holds the pipe any more
