"""Fixtures of the load tests' tests."""

from __future__ import annotations

import pytest

from florence2_loadtest.scenario import MixItem, Pictures, Scenario
from florence2_loadtest.workload import Workload, build_workload


@pytest.fixture(scope="session")
def captions() -> Workload:
    """Requests for captions of one small picture, over REST."""
    scenario = Scenario(mix=[MixItem(task="<CAPTION>")], pictures=Pictures(scenes=1, width=64, height=64))
    return build_workload(scenario, "florence2")


@pytest.fixture(scope="session")
def grpc_captions() -> Workload:
    """Requests for captions of one small picture, over gRPC."""
    scenario = Scenario(
        mix=[MixItem(task="<CAPTION>")], pictures=Pictures(scenes=1, width=64, height=64), protocol="grpc"
    )
    return build_workload(scenario, "florence2")
