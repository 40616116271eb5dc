"""The transformer's call to its predictor, over V2 gRPC with raw tensors.

Predictors come and go while calls are made: they are scaled, rolled out, evicted, killed. A
prediction is a function of its request and changes nothing, so a call that was lost on the way is
made again, on another replica if there is one.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Mapping
from typing import Any

import grpc
from prometheus_client import Counter

from florence2_kserve import errors
from florence2_kserve.protocol import wire
from florence2_kserve.protocol.internal import GenerateCall, GenerateResult
from florence2_kserve.settings import Settings

FORWARDED_HEADERS = ("x-request-id", "traceparent", "tracestate", "authorization")
# Where KServe's Services listen; it injects the host without a port.
DEFAULT_PORT, DEFAULT_TLS_PORT = 80, 443
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 5.0
_HEALTH_TIMEOUT_S = 2.0
_PARTIAL_MARGIN_S = 0.25
# There is no memory for a row: that the predictor has tried. Trying again is left to the client.
_ABOUT_A_ROW = re.compile(r"row \d+: ")

RETRIES = Counter("florence2_transformer_predictor_retries", "Calls to the predictor that were made again.")


class PredictorClient:
    """Calls one predictor.

    Args:
        settings: The predictor's host, TLS, timeout, retries and message limits.
        pad_token_id: What the predictor pads sequences with.
    """

    def __init__(self, settings: Settings, pad_token_id: int) -> None:
        if not settings.predictor_host:
            raise ValueError("predictor_host is not set: the transformer needs --predictor-host HOST[:PORT]")
        host = settings.predictor_host
        port = DEFAULT_TLS_PORT if settings.predictor_use_ssl else DEFAULT_PORT
        complete = "://" in host or host.rpartition("]")[2].count(":") == 1
        self._target = host if complete else f"{host}:{port}"
        self._settings = settings
        self._pad_token_id = pad_token_id
        self._channel: grpc.aio.Channel | None = None

    async def generate(
        self, model_name: str, call: GenerateCall, *, deadline: float, request_id: str, headers: Mapping[str, str]
    ) -> GenerateResult:
        """Sends `call` and returns its results.

        A predictor that is away or lost is tried again, with growing jittered pauses, while time is left.

        Args:
            model_name: Model's name on the predictor.
            call: The rows.
            deadline: ``time.monotonic()`` by which the answer is wanted.
            request_id: Passed on for the logs.
            headers: The client's headers; tracing and authorization ones are passed on.

        Raises:
            ServiceError: What the predictor said, or 503 if it can't be reached, or 504.
        """
        message = wire.infer_request(
            model_name, call.to_tensors(), request_id=request_id, parameters=call.to_parameters()
        )
        if message.ByteSize() > self._settings.grpc_max_send_message_length:
            raise errors.TooLarge(
                f"{len(call.pixel_values)} images make {message.ByteSize()} bytes for the predictor, over the limit "
                f"grpc_max_send_message_length={self._settings.grpc_max_send_message_length}: send fewer at once"
            )
        # gRPC refuses to send anything but printable ASCII.
        metadata = tuple(
            (key, value)
            for key in FORWARDED_HEADERS
            if (value := headers.get(key)) and value.isascii() and value.isprintable()
        )
        infer = wire.rpc(self._get_channel(), "ModelInfer")
        attempt = 0
        while True:
            left = min(deadline - time.monotonic(), self._settings.predictor_request_timeout_seconds)
            if left <= 0:
                raise errors.DeadlineExceeded("no answer from the predictor in time")
            # The predictor drops the row by itself when nobody waits any more. What others have come to it must
            # tell before that.
            time_there = left - min(left / 10, _PARTIAL_MARGIN_S) if call.options.partial else left
            message.parameters["timeout_ms"].string_param = str(max(1, int(time_there * 1000)))
            try:
                answer = await infer(message, timeout=left, metadata=metadata)
                break
            except grpc.aio.AioRpcError as error:
                code, details = error.code(), error.details() or ""
            if not wire.is_unanswered(code, details):
                raise errors.from_grpc_status(code, details)
            if _ABOUT_A_ROW.match(details):
                raise errors.Unavailable(details)
            pause = min(_FIRST_BACKOFF_S * 2**attempt, _LONGEST_BACKOFF_S) * random.uniform(0.5, 1.5)
            attempt += 1
            if attempt > self._settings.predictor_request_retries or time.monotonic() + pause >= deadline:
                raise errors.Unavailable(f"the predictor can't answer now: {details}")
            RETRIES.inc()
            await asyncio.sleep(pause)
        try:
            tensors = wire.response_tensors(answer)
            return GenerateResult.from_tensors(tensors, wire.response_parameters(answer), self._pad_token_id)
        except (errors.BadTensor, IndexError) as error:
            raise errors.Internal(f"the predictor's answer can't be read: {error}") from error

    async def is_ready(self, model_name: str) -> bool:
        """Whether the predictor says that its model is ready."""
        try:
            call = wire.rpc(self._get_channel(), "ModelReady")
            answer = await call(wire.MESSAGES["ModelReadyRequest"](name=model_name), timeout=_HEALTH_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.ready)

    async def close(self) -> None:
        """Closes the channel."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    def _get_channel(self) -> grpc.aio.Channel:
        # Made on first use, since it belongs to the event loop that runs then.
        if self._channel is None:
            options: list[tuple[str, Any]] = [
                *wire.LASTING_CHANNEL,
                ("grpc.max_send_message_length", self._settings.grpc_max_send_message_length),
                ("grpc.max_receive_message_length", self._settings.grpc_max_receive_message_length),
                ("grpc.enable_http_proxy", 0),  # an environment's proxy leads out of the cluster, not into it
                # Behind a headless Service one name has many addresses: spread over all of them.
                ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
            ]
            if self._settings.predictor_use_ssl:
                credentials = grpc.ssl_channel_credentials()
                self._channel = grpc.aio.secure_channel(self._target, credentials, options=options)
            else:
                self._channel = grpc.aio.insecure_channel(self._target, options=options)
        return self._channel
