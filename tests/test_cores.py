"""How many cores a process may use, by the files of control groups."""

from pathlib import Path

import onnxruntime as ort
import pytest

from pipeline import cores
from pipeline.engine.session import session_options
from pipeline.errors import UserError

DEFAULT_THREADS = ort.SessionOptions().intra_op_num_threads


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        # Version 2 in a container: its own group is the top.
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        # A service of systemd: the group above has less.
        (
            "0::/app.slice/api.service\n",
            {"app.slice/cpu.max": "200000 100000\n", "app.slice/api.service/cpu.max": "400000 100000\n"},
            2.0,
        ),
        # Version 2 with the host's path, of which a container sees only its own part.
        ("0::/system.slice/docker-1f.scope\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/../other\n", {"cpu.max": "300000 100000\n"}, 3.0),
        # Version 1, where a folder has the controllers' names or a link has one of them.
        (
            "5:cpuset:/\n4:cpu,cpuacct:/docker/1f\n1:name=systemd:/docker/1f\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        (
            "1:cpu:/jobs/a:b\n0::/\n",
            {"cpu/jobs/a:b/cpu.cfs_quota_us": "20000\n", "cpu/jobs/a:b/cpu.cfs_period_us": "10000\n"},
            2.0,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        # The accounting of time is no limit.
        ("2:cpuacct:/\n", {"cpuacct/cpu.cfs_quota_us": "1\n", "cpuacct/cpu.cfs_period_us": "100000\n"}, None),
        # Another group's quota is not this process's.
        ("0::/mine\n", {"other/cpu.max": "100000 100000\n"}, None),
    ],
)
def test_the_quota_is_the_least_of_the_groups(
    own: str, files: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own)
    assert cores.cpu_quota(tmp_path / "own", write_files(tmp_path / "groups", files)) == expected


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert cores.cpu_quota(tmp_path / "missing", tmp_path) is None


@pytest.fixture
def quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says the quota of this process, on a processor of eight cores."""
    write_files(tmp_path, {"own": "0::/\n", "groups/cpu.max": "max 100000\n"})
    monkeypatch.setattr(cores, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(cores, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(cores, "physical_cores", lambda: 8)
    return tmp_path / "groups" / "cpu.max"


@pytest.mark.parametrize(
    ("text", "threads"),
    [("max 100000", None), ("800000 100000", None), ("390000 100000", 3), ("100000 100000", 1), ("20000 100000", 1)],
)
def test_an_operator_has_no_more_threads_than_the_quota_has_cores(text: str, threads: int | None, quota: Path) -> None:
    quota.write_text(text)
    assert session_options(None).intra_op_num_threads == (threads or DEFAULT_THREADS)
    assert cores.usable_cores() == (threads or 8)
    assert session_options(5).intra_op_num_threads == 5


@pytest.mark.parametrize("threads", [0, -1, "2", 1.5])
def test_threads_that_are_no_count_are_refused(threads: object) -> None:
    with pytest.raises(UserError, match=r"^threads: .* must be a whole number from 1"):
        session_options(threads)  # type: ignore[arg-type]


def test_physical_cores_are_at_most_the_allowed_ones() -> None:
    assert 1 <= cores.physical_cores() <= len(cores.allowed_cores())
