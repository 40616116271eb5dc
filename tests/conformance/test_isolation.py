"""Requests side by side: each gets its own answer, and none notices what becomes of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

from .contract import IMAGE, TASK
from .messages import Outcome, ask
from .pictures import base64_text, noise, png
from .wires import RestConnection, RestJson, Target, Wire, rest_outcome

Alone = Callable[..., Any]
MakeWire = Callable[[type[Wire]], Wire]

ROWS = ((0, "<CAPTION>", ""), (1, "<OD>", ""), (2, "<OPEN_VOCABULARY_DETECTION>", "red circle"), (1, "<OCR>", ""))
BAD = {
    IMAGE: ask(base64_text(noise()), "<CAPTION>"),
    TASK: ask(base64_text(png()), "<DANCE>"),
    "num_beams": ask(base64_text(png()), "<CAPTION>", parameters={"num_beams": 0}),
}


def _infer(wire: Wire, row: tuple[int, str, str]) -> list[Any]:
    number, task, text = row
    return wire.infer(ask(base64_text(png(number)), task, text or None)).answers()


def test_eight_threads_get_the_answers_of_one(alone: Alone, rest_or_grpc: Wire, make_wire: MakeWire) -> None:
    expected = {row: [alone(*row)] for row in ROWS}
    wires = [make_wire(type(rest_or_grpc)) for _ in range(8)]

    def work(thread: int) -> None:
        with wires[thread] as wire:
            for step in range(3):
                row = ROWS[(thread + step) % len(ROWS)]
                assert _infer(wire, row) == expected[row]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


@contextmanager
def _bad_requests(server: Target, threads: int) -> Iterator[list[tuple[str, Outcome]]]:
    """Sends bad requests from `threads` connections all the while, and gives what came back for them."""
    done, outcomes = Event(), list[tuple[str, Outcome]]()

    def work(_: int) -> None:
        with RestJson(server) as wire:
            while not done.is_set():
                for name, request in BAD.items():
                    outcomes.append((name, wire.infer(request)))
                time.sleep(0.01)  # a nuisance, not a flood

    with ThreadPoolExecutor(threads) as pool:
        workers = [pool.submit(work, thread) for thread in range(threads)]
        try:
            yield outcomes
        finally:
            done.set()
        for worker in workers:
            worker.result()


def test_good_requests_do_not_notice_bad_ones(
    server: Target, alone: Alone, rest_or_grpc: Wire, make_wire: MakeWire
) -> None:
    expected = {row: [alone(*row)] for row in ROWS}
    wires = [make_wire(type(rest_or_grpc)) for _ in ROWS]
    with _bad_requests(server, threads=3) as bad, ThreadPoolExecutor(len(ROWS)) as pool:
        for _ in range(2):
            assert list(pool.map(_infer, wires, ROWS)) == list(expected.values())
    assert bad
    assert all(outcome.status == "invalid" and name in outcome.message for name, outcome in bad)


def test_clients_that_leave_disturb_nobody(server: Target, alone: Alone, rest: RestConnection) -> None:
    row = ROWS[1]
    expected = [alone(*row)]
    body = ask(base64_text(png(row[0])), row[1])
    for wait in (0, 0.01, 0.05, 0.1):
        leaving = RestConnection(server)
        leaving.send("POST", server.path("/infer"), body.json_bytes(), {"Content-Type": "application/json"})
        time.sleep(wait)
        leaving.close()
        assert rest_outcome(rest.post(body.json_body())).answers() == expected


def test_a_client_that_leaves_amid_its_body_disturbs_nobody(
    server: Target, alone: Alone, rest: RestConnection
) -> None:
    body = ask(base64_text(png()), "<CAPTION>")
    encoded = body.json_bytes()
    leaving = RestConnection(server)
    leaving.send(
        "POST",
        server.path("/infer"),
        encoded[: len(encoded) // 2],
        {"Content-Type": "application/json", "Content-Length": str(len(encoded))},
    )
    leaving.close()
    assert rest_outcome(rest.post(body.json_body())).answers() == [alone(0, "<CAPTION>")]
