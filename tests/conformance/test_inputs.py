"""Every form in which a picture and its prompts may come: all give the answer of the plain base64 request."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from .contract import IMAGE, PARSED, TASK, TASKS, assert_answer
from .messages import BRIEF, SHORT, Request, Tensor, ask
from .pictures import RED_CIRCLE_BINS, RED_CIRCLE_PIXELS, SIZE, base64_text, data_uri, draw, encode, png
from .wires import RestConnection, Target, Wire, rest_outcome

Alone = Callable[..., Any]
ROTATE_90 = Image.Transpose.ROTATE_90  # counter-clockwise
CAPTION, GROUNDING, OD = (
    next(task for task in TASKS if task.prompt == prompt)
    for prompt in ("<CAPTION>", "<CAPTION_TO_PHRASE_GROUNDING>", "<OD>")
)


def test_the_replaced_deployments_client_body(rest: RestConnection, server: Target) -> None:
    """The body that existing clients send, as they send it and read the response."""
    body = {
        "id": uuid.uuid4().hex,
        "inputs": [
            {"name": "INPUT_IMAGE", "shape": [1, 1], "datatype": "BYTES", "data": [base64_text(png()).decode()]},
            {"name": "TASK_PROMPT", "shape": [1, 1], "datatype": "BYTES", "data": ["<CAPTION>"]},
        ],
    }
    reply = rest.post(body)
    assert reply.status == 200
    response = reply.json()
    assert response["id"] == body["id"]
    assert response["model_name"] == server.model
    output = response["outputs"][0]
    assert (output["name"], output["datatype"], output["shape"]) == ("PARSED_JSON", "BYTES", [1, 1])
    assert_answer(CAPTION, json.loads(output["data"][0]), SIZE)


def test_the_replaced_deployments_client_body_with_a_text(rest: RestConnection) -> None:
    def tensor(name: str, value: str) -> dict[str, Any]:
        return {"name": name, "shape": [1, 1], "datatype": "BYTES", "data": [value]}

    inputs = [
        tensor("INPUT_IMAGE", base64_text(png()).decode()),
        tensor("TASK_PROMPT", GROUNDING.prompt),
        tensor("TEXT_PROMPT", "a red circle and a blue square"),
    ]
    reply = rest.post({"id": uuid.uuid4().hex, "inputs": inputs})
    assert reply.status == 200
    assert_answer(GROUNDING, json.loads(reply.json()["outputs"][0]["data"][0]), SIZE)


def test_a_response_has_an_id_where_the_request_has_none(rest: RestConnection) -> None:
    response = rest.post(ask(base64_text(png()), "<CAPTION>").json_body()).json()
    assert isinstance(response["id"], str)
    assert response["id"]


def test_the_id_comes_back_on_every_wire(wire: Wire, server: Target) -> None:
    outcome = wire.infer(ask(base64_text(png()), "<CAPTION>", id="request-7"))
    assert (outcome.status, outcome.id, outcome.model_name) == ("ok", "request-7", server.model)


@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
def test_base64(wire: Wire, alone: Alone, shape: tuple[int, ...]) -> None:
    outcome = wire.infer(ask(base64_text(png()), "<OD>", shape=shape))
    assert outcome.answers() == [alone(0, "<OD>")]
    assert (outcome.outputs[PARSED].datatype, outcome.outputs[PARSED].shape) == ("BYTES", shape)


@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
def test_raw_bytes(bytes_wire: Wire, alone: Alone, shape: tuple[int, ...]) -> None:
    outcome = bytes_wire.infer(ask(png(), "<OD>", shape=shape))
    assert outcome.answers() == [alone(0, "<OD>")]
    assert outcome.outputs[PARSED].shape == shape


def test_data_uri(wire: Wire, alone: Alone) -> None:
    assert wire.infer(ask(data_uri(png()), "<OD>")).answers() == [alone(0, "<OD>")]


def test_each_row_may_have_its_own_form(bytes_wire: Wire, alone: Alone) -> None:
    images = [png(0), base64_text(png(1)), data_uri(png(2))]
    assert bytes_wire.infer(ask(images, ["<CAPTION>"] * 3)).answers() == [alone(n, "<CAPTION>") for n in range(3)]


def test_image_and_task_may_differ_in_dimensions(wire: Wire, alone: Alone) -> None:
    images = Tensor(IMAGE, (base64_text(png(0)), base64_text(png(1))), (2,))
    tasks = Tensor(TASK, (b"<CAPTION>", b"<OCR>"), (2, 1))
    outcome = wire.infer(Request((images, tasks), SHORT))
    assert outcome.answers() == [alone(0, "<CAPTION>"), alone(1, "<OCR>")]
    assert outcome.outputs[PARSED].shape == (2, 1)


def test_tensors_may_come_in_any_order(wire: Wire, alone: Alone) -> None:
    ordered = ask(base64_text(png()), "<OPEN_VOCABULARY_DETECTION>", "red circle")
    shuffled = Request(ordered.tensors[::-1], ordered.parameters)
    assert wire.infer(shuffled).answers() == [alone(0, "<OPEN_VOCABULARY_DETECTION>", "red circle")]


def test_json_data_may_be_nested_as_its_shape(rest: RestConnection, alone: Alone) -> None:
    body = ask(base64_text(png()), "<CAPTION>").json_body()
    for tensor in body["inputs"]:
        tensor["data"] = [tensor["data"]]
    assert rest_outcome(rest.post(body)).answers() == [alone(0, "<CAPTION>")]


def test_json_tensors_may_carry_empty_parameters(rest: RestConnection, alone: Alone) -> None:
    body = ask(base64_text(png()), "<CAPTION>").json_body()
    for tensor in body["inputs"]:
        tensor["parameters"] = {}
    assert rest_outcome(rest.post(body)).answers() == [alone(0, "<CAPTION>")]


# Files that hold exactly the pixels of scene 0, so that the answer must be exactly the PNG's.
SAME_PIXELS: dict[str, Callable[[], bytes]] = {
    "bmp": lambda: encode(draw(), "BMP"),
    "gif": lambda: encode(draw().quantize(256), "GIF"),
    "webp-lossless": lambda: encode(draw(), "WEBP", lossless=True),
    "png-palette": lambda: encode(draw().quantize(256), "PNG"),
    "png-opaque-alpha": lambda: encode(draw().convert("RGBA"), "PNG"),
    "png-turned-upright-by-exif": lambda: encode(draw().transpose(ROTATE_90), "PNG", exif=_turn_clockwise()),
}

# Files that show about the same; the answer must have the right form.
SIMILAR_PIXELS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(draw(), "JPEG"),
    "jpeg-progressive": lambda: encode(draw(), "JPEG", progressive=True),
    "jpeg-grey": lambda: encode(draw().convert("L"), "JPEG"),
    "jpeg-cmyk": lambda: encode(draw().convert("CMYK"), "JPEG"),
    "webp-lossy": lambda: encode(draw(), "WEBP", quality=80),
    "png-one-bit": lambda: encode(draw().convert("1"), "PNG"),
    "png-sixteen-bit-grey": lambda: encode(draw().convert("I;16"), "PNG"),
    "gif-animated": lambda: encode(draw(), "GIF", save_all=True, append_images=[draw(1)]),
}


# How a file's pixels lie for each EXIF orientation: what turns the upright picture into them.
_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def _turn_clockwise() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation that phones write: turn by 90 degrees clockwise to see it upright
    return exif


def _as_the_wire_carries_it(wire: Wire, data: bytes) -> bytes:
    return data if wire.carries_bytes else base64_text(data)


@pytest.mark.parametrize("kind", SAME_PIXELS)
def test_the_same_pixels_give_the_same_answer_in_any_format(rest_or_grpc: Wire, alone: Alone, kind: str) -> None:
    image = _as_the_wire_carries_it(rest_or_grpc, SAME_PIXELS[kind]())
    assert rest_or_grpc.infer(ask(image, "<OD>")).answers() == [alone(0, "<OD>")]


@pytest.mark.parametrize("kind", SIMILAR_PIXELS)
def test_any_common_format_and_mode_is_read(rest_or_grpc: Wire, kind: str) -> None:
    (answer,) = rest_or_grpc.infer(
        ask(_as_the_wire_carries_it(rest_or_grpc, SIMILAR_PIXELS[kind]()), "<OD>")
    ).answers()
    assert_answer(OD, answer, SIZE)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_every_orientation_of_a_file_is_that_of_its_upright_picture(
    rest_or_grpc: Wire, alone: Alone, orientation: int
) -> None:
    """Boxes, and the boxes of regions, are in pixels of the picture as it is shown."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = base64_text(encode(draw().transpose(_STORED[orientation]), "PNG", exif=exif))
    tasks, texts = ["<OD>", "<REGION_TO_CATEGORY>"], ["", RED_CIRCLE_PIXELS]
    outcome = rest_or_grpc.infer(ask(image, tasks, texts, shape=(1, 2)))
    assert outcome.answers() == [alone(0, "<OD>"), alone(0, "<REGION_TO_CATEGORY>", RED_CIRCLE_BINS)]


TEXTS_BEYOND_ASCII = {
    "accents": "un cercle vert à côté d'une étoile",
    "decomposed accents": "e\u0301toile",
    "Japanese": "赤い円",
    "right to left": "دائرة حمراء",
    "emoji of several code points": "👩\u200d🎨 und 🟥",
}


@pytest.mark.parametrize("kind", TEXTS_BEYOND_ASCII)
def test_a_text_beyond_ascii_is_the_same_question_on_every_wire(wire: Wire, alone: Alone, kind: str) -> None:
    """Python's JSON escapes it, gRPC and the binary extension carry its UTF-8."""
    text = TEXTS_BEYOND_ASCII[kind]
    outcome = wire.infer(ask(base64_text(png()), GROUNDING.prompt, text))
    (answer,) = outcome.answers()
    assert_answer(GROUNDING, answer, SIZE)
    assert answer == alone(0, GROUNDING.prompt, text)


def test_a_text_beyond_ascii_may_be_json_without_escapes(rest: RestConnection, alone: Alone) -> None:
    text = TEXTS_BEYOND_ASCII["Japanese"]
    body = json.dumps(ask(base64_text(png()), GROUNDING.prompt, text).json_body(), ensure_ascii=False)
    assert text in body
    assert rest_outcome(rest.post(body.encode())).answers() == [alone(0, GROUNDING.prompt, text)]


def test_a_refusal_repeats_a_text_beyond_ascii_as_it_was(wire: Wire) -> None:
    outcome = wire.infer(ask(base64_text(png()), "<OD>", "赤い円 à côté"))
    assert outcome.status == "invalid"
    assert "赤い円 à côté" in outcome.message


def test_coordinates_are_those_of_the_image_as_sent(rest: RestConnection) -> None:
    """A picture of another size and aspect gets coordinates of its own size."""
    size = (120, 480)
    (answer,) = rest_outcome(
        rest.post(ask(base64_text(encode(draw().resize(size))), "<OD>", parameters=BRIEF).json_body())
    ).answers()
    assert_answer(OD, answer, size)


def test_an_image_of_several_megabytes(wire: Wire) -> None:
    size = (1400, 1050)
    image = encode(draw().resize(size), "BMP")
    assert len(image) > 4 * 2**20  # gRPC's default limit
    (answer,) = wire.infer(ask(_as_the_wire_carries_it(wire, image), "<OD>", parameters=BRIEF)).answers()
    assert_answer(OD, answer, size)


def test_a_photograph_of_twelve_megapixels(rest_or_grpc: Wire) -> None:
    size = (4000, 3000)
    image = encode(draw().resize(size), "JPEG")
    (answer,) = rest_or_grpc.infer(
        ask(_as_the_wire_carries_it(rest_or_grpc, image), "<OD>", parameters=BRIEF)
    ).answers()
    assert_answer(OD, answer, size)


def test_an_image_of_one_pixel(rest_or_grpc: Wire) -> None:
    image = encode(Image.new("RGB", (1, 1), "white"))
    (answer,) = rest_or_grpc.infer(
        ask(_as_the_wire_carries_it(rest_or_grpc, image), "<OD>", parameters=BRIEF)
    ).answers()
    assert_answer(OD, answer, (1, 1))
