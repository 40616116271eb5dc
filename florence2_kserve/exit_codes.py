"""What the command line's exit codes mean; docs/cli.md says the same to users, and a test holds them together."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended; each has its meaning to users as `meaning`."""

    meaning: str

    OK = 0, "all is well"
    FAILED = 1, "an error, said on stderr; of `check` and `doctor`: something was found wrong"
    USAGE = 2, "the command line is wrong, or asks for what can't be had"
    SOME_REFUSED = 3, "the batch is through, and some pictures were refused: a rerun would leave them alone"
    UNREACHABLE = 4, "the service can't be reached, or stopped answering"
    SOME_UNANSWERED = 5, "the batch is through, and some pictures have no answer yet: a rerun asks again"
    INTERRUPTED = 130, "ended by Ctrl-C (SIGINT) after what was in flight was written"
    TERMINATED = 143, "ended by SIGTERM after what was in flight was written"

    def __new__(cls, code: int, meaning: str) -> ExitCode:
        """Makes a member of its code and what that means."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member


# How a command ends that a signal has asked to stop.
SIGNAL_CODES: Mapping[signal.Signals, ExitCode] = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
}
