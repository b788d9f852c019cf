"""How many cores this process may use: those it may run on, and the quota of its container."""

import os
import sys
from pathlib import Path, PurePosixPath

OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def allowed_cores() -> set[int]:
    """Return the logical cores that this process may run on."""
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Return how many cores this process may run on; the threads of one core count once (known on Linux only)."""
    allowed = allowed_cores()
    siblings = {
        path.read_text().strip()
        for core in allowed
        if (path := Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")).is_file()
    }
    return len(siblings) or len(allowed)


def threads_within_quota() -> int | None:
    """Return how many threads a quota leaves room for, or None if it leaves room for one per physical core.

    A part of a core does not count: a thread that is held until the next period holds all that wait for it.
    """
    quota = cpu_quota(OWN_GROUPS, GROUPS)
    return None if quota is None or quota >= physical_cores() else max(1, int(quota))


def usable_cores() -> int:
    """Return how many threads this process keeps busy at best: one per physical core, or what its quota leaves."""
    return threads_within_quota() or physical_cores()


def cpu_quota(own_groups: Path, groups: Path) -> float | None:
    """Return how many cores' time the control groups of a process grant it, or None without a quota.

    `own_groups` lists the groups (`/proc/self/cgroup`), and `groups` is the folder of all. A group has at most what
    those above it have. Inside a container, `groups` may begin at the container's own group, whose path is then not
    in it: the quota is at the top.
    """
    text = own_groups.read_text() if own_groups.is_file() else ""
    grants = [
        read_grant(folder)
        for controllers, path in parse_groups(text)
        for root in ((groups,) if controllers == "" else (groups / controllers, groups / "cpu"))
        for folder in (root / above.relative_to("/") for above in (PurePosixPath(path), *PurePosixPath(path).parents))
    ]
    return min((grant for grant in grants if grant is not None), default=None)


def parse_groups(text: str) -> list[tuple[str, str]]:
    """Return the groups in `/proc/self/cgroup` that may have a quota, as controllers (`''` in version 2) and path."""
    fields = [line.split(":", 2) for line in text.splitlines()]
    return [(controllers, path) for _, controllers, path in fields if {"", "cpu"} & set(controllers.split(","))]


def read_grant(group: Path) -> float | None:
    """Return how many cores' time a group grants, by its files of version 2 or 1, or None without a quota."""
    if (file := group / "cpu.max").is_file():
        return parse_grant(file.read_text())
    files = [group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"]
    return parse_grant(" ".join(file.read_text() for file in files)) if all(map(Path.is_file, files)) else None


def parse_grant(text: str) -> float | None:
    """Return the ratio of a quota to its period, both in microseconds; None for `max` and -1, which are no quota."""
    quota, period = text.split()
    return None if quota == "max" or int(quota) < 0 else int(quota) / int(period)
