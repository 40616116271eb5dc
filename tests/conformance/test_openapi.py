"""The OpenAPI document: valid, complete for inference, and with examples that work as they are."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from .contract import INPUTS, OUTPUTS, TASKS, Takes
from .messages import ask
from .pictures import base64_text, png
from .wires import RestConnection, rest_outcome

_TEXTS = {Takes.NOTHING: "", Takes.TEXT: "a red circle", Takes.REGION: "[10,10,60,60]"}
_SCHEMAS = {"PARSED_JSON": "Answers", "SCORES": "Scores", "MASKS": "Masks"}


@pytest.fixture
def document(rest: RestConnection) -> Any:
    """The document, parsed."""
    reply = rest.get("/openapi.json")
    assert reply.status == 200, reply
    return reply.json()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _validator(document: Any, schema: Any) -> Any:
    """Returns a validator of `schema`, whose references point into the document."""
    return OAS31Validator({**schema, "components": document["components"]})


def _infer(document: Any, model: str) -> tuple[str, Any]:
    """Returns the path of inference, the model's name in it, and its operation."""
    for path, item in document["paths"].items():
        if path.replace("{model_name}", model) == f"/v2/models/{model}/infer":
            return path.replace("{model_name}", model), item["post"]
    raise AssertionError(f"no inference among {list(document['paths'])}")


def test_it_is_valid_openapi_3_1(document: Any) -> None:
    assert document["openapi"].startswith("3.1.")
    problems = [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()]
    assert not problems


def test_its_examples_are_answered_as_they_are(rest: RestConnection, document: Any) -> None:
    path, operation = _infer(document, rest.target.model)
    examples = operation["requestBody"]["content"]["application/json"]["examples"]
    assert examples
    for name, example in examples.items():
        body = example["value"]
        rest.send("POST", path, _json(body), {"Content-Type": "application/json"})
        reply = rest.receive()
        assert reply.status == 200, f"{name}: {reply}"
        outcome = rest_outcome(reply)
        assert set(outcome.outputs) == {output["name"] for output in body.get("outputs", [{"name": "PARSED_JSON"}])}
        assert not any("error" in answer for answer in outcome.answers()), f"{name}: {outcome.answers()}"


def test_its_examples_and_their_answers_fit_its_schemas(rest: RestConnection, document: Any) -> None:
    _, operation = _infer(document, rest.target.model)
    content = operation["requestBody"]["content"]["application/json"]
    asked = _validator(document, content["schema"])
    answered = _validator(document, operation["responses"]["200"]["content"]["application/json"]["schema"])
    for example in content["examples"].values():
        asked.validate(example["value"])
        answered.validate(rest.post(example["value"]).json())


@pytest.mark.parametrize(
    ("parameters", "fits"),
    [
        ({"num_beams": 1, "max_new_tokens": "3", "length_penalty": "0.5", "timeout_ms": 1, "partial": "true"}, True),
        ({"length_penalty": -10, "partial": False, "binary_data_output": True}, True),
        ({"num_beams": 0}, False),
        ({"max_new_tokens": -1}, False),
        ({"length_penalty": 11}, False),
        ({"timeout_ms": 0.5}, False),
        ({"partial": 1}, False),
        ({"beams": 3}, False),
    ],
    ids=str,
)
def test_parameters_fit_where_the_server_takes_them(
    rest: RestConnection, document: Any, parameters: dict[str, Any], fits: bool
) -> None:
    _, operation = _infer(document, rest.target.model)
    content = operation["requestBody"]["content"]["application/json"]
    body = {**content["examples"]["caption"]["value"], "parameters": parameters}
    assert _validator(document, content["schema"]).is_valid(body) is fits
    assert (rest.post(body).status in (200, 504)) is fits


def test_elements_fit_their_schemas(rest: RestConnection, document: Any) -> None:
    """Of all tasks, and of a row that can't be answered."""
    body = ask(
        [base64_text(png())] * len(TASKS) + [b"@@"],
        [*(task.prompt for task in TASKS), "<OD>"],
        [*(_TEXTS[task.takes] for task in TASKS), ""],
        parameters={"max_new_tokens": 64, "partial": True},
        outputs=tuple(_SCHEMAS),
    ).json_body()
    outcome = rest_outcome(rest.post(body))
    assert outcome.status == "ok", outcome
    for output, name in _SCHEMAS.items():
        validator = _validator(document, {"$ref": f"#/components/schemas/{name}"})
        for element in outcome.outputs[output].data:
            validator.validate(json.loads(element))
        assert not validator.is_valid({"<CAPTION>": []})
        assert not validator.is_valid({"<DANCE>": ""})


def test_a_refusal_fits_its_schema(rest: RestConnection, document: Any) -> None:
    _, operation = _infer(document, rest.target.model)
    reply = rest.post({"inputs": []})
    assert reply.status == 400
    schema = operation["responses"]["400"]["content"]["application/json"]["schema"]
    _validator(document, schema).validate(reply.json())


def test_it_tells_of_every_refusal(rest: RestConnection, document: Any) -> None:
    _, operation = _infer(document, rest.target.model)
    assert set(operation["responses"]) >= {"200", "400", "404", "413", "429", "500", "503", "504"}


def test_it_names_all_tensors_and_parameters(document: Any) -> None:
    text = _json(document).decode()
    parameters = ("max_new_tokens", "num_beams", "length_penalty", "timeout_ms", "partial")
    assert not [name for name in (*INPUTS, *OUTPUTS, *parameters) if name not in text]


def test_its_plain_paths_answer(rest: RestConnection, document: Any) -> None:
    paths = [path for path, item in document["paths"].items() if "get" in item and "{" not in path]
    assert paths
    for path in paths:
        reply = rest.get(path)
        assert reply.status == 200, f"{path}: {reply}"
