"""The public contract: what clients send to the transformer and what they get back.

``INPUT_IMAGE`` [B] or [B,1] and ``TASK_PROMPT`` [B], [B,1] or [B,T] make B·T rows, each one
question about one image; ``TEXT_PROMPT``, if sent, has TASK_PROMPT's shape, and so has every output.

===================  ==========================================================================================
``PARSED_JSON``      ``{"<OD>": {"bboxes": [[x1, y1, x2, y2], …], "labels": […]}}``
``GENERATED_TEXT``   the generated tokens as text
``SCORES``           ``{"<OD>": {"sequence": -0.2, "bboxes": [0.93, …], "labels": [0.99, …]}}``
``MASKS``            ``{"<OD>": {"masks": [{"size": [h, w], "counts": "…"}, …], "labels": […]}}``
``FINISH_REASON``    ``stop``, ``length`` where max_new_tokens cut the answer off, ``error``
===================  ==========================================================================================

With the parameter ``partial`` a row that can't be answered is
``{"error": {"status": 400, "message": "INPUT_IMAGE, row 1: …"}}`` where it would be JSON, and fails no other.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import orjson
import pybase64
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from florence2_kserve.errors import BadRequest, BadTensor, ServiceError, TooLarge
from florence2_kserve.protocol.tensors import Tensor, bytes_array, from_infer_input, named_inputs, to_infer_output
from florence2_kserve.tasks import Task, TaskInput, find_task

if TYPE_CHECKING:
    from kserve.protocol.infer_type import InferRequest, InferResponse

INPUT_IMAGE, TASK_PROMPT, TEXT_PROMPT = "INPUT_IMAGE", "TASK_PROMPT", "TEXT_PROMPT"
PARSED_JSON, GENERATED_TEXT, SCORES, MASKS, FINISH_REASON = (
    "PARSED_JSON",
    "GENERATED_TEXT",
    "SCORES",
    "MASKS",
    "FINISH_REASON",
)
REQUIRED_INPUTS = (INPUT_IMAGE, TASK_PROMPT)
OPTIONAL_INPUTS = (TEXT_PROMPT,)
INPUTS = (*REQUIRED_INPUTS, *OPTIONAL_INPUTS)
OUTPUTS = (PARSED_JSON, GENERATED_TEXT, SCORES, MASKS, FINISH_REASON)
DEFAULT_OUTPUTS = (PARSED_JSON,)
LENGTH, ERROR = "length", "error"  # finish reasons beside "stop"
# The ``platform`` of model metadata, in the protocol's form <project>_<format>.
PLATFORM, EMBEDDED_PLATFORM = "florence2_safetensors", "florence2_embedded"

# Request parameters that belong to the wire format and not to us.
TRANSPORT_PARAMETERS = frozenset({"binary_data_output"})
_WHITE_SPACE = b" \t\n\r\v\f"
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"RIFF", b"II*\x00", b"MM\x00*")


T = TypeVar("T")


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("has to be a number, not true or false")
    return value


def _read_bool(value: object) -> object:
    known = {"true": True, "false": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in known:
        return known[value.lower()]
    raise ValueError("has to be true or false")


_Number = BeforeValidator(_not_bool)


class GenerationOptions(BaseModel):
    """Request parameters; numbers may also come as strings, since gRPC has no fractions.

    Attributes:
        max_new_tokens: Bound on generated tokens; None takes the task's.
        num_beams: Width of the beam search; None takes the checkpoint's.
        length_penalty: Exponent of the length a finished beam's score is divided by; None takes the checkpoint's.
        timeout_ms: Milliseconds after which the answer is worthless; None takes the server's.
        partial: Whether rows that can be answered are, where others can't.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: Annotated[int, Field(ge=1), _Number] | None = None
    num_beams: Annotated[int, Field(ge=1), _Number] | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False), _Number] | None = None
    timeout_ms: Annotated[int, Field(ge=1, le=86_400_000), _Number] | None = None
    partial: Annotated[bool, BeforeValidator(_read_bool)] = False

    def timeout_seconds(self, longest: float) -> float:
        """Returns the seconds that the request may take: its own, but no more than the server's `longest`."""
        return longest if self.timeout_ms is None else min(longest, self.timeout_ms / 1000)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one request may ask for on this server; each bound is the setting of its name.

    Attributes:
        max_rows: Answers: images times tasks.
        max_num_beams: Beams.
        max_new_tokens: Generated tokens.
        max_image_bytes: Bytes of one encoded image.
    """

    max_rows: int
    max_num_beams: int
    max_new_tokens: int
    max_image_bytes: int = field(default=2**63, kw_only=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One question about one image.

    Attributes:
        image: Index of the image in the call.
        task: The task.
        text: Text or region that goes with it, "" where the task takes none.
        label: How errors name it: its index along the batch axis, and its column where there are several.
    """

    image: int
    task: Task
    text: str
    label: str


@dataclass(slots=True)
class InferenceCall:
    """A client's request, checked and in our own terms.

    Attributes:
        id: Request id, echoed in the answer.
        model_name: Name of the model asked for.
        images: B encoded images, as bytes; with ``options.partial`` an error where one isn't right.
        rows: B·T questions, row-major, likewise.
        shape: TASK_PROMPT's shape, which the outputs take on.
        outputs: Names of the outputs asked for.
        options: Request parameters.
    """

    id: str
    model_name: str
    images: list[bytes | ServiceError]
    rows: list[Row | ServiceError]
    shape: list[int]
    outputs: tuple[str, ...]
    options: GenerationOptions


@dataclass(slots=True)
class RowAnswer:
    """One row's answer; what its request didn't ask for may be missing.

    Attributes:
        task: Name of the task, the key of all that is JSON.
        value: The structured answer: a text, or a mapping of lists.
        finish_reason: ``stop`` or ``length``.
        text: The generated tokens as text.
        scores: By name: ``sequence``, the log-probability that beam search ranked it by, and those of its parts.
        masks: Run-length masks and their labels.
    """

    task: str
    value: Any
    finish_reason: str
    text: str = ""
    scores: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, Any] = field(default_factory=dict)


def read_call(request: InferRequest, bounds: Bounds) -> InferenceCall:
    """Checks a request and puts it into our own terms.

    Args:
        request: The SDK's request, from REST or gRPC.
        bounds: What a request may ask for here.

    Raises:
        BadTensor: If a tensor is missing, misnamed, of the wrong type or shape, or one of its rows is wrong and
            the request isn't partial.
        TooLarge: If an image is over the limit.
        BadRequest: If a parameter or an output's name is wrong.
    """
    options = read_options(request.parameters, bounds)
    inputs = named_inputs(request, known=INPUTS, required=REQUIRED_INPUTS)
    tensors = {name: from_infer_input(infer_input) for name, infer_input in inputs.items()}
    images = _image_column(tensors[INPUT_IMAGE])
    prompts = tensors[TASK_PROMPT].data
    _check_bytes(tensors[TASK_PROMPT])
    if prompts.ndim not in (1, 2) or prompts.shape[0] != len(images):
        raise BadTensor(
            TASK_PROMPT,
            f"shape {list(prompts.shape)} doesn't go with {len(images)} images: "
            f"expected [{len(images)}], [{len(images)},1] or [{len(images)},T] for T tasks on each image",
        )
    if prompts.size == 0:
        raise BadTensor(TASK_PROMPT, f"shape {list(prompts.shape)} holds no task")
    if prompts.size > bounds.max_rows:
        raise BadTensor(TASK_PROMPT, f"{prompts.size} rows are over this server's bound max_rows={bounds.max_rows}")
    texts = _text_column(tensors.get(TEXT_PROMPT), prompts.shape)
    tasks_per_image = prompts.size // len(images)
    rows = [
        _read(options.partial, _row, index // tasks_per_image, _label(index, tasks_per_image), prompt, text)
        for index, (prompt, text) in enumerate(zip(prompts.flat, texts, strict=True))
    ]
    return InferenceCall(
        id=request.id or "",
        model_name=request.model_name,
        images=[
            _read(options.partial, _image_bytes, value, row, bounds.max_image_bytes)
            for row, value in enumerate(images)
        ],
        rows=rows,
        shape=[int(n) for n in prompts.shape],
        outputs=_requested_outputs(request),
        options=options,
    )


def write_answer(
    call: InferenceCall, answers: Sequence[RowAnswer | ServiceError], parameters: Mapping[str, Any]
) -> InferResponse:
    """Returns the SDK's response for `call`, holding the outputs that were asked for.

    Args:
        call: The request.
        answers: An answer a row, or why there is none, in the order of its rows.
        parameters: Response parameters: strings, booleans or integers (gRPC has no others).
    """
    from kserve.protocol.infer_type import InferResponse

    columns = {name: bytes_array([_ELEMENTS[name](answer) for answer in answers]) for name in call.outputs}
    reasons = [_finish_reason(answer) for answer in answers]
    counts = {"truncated_rows": reasons.count(LENGTH)}
    if call.options.partial:
        counts["failed_rows"] = reasons.count(ERROR)
    return InferResponse(
        response_id=call.id,
        model_name=call.model_name,
        infer_outputs=[to_infer_output(Tensor(name, column.reshape(call.shape))) for name, column in columns.items()],
        parameters=counts | dict(parameters),
    )


def _json_element(field_name: str) -> Callable[[RowAnswer | ServiceError], bytes]:
    def element(answer: RowAnswer | ServiceError) -> bytes:
        if isinstance(answer, ServiceError):
            return orjson.dumps({"error": {"status": answer.http_status, "message": answer.details}})
        return orjson.dumps({answer.task: getattr(answer, field_name)})

    return element


def _finish_reason(answer: RowAnswer | ServiceError) -> str:
    return ERROR if isinstance(answer, ServiceError) else answer.finish_reason


_ELEMENTS: Mapping[str, Callable[[RowAnswer | ServiceError], bytes]] = {
    PARSED_JSON: _json_element("value"),
    GENERATED_TEXT: lambda answer: b"" if isinstance(answer, ServiceError) else answer.text.encode(),
    SCORES: _json_element("scores"),
    MASKS: _json_element("masks"),
    FINISH_REASON: lambda answer: _finish_reason(answer).encode(),
}


def describe_inputs() -> list[dict[str, Any]]:
    """Returns the inputs as V2 model metadata lists them; -1 is any size.

    Of TASK_PROMPT and TEXT_PROMPT it tells the usual one task an image: Triton's load generator reads the shapes
    here, and can't go on where an axis behind the first has no size.
    """
    return [{"name": name, "datatype": "BYTES", "shape": [-1, 1]} for name in INPUTS]


def describe_outputs() -> list[dict[str, Any]]:
    """Returns the outputs as V2 model metadata lists them, in the same way."""
    return [{"name": name, "datatype": "BYTES", "shape": [-1, 1]} for name in OUTPUTS]


def decode_base64(value: bytes) -> bytes:
    """Decodes base64 as people send it: plain or URL-safe, with or without padding and white space.

    Raises:
        ValueError: If it isn't base64.
    """
    try:
        return pybase64.b64decode(value, validate=True)  # as nearly all is sent, and many times as fast as the rest
    except binascii.Error:
        compact = value.translate(_URL_SAFE, _WHITE_SPACE).rstrip(b"=")
    try:
        return pybase64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"not valid base64: {error}") from None


def _read(keep_error: bool, read: Callable[..., T], *arguments: Any) -> T | ServiceError:
    """Returns what `read` returns, or the error that it raises where the others' rows go on without this one."""
    try:
        return read(*arguments)
    except ServiceError as error:
        if not keep_error:
            raise
        return error


def _check_bytes(tensor: Tensor) -> None:
    if tensor.datatype != "BYTES":
        raise BadTensor(tensor.name, f"expected datatype BYTES, got {tensor.datatype}")


def _image_column(tensor: Tensor) -> list[bytes]:
    _check_bytes(tensor)
    shape = tensor.data.shape
    if tensor.data.ndim not in (1, 2) or (tensor.data.ndim == 2 and shape[1] != 1):
        raise BadTensor(tensor.name, f"expected shape [B] or [B,1], got {list(shape)}")
    if tensor.data.size == 0:
        raise BadTensor(tensor.name, f"shape {list(shape)} holds no image")
    return list(tensor.data.flat)


def _text_column(tensor: Tensor | None, shape: tuple[int, ...]) -> list[bytes | None]:
    if tensor is None:
        return [None] * math.prod(shape)
    _check_bytes(tensor)
    if math.prod(tensor.data.shape) != math.prod(shape) or tensor.data.shape[:1] != shape[:1]:
        raise BadTensor(tensor.name, f"expected TASK_PROMPT's shape {list(shape)}, got {list(tensor.data.shape)}")
    return list(tensor.data.flat)


def _decode_text(tensor: str, row: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadTensor(tensor, f"not valid UTF-8: {error.reason} at byte {error.start}", row=row) from None


def _label(index: int, tasks_per_image: int) -> str:
    row, column = divmod(index, tasks_per_image)
    return str(row) if tasks_per_image == 1 else f"{row}, column {column}"


def _row(image: int, label: str, prompt: bytes, text: bytes | None) -> Row:
    name = _decode_text(TASK_PROMPT, label, prompt)
    try:
        task = find_task(name)
    except KeyError as error:
        raise BadTensor(TASK_PROMPT, error.args[0], row=label) from None
    words = _decode_text(TEXT_PROMPT, label, text).strip() if text is not None else ""
    if task.takes is TaskInput.NONE and words:
        raise BadTensor(TEXT_PROMPT, f"{task.name} takes no text, got {_shorten(words)!r}", row=label)
    if task.takes is not TaskInput.NONE and not words:
        kind = "a text" if task.takes is TaskInput.TEXT else "a region (<loc_…>×4, or a pixel box [x1,y1,x2,y2])"
        raise BadTensor(TEXT_PROMPT, f"{task.name} needs {kind}, got none", row=label)
    return Row(image, task, words, label)


def _image_bytes(value: bytes, row: int, max_bytes: int) -> bytes:
    if not value:
        raise BadTensor(INPUT_IMAGE, "is empty", row=row)
    if value.startswith(_IMAGE_MAGIC):
        return _bounded(value, row, max_bytes)
    if len(value) > 2 * max_bytes:  # even as base64 in lines; it isn't decoded then
        raise _too_large(row, f"{len(value)} characters of base64", max_bytes)
    text = value
    if value[:5].lower() == b"data:":
        header, comma, text = value.partition(b",")
        if not comma or not header.rstrip().lower().endswith(b";base64"):
            raise BadTensor(INPUT_IMAGE, "data: URI has to be base64-coded (data:image/…;base64,…)", row=row)
    try:
        image = decode_base64(text)
    except ValueError as error:
        raise BadTensor(INPUT_IMAGE, f"{error}, nor the bytes of an image in a known format", row=row) from None
    if not image:
        raise BadTensor(INPUT_IMAGE, "is empty", row=row)
    return _bounded(image, row, max_bytes)


def _bounded(image: bytes, row: int, max_bytes: int) -> bytes:
    if len(image) > max_bytes:
        raise _too_large(row, f"{len(image)} bytes", max_bytes)
    return image


def _too_large(row: int, size: str, max_bytes: int) -> TooLarge:
    return TooLarge(f"{INPUT_IMAGE}, row {row}: {size} are over the limit of {max_bytes} bytes (max_image_mib)")


def _requested_outputs(request: InferRequest) -> tuple[str, ...]:
    if not request.request_outputs:
        return DEFAULT_OUTPUTS
    names = tuple(dict.fromkeys(output.name for output in request.request_outputs))
    for name in names:
        if name not in OUTPUTS:
            raise BadRequest(f"unknown output {name!r}; known: {', '.join(OUTPUTS)}")
    return names


def read_options(parameters: Mapping[str, Any] | None, bounds: Bounds) -> GenerationOptions:
    from kserve.protocol.infer_type import to_http_parameters

    plain: dict[str, Any] = to_http_parameters(parameters) if parameters else {}
    for name in parameters or {}:
        # Over gRPC a number may be lost on the way: the protocol knows no fractions, and clients drop them silently.
        if name not in plain:
            raise BadRequest(f"parameter {name}: has no value; send fractions as strings")
    try:
        options = GenerationOptions.model_validate(
            {key: value for key, value in plain.items() if key not in TRANSPORT_PARAMETERS}
        )
    except ValidationError as error:
        raise BadRequest("; ".join(_explain(problem) for problem in error.errors())) from None
    for name, bound in (("num_beams", "max_num_beams"), ("max_new_tokens", "max_new_tokens")):
        value, most = getattr(options, name), getattr(bounds, bound)
        if value is not None and value > most:
            raise BadRequest(f"parameter {name}: {value} is over this server's bound {bound}={most}")
    return options


def _explain(problem: Any) -> str:
    name = problem["loc"][0]
    if problem["type"] == "extra_forbidden":
        return f"unknown parameter {name!r}; known: {', '.join(GenerationOptions.model_fields)}"
    return f"parameter {name}: {problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}"


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
