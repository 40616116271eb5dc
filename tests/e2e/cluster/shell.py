"""Commands with a limit, and words about what takes long."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.25


class ClusterError(Exception):
    """Something that the cluster needs failed; the message says what."""


def run(
    *command: str | Path,
    limit_s: float = 60,
    stdin: str | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> str:
    """Runs a command and returns what it printed.

    Raises:
        ClusterError: With the end of its output, if it failed or took longer than `limit_s`.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, input=stdin, cwd=cwd, env=env, timeout=limit_s, check=True, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"no end within {limit_s:.0f} s: {' '.join(words)}") from error
    except subprocess.CalledProcessError as error:
        raise ClusterError(f"{' '.join(words)}\n{(error.stdout + error.stderr)[-3000:]}") from error
    return done.stdout


def succeeds(command: Sequence[str | Path], limit_s: float = 10) -> bool:
    """Whether a command ends well."""
    try:
        run(*command, limit_s=limit_s)
    except ClusterError:
        return False
    return True


def wait(what: str, limit_s: float, condition: Callable[[], bool]) -> None:
    """Waits until `condition` holds.

    Raises:
        ClusterError: If it doesn't within `limit_s`.
    """
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise ClusterError(f"{what}: not within {limit_s:.0f} s")
        time.sleep(POLL_S)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Says on stderr how long a step took."""
    start = time.monotonic()
    yield
    print(f"{time.monotonic() - start:7.1f} s  {name}", file=sys.stderr, flush=True)
