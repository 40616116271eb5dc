"""Sending over real sockets: whatever comes of it is a status."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import grpc
import pytest

from florence2_kserve.local import free_port
from florence2_loadtest.results import Target
from florence2_loadtest.transport import Sent, open_transport
from florence2_loadtest.workload import Prepared, Workload
from tests.loadtest.fake_server import ANSWER, OUTPUT, FakeServer, Reply


@pytest.fixture(params=["rest", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def serve(protocol: str) -> Callable[[FakeServer], AbstractContextManager[str]]:
    return FakeServer.serve if protocol == "rest" else FakeServer.serve_grpc


@pytest.fixture
def prepared(protocol: str, captions: Workload, grpc_captions: Workload) -> Prepared:
    return (captions if protocol == "rest" else grpc_captions)[0]


def ask(
    url: str, prepared: Prepared, count: int = 1, timeout_s: float = 20.0, at_once: bool = False, **options: Any
) -> list[Sent]:
    """Sends a request some times."""
    protocol = "grpc" if url.startswith("grpc") else "rest"
    target = Target(url=url, protocol=protocol, keep_alive=options.pop("keep_alive", True), model=None)

    async def run() -> list[Sent]:
        async with open_transport(target, connections=8, **options) as transport:
            if at_once:
                return await asyncio.gather(*(transport.send(prepared, timeout_s) for _ in range(count)))
            return [await transport.send(prepared, timeout_s) for _ in range(count)]

    return asyncio.run(run())


def rest(reply: Reply, prepared: Prepared) -> Sent:
    """Has a request met by `reply` over HTTP."""
    with FakeServer(replies=(reply,)).serve() as url:
        return ask(url, prepared)[0]


def test_an_answer_is_ok_and_the_body_went_as_prepared(serve: Any, prepared: Prepared) -> None:
    server = FakeServer()
    with serve(server) as url:
        (sent,) = ask(url, prepared, headers={"X-Mine": "yes"})
    assert (sent.status, sent.component, sent.response_bytes) == ("ok", "", len(sent.body))
    assert server.bodies == [prepared.body]
    assert server.headers[0]["x-mine"] == "yes"


@pytest.mark.parametrize("keep_alive", [True, False])
def test_connections_are_kept_or_made_for_each_request(serve: Any, prepared: Prepared, keep_alive: bool) -> None:
    server = FakeServer()
    with serve(server) as url:
        # Over gRPC eight channels are taken in turn.
        assert {sent.status for sent in ask(url, prepared, 24, keep_alive=keep_alive)} == {"ok"}
    made = len(set(server.peers))
    assert made == 24 if not keep_alive else made <= 8


def test_requests_beyond_the_connections_wait(serve: Any, prepared: Prepared) -> None:
    server = FakeServer(lambda number: 0.05)
    with serve(server) as url:
        ask(url, prepared, 24, at_once=True)
    assert server.most_in_flight == 8


def test_over_rest_the_host_header_is_the_given_one(captions: Workload) -> None:
    server = FakeServer()
    with server.serve() as url:
        ask(url, captions[0], headers={"Host": "florence2.example.com"})
    assert server.headers[0]["host"] == "florence2.example.com"
    assert server.headers[0]["content-type"] == "application/json"


def test_a_server_that_takes_too_long_is_a_timeout(serve: Any, prepared: Prepared) -> None:
    with serve(FakeServer(lambda number: 1.0)) as url:
        assert ask(url, prepared, timeout_s=0.2)[0].status == "timeout"


def test_nobody_listening_is_no_connection(protocol: str, prepared: Prepared) -> None:
    scheme = "http" if protocol == "rest" else "grpc"
    (sent,) = ask(f"{scheme}://127.0.0.1:{free_port()}", prepared)
    assert (sent.status, sent.is_passing) == ("connection", True)
    assert sent.body


@pytest.mark.parametrize(
    "reply", [Reply(reset=True), Reply(cut=True), Reply(cut=True, body="")], ids=["reset", "cut", "no body"]
)
def test_a_connection_that_breaks_off_is_no_connection(reply: Reply, captions: Workload) -> None:
    sent = rest(reply, captions[0])
    assert (sent.status, sent.is_passing, sent.response_bytes) == ("connection", True, 0)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{}",
        "[]",
        "null",
        "<html>all is well</html>",
        ANSWER[:-10],
        '{"outputs": []}',
        '{"outputs": [{"name": "PARSED_JSON"}]}',
        json.dumps({"outputs": [OUTPUT | {"data": []}]}),
    ],
)
def test_a_200_without_outputs_is_not_ok(body: str, captions: Workload) -> None:
    assert rest(Reply(body=body), captions[0]).status == "malformed"


@pytest.mark.parametrize(
    ("head", "raw", "status"),
    [
        ({"name": "PARSED_JSON", "parameters": {"binary_data_size": 4}}, "four", "ok"),
        ({"name": "PARSED_JSON", "parameters": {"binary_data_size": 4}}, "fo", "malformed"),
        ({"name": "PARSED_JSON", "parameters": {"binary_data_size": 0}}, "", "malformed"),
    ],
)
def test_a_binary_answer_has_to_be_whole(head: dict[str, Any], raw: str, status: str, captions: Workload) -> None:
    text = json.dumps({"outputs": [head]})
    headers = {"Inference-Header-Content-Length": str(len(text))}
    assert rest(Reply(body=text + raw, headers=headers), captions[0]).status == status


def test_a_grpc_answer_without_outputs_is_not_ok(grpc_captions: Workload) -> None:
    with FakeServer(replies=(Reply(empty=True),)).serve_grpc() as url:
        assert ask(url, grpc_captions[0])[0].status == "malformed"


@pytest.mark.parametrize(
    ("status", "body", "component", "passing"),
    [
        (503, '{"error": "draining"}', "transformer", True),
        (503, '{"error": "the predictor can\'t answer now: Connection refused"}', "predictor", True),
        (503, "upstream connect error or disconnect/reset before headers", "ingress", True),
        (502, "<html>Bad Gateway</html>", "ingress", True),
        (429, '{"error": "the queue is full"}', "transformer", True),
        (504, "", "ingress", False),
        (400, '{"error": "INPUT_IMAGE, row 0: no image"}', "transformer", False),
        (500, '{"error": "row 0: broken"}', "transformer", False),
        (302, "", "ingress", False),
    ],
)
def test_a_refusal_is_told_by_status_and_by_who_refused(
    status: int, body: str, component: str, passing: bool, captions: Workload
) -> None:
    sent = rest(Reply(status, body, headers={"Location": "/elsewhere"}), captions[0])
    assert (sent.status, sent.component, sent.is_passing) == (f"http {status}", component, passing)
    assert sent.body == body.encode()


def test_a_refusal_over_grpc_is_told_too(grpc_captions: Workload) -> None:
    replies = (
        Reply(code=grpc.StatusCode.RESOURCE_EXHAUSTED, details="the queue is full", headers={"Retry-After": "3"}),
        Reply(code=grpc.StatusCode.UNAVAILABLE, details="the predictor can't answer now: Connection reset"),
        Reply(code=grpc.StatusCode.UNAVAILABLE, details="no healthy upstream"),
        Reply(code=grpc.StatusCode.DEADLINE_EXCEEDED, details="no time left"),
        Reply(code=grpc.StatusCode.INVALID_ARGUMENT, details="INPUT_IMAGE: no image"),
    )
    with FakeServer(replies=replies).serve_grpc() as url:
        sent = ask(url, grpc_captions[0], len(replies))
    assert [(each.status, each.component, each.is_passing) for each in sent] == [
        ("grpc RESOURCE_EXHAUSTED", "transformer", True),
        ("grpc UNAVAILABLE", "predictor", True),
        ("grpc UNAVAILABLE", "ingress", True),
        ("grpc DEADLINE_EXCEEDED", "transformer", False),
        ("grpc INVALID_ARGUMENT", "transformer", False),
    ]
    assert sent[0].retry_after_s == 3.0


@pytest.mark.parametrize(("value", "seconds"), [("2", 2.0), ("soon", None)])
def test_retry_after_is_read(value: str, seconds: float | None, captions: Workload) -> None:
    assert rest(Reply(429, "{}", headers={"Retry-After": value}), captions[0]).retry_after_s == seconds


def test_handing_over_a_large_body_and_reading_an_answer_take_time(captions: Workload) -> None:
    body = b'{"inputs": "' + b"A" * 8_000_000 + b'"}'
    large = Prepared("<CAPTION>", body, dict(captions[0].headers), len(body))
    server = FakeServer()
    with server.serve() as url:
        (sent,) = ask(url, large)
    assert sent.status == "ok"
    assert server.bodies == [body]
    assert sent.send_s > 0
    assert sent.receive_s >= 0


@pytest.mark.parametrize(("url", "protocol"), [("grpc://h:1", "rest"), ("http://h:1", "grpc"), ("h:1", "grpc")])
def test_a_url_of_another_protocol_is_refused(url: str, protocol: Any) -> None:
    async def open_it() -> None:
        async with open_transport(Target(url=url, protocol=protocol, model=None), connections=1):
            pass

    with pytest.raises(ValueError, match=url):
        asyncio.run(open_it())
