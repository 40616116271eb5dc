"""Transformer and predictor together on one machine: two processes, for a laptop, demos and tests."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from florence2_kserve.client import Florence2Client
from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.settings import (
    ENV_PREFIX,
    PREDICTOR_FIELDS,
    STORAGE_VARIABLE,
    TRANSFORMER_FIELDS,
    Settings,
)

LOOPBACK = "127.0.0.1"
_POLL_S = 0.1
_SPARE_S = 10.0  # beyond what a process may take to drain
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_PR_SET_PDEATHSIG = 1  # from Linux' prctl.h


def free_port() -> int:
    """Returns a TCP port of the loopback address that nobody listens on."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def run_local(settings: Settings) -> int:
    """Runs both processes until one ends or a signal comes, then ends the other.

    Args:
        settings: Of both; ports and host are the transformer's, the predictor listens on loopback.

    Returns:
        The exit code: 0 after a signal, else that of the process that ended by itself.
    """
    internal = {"host": LOOPBACK, "http_port": free_port(), "grpc_port": free_port(), "drain_seconds": 0}
    predictor = settings.model_copy(update=internal)
    transformer = settings.model_copy(
        update={"predictor_host": f"{LOOPBACK}:{predictor.grpc_port}", "enable_predictor_health_check": True}
    )
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    handlers = {number: signal.signal(number, note) for number in _ENDING_SIGNALS}
    children: list[subprocess.Popen[bytes]] = []
    try:
        # The transformer comes first: it is stopped first, so that it can still drain.
        children.append(_start("transformer", transformer, TRANSFORMER_FIELDS))
        children.append(_start("predictor", predictor, PREDICTOR_FIELDS))
        while not signals and all(child.poll() is None for child in children):
            time.sleep(_POLL_S)
        ended = [child.returncode for child in children if child.poll() is not None]
        return 0 if signals else next((code for code in ended if code), 1)
    finally:
        for child in children:
            _end(child, settings.drain_seconds + settings.grace_period + _SPARE_S)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class LocalService:
    """``florence2 serve`` on free ports of the loopback address, as a context manager.

    Args:
        command: Another server command: ``transformer`` or ``predictor``.
        python: The interpreter, and what starts the command line in it.
        wait: Whether to wait until the model is ready; else until the process lives.
        timeout: Seconds until then.
        host: Another loopback address.
        http_port: None for a free one.
        grpc_port: None for a free one.
        environment: The process's variables; None for those of this process.
        **flags: Other fields of Settings.

    Attributes:
        rest_url: ``http://127.0.0.1:port``.
        grpc_url: ``127.0.0.1:port``.
    """

    def __init__(
        self,
        command: str = "serve",
        *,
        python: Sequence[str] = (sys.executable, "-m", "florence2_kserve.cli"),
        wait: bool = True,
        timeout: float = 180.0,
        host: str = LOOPBACK,
        http_port: int | None = None,
        grpc_port: int | None = None,
        environment: Mapping[str, str] | None = None,
        **flags: Any,
    ) -> None:
        self._start, self._wait = [*python, command], wait
        self.http_port, self.grpc_port = http_port or free_port(), grpc_port or free_port()
        self.rest_url, self.grpc_url = f"http://{host}:{self.http_port}", f"{host}:{self.grpc_port}"
        self._timeout, self._environment = timeout, environment
        self._flags = {"host": host, "http_port": self.http_port, "grpc_port": self.grpc_port, **flags}
        self._log = tempfile.NamedTemporaryFile(prefix="florence2-serve-", suffix=".log", delete=False)  # noqa: SIM115
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = self._start + [f"--{name.replace('_', '-')}={value}" for name, value in self._flags.items()]
        # A session of its own: Ctrl-C in a terminal then reaches the service through us alone, once.
        self.process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,
            preexec_fn=partial(_end_with_parent, os.getpid()) if sys.platform == "linux" else None,
        )
        end = time.monotonic() + self._timeout
        name = str(self._flags.get("model_name", Settings.model_fields["model_name"].default))
        try:
            with Florence2Client(self.rest_url, model_name=name) as client:
                while not (client.is_ready() if self._wait else client.is_live()):
                    if self.process.poll() is not None:
                        raise RuntimeError(f"the service ended while starting:\n{self.log_tail()}")
                    if time.monotonic() >= end:
                        raise RuntimeError(f"the service isn't ready after {self._timeout:g} s:\n{self.log_tail()}")
                    time.sleep(_POLL_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            drain, grace = (
                float(self._flags.get(name, Settings.model_fields[name].default))
                for name in ("drain_seconds", "grace_period")
            )
            _end(self.process, 2 * (drain + grace + _SPARE_S) + _SPARE_S)
        self._log.close()
        Path(self._log.name).unlink(missing_ok=True)

    def log_tail(self, lines: int = 30) -> str:
        """Returns the last lines of both processes' logs."""
        return "\n".join(Path(self._log.name).read_text(errors="replace").splitlines()[-lines:])


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns `environment` without the variables that would change a server's settings."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(ENV_PREFIX) and name != STORAGE_VARIABLE
    }


def _start(command: str, settings: Settings, fields: list[str]) -> subprocess.Popen[bytes]:
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name in dict.fromkeys(fields)
        if (value := getattr(settings, name)) != Settings.model_fields[name].default
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "florence2_kserve.cli", command, *flags],
        env=without_settings(os.environ),  # flags say it all: what is meant for the one must not reach the other
        start_new_session=True,
        preexec_fn=partial(_end_with_parent, os.getpid()) if sys.platform == "linux" else None,
    )


def _end_with_parent(parent: int) -> None:
    """Has the kernel end this process when its parent is killed without a chance to end it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before the kernel knew
        os._exit(ExitCode.FAILED)


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
