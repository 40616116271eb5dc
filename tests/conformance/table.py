"""Cases that every way to the server must answer alike, and the comparison of the ways as a table.

    python -m tests.conformance.table --rest-url http://127.0.0.1:8080 --grpc-url 127.0.0.1:8081

prints it as Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .clients import CLIENTS
from .contract import FINISH, GENERATED, IMAGE, JSON_OUTPUTS, OUTPUTS, PARSED, TASK
from .messages import BRIEF, SHORT, Outcome, Request, Tensor, ask
from .pictures import (
    RED_CIRCLE_BINS,
    RED_CIRCLE_PIXELS,
    base64_text,
    data_uri,
    png,
    truncated,
    urlsafe_text,
    vast_png,
)
from .wires import GRPC_STATUS, REST_STATUS, WIRES, GrpcConnection, Target, Wire

# gRPC has no code of its own for it.
_STATUS_OVER_GRPC = {"too large": "invalid"}
# Whose message tells at which step time ran out, which is not the same from call to call.
_STATUS_WITH_WORDS_OF_ITS_OWN = ("deadline",)
# What a response says of its rows; its other parameters are times.
_COUNTS = ("truncated_rows", "failed_rows")
# Ways whose batches differ may differ in a score's last digits.
_TOLERANCE = 1e-3

PLAIN, OTHER = base64_text(png(0)), base64_text(png(1))
HALF = base64_text(truncated("PNG"))
GROUNDING, DETECTION, CATEGORY = "<CAPTION_TO_PHRASE_GROUNDING>", "<OPEN_VOCABULARY_DETECTION>", "<REGION_TO_CATEGORY>"


@dataclass(frozen=True, slots=True)
class Case:
    """A request and what has to come back for it, on whichever way.

    Attributes:
        name: What the case is about.
        request: The request.
        status: The outcome's status.
        words: What the message of a refusal must hold.
    """

    name: str
    request: Request
    status: str = "ok"
    words: tuple[str, ...] = ()


# A short answer tells ways apart as well as a long one.
_ask = partial(ask, parameters=BRIEF)


def _with(**parameters: Any) -> dict[str, Any]:
    return {**BRIEF, **parameters}


def _refused(name: str, request: Request, *words: str, status: str = "invalid") -> Case:
    return Case(name, request, status, words)


def _of_integers(request: Request, tensor_name: str) -> Request:
    tensors = (
        dataclasses.replace(tensor, datatype="INT32", data=(7,) * len(tensor.data))
        if tensor.name == tensor_name
        else tensor
        for tensor in request.tensors
    )
    return dataclasses.replace(request, tensors=tuple(tensors))


CASES = (
    Case("base64, shape [1]", _ask(PLAIN, "<OD>", shape=(1,))),
    Case("base64, shape [1,1]", _ask(PLAIN, "<OD>")),
    Case("URL-safe base64 without padding", _ask(urlsafe_text(png()), "<OD>")),
    Case("data: URI", _ask(data_uri(png()), "<OD>")),
    Case("a file's bytes", _ask(png(), "<OD>")),
    Case("bytes, base64 and data: URI in one request", _ask([png(), OTHER, data_uri(png(2))], ["<CAPTION>"] * 3)),
    Case("two images, shape [2]", _ask([PLAIN, OTHER], ["<CAPTION>", "<OCR>"], shape=(2,))),
    Case("two images, shape [2,1]", _ask([PLAIN, OTHER], ["<CAPTION>", "<OCR>"])),
    Case("three tasks on an image, shape [1,3]", _ask(PLAIN, ["<CAPTION>", "<OD>", "<OCR>"], shape=(1, 3))),
    Case(
        "two tasks on each of two images, shape [2,2]",
        _ask(
            [PLAIN, OTHER],
            ["<OD>", DETECTION, "<OCR>", CATEGORY],
            ["", "red circle", "", RED_CIRCLE_BINS],
            shape=(2, 2),
        ),
    ),
    Case(
        "images of shape [2], tasks of shape [2,1]",
        Request((Tensor(IMAGE, (PLAIN, OTHER), (2,)), Tensor(TASK, (b"<CAPTION>", b"<OCR>"), (2, 1))), BRIEF),
    ),
    Case("a text", _ask(PLAIN, GROUNDING, "a red circle and a blue square")),
    Case("a text beyond ASCII", _ask(PLAIN, GROUNDING, "ein grüner Kreis, 赤い円 und 🟥")),
    Case("an empty text for a task that takes none", _ask(PLAIN, "<CAPTION>", "")),
    Case("a region by locations", _ask(PLAIN, CATEGORY, RED_CIRCLE_BINS)),
    Case("a region by a pixel box", _ask(PLAIN, CATEGORY, RED_CIRCLE_PIXELS)),
    Case("a task in small letters, without brackets", _ask(PLAIN, "od")),
    Case("a request with an id", _ask(PLAIN, "<OCR>", id="request-7")),
    Case("all outputs", _ask([PLAIN, OTHER], ["<OD>", "<CAPTION>"], outputs=OUTPUTS)),
    Case("one output, another than the usual", _ask(PLAIN, "<OCR_WITH_REGION>", outputs=(GENERATED,))),
    Case("masks", _ask(PLAIN, "<REGION_TO_SEGMENTATION>", RED_CIRCLE_BINS, parameters=SHORT, outputs=OUTPUTS)),
    Case("parameters as numbers", _ask(PLAIN, "<OD>", parameters=_with(num_beams=2, timeout_ms=60_000))),
    Case(
        "parameters as strings",
        _ask(PLAIN, "<OD>", parameters={"max_new_tokens": "12", "num_beams": "2", "length_penalty": "0.5"}),
    ),
    Case("a fraction as a number", _ask(PLAIN, "<OD>", parameters=_with(length_penalty=0.5))),
    Case("an answer cut short", _ask(PLAIN, "<OD>", parameters={"max_new_tokens": 3}, outputs=(PARSED, FINISH))),
    Case("partial: one bad row of three", _ask([PLAIN, HALF, OTHER], ["<OCR>"] * 3, parameters=_with(partial=True))),
    Case(
        "partial, all outputs: two tasks on a bad image",
        _ask([HALF, PLAIN], ["<OD>", "<OCR>"] * 2, shape=(2, 2), parameters=_with(partial=True), outputs=OUTPUTS),
    ),
    Case("partial: all rows bad", _ask([HALF] * 2, ["<OD>"] * 2, parameters=_with(partial=True))),
    _refused("unknown task", _ask(PLAIN, "<DANCE>"), TASK, "<DANCE>", "row 0"),
    _refused("no text for a task that needs one", _ask(PLAIN, GROUNDING), "TEXT_PROMPT", "row 0"),
    _refused("a text for a task that takes none", _ask(PLAIN, "<OD>", "a cat"), "TEXT_PROMPT", "row 0"),
    _refused("a region in words", _ask(PLAIN, CATEGORY, "in the middle"), "TEXT_PROMPT", "row 0"),
    _refused("a box beyond the image", _ask(PLAIN, CATEGORY, "[0, 0, 9000, 9000]"), "TEXT_PROMPT", "row 0"),
    _refused("half a picture", _ask(HALF, "<OD>"), IMAGE, "row 0"),
    _refused("no base64", _ask(b"@@@ this is no base64 @@@", "<OD>"), IMAGE, "row 0"),
    _refused("a web address", _ask(b"https://example.com/cat.png", "<OD>"), IMAGE, "row 0"),
    _refused("half a picture's bytes", _ask(truncated("PNG"), "<OD>"), IMAGE, "row 0"),
    _refused("one bad row of three", _ask([PLAIN, OTHER, HALF], ["<OCR>"] * 3), IMAGE, "row 2"),
    _refused("more rows than allowed", _ask(PLAIN, ["<OD>"] * 5000, shape=(1, 5000)), TASK, "max_rows"),
    _refused(
        "two images and one task",
        Request((Tensor(IMAGE, (PLAIN, OTHER), (2, 1)), Tensor(TASK, (b"<OD>",), (1, 1))), BRIEF),
        TASK,
    ),
    _refused("no task", Request((Tensor(IMAGE, (PLAIN,), (1, 1)),), BRIEF), TASK),
    _refused(
        "an unknown tensor",
        Request((*_ask(PLAIN, "<OD>").tensors, Tensor("PICTURE", (b"",), (1, 1))), BRIEF),
        "PICTURE",
    ),
    _refused("an image of INT32", _of_integers(_ask(PLAIN, "<OD>"), IMAGE), IMAGE, "BYTES"),
    _refused("a task of INT32", _of_integers(_ask(PLAIN, "<OD>"), TASK), TASK, "BYTES"),
    _refused("unknown output", _ask(PLAIN, "<OD>", outputs=(PARSED, "POLYGONS")), "POLYGONS"),
    _refused("unknown parameter", _ask(PLAIN, "<OD>", parameters=_with(temperature=1)), "temperature"),
    _refused("more beams than allowed", _ask(PLAIN, "<OD>", parameters=_with(num_beams=1000)), "num_beams"),
    _refused("no beams", _ask(PLAIN, "<OD>", parameters=_with(num_beams=0)), "num_beams"),
    _refused("true for a number", _ask(PLAIN, "<OD>", parameters=_with(num_beams=True)), "num_beams"),
    _refused("a number for true", _ask(PLAIN, "<OD>", parameters=_with(partial=7)), "partial"),
    _refused("no number", _ask(PLAIN, "<OD>", parameters=_with(length_penalty="nan")), "length_penalty"),
    _refused("a time that is too short", _ask(PLAIN, "<OD>", parameters=_with(timeout_ms=1)), status="deadline"),
    _refused("an image of too many pixels", _ask(base64_text(vast_png()), "<OD>"), IMAGE, status="too large"),
    _refused(
        "partial, but an unknown output",
        _ask(PLAIN, "<OD>", parameters=_with(partial=True), outputs=("POLYGONS",)),
        "POLYGONS",
    ),
    _refused(
        "unknown model",
        dataclasses.replace(_ask(PLAIN, "<OD>"), model="no-such-model"),
        "no-such-model",
        status="not found",
    ),
)


@contextmanager
def open_ways(target: Target) -> Iterator[list[Wire]]:
    """Gives all ways to `target`: those of REST alone where it has no gRPC address."""
    with ExitStack() as stack:
        channel = None
        if target.grpc_url is not None:
            channel = GrpcConnection(target)
            stack.callback(channel.close)
        wires: tuple[type[Any], ...] = WIRES  # those of gRPC share a channel
        opened = [kind(channel if kind.over_grpc() else target) for kind in wires if channel or not kind.over_grpc()]
        opened += [kind(target) for kind in CLIENTS if channel or not kind.over_grpc()]
        yield [stack.enter_context(way) for way in opened]


@dataclass(slots=True)
class Sent:
    """What became of a case on one way.

    Attributes:
        way: The way.
        outcome: What came back; None where the way cannot send the case.
        reason: Why it cannot.
        differences: In what the outcome differs from the first way's, or from the case.
    """

    way: Wire
    outcome: Outcome | None = None
    reason: str = ""
    differences: list[str] = field(default_factory=list)

    def cell(self) -> str:
        """Returns the outcome in a word, in the protocol's own codes."""
        if self.outcome is None:
            return "—"
        code = _code(self.outcome.status, over_grpc=self.way.over_grpc())
        return f"**{code} ≠**" if self.differences else code


def _code(status: str, *, over_grpc: bool) -> str:
    if over_grpc:
        return next((code for code, name in GRPC_STATUS.items() if name == status), status)
    return next((str(code) for code, name in REST_STATUS.items() if name == status != "ok"), status)


def send(case: Case, ways: Sequence[Wire]) -> list[Sent]:
    """Sends `case` on each way, and compares what comes back with the case and with the first way that sends it."""
    sent: list[Sent] = []
    first: Outcome | None = None
    for way in ways:
        if reason := way.cannot_send(case.request):
            sent.append(Sent(way, reason=reason))
            continue
        outcome = way.infer(case.request)
        differences = list(_against_case(case, way, outcome))
        if first is None:
            first = outcome
        else:
            differences += _against_first(first, way, outcome)
        sent.append(Sent(way, outcome, differences=differences))
    return sent


def _against_case(case: Case, way: Wire, outcome: Outcome) -> Iterator[str]:
    expected = _STATUS_OVER_GRPC.get(case.status, case.status) if way.over_grpc() else case.status
    if outcome.status != expected:
        yield f"{outcome.status}, not {expected}: {outcome.message}"
    yield from (f"no {word!r} in {outcome.message!r}" for word in case.words if word not in outcome.message)
    if outcome.status != "ok":
        return
    request = case.request
    names = set(request.outputs or (PARSED,))
    if set(outcome.outputs) != names:
        yield f"outputs {sorted(outcome.outputs)}, not {sorted(names)}"
    tasks = next(tensor for tensor in request.tensors if tensor.name == TASK)
    for name, output in outcome.outputs.items():
        shape = tasks.shape if way.shows_tensors else (len(tasks.data),)
        if (output.datatype, output.shape, len(output.data)) != ("BYTES", shape, len(tasks.data)):
            yield f"{name}: {len(output.data)} of {output.datatype} {output.shape}, not BYTES {shape}"
    if request.id and outcome.id != request.id:
        yield f"id {outcome.id!r}, not {request.id!r}"


def _against_first(first: Outcome, way: Wire, outcome: Outcome) -> Iterator[str]:
    if outcome.message != first.message and first.status not in _STATUS_WITH_WORDS_OF_ITS_OWN:
        yield f"message {outcome.message!r}, not {first.message!r}"
    for name in outcome.outputs.keys() & first.outputs.keys():
        elements = zip(outcome.outputs[name].data, first.outputs[name].data, strict=False)
        for row, (element, expected) in enumerate(elements):
            alike = _alike(json.loads(element), json.loads(expected)) if name in JSON_OUTPUTS else element == expected
            if not alike:
                yield f"{name}, row {row}: {element}, not {expected}"
    if way.shows_tensors:
        for name in _COUNTS:
            value, expected_value = outcome.parameters.get(name), first.parameters.get(name)
            if value != expected_value:
                yield f"parameter {name} {value!r}, not {expected_value!r}"


def _alike(value: Any, expected: Any) -> bool:
    """Whether two JSON values are the same, fractions but for their last digits."""
    if isinstance(value, float) and isinstance(expected, float):
        return math.isclose(value, expected, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(_alike(value[key], expected[key]) for key in value)
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_alike, value, expected))
    return type(value) is type(expected) and bool(value == expected)


def explain(sent: Sequence[Sent]) -> str:
    """Returns one line a way: its outcome, and in what it differs."""
    width = max(len(one.way.name) for one in sent)
    lines = []
    for one in sent:
        told = one.reason or "; ".join(one.differences) or "as it should be"
        lines.append(f"{one.way.name:<{width}}  {one.cell()}  {told}")
    return "\n".join(lines)


def markdown(rows: Sequence[tuple[Case, Sequence[Sent]]]) -> str:
    """Returns all cases on all ways as a Markdown table, with notes of why a way cannot send a case."""
    ways = [one.way.name for one in rows[0][1]]
    lines = [f"| case | {' | '.join(ways)} |", f"|---|{'---|' * len(ways)}"]
    reasons: dict[str, set[str]] = {}
    for case, sent in rows:
        lines.append(f"| {case.name} | {' | '.join(one.cell() for one in sent)} |")
        for one in sent:
            if one.reason:
                reasons.setdefault(one.reason, set()).add(one.way.name)
    lines += ["", "— where a way cannot send the case:", ""]
    lines += [f"- {', '.join(sorted(names))}: {reason}." for reason, names in reasons.items()]
    wrong = [f"{case.name}\n{explain(sent)}" for case, sent in rows if any(one.differences for one in sent)]
    return "\n".join(
        [*lines, *(["", "≠ where the outcome is not as it should be:", "", "```", *wrong, "```"] if wrong else [])]
    )


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.table", description=__doc__)
    parser.add_argument("--rest-url", required=True, help="REST address of the server, e.g. http://127.0.0.1:8080")
    parser.add_argument("--grpc-url", help="its gRPC host:port")
    parser.add_argument("--model-name", default="florence2", help="the model's name")
    parser.add_argument("--request-timeout", type=float, default=60.0, help="seconds one call may take")
    given = parser.parse_args()
    grpc_url = given.grpc_url.removeprefix("grpc://") if given.grpc_url else None
    target = Target(given.rest_url, grpc_url, given.model_name, {}, given.request_timeout)
    logging.disable()  # KServe's client logs every refusal with a stack
    with open_ways(target) as ways:
        print(markdown([(case, send(case, ways)) for case in CASES]))


if __name__ == "__main__":
    _main()
