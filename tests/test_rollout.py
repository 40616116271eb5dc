"""Servers that are killed or end under load: what their clients notice, which is nothing or what they retry."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import pytest
import requests

from florence2_kserve.client import ClientError, Florence2Client, UnavailableError
from florence2_kserve.local import LocalService, free_port

from .client.pictures import png
from .name_server import NameServer

HOSTS = ("127.0.0.1", "127.0.0.2")


class Load:
    """Clients that ask without a pause, each on its own connection and without retries, until the context ends."""

    def __init__(self, *urls: str, each: int = 3) -> None:
        self._urls = urls * each
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url,)) for url in self._urls]
        self.answers: list[tuple[float, Any]] = []
        self.failures: list[tuple[float, str, ClientError]] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Lets it go on until `condition` holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came to that"
            time.sleep(0.05)

    def go_on(self, answers: int) -> None:
        """Lets it go on for some more answers."""
        goal = len(self.answers) + answers
        self.until(lambda: len(self.answers) >= goal)

    def _ask(self, url: str) -> None:
        with Florence2Client(url, retries=0) as client:
            while not self._stop.is_set():
                try:
                    answer = client.infer(png(), "<CAPTION>")
                    self.answers.append((time.monotonic(), answer))
                except ClientError as error:
                    self.failures.append((time.monotonic(), url, error))
                    time.sleep(0.05)


def metric(service: LocalService, name: str) -> float:
    lines = requests.get(f"{service.rest_url}/metrics", timeout=20).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def asked(predictor: LocalService) -> float:
    return metric(predictor, "florence2_engine_requests_submitted_total")


def retries(transformer: LocalService) -> float:
    return metric(transformer, "florence2_transformer_predictor_retries_total")


@pytest.mark.slow  # five servers in turn, on two cores
def test_no_request_is_lost_when_a_predictor_is_killed_or_ends_under_load(capsys):
    port = free_port()
    with NameServer(*HOSTS) as names, ExitStack() as stack:
        flags = {"grpc_port": port, "drain_seconds": 1, "grpc_max_connection_age_seconds": 5}
        first, second = (LocalService("predictor", host=host, **flags) for host in HOSTS)
        again = LocalService("predictor", host=HOSTS[1], **flags)
        for service in (first, second):
            stack.enter_context(service)
        transformer = stack.enter_context(LocalService("transformer", predictor_host=names.target(port)))
        with Load(transformer.rest_url, f"grpc://{transformer.grpc_url}") as load:
            load.go_on(50)
            assert min(asked(first), asked(second)) > 20
            assert retries(transformer) == 0

            assert second.process is not None
            second.process.kill()
            load.go_on(20)
            killed = retries(transformer)

            stack.enter_context(again)
            load.until(lambda: asked(again) > 20)

            assert first.process is not None
            before = retries(transformer)
            first.process.send_signal(signal.SIGTERM)
            load.until(lambda: first.process is not None and first.process.poll() is not None)
            ended = retries(transformer) - before
            load.go_on(20)
    with capsys.disabled():
        print(f"\n{len(load.answers)} answers; retries: {killed:g} after a kill, {ended:g} as one ended")
    assert not load.failures
    assert killed > 0, "the kill hit no call: nothing was seen of its loss"
    assert first.process.returncode == 0
    assert len({str(answer) for _, answer in load.answers}) == 1


@pytest.mark.slow  # starts servers
def test_clients_of_a_server_that_ends_see_nothing_but_what_they_retry():
    drain = 2.0
    with LocalService(drain_seconds=drain) as service:
        with Load(service.rest_url, f"grpc://{service.grpc_url}") as load:
            load.go_on(20)
            assert service.process is not None
            ending = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            time.sleep(drain / 2)
            response = requests.get(f"{service.rest_url}/v2/health/ready", timeout=20)
            assert response.status_code == 503
            assert response.headers["Connection"] == "close", "keep-alive connections stay on a server that ends"
            load.until(lambda: service.process is not None and service.process.poll() is not None)
            time.sleep(0.2)  # each client finds out
        assert service.process.returncode == 0
    assert {type(error) for _, _, error in load.failures} == {UnavailableError}, load.failures
    assert {url for _, url, _ in load.failures} == {service.rest_url, f"grpc://{service.grpc_url}"}
    assert min(when for when, _, _ in load.failures) >= ending + drain
    assert max(when for when, _ in load.answers) >= ending + drain / 2
