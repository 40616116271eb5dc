"""What only gRPC can get right or wrong: raw against typed contents, and their framing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

from .contract import PARSED
from .messages import ask
from .pictures import base64_text, png
from .wires import GrpcConnection, Target, grpc_message

Alone = Callable[..., Any]


def _raw(model: str) -> Any:
    return grpc_message(ask(png(), "<CAPTION>"), model, raw=True)


def _too_few(message: Any) -> None:
    del message.raw_input_contents[-1]


def _too_many(message: Any) -> None:
    message.raw_input_contents.append(b"")


def _element_beyond_its_tensor(message: Any) -> None:
    message.raw_input_contents[1] = b"\xff\xff\xff\x7f<CAPTION>"


def _length_cut_short(message: Any) -> None:
    message.raw_input_contents[1] = b"\x09\x00"


def _without_length(message: Any) -> None:
    message.raw_input_contents[0] = png()


def _empty(message: Any) -> None:
    message.raw_input_contents[0] = b""


def _typed_contents_beside_raw(message: Any) -> None:
    message.inputs[1].contents.bytes_contents.append(b"<CAPTION>")


def _no_contents_at_all(message: Any) -> None:
    del message.raw_input_contents[:]


def _contents_of_another_type(message: Any) -> None:
    del message.raw_input_contents[:]
    message.inputs[0].contents.bytes_contents.append(png())
    message.inputs[1].contents.fp32_contents.append(1.0)


SPOILERS = [
    _too_few,
    _too_many,
    _element_beyond_its_tensor,
    _length_cut_short,
    _without_length,
    _empty,
    _typed_contents_beside_raw,
    _no_contents_at_all,
    _contents_of_another_type,
]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__.strip("_").replace("_", " "))
def test_malformed_contents_are_refused(
    grpc_connection: GrpcConnection, server: Target, spoil: Callable[[Any], None]
) -> None:
    message = _raw(server.model)
    spoil(message)
    outcome = grpc_connection.infer(message)
    assert outcome.status == "invalid", outcome
    assert grpc_connection.call("ServerLive", pb.ServerLiveRequest()).live


def test_a_parameter_without_a_value_is_refused(grpc_connection: GrpcConnection, server: Target) -> None:
    message = _raw(server.model)
    message.parameters["num_beams"].SetInParent()
    outcome = grpc_connection.infer(message)
    assert outcome.status == "invalid", outcome
    assert "num_beams" in outcome.message


def test_text_goes_as_raw_contents_too(grpc_connection: GrpcConnection, server: Target, alone: Alone) -> None:
    message = grpc_message(ask(base64_text(png()), "<CAPTION>"), server.model, raw=True)
    assert grpc_connection.infer(message).answers() == [alone(0, "<CAPTION>")]


def test_an_error_is_followed_by_inference_on_the_same_channel(
    grpc_connection: GrpcConnection, server: Target, alone: Alone
) -> None:
    for spoil in SPOILERS:
        message = _raw(server.model)
        spoil(message)
        assert grpc_connection.infer(message).status == "invalid"
    outcome = grpc_connection.infer(_raw(server.model))
    assert outcome.answers() == [alone(0, "<CAPTION>")]
    assert outcome.outputs[PARSED].shape == (1, 1)
