"""The machine that Kubernetes runs on: mount, network and process namespaces of its own on this one.

All that the cluster starts, mounts and plugs in is inside, containers too. So ending one process, the namespaces'
first, takes everything away, whatever state it is in, and no setting of this machine is touched. One wire
(a veth pair) leads in; there is no route from the node to the outside, and none from the outside to it.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .config import BIN, CGROUP, HOST_IP, HOST_LINK, NETWORK, NODE_IP, RUN, SERVICE_CIDR
from .shell import run, succeeds, wait

PIDS = RUN / "pids"
LOGS = RUN / "log"
COMPLETE = RUN / "node-is-complete"
# containerd, runc and the kubelet write here whatever they are told. Their own, empty, in the node.
PRIVATE = ("/run", "/var/lib", "/var/log")


def start() -> None:
    """Makes the namespaces and the wire, where they aren't there."""
    if is_running():
        return
    PIDS.mkdir(parents=True, exist_ok=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    _spawn("unshare", "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", BIN / "pause")
    wait("the node's first process", 10, _record_first)
    for private in PRIVATE:
        run(*inside("mount", "-t", "tmpfs", "tmpfs", private))
    run("ip", "link", "add", HOST_LINK, "type", "veth", "peer", "name", "eth0", "netns", str(_process("first")))
    run("ip", "address", "add", f"{HOST_IP}/32", "peer", f"{NODE_IP}/32", "dev", HOST_LINK)
    run("ip", "link", "set", HOST_LINK, "up")
    run("ip", "route", "add", NETWORK, "via", NODE_IP)
    run(*inside("ip", "link", "set", "lo", "up"))
    run(*inside("ip", "address", "add", f"{NODE_IP}/32", "peer", f"{HOST_IP}/32", "dev", "eth0"))
    run(*inside("ip", "link", "set", "eth0", "up"))
    # kube-proxy sends service addresses elsewhere, but only after the kernel has found some way to them.
    run(*inside("ip", "route", "add", SERVICE_CIDR, "dev", "lo"))
    run(*inside("sysctl", "-q", "-w", "net.ipv4.ip_forward=1"))
    for folder in _cgroups():
        folder.mkdir(exist_ok=True)
    COMPLETE.touch()


def stop() -> None:
    """Ends everything in the node, and removes what it left on this machine. Harmless where nothing is."""
    if (first := _process("first") or _process("unshare")) is not None:
        os.kill(first, signal.SIGKILL)
    # The kernel lets the first process of a namespace end only after all the others.
    wait("the end of the node's processes", 60, lambda: _process("first") is None and _process("unshare") is None)
    if succeeds(["ip", "link", "show", HOST_LINK]):  # goes with the namespace, but in the kernel's own time
        succeeds(["ip", "link", "delete", HOST_LINK])
    for folder in _cgroups():
        for inner in sorted((Path(path) for path, _, _ in os.walk(folder)), key=lambda path: -len(path.parts)):
            wait(f"an empty {inner}", 10, functools.partial(_is_removed, inner))
    # All mounts were the node's: nothing here leads out of the folder.
    shutil.rmtree(RUN, ignore_errors=True)


def is_running() -> bool:
    """Whether the node was made to the end, and lives."""
    return COMPLETE.exists() and _process("first") is not None


def inside(*command: str | Path) -> list[str]:
    """The command that runs `command` in the node."""
    return ["nsenter", "--target", str(_process("first")), "--mount", "--net", "--pid", "--", *map(str, command)]


def daemon(name: str, *command: str | Path, env: dict[str, str] | None = None) -> None:
    """Starts a daemon in the node, unless it runs already. Its output goes to a log of its name."""
    if _process(name) is None:
        _spawn(name, *inside(*command), env=env)


def daemons() -> dict[str, bool]:
    """The processes that were started, and whether each still runs."""
    return {path.name: _process(path.name) is not None for path in sorted(PIDS.glob("*"))}


def usage() -> dict[str, int]:
    """Resident memory in MiB of the node's processes, by name; pages that several share count for each."""
    total: dict[str, int] = {}
    for line in run(*inside("ps", "-eo", "rss=,args=")).splitlines():
        rss, command = line.split(None, 1)
        words = command.split()
        name = words[1] if words[0] == str(BIN / "kube") else Path(words[0]).name
        total[name] = total.get(name, 0) + int(rss)
    return {name: kib // 1024 for name, kib in sorted(total.items(), key=lambda item: -item[1])}


def log_end(name: str, lines: int = 15) -> str:
    """The last lines that a daemon wrote."""
    path = LOGS / f"{name}.log"
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def _spawn(name: str, *command: str | Path, env: dict[str, str] | None = None) -> None:
    with open(LOGS / f"{name}.log", "ab") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/", env=env,
        )  # fmt: skip
    (PIDS / name).write_text(f"{process.pid} {_started(process.pid)}")


def _process(name: str) -> int | None:
    """The id of the process recorded under a name, if it still is that process and no zombie."""
    path = PIDS / name
    if not path.exists():
        return None
    pid, started = path.read_text().split()
    return int(pid) if _started(int(pid)) == started else None


def _started(pid: int) -> str | None:
    """When a process began, which tells it from a later one of the same id; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _record_first() -> bool:
    """Records the namespaces' first process, the child of `unshare`, once it is there."""
    parent = _process("unshare")
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split() if parent else []
    if not children or Path(f"/proc/{children[0]}/comm").read_text().strip() != "pause":
        return False
    (PIDS / "first").write_text(f"{children[0]} {_started(int(children[0]))}")
    return True


def _is_removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # a cgroup stays busy for a moment after its last process
        return False
    return True


def _cgroups() -> Iterator[Path]:
    """The node's cgroup in each hierarchy: several of version 1, one of version 2, or both."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        where, kind = line.split()[4], line.partition(" - ")[2].split()[0]
        if kind in ("cgroup", "cgroup2"):
            yield Path(where) / CGROUP
