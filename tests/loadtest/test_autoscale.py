"""``florence2 loadtest autoscale`` from its beginning to its end: a real service, and a cluster's API on loopback."""

from __future__ import annotations

import asyncio
import csv
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.local import LocalService
from florence2_loadtest.cluster.api import ClusterError
from florence2_loadtest.cluster.command import RECORDS, RESULT, SAMPLES, TIMELINE, autoscale
from florence2_loadtest.cluster.expectations import parse_expectation, parse_replicas
from florence2_loadtest.cluster.run import Plan, keeps_alive, watch_scaling
from florence2_loadtest.cluster.service import read_service
from florence2_loadtest.cluster.table import changes
from florence2_loadtest.results import AutoscaleResult, read_records, read_result
from florence2_loadtest.scenario import Scenario

from . import cluster_objects as objects
from .cluster_api import SERVICE, ClusterApi
from .fake_server import FakeServer

pytestmark = pytest.mark.slow
SCENARIO = {
    "name": "up-and-down",
    "mix": [{"task": "<CAPTION>"}],
    "pictures": {"scenes": 1},
    "parameters": {"max_new_tokens": 4, "num_beams": 1},
    "load": {"schedule": "steps:2/s,2s;12/s,3s"},
}


class Autoscaler:
    """Has pods come while there is load and go when it is over, as Knative's would.

    Args:
        cluster: Where.
    """

    def __init__(self, cluster: ClusterApi) -> None:
        self._cluster = cluster
        self._pods: list[objects.Object] = []
        self._thread = threading.Thread(target=self._scale_up, daemon=True)

    def hear(self, line: str) -> None:
        """Takes what the load test says."""
        if line == "the load begins":
            self._thread.start()
        elif line == "the load is over":
            self._thread.join()
            threading.Thread(target=self._scale_down, daemon=True).start()

    def _scale_up(self) -> None:
        for number in (0, 1):
            for component in ("transformer", "predictor"):
                self._cluster.put("podautoscalers", objects.pod_autoscaler(component, number + 1, number))
                self._cluster.put("pods", objects.pod(component, number, phase="Pending"))
            time.sleep(0.5)
            for component in ("transformer", "predictor"):
                ready = objects.pod(component, number, scheduled=1, started=2, is_loaded=True, ready=3)
                self._cluster.put("events", objects.pulled(ready, 2))
                self._cluster.put("pods", ready)
                self._pods.append(ready)
            time.sleep(1.0)

    def _scale_down(self) -> None:
        time.sleep(0.5)
        for component in ("transformer", "predictor"):
            self._cluster.put("podautoscalers", objects.pod_autoscaler(component, 0, 0))
        self._cluster.delete("pods", *self._pods)


def put_knative_at_zero(cluster: ClusterApi) -> None:
    cluster.serve(objects.inference_service())
    for component in ("transformer", "predictor"):
        cluster.put("podautoscalers", objects.pod_autoscaler(component, 0, 0))
        cluster.put("serverlessservices", objects.serverless_service(component, "Proxy"))


def test_zero_to_two_and_back(service: LocalService, tmp_path: Path) -> None:
    expected = [*map(parse_expectation, ("first_answer<60s", "failures<=0", "back<60s", "enough<60s"))]
    expected += [parse_replicas("predictor>=2"), parse_replicas("transformer>=3")]
    with ClusterApi() as cluster:
        put_knative_at_zero(cluster)
        autoscaler, said = Autoscaler(cluster), []

        def say(line: str) -> None:
            said.append(line)
            autoscaler.hear(line)

        plan = Plan(
            objects.NAME, objects.NAMESPACE, Scenario.model_validate(SCENARIO), url=service.rest_url,
            wait_ready_s=5, wait_before_s=10, wait_after_s=20, expectations=expected,
        )  # fmt: skip
        result, records = asyncio.run(watch_scaling(cluster.connect(), plan, say))
    assert result.level.answered == len(records) == 40
    assert result.deployment_mode == "Knative"
    found = result.findings
    assert found["from_zero"] == ["transformer", "predictor"]
    assert found["sent_share"] == 1.0
    assert found["predictor"]["most_ready"] == found["predictor"]["most_desired"] == 2
    assert [step["second"] for step in found["steps"]] == [0, 2]
    assert list(found["first_answer_parts"]["predictor"]) == [
        "created", "scheduled", "pulled", "started", "loaded", "ready",
    ]  # fmt: skip
    assert 0 <= found["predictor"]["back_s"] <= found["predictor"]["gone_s"] < 20
    assert found["panics"] == 0
    assert result.problems == ["transformer>=3: it is 2"]
    assert len(result.pods) == 4
    assert {pod.component for pod in result.pods} == {"transformer", "predictor"}
    assert result.samples[0].second < 0 < result.samples[-1].second - 5
    assert [text for _, text in result.notes][-1] == "back at the fewest replicas"
    assert "waiting until it is back at the fewest replicas, 20 s at most" in said
    table = changes(result).splitlines()
    assert table[0].split() == ["transformer", "predictor"]
    assert any(line.endswith("step to 12 requests/s") for line in table)
    assert len(table) < len(result.samples) + 3


def test_load_that_begins_above_the_fewest_replicas_is_a_problem(service: LocalService) -> None:
    with ClusterApi() as cluster:
        put_knative_at_zero(cluster)
        cluster.put("pods", objects.pod("transformer", ready=1))
        scenario = Scenario.model_validate({**SCENARIO, "load": {"schedule": "constant:2/s,1s"}})
        plan = Plan(objects.NAME, objects.NAMESPACE, scenario, url=service.rest_url, wait_before_s=1, wait_after_s=0)
        result, _ = asyncio.run(watch_scaling(cluster.connect(), plan, lambda _: None))
    assert result.problems == ["the load began while there were more than the fewest replicas"]
    assert result.findings["back_s"] is None


class TestWaiting:
    scenario = Scenario.model_validate({**SCENARIO, "load": {"schedule": "constant:4/s,0.5s"}})

    def plan(self, url: str, **more: Any) -> Plan:
        given = {"wait_ready_s": 20, "wait_before_s": 0, "wait_after_s": 0, **more}
        return Plan(objects.NAME, objects.NAMESPACE, self.scenario, url=url, **given)

    @pytest.mark.parametrize("status", [404, 503])
    def test_goes_on_where_the_api_has_no_answer_yet(self, status: int) -> None:
        said: list[str] = []
        with ClusterApi() as cluster, FakeServer(lambda _: 0.01).serve() as url:
            put_knative_at_zero(cluster)
            cluster.refusals[SERVICE] = status

            def say(line: str) -> None:
                said.append(line)
                if line.startswith("waiting"):
                    cluster.refusals.clear()

            result, _ = asyncio.run(watch_scaling(cluster.connect(), self.plan(url), say))
        assert result.level.answered == 2
        waiting = [line for line in said if line.startswith("waiting")]
        assert len(waiting) == 1
        assert waiting[0].startswith(f"waiting: inferenceservice vision/florence2: the API said {status}")

    @pytest.mark.parametrize(("mode", "seconds"), [("Knative", 300), ("Standard", 900)])
    def test_for_the_way_back_takes_as_long_as_the_mode_s_autoscaler_may(self, mode: str, seconds: int) -> None:
        class Seen(Exception): ...

        def say(line: str) -> None:
            if line == f"waiting until it is back at the fewest replicas, {seconds} s at most":
                raise Seen

        with ClusterApi() as cluster, FakeServer(lambda _: 0.01).serve() as url:
            cluster.serve(objects.inference_service(mode, fewest=0))
            cluster.put("pods", objects.pod("transformer", ready=1))
            with pytest.raises(Seen):
                asyncio.run(watch_scaling(cluster.connect(), self.plan(url, wait_after_s=None), say))

    @pytest.mark.parametrize("status", [401, 403])
    def test_ends_at_once_where_it_isn_t_allowed(self, status: int) -> None:
        with ClusterApi() as cluster:
            cluster.refusals[SERVICE] = status
            with pytest.raises(ClusterError, match=f"the API said {status}"):
                asyncio.run(watch_scaling(cluster.connect(), self.plan("http://127.0.0.1:9")))
        assert len(cluster.asked) == 1

    @pytest.mark.parametrize(
        ("mode", "url", "protocol", "keep_alive", "expected"),
        [
            ("Standard", None, "rest", None, False),
            ("Standard", None, "rest", True, True),
            ("Standard", None, "grpc", None, True),
            ("Standard", "http://ingress", "rest", None, True),
            ("Knative", None, "rest", None, True),
            ("Knative", None, "rest", False, False),
        ],
    )
    def test_connections_are_kept_where_new_pods_are_reached_anyway(
        self, mode: str, url: str | None, protocol: str, keep_alive: bool | None, expected: bool
    ) -> None:
        scenario = self.scenario.model_copy(update={"protocol": protocol})
        plan = Plan(objects.NAME, objects.NAMESPACE, scenario, url=url, keep_alive=keep_alive)
        assert keeps_alive(plan, read_service(objects.inference_service(mode))) is expected


class TestCommand:
    @pytest.fixture
    def cluster(self, tmp_path: Path) -> Any:
        with ClusterApi() as cluster:
            cluster.serve(objects.inference_service("Standard", fewest=1))
            for component in ("transformer", "predictor"):
                cluster.put("pods", objects.pod(component, ready=1))
                cluster.put("deployments", objects.deployment(component, 1))
            (tmp_path / "kubeconfig").write_text(yaml.safe_dump(cluster.kubeconfig()))
            (tmp_path / "scenario.yaml").write_text(yaml.safe_dump(SCENARIO))
            yield cluster

    def run(self, folder: Path, *arguments: str) -> Result:
        app = typer.Typer()
        app.command()(autoscale)
        common = [
            "--kubeconfig",
            folder / "kubeconfig",
            "--scenario",
            folder / "scenario.yaml",
            "--output",
            folder / "out",
        ]
        return CliRunner().invoke(app, [*map(str, common), "--schedule", "constant:4/s,2s", *arguments])

    def test_writes_result_samples_requests_and_picture(
        self, cluster: ClusterApi, service: LocalService, tmp_path: Path
    ) -> None:
        done = self.run(tmp_path, "--url", service.rest_url, "--host-header", "--expect-replicas", "predictor>=1")
        assert done.exit_code == ExitCode.OK, done.output
        assert "all as expected" in done.output
        result = read_result(tmp_path / "out" / RESULT)
        assert isinstance(result, AutoscaleResult)
        assert (result.deployment_mode, result.level.answered, result.problems) == ("Standard", 8, [])
        assert result.scenario["load"]["schedule"] == "constant:4/s,2s"
        assert len(list(read_records(tmp_path / "out" / RECORDS))) == 8
        with (tmp_path / "out" / SAMPLES).open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(result.samples)
        assert rows[-1]["transformer_ready"] == "1"
        assert rows[-1]["transformer_activator_in_path"] == ""
        assert rows[0]["answered"] == "0"
        assert rows[-1]["answered"] == "8"
        assert (tmp_path / "out" / TIMELINE).stat().st_size > 1000

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_ends_it_and_what_there_is_is_written(
        self, cluster: ClusterApi, tmp_path: Path, number: int, code: int
    ) -> None:
        def answer_after(index: int) -> float:
            if index == 5:
                os.kill(os.getpid(), number)
            return 0.01

        with FakeServer(answer_after).serve() as url:
            done = self.run(tmp_path, "--url", url, "--schedule", "constant:4/s,60s")
        assert done.exit_code == code, done.output
        result = read_result(tmp_path / "out" / RESULT)
        assert isinstance(result, AutoscaleResult)
        assert 0 < result.level.answered < 240
        assert result.problems[0].startswith("ended by a signal")
        assert len(list(read_records(tmp_path / "out" / RECORDS))) == result.level.answered
        assert result.samples
        assert (tmp_path / "out" / SAMPLES).exists()

    def test_ends_before_the_load_where_nothing_can_be_written(self, cluster: ClusterApi, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("a file")
        done = self.run(tmp_path, "--url", "http://127.0.0.1:9")
        assert done.exit_code == ExitCode.FAILED
        assert f"error: {tmp_path / 'out'} can't be written to: File exists" in done.output
        assert not cluster.asked

    def test_says_what_it_found_where_that_can_t_be_written_any_more(
        self, cluster: ClusterApi, service: LocalService, tmp_path: Path
    ) -> None:
        (tmp_path / "out" / SAMPLES).mkdir(parents=True)
        done = self.run(tmp_path, "--url", service.rest_url, "--wait-after", "0")
        assert done.exit_code == ExitCode.FAILED
        assert "sent_share" in done.output
        assert "can't be written to" in done.output
        assert "Traceback" not in done.output

    def test_ends_with_1_where_it_isn_t_as_expected(
        self, cluster: ClusterApi, service: LocalService, tmp_path: Path
    ) -> None:
        done = self.run(tmp_path, "--url", service.rest_url, "--expect-replicas", "predictor>=2", "--wait-after", "0")
        assert done.exit_code == ExitCode.FAILED
        assert "not as expected: predictor>=2: it is 1" in done.output

    def test_requests_that_nobody_answers_are_failures(self, cluster: ClusterApi, tmp_path: Path) -> None:
        url = f"http://127.0.0.1:{closed_port()}"
        done = self.run(tmp_path, "--url", url, "--retries", "0", "--wait-after", "0", "--max-failures", "7")
        assert done.exit_code == ExitCode.FAILED
        assert "not as expected: failures<=7: it is 8" in done.output
        result = read_result(tmp_path / "out" / RESULT)
        assert isinstance(result, AutoscaleResult)
        assert sum(row["count"] for row in result.statuses_per_second if row["status"] == "connection") == 8

    def test_ends_with_4_where_there_is_no_such_service(self, cluster: ClusterApi, tmp_path: Path) -> None:
        done = self.run(tmp_path, "another", "--url", "http://127.0.0.1:9", "--wait-ready", "0")
        assert done.exit_code == ExitCode.UNREACHABLE
        assert "inferenceservice vision/another: the API said 404" in done.output

    def test_ends_with_4_where_no_cluster_is_configured(self, cluster: ClusterApi, tmp_path: Path) -> None:
        done = self.run(tmp_path, "--kubeconfig", str(tmp_path / "missing"))
        assert done.exit_code == ExitCode.UNREACHABLE
        assert "no cluster to ask" in done.output

    def test_ends_with_4_where_it_isn_t_ready_in_time(self, cluster: ClusterApi, tmp_path: Path) -> None:
        cluster.serve(objects.inference_service("Standard", is_ready=False))
        done = self.run(tmp_path, "--url", "http://127.0.0.1:9", "--wait-ready", "0.5")
        assert done.exit_code == ExitCode.UNREACHABLE
        assert "isn't ready, after 0.5 s" in done.output

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--expect", "speed<1"], "is no finding"),
            (["--expect-replicas", "gpu>=1"], "predictor>=2"),
            (["--schedule", "fast"], "a schedule looks like"),
            (["--url", "nowhere"], "--url"),
            (["--header", "Host"], "NAME: VALUE"),
        ],
    )
    def test_ends_with_2_where_the_command_line_is_wrong(
        self, cluster: ClusterApi, tmp_path: Path, arguments: list[str], said: str
    ) -> None:
        done = self.run(tmp_path, *arguments)
        assert done.exit_code == ExitCode.USAGE, done.output
        assert said in " ".join(done.output.split())
        assert not cluster.asked, "nothing was begun"


def closed_port() -> int:
    """Returns a port on which nobody listens."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
