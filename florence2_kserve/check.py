"""``florence2 check``: asks a running service a few questions, and says what was wrong with the answers.

It knows only the service's address, so it asks of any model answers of the right form, and of the
embedded one, which knows the scenes that are drawn here, a true one too.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from florence2_kserve.client import Florence2Client, InvalidRequestError
from florence2_kserve.protocol.public import (
    EMBEDDED_PLATFORM,
    INPUT_IMAGE,
    PARSED_JSON,
    TASK_PROMPT,
    TEXT_PROMPT,
)
from florence2_kserve.tasks import TASKS, AnswerKind
from florence2_kserve.tiny.scenes import Scene, held_out_scene

SCENES = (36, 30)  # four things and a word; four things
ASKED = ("<CAPTION>", "<OD>", "<OCR>", "<CAPTION_TO_PHRASE_GROUNDING>", "<REGION_TO_SEGMENTATION>")
_SHOWN = 100  # characters of an answer
_PATIENT = 10_000  # retries, where time alone is the bound

# The lists of an answer that isn't a text: places, their labels, numbers a place (polygons have any even number).
_BOXES = (("bboxes", "labels", 4),)
_POLYGONS = (("polygons", "labels", None),)
_LISTS: dict[AnswerKind, tuple[tuple[str, str, int | None], ...]] = {
    AnswerKind.QUADS: (("quad_boxes", "labels", 8),),
    AnswerKind.LABELED_BOXES: _BOXES,
    AnswerKind.PHRASE_BOXES: _BOXES,
    AnswerKind.BOXES: _BOXES,
    AnswerKind.POLYGONS: _POLYGONS,
    AnswerKind.BOXES_OR_POLYGONS: (("bboxes", "bboxes_labels", 4), ("polygons", "polygons_labels", None)),
}


class CheckFailed(Exception):
    """The service answered, but not as it should."""


def run_check(
    url: str,
    *,
    model_name: str,
    headers: Mapping[str, str],
    wait: float,
    timeout: float,
    say: Callable[[str], None] = print,
) -> int:
    """Checks a service and says one line about each check.

    Args:
        url: ``http://…``, ``https://…`` or ``grpc://…``.
        model_name: The model's name.
        headers: Sent with every call.
        wait: Seconds in which it has to become ready and give its first answer.
        timeout: Seconds for each further call.
        say: Takes the lines.

    Returns:
        The exit code, 0 where nothing was wrong.
    """
    failed = 0

    def check(name: str, ask: Callable[[], str]) -> bool:
        nonlocal failed
        started = time.monotonic()
        try:
            word, told = "ok", ask()
        except Exception as error:  # whatever comes back from an address that may be anything
            word, told = "FAILED", f"{type(error).__name__}: {error}"
            failed += 1
        told = " ".join(told.split())
        told = told if word == "FAILED" or len(told) <= _SHOWN else told[: _SHOWN - 1] + "…"
        say(f"{word:6} {(time.monotonic() - started) * 1000:7.0f} ms  {name}: {told}")
        return word == "ok"

    started = time.monotonic()
    with Florence2Client(url, model_name=model_name, headers=dict(headers), retries=_PATIENT) as client:
        questions = _Questions(client)

        def ready() -> str:
            client.wait_ready(wait)
            return f"the model {model_name!r} is ready"

        def first() -> str:
            client.timeout = max(1.0, started + wait - time.monotonic())
            return questions.task(ASKED[0])

        # Without these there is nothing to be seen of the rest.
        if check("ready", ready) and check(ASKED[0], first):
            client.timeout = timeout
            platform = ""

            def metadata() -> str:
                nonlocal platform
                platform = questions.platform()
                return platform

            check("metadata", metadata)
            for task in ASKED[1:]:
                check(task, lambda task=task: questions.task(task))  # type: ignore[misc]
            check("several rows", questions.rows)
            check("a wrong request", questions.wrong)
            if platform == EMBEDDED_PLATFORM:
                check("the truth", questions.truth)
        retries = f", {client.retries_made} calls repeated" if client.retries_made else ""
    say(f"{url}: {f'{failed} failed' if failed else 'all is well'}{retries}")
    return 1 if failed else 0


class _Questions:
    """What is asked of the service; each method returns what to show of the answer, or raises."""

    def __init__(self, client: Florence2Client) -> None:
        self._client = client
        self._scenes = [held_out_scene(index) for index in SCENES]
        self._pictures = [_png(scene) for scene in self._scenes]

    def platform(self) -> str:
        """Asks for the model's metadata and returns its platform."""
        metadata = self._client.metadata()
        for side, names in (("inputs", {INPUT_IMAGE, TASK_PROMPT, TEXT_PROMPT}), ("outputs", {PARSED_JSON})):
            missing = names - {tensor["name"] for tensor in metadata[side]}
            if missing:
                raise CheckFailed(f"no {', '.join(sorted(missing))} among the {side}: {metadata}")
        return str(metadata["platform"])

    def task(self, task: str) -> str:
        """Asks one question."""
        (answer,) = self._infer([0], [task])
        return json.dumps(answer, ensure_ascii=False)

    def rows(self) -> str:
        """Asks about two pictures in one request."""
        tasks = ["<CAPTION>", "<OD>", "<OCR>", "<CAPTION_TO_PHRASE_GROUNDING>"]
        return f"{len(self._infer([0, 1, 1, 0], tasks))} answers"

    def wrong(self) -> str:
        """Asks what must be refused."""
        try:
            answer = self._client.infer(self._pictures[0], "<OD>", "a text that <OD> doesn't take")
        except InvalidRequestError as error:
            if TEXT_PROMPT not in error.message:
                raise CheckFailed(f"refused without naming {TEXT_PROMPT}: {error.message}") from None
            return f"refused with {error.status}"
        raise CheckFailed(f"it should have been refused, the answer is {answer}")

    def truth(self) -> str:
        """Asks the embedded model what the scenes show."""
        answers = self._infer([0, 1], ["<CAPTION>"] * 2)
        for scene, answer in zip(self._scenes, answers, strict=True):
            example = scene.truth("<CAPTION>")
            assert example is not None
            if answer != example.target:
                raise CheckFailed(f"the picture shows {example.target!r}, the answer is {answer!r}")
        return " / ".join(map(str, answers))

    def _infer(self, pictures: Sequence[int], tasks: Sequence[str]) -> list[Any]:
        examples = [self._scenes[picture].truth(task) for picture, task in zip(pictures, tasks, strict=True)]
        texts = [example.text if example else "" for example in examples]
        answers = self._client.infer_batch([self._pictures[picture] for picture in pictures], tasks, texts)
        if len(answers) != len(tasks):
            raise CheckFailed(f"{len(tasks)} questions got {len(answers)} answers")
        sizes = [self._scenes[picture].image.shape[1::-1] for picture in pictures]
        return [_formed(*each) for each in zip(tasks, answers, sizes, strict=True)]


def _formed(task: str, answer: Any, size: tuple[int, int]) -> Any:
    """Returns the answer to `task` if it has the form that this task's answers have.

    Raises:
        CheckFailed: If it hasn't.
    """
    if not isinstance(answer, dict) or list(answer) != [task]:
        raise CheckFailed(f"an answer to {task} has this one key, not {answer!r}")
    value = answer[task]
    kind = TASKS[task].answer
    if kind is AnswerKind.TEXT:
        if not isinstance(value, str):
            raise CheckFailed(f"a text was expected, not {value!r}")
        return value
    if not isinstance(value, dict) or set(value) != {name for pair in _LISTS[kind] for name in pair[:2]}:
        raise CheckFailed(f"lists were expected ({', '.join(n for p in _LISTS[kind] for n in p[:2])}), not {value!r}")
    for places_name, labels_name, numbers in _LISTS[kind]:
        places, labels = value[places_name], value[labels_name]
        if len(places) != len(labels) or not all(isinstance(label, str) for label in labels):
            raise CheckFailed(f"{labels_name} don't fit {places_name}: {value!r}")
        for place in places:
            outlines = [place] if numbers else place
            for outline in outlines:
                fits = len(outline) == numbers if numbers else len(outline) % 2 == 0
                if not fits or not all(0 <= number <= size[axis % 2] for axis, number in enumerate(outline)):
                    raise CheckFailed(f"{places_name} has {outline!r} in a picture of {size[0]}×{size[1]}")
    return value


def _png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scene.image).save(buffer, "PNG")
    return buffer.getvalue()
