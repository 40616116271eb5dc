"""The Open Inference Protocol's gRPC messages, for the sides that call.

Built in a descriptor pool of their own: the generated modules of kserve and of tritonclient
both claim the package ``inference`` in the default pool, so that a process can import only
one of them, and importing kserve's takes seconds. Field numbers are the protocol's; fields
that we neither send nor read are left out, which protobuf allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from florence2_kserve.errors import BadTensor
from florence2_kserve.protocol.tensors import DATATYPES, Tensor, from_values, pack, unpack

SERVICE = "/inference.GRPCInferenceService/"

# Options of a channel that outlives the servers at its other end.
LASTING_CHANNEL = [
    # A server that restarts is back in a second, not in gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Nor are its address's successors unknown for gRPC's default of half a minute.
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
]

# message → field → (number, type); "[]" repeats, "{}" maps from strings, "|" belongs to a oneof.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ModelReadyRequest": {"name": (1, "string"), "version": (2, "string")},
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ModelMetadataRequest": {"name": (1, "string"), "version": (2, "string")},
    "TensorMetadata": {"name": (1, "string"), "datatype": (2, "string"), "shape": (3, "int64[]")},
    "ModelMetadataResponse": {
        "name": (1, "string"),
        "versions": (2, "string[]"),
        "platform": (3, "string"),
        "inputs": (4, "TensorMetadata[]"),
        "outputs": (5, "TensorMetadata[]"),
        "properties": (6, "string{}"),  # ours: the SDK's messages know no such field, and pass it on
    },
    "InferParameter": {"bool_param": (1, "bool|"), "int64_param": (2, "int64|"), "string_param": (3, "string|")},
    "InferTensorContents": {
        "bool_contents": (1, "bool[]"),
        "int_contents": (2, "int32[]"),
        "int64_contents": (3, "int64[]"),
        "uint_contents": (4, "uint32[]"),
        "uint64_contents": (5, "uint64[]"),
        "fp32_contents": (6, "float[]"),
        "fp64_contents": (7, "double[]"),
        "bytes_contents": (8, "bytes[]"),
    },
    "InferInputTensor": {
        "name": (1, "string"),
        "datatype": (2, "string"),
        "shape": (3, "int64[]"),
        "contents": (5, "InferTensorContents"),
    },
    "InferRequestedOutputTensor": {"name": (1, "string")},
    "ModelInferRequest": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, "InferParameter{}"),
        "inputs": (5, "InferInputTensor[]"),
        "outputs": (6, "InferRequestedOutputTensor[]"),
        "raw_input_contents": (7, "bytes[]"),
    },
    "InferOutputTensor": {
        "name": (1, "string"),
        "datatype": (2, "string"),
        "shape": (3, "int64[]"),
        "contents": (5, "InferTensorContents"),
    },
    "ModelInferResponse": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, "InferParameter{}"),
        "outputs": (5, "InferOutputTensor[]"),
        "raw_output_contents": (6, "bytes[]"),
    },
}
_CONTENTS_OF = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def _build() -> dict[str, Any]:
    proto = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="florence2_kserve.proto", package="inference", syntax="proto3")
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        if any(kind.endswith("|") for _, kind in fields.values()):
            message.oneof_decl.add(name="choice")
        for field_name, (number, kind) in fields.items():
            repeated, is_map, base = kind.endswith("[]"), kind.endswith("{}"), kind.rstrip("[]{}|")
            field = message.field.add(name=field_name, number=number)
            field.label = proto.LABEL_REPEATED if repeated or is_map else proto.LABEL_OPTIONAL
            if kind.endswith("|"):
                field.oneof_index = 0
            if is_map:
                entry = message.nested_type.add(name="".join(w.title() for w in field_name.split("_")) + "Entry")
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, label=proto.LABEL_OPTIONAL, type=proto.TYPE_STRING)
                value = entry.field.add(name="value", number=2, label=proto.LABEL_OPTIONAL)
                if base in _MESSAGES:
                    value.type, value.type_name = proto.TYPE_MESSAGE, f".inference.{base}"
                else:
                    value.type = getattr(proto, f"TYPE_{base.upper()}")
                field.type, field.type_name = proto.TYPE_MESSAGE, f".inference.{message_name}.{entry.name}"
            elif base in _MESSAGES:
                field.type, field.type_name = proto.TYPE_MESSAGE, f".inference.{base}"
            else:
                field.type = getattr(proto, f"TYPE_{base.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}")) for name in _MESSAGES
    }


MESSAGES: Mapping[str, Any] = _build()


def rpc(channel: Any, method: str) -> Any:
    """Returns the callable of `method` (``ModelInfer``, ``ServerReady``, …) on a sync or asyncio channel."""
    return channel.unary_unary(
        SERVICE + method,
        request_serializer=MESSAGES[f"{method}Request"].SerializeToString,
        response_deserializer=MESSAGES[f"{method}Response"].FromString,
    )


def is_unanswered(code: grpc.StatusCode, details: str) -> bool:
    """Whether a call failed since its server couldn't be reached, was lost, or can't answer now.

    Of other failures the server itself is the judge. Asking again is safe in either case: an
    inference is a function of its request and changes nothing.
    """
    if code is grpc.StatusCode.UNAVAILABLE:  # refused, reset, drained, loading, or 502 to 504 of a proxy
        return True
    if code is grpc.StatusCode.CANCELLED:  # by the other side, as it ends: who cancels its own call doesn't ask
        return True
    # A stream or connection that broke off under the call.
    return (code is grpc.StatusCode.INTERNAL and "RST_STREAM" in details) or (
        code is grpc.StatusCode.UNKNOWN and "Stream removed" in details
    )


def infer_request(
    model_name: str,
    tensors: Sequence[Tensor],
    *,
    request_id: str = "",
    parameters: Mapping[str, Any] | None = None,
    outputs: Sequence[str] = (),
) -> Any:
    """Returns a ModelInferRequest that carries `tensors` raw."""
    message = MESSAGES["ModelInferRequest"](model_name=model_name, id=request_id)
    for key, value in (parameters or {}).items():
        kind = "bool_param" if isinstance(value, bool) else "int64_param" if isinstance(value, int) else "string_param"
        setattr(message.parameters[key], kind, value if kind != "string_param" else str(value))
    for tensor in tensors:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_input_contents.append(pack(tensor.data))
    for name in outputs:
        message.outputs.add(name=name)
    return message


def response_tensors(message: Any) -> dict[str, Tensor]:
    """Reads a ModelInferResponse's outputs, raw or typed, by name.

    Raises:
        BadTensor: If an output's data don't fit its type and shape.
    """
    tensors = {}
    for index, output in enumerate(message.outputs):
        if output.datatype not in DATATYPES:
            raise BadTensor(output.name, f"unknown datatype {output.datatype!r}")
        data: np.ndarray[Any, Any]
        if message.raw_output_contents:
            data = unpack(output.name, output.datatype, output.shape, message.raw_output_contents[index])
        else:
            values = list(getattr(output.contents, _CONTENTS_OF[output.datatype]))
            data = from_values(output.name, output.datatype, output.shape, values)
        tensors[output.name] = Tensor(output.name, data)
    return tensors


def response_parameters(message: Any) -> dict[str, bool | int | str]:
    """Reads a ModelInferResponse's parameters."""
    return {
        key: getattr(value, value.WhichOneof("choice"))
        for key, value in message.parameters.items()
        if value.WhichOneof("choice")
    }
