"""The OpenAPI document of the transformer's REST side, made from the same tables that requests are checked by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from florence2_kserve import __version__
from florence2_kserve.protocol.public import (
    DEFAULT_OUTPUTS,
    FINISH_REASON,
    INPUT_IMAGE,
    INPUTS,
    MASKS,
    OUTPUTS,
    PARSED_JSON,
    SCORES,
    TASK_PROMPT,
    TEXT_PROMPT,
    TRANSPORT_PARAMETERS,
    GenerationOptions,
)
from florence2_kserve.settings import Settings
from florence2_kserve.tasks import TASKS, AnswerKind, TaskInput

# A PNG of 8×8 pixels, one of them red, so that examples can be sent as they are.
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAH0lEQVR42mP8//8/AzbAxIADECPB"
    "yIhDAtUyiuxABQAIFQUNvk42VAAAAABJRU5ErkJggg=="
)
_ERRORS = {
    400: "The request is wrong; the message names the tensor, the row and what was expected.",
    404: "No model of that name.",
    413: "Body or image over the limit.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "A fault of the service.",
    503: "Loading, draining, or no predictor; Retry-After says when to come back.",
    504: "The request's time is over.",
}


def document(settings: Settings) -> dict[str, Any]:
    """Returns the OpenAPI 3.1 document of the server that `settings` describe."""
    model = f"/v2/models/{settings.model_name}"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "florence2-kserve",
            "version": __version__,
            "description": "Microsoft Florence-2 by the V2 / Open Inference Protocol: a picture and a task prompt in, "
            "JSON out. The same requests go over gRPC (`inference.GRPCInferenceService`).",
        },
        "paths": {
            f"{model}/infer": {"post": _infer_operation(settings)},
            model: {"get": _get("The model's tensors", {"$ref": "#/components/schemas/ModelMetadata"}, 404)},
            f"{model}/ready": {"get": _get("Whether the model answers", {"type": "object"}, 404, 503)},
            f"{model}/config": {"get": _get("Triton's model configuration extension", {"type": "object"}, 404)},
            f"{model}/stats": {"get": _get("Triton's statistics extension", {"type": "object"}, 404)},
            "/v2": {"get": _get("The server's name, version and extensions", {"type": "object"})},
            "/v2/health/live": {"get": _get("Whether the process lives", {"type": "object"}, 503)},
            "/v2/health/ready": {"get": _get("Whether requests are answered", {"type": "object"}, 503)},
        },
        "components": {"schemas": _schemas(settings)},
    }


def _infer_operation(settings: Settings) -> dict[str, Any]:
    return {
        "summary": "Ask about pictures",
        "operationId": "infer",
        "description": "`INPUT_IMAGE` [B] or [B,1] and `TASK_PROMPT` [B], [B,1] or [B,T] (T tasks on each image) make "
        f"rows, at most {settings.max_rows} in a request; every output has TASK_PROMPT's shape. Binary tensors travel "
        "behind the JSON, with the header Inference-Header-Content-Length.",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/InferenceRequest"},
                    "examples": {name: {"value": value} for name, value in examples().items()},
                },
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        },
        "responses": {
            "200": {
                "description": "An answer a row",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/InferenceResponse"}}},
            },
            **_refusals(*_ERRORS),
        },
    }


def examples() -> dict[str, dict[str, Any]]:
    """Returns request bodies by name; each can be sent as it is."""
    return {
        "caption": _example(["<CAPTION>"]),
        "grounding": _example(["<CAPTION_TO_PHRASE_GROUNDING>"], ["a red dot"]),
        "region": _example(["<REGION_TO_DESCRIPTION>"], ["[0,0,8,8]"]),
        "several tasks, with scores": _example(
            ["<CAPTION>", "<OD>", "<OCR>"],
            outputs=[PARSED_JSON, SCORES, FINISH_REASON],
            parameters={"max_new_tokens": 64, "num_beams": 3, "timeout_ms": 30_000, "partial": True},
        ),
    }


def _example(
    tasks: Sequence[str], texts: Sequence[str] | None = None, outputs: Sequence[str] = (), **rest: Any
) -> dict[str, Any]:
    columns: dict[str, Sequence[str]] = {INPUT_IMAGE: [EXAMPLE_IMAGE], TASK_PROMPT: tasks}
    if texts:
        columns[TEXT_PROMPT] = texts
    body: dict[str, Any] = {
        "id": "1",
        "inputs": [
            {"name": name, "shape": [1, len(data)], "datatype": "BYTES", "data": list(data)}
            for name, data in columns.items()
        ],
        **rest,
    }
    if outputs:
        body["outputs"] = [{"name": name} for name in outputs]
    return body


def _schemas(settings: Settings) -> dict[str, Any]:
    texts = ", ".join(task.name for task in TASKS.values() if task.takes is TaskInput.TEXT)
    regions = ", ".join(task.name for task in TASKS.values() if task.takes is TaskInput.REGION)
    elements = {
        INPUT_IMAGE: "Base64, plain or URL-safe, a data: URI, or the file's bytes as binary tensor.",
        TASK_PROMPT: f"One of {', '.join(TASKS)}.",
        TEXT_PROMPT: f"A text for {texts}; <loc_…> four times or a pixel box [x1,y1,x2,y2] for {regions}; else empty.",
    }
    request_tensor = _tensor(INPUTS, "\n\n".join(f"{name}: {text}" for name, text in elements.items()))
    return {
        "InferenceRequest": {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": {"type": "string"},
                "parameters": _parameters(settings),
                "inputs": {"type": "array", "items": {"$ref": "#/components/schemas/RequestTensor"}},
                "outputs": {
                    "type": "array",
                    "description": f"Which outputs to send; without it {', '.join(DEFAULT_OUTPUTS)}.",
                    "items": {
                        "type": "object",
                        "required": ["name"],
                        "properties": {"name": {"enum": list(OUTPUTS)}, "parameters": {"type": "object"}},
                    },
                },
            },
        },
        "RequestTensor": request_tensor,
        "InferenceResponse": {
            "type": "object",
            "required": ["id", "model_name", "outputs"],
            "properties": {
                "id": {"type": "string"},
                "model_name": {"const": settings.model_name},
                "parameters": {
                    "type": "object",
                    "description": "truncated_rows, failed_rows of partial requests, and microseconds by phase.",
                    "additionalProperties": {"type": "integer"},
                },
                "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/ResponseTensor"}},
            },
        },
        "ResponseTensor": _tensor(
            OUTPUTS,
            f"{PARSED_JSON}, {SCORES} and {MASKS} hold JSON, of the form of the schemas Answers, Scores and Masks.",
        ),
        "Answers": _by_task(
            "Coordinates are pixels of the picture as shown.",
            {task.name: _ANSWERS[task.answer] for task in TASKS.values()},
        ),
        "Scores": _by_task(
            "Lists run parallel to those of the answer.",
            {task.name: _scores_of(_ANSWERS[task.answer]) for task in TASKS.values()},
        ),
        "Masks": _by_task("One of each instance of the answer's polygons.", dict.fromkeys(TASKS, _MASKS)),
        "ModelMetadata": {
            "type": "object",
            "properties": {
                "name": {"const": settings.model_name},
                "versions": {"type": "array", "items": {"type": "string"}},
                "platform": {"type": "string"},
                "properties": {
                    "type": "object",
                    "description": "The checkpoint: model and revision.",
                    "additionalProperties": {"type": "string"},
                },
                "inputs": {"type": "array", "items": {"type": "object"}},
                "outputs": {"type": "array", "items": {"type": "object"}},
            },
        },
        "Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
    }


def _parameters(settings: Settings) -> dict[str, Any]:
    """Returns the schema of request parameters; the server's bounds are among their descriptions."""
    schema = GenerationOptions.model_json_schema()
    for name, parameter in schema["properties"].items():
        kinds = parameter.pop("anyOf", None) or [{"type": parameter.pop("type")}]
        schema["properties"][name] = parameter | {"anyOf": [*kinds, {"type": "string"}]}
    for name, most in (("num_beams", settings.max_num_beams), ("max_new_tokens", settings.max_new_tokens)):
        if most is not None:
            schema["properties"][name]["description"] = f"At most {most} on this server."
    schema["properties"] |= {name: {"type": "boolean"} for name in sorted(TRANSPORT_PARAMETERS)}
    return schema


def _by_task(description: str, schemas: Mapping[str, Any]) -> dict[str, Any]:
    error = {"type": "object", "properties": {"status": {"type": "integer"}, "message": {"type": "string"}}}
    return {
        "type": "object",
        "description": f"One key: the task prompt, or error, for a row of a partial request. {description}",
        "properties": {**schemas, "error": error},
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
    }


def _scores_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    score = {"type": "number", "minimum": 0, "maximum": 1}
    properties: dict[str, Any] = {"sequence": {"type": "number"}}
    if answer["type"] == "string":
        properties["text"] = score
    else:
        properties |= {name: {"type": "array", "items": score} for name in answer["properties"]}
    return {"type": "object", "required": list(properties), "properties": properties}


def _tensor(names: Sequence[str], description: str) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"enum": list(names)},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "datatype": {"const": "BYTES"},
            "data": {"type": "array", "description": description},
            "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer", "minimum": 0}}},
        },
    }


def _get(summary: str, schema: Mapping[str, Any], *refusals: int) -> dict[str, Any]:
    ok = {"description": summary, "content": {"application/json": {"schema": schema}}}
    return {"summary": summary, "responses": {"200": ok, **_refusals(*refusals)}}


def _refusals(*statuses: int) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": _ERRORS[status], "content": error} for status in statuses}


def _lists(*columns: tuple[str, str], of: Mapping[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for places, labels in columns:
        properties[places] = {"type": "array", "items": of[places]}
        properties[labels] = {"type": "array", "items": {"type": "string"}}
    return {"type": "object", "required": list(properties), "properties": properties}


def _coordinates(least: int, most: int | None = None) -> dict[str, Any]:
    numbers: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": least}
    return numbers if most is None else numbers | {"maxItems": most}


_PLACES = {
    "bboxes": _coordinates(4, 4),
    "quad_boxes": _coordinates(8, 8),
    "polygons": {"type": "array", "items": _coordinates(0)},
}
_MASK = {
    "type": "object",
    "description": "COCO's compressed run lengths; size is height and width.",
    "required": ["size", "counts"],
    "properties": {"size": _coordinates(2, 2), "counts": {"type": "string"}},
}
_MASKS = _lists(("masks", "labels"), of={"masks": _MASK})
_BOXES = _lists(("bboxes", "labels"), of=_PLACES)
_ANSWERS: Mapping[AnswerKind, dict[str, Any]] = {
    AnswerKind.TEXT: {"type": "string"},
    AnswerKind.QUADS: _lists(("quad_boxes", "labels"), of=_PLACES),
    AnswerKind.LABELED_BOXES: _BOXES,
    AnswerKind.PHRASE_BOXES: _BOXES,
    AnswerKind.BOXES: _BOXES,
    AnswerKind.POLYGONS: _lists(("polygons", "labels"), of=_PLACES),
    AnswerKind.BOXES_OR_POLYGONS: _lists(("bboxes", "bboxes_labels"), ("polygons", "polygons_labels"), of=_PLACES),
}
