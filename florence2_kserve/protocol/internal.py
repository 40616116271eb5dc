"""The contract between transformer and predictor, V2 tensors too.

I images and R rows in one request, letters as in the tables below:

===================  =======  ===========  ==================================================
``pixel_values``     UINT8    [I,H,W,3]    resized, not yet normalised
``image_key``        BYTES    [I]          hash of the image's content
``input_ids``        INT64    [R,L]        prompt alone, padded; no image placeholders
``attention_mask``   INT64    [R,L]        1 where ``input_ids`` holds the prompt
``image_index``      INT32    [R]          which of the I images the row asks about
``max_new_tokens``   INT32    [R]          bound on generated tokens; cut down to the predictor's own
===================  =======  ===========  ==================================================

and back:

====================  =====  ======  ========================================================
``sequences``         INT64  [R,T]   best beam, start token kept, padded
``sequences_scores``  FP32   [R]     its score
``token_logprobs``    FP32   [R,T]   log-probability of each token, 0 where forced or padding
``finish_reason``     BYTES  [R]     ``stop`` or ``length``, ``error`` where a row failed
``error``             BYTES  [R]     why, as ``<gRPC status> <message>``; "" where it didn't
====================  =====  ======  ========================================================

``error`` is there only if a request is ``partial`` and a row failed; otherwise one row's error is the request's.

``image_key`` is for logs and caches on the way; the predictor doesn't rely on it. Which images
are the same, and may share features, it finds out from their pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from grpc import StatusCode

from florence2_kserve.errors import BadRequest, BadTensor, ServiceError, from_grpc_status
from florence2_kserve.protocol.public import Bounds, GenerationOptions, read_options
from florence2_kserve.protocol.tensors import (
    DATATYPES,
    Tensor,
    bytes_array,
    from_infer_input,
    named_inputs,
    to_infer_output,
)

if TYPE_CHECKING:
    from kserve.protocol.infer_type import InferRequest, InferResponse

REQUEST_TENSORS = {
    "pixel_values": ("UINT8", [-1, -1, -1, 3]),
    "image_key": ("BYTES", [-1]),
    "input_ids": ("INT64", [-1, -1]),
    "attention_mask": ("INT64", [-1, -1]),
    "image_index": ("INT32", [-1]),
    "max_new_tokens": ("INT32", [-1]),
}
ERROR_TENSOR = "error"
RESPONSE_TENSORS = {
    "sequences": ("INT64", [-1, -1]),
    "sequences_scores": ("FP32", [-1]),
    "token_logprobs": ("FP32", [-1, -1]),
    "finish_reason": ("BYTES", [-1]),
}


@dataclass(slots=True)
class GenerateCall:
    """What the transformer asks of the predictor.

    Attributes:
        pixel_values: uint8 [I,H,W,3].
        image_keys: I content hashes, as the caller says.
        input_ids: R prompts, each int64 [L_r].
        image_index: For each row, the index of its image.
        max_new_tokens: For each row, the bound on generated tokens.
        options: The request's other parameters.
    """

    pixel_values: np.ndarray[Any, Any]
    image_keys: list[bytes]
    input_ids: list[np.ndarray[Any, Any]]
    image_index: list[int]
    max_new_tokens: list[int]
    options: GenerationOptions = field(default_factory=GenerationOptions)

    def to_tensors(self) -> list[Tensor]:
        """Returns the tensors to send; prompts are padded to the longest."""
        length = max(len(ids) for ids in self.input_ids)
        input_ids = np.zeros((len(self.input_ids), length), dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for row, ids in enumerate(self.input_ids):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
        return [
            Tensor("pixel_values", self.pixel_values),
            Tensor("image_key", bytes_array(self.image_keys)),
            Tensor("input_ids", input_ids),
            Tensor("attention_mask", attention_mask),
            Tensor("image_index", np.array(self.image_index, dtype=np.int32)),
            Tensor("max_new_tokens", np.array(self.max_new_tokens, dtype=np.int32)),
        ]

    def to_parameters(self) -> dict[str, str]:
        """Returns the request parameters to send; numbers as strings, since gRPC has no fractions."""
        return {key: str(value) for key, value in self.options.model_dump(exclude_defaults=True).items()}


@dataclass(slots=True)
class GenerateResult:
    """What the predictor answers, in the order of the rows.

    Attributes:
        sequences: For each row, int64 [T_r], start token kept, without padding.
        scores: For each row, the beam's score.
        token_logprobs: For each row, float32 [T_r].
        finish_reasons: For each row, ``stop``, ``length`` or ``error``.
        timings: Integers by name: ``queue_us`` and ``generate_us``, in microseconds, the row's that waited longest.
        errors: By row: why it has no answer.
    """

    sequences: list[np.ndarray[Any, Any]]
    scores: list[float]
    token_logprobs: list[np.ndarray[Any, Any]]
    finish_reasons: list[str]
    timings: dict[str, int] = field(default_factory=dict)
    errors: dict[int, ServiceError] = field(default_factory=dict)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], timings: Mapping[str, Any], pad: int) -> GenerateResult:
        """Reads the predictor's answer; padding behind a sequence's end is cut off.

        Raises:
            BadTensor: If a tensor is missing or its shape doesn't fit the others.
        """
        for name in RESPONSE_TENSORS:
            if name not in tensors:
                raise BadTensor(name, "is missing from the predictor's answer")
        sequences, logprobs = tensors["sequences"].data, tensors["token_logprobs"].data
        if sequences.shape != logprobs.shape:
            raise BadTensor("token_logprobs", f"expected shape {list(sequences.shape)}, got {list(logprobs.shape)}")
        # Padding only trails: a pad token inside belongs to the sequence.
        lengths = [int(np.flatnonzero(row != pad).max(initial=0)) + 1 for row in sequences]
        return cls(
            sequences=[row[:n] for row, n in zip(sequences, lengths, strict=True)],
            scores=[float(score) for score in tensors["sequences_scores"].data],
            token_logprobs=[row[:n] for row, n in zip(logprobs, lengths, strict=True)],
            finish_reasons=[reason.decode() for reason in tensors["finish_reason"].data],
            timings={key: value for key, value in timings.items() if isinstance(value, int)},
            errors=_read_errors(tensors.get(ERROR_TENSOR)),
        )


def read_generate_call(request: InferRequest, image_size: tuple[int, int], bounds: Bounds) -> GenerateCall:
    """Checks a predictor's request and puts it into our own terms.

    Args:
        request: The SDK's request.
        image_size: (H, W) that the model takes.
        bounds: What one request may ask for here.

    Raises:
        BadTensor: If a tensor is missing, misnamed, or of another type, shape or range than the contract says.
        BadRequest: If a parameter is wrong.
    """
    data = {name: tensor.data for name, tensor in _checked_tensors(request).items()}
    images, rows = data["pixel_values"].shape[0], data["input_ids"].shape[0]
    if not images or not rows or not data["input_ids"].shape[1]:
        raise BadRequest("the request holds no image or no row")
    if rows > bounds.max_rows:
        raise BadTensor("input_ids", f"{rows} rows are over this server's bound max_rows={bounds.max_rows}")
    _expect_shape("pixel_values", data["pixel_values"], (images, *image_size, 3))
    _expect_shape("image_key", data["image_key"], (images,))
    _expect_shape("attention_mask", data["attention_mask"], data["input_ids"].shape)
    for name in ("image_index", "max_new_tokens"):
        _expect_shape(name, data[name], (rows,))
    lengths = _prompt_lengths(data["attention_mask"])
    for row in range(rows):
        if not 0 <= data["image_index"][row] < images:
            raise BadTensor("image_index", f"expected 0 to {images - 1}, got {data['image_index'][row]}", row=row)
        if data["max_new_tokens"][row] < 1:
            raise BadTensor("max_new_tokens", f"expected 1 or more, got {data['max_new_tokens'][row]}", row=row)
    return GenerateCall(
        pixel_values=data["pixel_values"],
        image_keys=list(data["image_key"]),
        input_ids=[ids[:length] for ids, length in zip(data["input_ids"], lengths, strict=True)],
        image_index=[int(i) for i in data["image_index"]],
        # A transformer that knows of no lower bound here asks for the task's own number.
        max_new_tokens=[min(int(n), bounds.max_new_tokens) for n in data["max_new_tokens"]],
        options=read_options(request.parameters, bounds),
    )


def write_generate_result(request: InferRequest, result: GenerateResult, pad: int) -> InferResponse:
    """Returns the SDK's response for a predictor's answer."""
    from kserve.protocol.infer_type import InferResponse

    length = max(len(sequence) for sequence in result.sequences)
    tensors = [
        Tensor("sequences", _padded(result.sequences, length, np.int64, pad)),
        Tensor("sequences_scores", np.array(result.scores, dtype=np.float32)),
        Tensor("token_logprobs", _padded(result.token_logprobs, length, np.float32, 0)),
        Tensor("finish_reason", bytes_array([reason.encode() for reason in result.finish_reasons])),
    ]
    if result.errors:
        lines = [_error_line(result.errors.get(row)) for row in range(len(result.sequences))]
        tensors.append(Tensor(ERROR_TENSOR, bytes_array(lines)))
    known = [*RESPONSE_TENSORS, ERROR_TENSOR]
    wanted = {output.name for output in request.request_outputs or []} or set(known)
    if unknown := wanted - set(known):
        raise BadRequest(f"unknown output {min(unknown)!r}; known: {', '.join(known)}")
    return InferResponse(
        response_id=request.id or "",
        model_name=request.model_name,
        infer_outputs=[to_infer_output(tensor) for tensor in tensors if tensor.name in wanted],
        parameters=dict(result.timings),
    )


def describe(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> list[dict[str, Any]]:
    """Returns tensors as V2 model metadata lists them; -1 is any size."""
    return [{"name": name, "datatype": datatype, "shape": list(shape)} for name, (datatype, shape) in tensors.items()]


def _error_line(error: ServiceError | None) -> bytes:
    return b"" if error is None else f"{error.status_code.name} {error.details}".encode()


def _read_errors(tensor: Tensor | None) -> dict[int, ServiceError]:
    errors = {}
    for row, line in enumerate([] if tensor is None else tensor.data.flat):
        name, _, details = line.decode(errors="replace").partition(" ")
        if name:
            errors[row] = from_grpc_status(StatusCode.__members__.get(name, StatusCode.INTERNAL), details)
    return errors


def _checked_tensors(request: InferRequest) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, infer_input in named_inputs(request, known=REQUEST_TENSORS, required=REQUEST_TENSORS).items():
        datatype, shape = REQUEST_TENSORS[name]
        if infer_input.datatype != datatype:
            raise BadTensor(name, f"expected datatype {datatype}, got {infer_input.datatype}")
        tensor = from_infer_input(infer_input)
        if tensor.data.ndim != len(shape) or tensor.data.dtype != DATATYPES[datatype]:
            raise BadTensor(name, f"expected shape {shape}, got {tensor.shape}")
        tensors[name] = tensor
    return tensors


def _expect_shape(name: str, array: np.ndarray[Any, Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise BadTensor(name, f"expected shape {list(shape)}, got {list(array.shape)}")


def _prompt_lengths(attention_mask: np.ndarray[Any, Any]) -> list[int]:
    lengths = attention_mask.sum(axis=1)
    expected = np.arange(attention_mask.shape[1])[None, :] < lengths[:, None]
    for row, (mask, want) in enumerate(zip(attention_mask, expected, strict=True)):
        if lengths[row] < 1 or not np.array_equal(mask, want):
            raise BadTensor("attention_mask", "expected ones for the prompt, then zeros for padding", row=row)
    return [int(n) for n in lengths]


def _padded(rows: Sequence[np.ndarray[Any, Any]], length: int, dtype: Any, value: float) -> np.ndarray[Any, Any]:
    array = np.full((len(rows), length), value, dtype=dtype)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array
