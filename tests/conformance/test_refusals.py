"""What is wrong is refused by name and row, on every wire, and the connection goes on."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import pytest

from .contract import IMAGE, TASK, TEXT
from .messages import SHORT, Request, Tensor, ask
from .pictures import base64_text, data_uri, noise, png, truncated, vast_png
from .wires import Wire


def _assert_refused(wire: Wire, request: Request, *names: str, row: int | None = None) -> None:
    """Asserts that `request` is invalid, that the message has one of `names` and `row`, and that calls go on."""
    outcome = wire.infer(request)
    assert outcome.status == "invalid", f"{outcome.status}: {outcome.message}"
    assert any(name in outcome.message for name in names), f"none of {names} in {outcome.message!r}"
    if row is not None:  # as a number of its own, not the 2 of "Florence-2"
        assert re.search(rf"(?<![\w.-]){row}(?!\w)", outcome.message), f"no row {row} in {outcome.message!r}"
    wire.assert_alive()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that must be refused, and the tensor that is to blame."""

    blame: str
    image: bytes = base64_text(png())
    task: bytes = b"<CAPTION>"
    text: bytes = b""


BAD_ROWS = {
    "empty image": BadRow(IMAGE, image=b""),
    "broken base64": BadRow(IMAGE, image=b"@@@ this is no base64 @@@"),
    "base64 cut short": BadRow(IMAGE, image=base64_text(png())[:101]),
    "base64 of noise": BadRow(IMAGE, image=base64_text(noise())),
    "base64 of a web page": BadRow(IMAGE, image=base64_text(b"<!doctype html><title>Not here</title>")),
    "base64 of half a PNG": BadRow(IMAGE, image=base64_text(truncated("PNG"))),
    "base64 of half a JPEG": BadRow(IMAGE, image=base64_text(truncated("JPEG"))),
    "broken data URI": BadRow(IMAGE, image=b"data:image/png;base64,@@@"),
    "data URI without data": BadRow(IMAGE, image=b"data:image/png;base64,"),
    "data URI of a text": BadRow(IMAGE, image=data_uri(b"hello", "text/plain")),
    "web address": BadRow(IMAGE, image=b"https://example.com/cat.png"),
    "file address": BadRow(IMAGE, image=b"file:///etc/passwd"),
    "unknown task": BadRow(TASK, task=b"<DANCE>"),
    "empty task": BadRow(TASK, task=b""),
    "task with its text behind it": BadRow(TASK, task=b"<OPEN_VOCABULARY_DETECTION>red circle"),
    "two tasks in one": BadRow(TASK, task=b"<OD><OCR>"),
    "no text for a task that needs one": BadRow(TEXT, task=b"<CAPTION_TO_PHRASE_GROUNDING>"),
    "blank text": BadRow(TEXT, task=b"<OPEN_VOCABULARY_DETECTION>", text=b"  \n"),
    "text for a task that takes none": BadRow(TEXT, text=b"a red circle"),
    "region for a task that takes none": BadRow(TEXT, task=b"<OD>", text=b"<loc_1><loc_2><loc_3><loc_4>"),
    "text too long for the model": BadRow(TEXT, task=b"<CAPTION_TO_PHRASE_GROUNDING>", text=b"a red circle, " * 3000),
    "no region": BadRow(TEXT, task=b"<REGION_TO_CATEGORY>"),
    "region in words": BadRow(TEXT, task=b"<REGION_TO_CATEGORY>", text=b"in the middle"),
    "region of three locations": BadRow(TEXT, task=b"<REGION_TO_OCR>", text=b"<loc_1><loc_2><loc_3>"),
    "region of five locations": BadRow(TEXT, task=b"<REGION_TO_OCR>", text=b"<loc_1><loc_2><loc_3><loc_4><loc_5>"),
    "location beyond the last": BadRow(TEXT, task=b"<REGION_TO_OCR>", text=b"<loc_1><loc_2><loc_1000><loc_4>"),
    "box of three numbers": BadRow(TEXT, task=b"<REGION_TO_DESCRIPTION>", text=b"[1, 2, 3]"),
    "box of words": BadRow(TEXT, task=b"<REGION_TO_DESCRIPTION>", text=b'["a", "b", "c", "d"]'),
    "box as object": BadRow(TEXT, task=b"<REGION_TO_SEGMENTATION>", text=b'{"x1": 1, "y1": 2, "x2": 3, "y2": 4}'),
    "box that is no JSON": BadRow(TEXT, task=b"<REGION_TO_SEGMENTATION>", text=b"[1, 2, 3, 4"),
    "box with no number in it": BadRow(TEXT, task=b"<REGION_TO_SEGMENTATION>", text=b"[1, 2, NaN, 4]"),
}

# Rows that JSON cannot carry.
BAD_BYTES_ROWS = {
    "noise": BadRow(IMAGE, image=noise()),
    "half a PNG": BadRow(IMAGE, image=truncated("PNG")),
    "half a JPEG": BadRow(IMAGE, image=truncated("JPEG")),
    "a PNG's signature alone": BadRow(IMAGE, image=png()[:8]),
    "zeros": BadRow(IMAGE, image=bytes(1000)),
    "task that is not UTF-8": BadRow(TASK, task=b"\xff\xfe<CAPTION>"),
    "text that is not UTF-8": BadRow(TEXT, task=b"<OPEN_VOCABULARY_DETECTION>", text=b"caf\xe9"),
}


def _rows(bad: BadRow, before: int) -> Request:
    """Returns a request of `before` good rows and a bad one."""
    good = BadRow("")
    rows = [*[good] * before, bad]
    shape = (len(rows), 1)
    return Request(
        (
            Tensor(IMAGE, tuple(row.image for row in rows), shape),
            Tensor(TASK, tuple(row.task for row in rows), shape),
            Tensor(TEXT, tuple(row.text for row in rows), shape),
        ),
        SHORT,
    )


@pytest.mark.parametrize("before", [0, 2], ids=["alone", "after two good rows"])
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_refused_by_tensor_and_row(wire: Wire, kind: str, before: int) -> None:
    _assert_refused(wire, _rows(BAD_ROWS[kind], before), BAD_ROWS[kind].blame, row=before)


@pytest.mark.parametrize("before", [0, 2], ids=["alone", "after two good rows"])
@pytest.mark.parametrize("kind", BAD_BYTES_ROWS)
def test_bad_bytes_are_refused_by_tensor_and_row(bytes_wire: Wire, kind: str, before: int) -> None:
    _assert_refused(bytes_wire, _rows(BAD_BYTES_ROWS[kind], before), BAD_BYTES_ROWS[kind].blame, row=before)


GOOD = ask(base64_text(png()), "<CAPTION>")
GOOD_WITH_TEXT = ask(base64_text(png()), "<OPEN_VOCABULARY_DETECTION>", "red circle")


def _changed(request: Request, tensor_name: str, **changes: Any) -> Request:
    """Returns `request` with one tensor changed, or left out where no changes are given."""
    tensors = (
        dataclasses.replace(tensor, **changes) if tensor.name == tensor_name else tensor
        for tensor in request.tensors
        if tensor.name != tensor_name or changes
    )
    return dataclasses.replace(request, tensors=tuple(tensors))


def _with(request: Request, *tensors: Tensor) -> Request:
    return dataclasses.replace(request, tensors=(*request.tensors, *tensors))


# The request, and the names of which the message must have one.
BAD_REQUESTS: dict[str, tuple[Request, tuple[str, ...]]] = {
    "no tensors": (dataclasses.replace(GOOD, tensors=()), (IMAGE, TASK)),
    "no image": (_changed(GOOD, IMAGE), (IMAGE,)),
    "no task": (_changed(GOOD, TASK), (TASK,)),
    "no text tensor for a task that needs a text": (_changed(GOOD_WITH_TEXT, TEXT), (TEXT,)),
    "misnamed image": (_changed(GOOD, IMAGE, name="PICTURE"), ("PICTURE", IMAGE)),
    "misnamed task": (_changed(GOOD, TASK, name="PROMPT"), ("PROMPT", TASK)),
    "name in small letters": (_changed(GOOD, IMAGE, name="input_image"), ("input_image", IMAGE)),
    "one tensor too many": (_with(GOOD, Tensor("MASK", (b"",), (1, 1))), ("MASK",)),
    "the same tensor twice": (_with(GOOD, GOOD.tensors[0]), (IMAGE,)),
    "image of INT32": (_changed(GOOD, IMAGE, datatype="INT32", data=(7,)), (IMAGE,)),
    "task of INT32": (_changed(GOOD, TASK, datatype="INT32", data=(7,)), (TASK,)),
    "text of INT32": (_changed(GOOD_WITH_TEXT, TEXT, datatype="INT32", data=(7,)), (TEXT,)),
    "unknown datatype": (_changed(GOOD, IMAGE, datatype="JPEG"), (IMAGE,)),
    "fewer images than the shape says": (_changed(GOOD, IMAGE, shape=(2, 1)), (IMAGE,)),
    "more tasks than the shape says": (_changed(GOOD, TASK, data=(b"<OD>", b"<OCR>")), (TASK,)),
    "fewer texts than the shape says": (_changed(GOOD_WITH_TEXT, TEXT, shape=(3, 1)), (TEXT,)),
    "two images and one task": (
        _changed(GOOD, IMAGE, data=(base64_text(png()),) * 2, shape=(2, 1)),
        (IMAGE, TASK),
    ),
    "one image and two tasks in rows of their own": (
        _changed(GOOD, TASK, data=(b"<OD>", b"<OCR>"), shape=(2, 1)),
        (IMAGE, TASK),
    ),
    "one task and two texts": (
        _changed(GOOD_WITH_TEXT, TEXT, data=(b"red circle", b"square"), shape=(2, 1)),
        (TEXT,),
    ),
    "two images in a row": (_changed(GOOD, IMAGE, data=(base64_text(png()),) * 2, shape=(1, 2)), (IMAGE,)),
    "image without dimensions": (_changed(GOOD, IMAGE, shape=()), (IMAGE,)),
    "image of three dimensions": (_changed(GOOD, IMAGE, shape=(1, 1, 1)), (IMAGE,)),
    "task of three dimensions": (_changed(GOOD, TASK, shape=(1, 1, 1)), (TASK,)),
    "negative dimensions": (_changed(GOOD, TASK, shape=(-1, -1)), (TASK,)),
    "a shape beyond all memory": (_changed(GOOD, IMAGE, shape=(2**40, 2**20)), (IMAGE,)),
    "no rows": (
        _changed(_changed(GOOD, IMAGE, data=(), shape=(0, 1)), TASK, data=(), shape=(0, 1)),
        (IMAGE, TASK),
    ),
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_a_bad_request_is_refused_by_tensor(wire: Wire, kind: str) -> None:
    request, names = BAD_REQUESTS[kind]
    _assert_refused(wire, request, *names)


def test_an_image_of_too_many_pixels_is_refused(wire: Wire) -> None:
    """A file of 100 KB that decodes to 900 megapixels costs the server nothing."""
    outcome = wire.infer(ask(base64_text(vast_png()), "<CAPTION>"))
    # gRPC has no code of its own for this: a bad argument, or resources that it would exhaust.
    assert outcome.status in ({"too large"} if wire.name.startswith("rest") else {"exhausted", "invalid"}), outcome
    assert IMAGE in outcome.message
    wire.assert_alive()
