"""When a call is made again: against servers that fail as told, and against the real one behind a breaking proxy."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from email.utils import formatdate
from itertools import pairwise
from time import sleep, time

import pytest

from florence2_kserve.client import (
    DeadlineError,
    Florence2Client,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from florence2_kserve.client.core import BaseClient, Pause, Query, Send, _pause_after
from florence2_kserve.client.errors import read_retry_after
from florence2_kserve.local import LocalService
from tests.client.pictures import png
from tests.client.servers import BAD_GATEWAY, FULL, LOADING, RESET, WRONG, http_server


@pytest.mark.parametrize("fault", [FULL, LOADING, BAD_GATEWAY])
def test_a_server_that_recovers_is_asked_again(open_client, small_server, behaviour, fault):
    behaviour.faults = [fault]
    with open_client(small_server) as client:
        assert client.infer(b"7", "<CAPTION>") == {"<CAPTION>": "7"}
        assert len(behaviour.arrivals) == 2
        assert client.retries_made == 1
        client.infer(b"7", "<CAPTION>")
        assert client.retries_made == 1


def test_a_connection_that_is_reset_is_made_again(open_client, behaviour):
    behaviour.faults = [RESET, RESET]
    with http_server(behaviour) as url, open_client(url) as client:
        assert client.infer(b"7", "<CAPTION>") == {"<CAPTION>": "7"}
        assert len(behaviour.arrivals) == 3


@pytest.mark.parametrize(("fault", "error"), [(FULL, OverloadedError), (LOADING, UnavailableError)])
def test_a_server_that_does_not_recover_is_given_up(open_client, small_server, behaviour, fault, error):
    behaviour.faults = [fault] * 99
    with open_client(small_server, retries=1) as client:
        with pytest.raises(error):
            client.infer(b"7", "<CAPTION>")
        assert len(behaviour.arrivals) == 2


def test_a_wrong_request_is_not_sent_again(open_client, small_server, behaviour):
    behaviour.faults = [WRONG]
    with open_client(small_server) as client:
        with pytest.raises(InvalidRequestError):
            client.infer(b"7", "<CAPTION>")
        assert len(behaviour.arrivals) == 1
        assert client.retries_made == 0


def test_no_server_is_asked_again_before_it_wants_to(open_client, small_server, behaviour):
    behaviour.faults = [replace(FULL, headers={"Retry-After": "1"})]
    with open_client(small_server) as client:
        client.infer(b"7", "<CAPTION>")
    first, second = behaviour.arrivals
    assert second - first >= 1


def test_a_date_to_come_back_is_kept(open_client, small_server, behaviour):
    behaviour.faults = [replace(LOADING, headers={"Retry-After": formatdate(time() + 3600, usegmt=True)})]
    with open_client(small_server, timeout=30) as client:
        with pytest.raises(UnavailableError) as caught:
            client.infer(b"7", "<CAPTION>")  # an hour is more than this client has
        assert 3500 < caught.value.retry_after_s <= 3600
        assert len(behaviour.arrivals) == 1


@pytest.mark.parametrize("said", ["soon", "-1", "²"])
def test_what_is_no_time_is_not_waited_for(said):
    assert read_retry_after(said) is None


def test_pauses_grow(open_client, behaviour):
    behaviour.faults = [LOADING] * 3
    with http_server(behaviour) as url, open_client(url) as client:
        client.infer(b"7", "<CAPTION>")
    pauses = [later - earlier for earlier, later in pairwise(behaviour.arrivals)]
    assert [pause >= least for pause, least in zip(pauses, (0.1, 0.2, 0.4), strict=True)] == [True] * 3


@pytest.mark.parametrize(("said", "least", "most"), [(None, 0.1, 0.3), (4.0, 4.0, 6.0)])
def test_clients_do_not_come_back_all_at_once(said, least, most):
    pauses = [_pause_after(OverloadedError("full", 429, said), 0) for _ in range(50)]
    assert least <= min(pauses) < max(pauses) <= most
    assert len(set(pauses)) > 40


def test_retries_end_with_the_time(open_client, small_server, behaviour):
    behaviour.faults = [LOADING] * 99
    with open_client(small_server, retries=99, timeout=1) as client:
        with pytest.raises(UnavailableError):
            client.infer(b"7", "<CAPTION>")
        assert client.retries_made < 10


def test_a_last_try_without_time_tells_why_the_others_failed():
    """The core alone: what is sent, and what comes of it, is told by hand."""
    steps = BaseClient("florence2", timeout=0.4, retries=5)._insist(Query.METADATA)
    assert isinstance(next(steps), Send)
    assert isinstance(steps.throw(UnavailableError("no predictor", 503)), Pause)
    last = steps.send(None)
    assert isinstance(last, Send)
    assert last.timeout < 0.4
    sleep(0.4)
    with pytest.raises(UnavailableError, match="no predictor"):
        steps.throw(DeadlineError("no answer within 0.0 s"))


def test_a_deadline_that_the_server_tells_is_told():
    steps = BaseClient("florence2", timeout=60, retries=5)._insist(Query.METADATA)
    next(steps)
    steps.throw(UnavailableError("no predictor", 503))
    steps.send(None)
    with pytest.raises(DeadlineError, match="too late"):
        steps.throw(DeadlineError("too late", 504))


def test_connections_are_used_again(open_client, behaviour):
    with http_server(behaviour) as url, open_client(url) as client:
        for _ in range(5):
            client.infer(b"7", "<CAPTION>")
    assert behaviour.connections == 1


def overloaded(connection: socket.socket) -> None:
    answer(connection, "429 Too Many Requests", '{"error": "the queue is full"}')


def unavailable(connection: socket.socket) -> None:
    answer(connection, "503 Service Unavailable", '{"error": "loading"}', "Retry-After: 1\r\n")


def bad_gateway(connection: socket.socket) -> None:
    answer(connection, "502 Bad Gateway", "<html>")


def reset(connection: socket.socket) -> None:
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def answer(connection: socket.socket, status: str, body: str, headers: str = "") -> None:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, rest = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(rest) < length:
        rest += connection.recv(65536)
    reply = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n{body}"
    connection.sendall(reply.encode())


@contextmanager
def breaking_first(
    service: LocalService, break_it: Callable[[socket.socket], None], times: int
) -> Iterator[tuple[str, list[int]]]:
    """Passes connections on to the service, after the first `times` were broken; yields a URL and a counter."""
    seen: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def copy(source: socket.socket, target: socket.socket) -> None:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

        def run() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                seen.append(1)
                if len(seen) <= times:
                    with closing(connection):
                        break_it(connection)
                else:
                    onward = socket.create_connection(("127.0.0.1", service.http_port))
                    for pair in ((connection, onward), (onward, connection)):
                        threading.Thread(target=copy, args=pair, daemon=True).start()

        threading.Thread(target=run, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen


@pytest.mark.parametrize("break_it", [overloaded, unavailable, bad_gateway, reset])
def test_a_service_behind_a_breaking_proxy_is_asked_again(service, break_it):
    with breaking_first(service, break_it, 2) as (url, seen), Florence2Client(url) as client:
        assert client.infer(png(), "<CAPTION>")["<CAPTION>"]
        assert len(seen) == 3
