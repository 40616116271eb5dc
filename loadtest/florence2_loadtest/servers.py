"""Fresh servers on the loopback address: both halves of the service, or one of them alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

from florence2_kserve.local import LocalService, without_settings
from florence2_kserve.settings import ENV_PREFIX, PREDICTOR_FIELDS, TRANSFORMER_FIELDS, Settings
from florence2_loadtest.masking import VARIABLE, masked
from florence2_loadtest.results import Target
from florence2_loadtest.sweep.instant_predictor import DEFAULT_TOKENS, InstantPredictor

Half = Literal["both", "transformer", "predictor"]
FIELDS: Mapping[Half, frozenset[str]] = {
    "both": frozenset(TRANSFORMER_FIELDS) | frozenset(PREDICTOR_FIELDS),
    "transformer": frozenset(TRANSFORMER_FIELDS),
    "predictor": frozenset(PREDICTOR_FIELDS),
}
# What is ours to say, since it has to be known before a server starts.
OWN_FIELDS = frozenset({"host", "http_port", "grpc_port", "predictor_host"})
_START_S = 300.0
_GRACE_S = 5  # what is in flight when a measurement has ended is of no use to anybody


class Servers:
    """Servers of their own processes, as a context manager; they end with this process, killed or not.

    Args:
        settings: Fields of Settings and variables (``env.OMP_NUM_THREADS``) by name; None leaves a default. What both
            halves take goes to both.
        target: ``both``; ``transformer``: beside a predictor that answers at once, so that it is measured alone;
            ``predictor``: requests are then those of the internal protocol, see `predictor_workload`.
        protocol: What clients are to speak; the predictor alone is asked over gRPC in any case.
        keep_alive: Whether they keep connections.
        start_s: Time until a server has to be ready.
        answer_tokens: Length of the answers of the predictor that answers at once.

    Attributes:
        target: Whom to ask, once it is entered.
        metrics_urls: Where the servers' metrics are.

    Raises:
        ValueError: If a setting is unknown, or none of the target's.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        target: Half = "both",
        *,
        protocol: Literal["rest", "grpc"] = "rest",
        keep_alive: bool = True,
        start_s: float = _START_S,
        answer_tokens: int = DEFAULT_TOKENS,
    ) -> None:
        self._settings = {name: value for name, value in (settings or {}).items() if value is not None}
        for name in self._settings:
            check_name(name, target)
        self._half, self._start_s, self._answer_tokens = target, start_s, answer_tokens
        self._protocol, self._keep_alive = protocol, keep_alive
        self._services: dict[str, LocalService] = {}
        self._stack = ExitStack()
        self.metrics_urls: list[str] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # what has started ends if the rest doesn't
            if self._half == "transformer":
                predictor_host = stack.enter_context(
                    InstantPredictor(self._model, self._answer_tokens, self._settings.get("model_revision"))
                ).address
            else:
                predictor_host = self._start(stack, "predictor", {}).grpc_url
            if self._half != "predictor":
                self._start(stack, "transformer", {"predictor_host": predictor_host})
            self._stack = stack.pop_all()
        asked = self._services["predictor" if self._half == "predictor" else "transformer"]
        protocol = "grpc" if self._half == "predictor" else self._protocol
        self.metrics_urls = [f"{service.rest_url}/metrics" for service in self._services.values()]
        self.target = Target(
            url=asked.rest_url if protocol == "rest" else f"grpc://{asked.grpc_url}",
            protocol=protocol,
            keep_alive=self._keep_alive,
            model_name=str(self._settings.get("model_name", Settings.model_fields["model_name"].default)),
            model=self._model,
            settings=masked(self._settings),
            note=_NOTES[self._half],
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def ended(self) -> str | None:
        """Which of the servers has ended by itself; None if they all run."""
        for name, service in self._services.items():
            if service.process is not None and (code := service.process.poll()) is not None:
                return f"the {name} ended with code {code}"
        return None

    def log_tail(self, lines: int = 15) -> str:
        """Returns the last lines of each server's log, while it is entered."""
        return "\n".join(f"--- {name}\n{service.log_tail(lines)}" for name, service in self._services.items())

    @property
    def _model(self) -> str:
        return str(self._settings.get("model", Settings.model_fields["model"].default))

    def _start(self, stack: ExitStack, command: Half, further: Mapping[str, Any]) -> LocalService:
        flags = {name: value for name, value in self._settings.items() if name in FIELDS[command]}
        service = LocalService(
            command,
            timeout=self._start_s,
            environment=environment(self._settings),
            **{"grace_period": _GRACE_S, **flags, **further},
        )
        self._services[command] = stack.enter_context(service)
        return service


_NOTES: Mapping[Half, str] = {
    "both": "",
    "transformer": "the transformer alone, beside a predictor that answers at once",
    "predictor": "the predictor alone, asked by its internal protocol",
}


def check_name(name: str, target: Half) -> None:
    """Checks that a setting can be given to `target`.

    Raises:
        ValueError: If it can't; says why.
    """
    if name.startswith(VARIABLE):
        variable = name.removeprefix(VARIABLE)
        if not variable:
            raise ValueError(f"{name}: name a variable, such as {VARIABLE}OMP_NUM_THREADS")
        if variable.startswith(ENV_PREFIX):
            raise ValueError(f"{name}: name the setting itself, {variable.removeprefix(ENV_PREFIX).lower()}")
    elif name not in Settings.model_fields:
        raise ValueError(f"{name}: there is no such setting; `florence2 serve --help` lists them")
    elif name in OWN_FIELDS:
        raise ValueError(f"{name}: the servers are started here, on free ports")
    elif name not in FIELDS[target]:
        takes = " and ".join(half for half in ("transformer", "predictor") if name in FIELDS[half])
        raise ValueError(f"{name}: the {target} doesn't take it, only the {takes} does")


def environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns a server's variables: this process's, without what would change settings, and those of `settings`."""
    # Flags say it all: what is measured is what is said to be.
    given = {name.removeprefix(VARIABLE): str(value) for name, value in settings.items() if name.startswith(VARIABLE)}
    return {**without_settings(os.environ), **given}
