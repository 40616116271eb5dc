"""How many processors this process may keep busy.

A container's limit of processors is a quota of time: ``os.cpu_count()`` in a pod that may use two of a node's 64
processors says 64, and 64 threads that decode pictures would use the quota up at once and then all stand still.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cpus(cgroups: Path = _CGROUPS, own_cgroups: Path = _OWN_CGROUPS) -> int:
    """Returns how many processors this process may keep busy: its affinity, or its cgroup's quota where that is less.

    A quota of a part of a processor counts as a whole one. What can't be read is taken for no limit.

    Args:
        cgroups: Where cgroups are mounted: one tree (version 2), or a folder for each controller (version 1).
        own_cgroups: The kernel's list of the cgroups that the process is in.
    """
    quota = cpu_quota(cgroups, own_cgroups)
    return max(1, math.ceil(_affinity() if quota is None else min(_affinity(), quota)))


def cpu_quota(cgroups: Path = _CGROUPS, own_cgroups: Path = _OWN_CGROUPS) -> float | None:
    """Returns the limit of processors of this process's cgroup, which may be a part of one; None for no limit.

    Args:
        cgroups: As for `available_cpus`.
        own_cgroups: Likewise.
    """
    quotas = (_quota(folder) for folder in _folders(cgroups, own_cgroups))
    return min((quota for quota in quotas if quota is not None), default=None)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows


def _folders(cgroups: Path, own_cgroups: Path) -> list[Path]:
    """Returns the folders whose limits apply: the process's cgroup and those it lies in.

    In a container the list may name the cgroup as the node sees it, which isn't there; its own is mounted as the root.
    """
    folders = []
    for line in _read(own_cgroups).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        inside = PurePosixPath(path.lstrip("/"))
        # Version 1 mounts controllers together or apart, and links from the single name as a rule.
        roots = [cgroups / controllers, cgroups / "cpu"] if controllers else [cgroups]
        folders += [root / part for root in roots for part in (inside, *inside.parents)]
    return folders


def _quota(folder: Path) -> float | None:
    """Returns a cgroup's limit in processors, None where it has none."""
    both = _read(folder / "cpu.max").split()  # version 2: "quota period", or "max period"
    quota, period = both if len(both) == 2 else (_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    with suppress(ValueError, ZeroDivisionError):
        if (cpus := int(quota) / int(period)) > 0:  # version 1 has a quota of -1 for none
            return cpus
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
