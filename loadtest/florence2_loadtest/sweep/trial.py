"""One configuration: fresh servers, the scenario's load, and what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from florence2_kserve.settings import Settings
from florence2_loadtest.measure import measure
from florence2_loadtest.results import Level
from florence2_loadtest.scenario import Scenario
from florence2_loadtest.servers import Half, Servers
from florence2_loadtest.sweep.instant_predictor import DEFAULT_TOKENS
from florence2_loadtest.sweep.loop import TrialFailed
from florence2_loadtest.sweep.predictor_workload import predictor_workload
from florence2_loadtest.workload import Workload, build_workload


@dataclass(frozen=True, slots=True)
class Bench:
    """What all trials of a sweep have in common.

    Attributes:
        scenario: The load.
        workload: Its requests, made once.
        target: Which half is measured.
        start_s: Time until a server has to be ready.
        answer_tokens: Length of the answers that the transformer alone gets.
        say: Tells of progress within a trial.
    """

    scenario: Scenario
    workload: Workload
    target: Half = "both"
    start_s: float = 300.0
    answer_tokens: int = DEFAULT_TOKENS
    say: Callable[[str], None] = lambda text: None

    def measure(self, settings: Mapping[str, Any]) -> list[Level]:
        """Measures servers with `settings`.

        Raises:
            TrialFailed: If they didn't start, ended under the load, or answered nothing.
        """
        with ExitStack() as stack:
            try:
                servers = stack.enter_context(self._servers(settings))
            except RuntimeError as error:
                raise TrialFailed(str(error)) from None
            try:
                levels = asyncio.run(self._ask(servers))
            except Exception as error:
                raise TrialFailed(f"{servers.log_tail()}\n{type(error).__name__}: {error}") from error
            if why := servers.ended or _silence(levels):
                raise TrialFailed(f"{servers.log_tail()}\n{why}")
            return levels

    def _servers(self, settings: Mapping[str, Any]) -> Servers:
        return Servers(
            settings,
            self.target,
            protocol=self.scenario.protocol,
            keep_alive=self.scenario.keep_alive,
            start_s=self.start_s,
            answer_tokens=self.answer_tokens,
        )

    async def _ask(self, servers: Servers) -> list[Level]:
        result, _ = await measure(
            servers.target,
            self.scenario,
            metrics_urls=servers.metrics_urls,
            say=self.say,
            workload=self.workload,
        )
        return result.levels


def _silence(levels: Sequence[Level]) -> str | None:
    if any(level.answered for level in levels):
        return None
    return f"nothing was answered: {', '.join(sorted({status for level in levels for status in level.statuses}))}"


def make_workload(scenario: Scenario, target: Half, settings: Mapping[str, Any]) -> Workload:
    """Returns the requests of a scenario for a half of the service.

    Args:
        scenario: The scenario.
        target: Which half is asked.
        settings: Of all trials; they name the model.

    Raises:
        ValueError: If they can't be made.
    """
    model_name, model = (
        str(settings.get(name) or Settings.model_fields[name].default) for name in ("model_name", "model")
    )
    if target == "predictor":
        return predictor_workload(scenario, model_name, model, settings.get("model_revision"))
    return build_workload(scenario, model_name)
