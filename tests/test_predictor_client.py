"""The transformer's call to predictors that come, go and answer nothing."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio
from prometheus_client import REGISTRY

from florence2_kserve import errors
from florence2_kserve.local import LocalService, free_port
from florence2_kserve.predictor_client import PredictorClient
from florence2_kserve.protocol import wire
from florence2_kserve.protocol.internal import GenerateCall
from florence2_kserve.protocol.public import GenerationOptions
from florence2_kserve.server import _grpc_options
from florence2_kserve.settings import Settings

from .name_server import NameServer

LONG_S = 3.0  # of a call that outlives its connection's age
CALL = GenerateCall(
    pixel_values=np.zeros((1, 8, 8, 3), np.uint8),
    image_keys=[b"key"],
    input_ids=[np.array([0, 5, 2])],
    image_index=[0],
    max_new_tokens=[4],
    options=GenerationOptions(),
)
Answer = Callable[[aio.ServicerContext], Any]


async def answer(context: aio.ServicerContext) -> bytes:
    """Answers as a predictor does: one row, and that it took no time."""
    response = wire.MESSAGES["ModelInferResponse"](model_name="florence2")
    for name, datatype, shape, data in (
        ("sequences", "INT64", [1, 2], np.array([2, 0])),
        ("sequences_scores", "FP32", [1], np.zeros(1, np.float32)),
        ("token_logprobs", "FP32", [1, 2], np.zeros(2, np.float32)),
    ):
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(data.tobytes())
    response.outputs.add(name="finish_reason", datatype="BYTES", shape=[1])
    response.raw_output_contents.append(b"\4\0\0\0stop")
    return response.SerializeToString()


@asynccontextmanager
async def predictor(host: str, port: int, respond: Answer = answer, **settings: Any) -> AsyncIterator[Counter[str]]:
    """A gRPC server with the predictor's options in this event loop; yields a counter of calls."""
    calls: Counter[str] = Counter()

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            async def handle(request: bytes, context: aio.ServicerContext) -> bytes:
                calls["all"] += 1
                return await respond(context)

            return grpc.unary_unary_rpc_method_handler(handle)

    server = aio.server(options=_grpc_options(Settings(**settings)))
    server.add_generic_rpc_handlers((Handler(),))
    server.add_insecure_port(f"{host}:{port}")
    await server.start()
    try:
        yield calls
    finally:
        await server.stop(0)


@asynccontextmanager
async def client(host: str, **settings: Any) -> AsyncIterator[Callable[..., Any]]:
    """A client as the transformer has it; yields what makes one call."""
    made = PredictorClient(Settings(predictor_host=host, **settings), pad_token_id=1)

    async def generate(seconds: float = 30) -> Any:
        deadline = time.monotonic() + seconds
        return await made.generate("florence2", CALL, deadline=deadline, request_id="1", headers={})

    try:
        yield generate
    finally:
        await made.close()


async def ask_for(seconds: float, generate: Callable[..., Any], at_once: int = 4) -> int:
    """Asks without a pause for some time; returns how many calls were answered, raises what one failed with."""
    end = time.monotonic() + seconds

    async def one() -> int:
        answered = 0
        while time.monotonic() < end:
            await generate()
            await asyncio.sleep(0.01)
            answered += 1
        return answered

    return sum(await asyncio.gather(*(one() for _ in range(at_once))))


def retries() -> float:
    return REGISTRY.get_sample_value("florence2_transformer_predictor_retries_total") or 0.0


@pytest.mark.parametrize("age", [0, 1])
def test_a_new_replica_is_found_within_a_connections_age_and_never_without(age):
    async def run() -> None:
        port, made = free_port(), retries()
        setting = {"grpc_max_connection_age_seconds": age}
        with NameServer("127.0.0.1") as names:
            async with AsyncExitStack() as stack:
                old = await stack.enter_async_context(predictor("127.0.0.1", port, **setting))
                new = await stack.enter_async_context(predictor("127.0.0.2", port, **setting))
                generate = await stack.enter_async_context(client(names.target(port)))
                await ask_for(0.5, generate)
                assert new["all"] == 0
                names.addresses.append("127.0.0.2")
                await ask_for(2.5 * max(age, 1), generate)  # ages vary by a tenth, and addresses are asked for apart
                before = Counter(old=old["all"], new=new["all"])
                await ask_for(2, generate)
                later = Counter(old=old["all"], new=new["all"])
                later.subtract(before)
        if age:
            assert 0.4 < later["new"] / later.total() < 0.6
            assert names.asked > 2
        else:
            assert later["new"] == 0 < later["old"]
            assert names.asked == 1
        assert retries() == made, "renewing a connection lost a call"

    asyncio.run(run())


def test_a_call_longer_than_its_connections_age_is_answered():
    async def respond(context: aio.ServicerContext) -> Any:
        await asyncio.sleep(LONG_S)
        return await answer(context)

    async def run() -> None:
        port, made = free_port(), retries()
        settings = {"grpc_max_connection_age_seconds": 0.5}
        async with predictor("127.0.0.1", port, respond, **settings) as calls, client(f"127.0.0.1:{port}") as generate:
            await asyncio.gather(*(generate() for _ in range(5)))
            assert calls["all"] == 5
        assert retries() == made

    asyncio.run(run())


def failing_once(code: grpc.StatusCode, details: str) -> Answer:
    seen = []

    async def respond(context: aio.ServicerContext) -> Any:
        seen.append(1)
        if len(seen) == 1:
            await context.abort(code, details)
        return await answer(context)

    return respond


@pytest.mark.parametrize(
    ("code", "details"),
    [
        ("UNAVAILABLE", "the model is still loading"),
        ("UNAVAILABLE", "upstream connect error or disconnect/reset before headers"),
        ("CANCELLED", ""),
        ("INTERNAL", "Received RST_STREAM with error code 2"),
        ("UNKNOWN", "Stream removed"),
    ],
)
def test_a_lost_call_is_made_again(code, details):
    async def run() -> None:
        port, made = free_port(), retries()
        respond = failing_once(grpc.StatusCode[code], details)
        async with predictor("127.0.0.1", port, respond) as calls, client(f"127.0.0.1:{port}") as generate:
            result = await generate()
        assert result.finish_reasons == ["stop"]
        assert (calls["all"], retries() - made) == (2, 1)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("code", "details", "error"),
    [
        ("INVALID_ARGUMENT", "input_ids: too long", errors.BadRequest),
        ("INTERNAL", "row 1: the model gave NaN", errors.Internal),
        ("UNKNOWN", "Unexpected <class 'ValueError'>", errors.Internal),
        ("RESOURCE_EXHAUSTED", "the queue is full", errors.QueueFull),
        ("DEADLINE_EXCEEDED", "no answer within 1 s", errors.DeadlineExceeded),
        ("UNAVAILABLE", "row 1: no memory", errors.Unavailable),
    ],
)
def test_what_the_predictor_judged_is_passed_on_at_once(code, details, error):
    async def run() -> None:
        port = free_port()
        respond = failing_once(grpc.StatusCode[code], details)
        async with predictor("127.0.0.1", port, respond) as calls, client(f"127.0.0.1:{port}") as generate:
            with pytest.raises(error) as caught:
                await generate()
        assert type(caught.value) is error
        assert str(caught.value) == details
        assert calls["all"] == 1

    asyncio.run(run())


def test_retries_end_with_the_requests_time_and_with_their_number():
    async def run() -> None:
        async with client(f"127.0.0.1:{free_port()}") as generate:
            started = time.monotonic()
            with pytest.raises(errors.Unavailable, match="the predictor can't answer now"):
                await generate(1.0)
            assert time.monotonic() - started < 1.5
        made = retries()
        async with client(f"127.0.0.1:{free_port()}", predictor_request_retries=2) as generate:
            with pytest.raises(errors.Unavailable):
                await generate()
        assert retries() - made == 2

    asyncio.run(run())


def test_replicas_that_were_all_replaced_are_found_anew():
    """As after a rollout: the name stays, every address behind it is another one."""

    async def run() -> None:
        port = free_port()
        with NameServer("127.0.0.1") as names:
            async with client(names.target(port)) as generate:
                async with predictor("127.0.0.1", port):
                    await generate()
                names.addresses = ["127.0.0.2"]
                async with predictor("127.0.0.2", port) as calls:
                    await generate(10)
                    assert calls["all"] == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("host", "ssl", "target"),
    [
        ("florence2-predictor.ns", False, "florence2-predictor.ns:80"),
        ("florence2-predictor.ns", True, "florence2-predictor.ns:443"),
        ("florence2-predictor.ns:8081", False, "florence2-predictor.ns:8081"),
        ("[::1]", False, "[::1]:80"),
        ("[::1]:8081", False, "[::1]:8081"),
        ("dns:///florence2-predictor.ns:8081", False, "dns:///florence2-predictor.ns:8081"),
    ],
)
def test_where_the_predictor_is(host, ssl, target):
    assert PredictorClient(Settings(predictor_host=host, predictor_use_ssl=ssl), 1)._target == target


def test_a_transformer_that_starts_wakes_its_predictor_once():
    """Of two components at zero the second one begins to start with the first, not when that is ready."""

    async def calls_at_start() -> int:
        port = free_port()
        async with predictor("127.0.0.1", port) as calls:
            transformer = LocalService("transformer", predictor_host=f"127.0.0.1:{port}")
            await asyncio.to_thread(transformer.__enter__)
            try:
                while not calls["all"]:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(0.5)
            finally:
                await asyncio.to_thread(transformer.__exit__, None, None, None)
            return calls["all"]

    assert asyncio.run(asyncio.wait_for(calls_at_start(), 60)) == 1
