"""The requests of a load test, encoded before it begins, so that sending one costs nothing but sending it."""

from __future__ import annotations

import base64
import io
import json
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from florence2_kserve.protocol import wire
from florence2_kserve.protocol.public import INPUT_IMAGE, PARSED_JSON, TASK_PROMPT, TEXT_PROMPT
from florence2_kserve.protocol.rest import encode_request
from florence2_kserve.protocol.tensors import Tensor, bytes_array
from florence2_kserve.tasks import TASKS, TaskInput
from florence2_kserve.tiny.scenes import Scene, draw_scene
from florence2_loadtest.scenario import MixItem, Pictures, Scenario

_PLAN = 100 * 128  # requests until the plan begins again
_BLOCK = 100  # in so many requests in a row, tasks are there by their weights
_MOST_BYTES = 512 * 1024**2
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_JPEG_QUALITY = 90
# What is asked of pictures of which nothing is known.
_ANY_TEXT = {TaskInput.TEXT: "a person", TaskInput.REGION: "<loc_250><loc_250><loc_749><loc_749>"}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as it goes over the wire.

    Attributes:
        task: Task prompt.
        body: HTTP body, or a serialised ModelInferRequest.
        headers: That go with the body.
        size: Bytes of the body.
    """

    task: str
    body: bytes
    headers: dict[str, str]
    size: int


@dataclass(frozen=True, slots=True)
class _Picture:
    data: bytes
    scene: Scene | None = None


class Workload:
    """Requests by their number; which one it is depends on the number and the seed alone.

    Args:
        bodies: By entry of the mix: its requests, one a picture.
        weights: By entry of the mix.
        seed: Of their order.
    """

    def __init__(self, bodies: Sequence[Sequence[Prepared]], weights: Sequence[float], seed: int) -> None:
        self._bodies, self._weights, self._seed = bodies, weights, seed
        self._plan = _plan(bodies, weights, seed)

    def __getitem__(self, index: int) -> Prepared:
        item, picture = self._plan[index % len(self._plan)]
        return self._bodies[item][picture]

    def __iter__(self) -> Any:
        raise TypeError("a workload has no end")

    @property
    def variety(self) -> int:
        """How many different requests there are."""
        return sum(map(len, self._bodies))

    @property
    def tasks(self) -> list[str]:
        """The tasks that are asked, each once."""
        return list(dict.fromkeys(bodies[0].task for bodies in self._bodies))

    def mapped(self, change: Callable[[Prepared], Prepared]) -> Workload:
        """Returns the same requests in the same order, each as `change` makes it."""
        return Workload([[change(body) for body in bodies] for bodies in self._bodies], self._weights, self._seed)

    def only(self, task: str) -> Workload:
        """Returns the requests of one task.

        Raises:
            KeyError: If it isn't among them.
        """
        chosen = [number for number, bodies in enumerate(self._bodies) if bodies[0].task == task]
        if not chosen:
            raise KeyError(f"{task} isn't among {', '.join(self.tasks)}")
        return Workload([self._bodies[n] for n in chosen], [self._weights[n] for n in chosen], self._seed)


def build_workload(scenario: Scenario, model_name: str) -> Workload:
    """Encodes a scenario's requests.

    Raises:
        ValueError: If there are no pictures, or so many that their requests don't fit into memory.
    """
    pictures = _read_folder(scenario) if scenario.pictures.folder else _draw(scenario.pictures)
    _check_size(scenario, [len(picture.data) for picture in pictures])
    ids = random.Random(scenario.seed)
    bodies = [
        [_prepare(scenario, model_name, item, picture, _request_id(ids)) for picture in pictures]
        for item in scenario.mix
    ]
    return Workload(bodies, [item.weight for item in scenario.mix], scenario.seed)


def _plan(bodies: Sequence[Sequence[Prepared]], weights: Sequence[float], seed: int) -> list[tuple[int, int]]:
    """Returns (entry of the mix, picture) for each number.

    Entries are drawn systematically within a block, so that every block has them by their weights; drawn one by one
    they would make windows of a measurement differ that the server handles alike. An entry's pictures come in turn.
    """
    chance = np.random.default_rng(seed)
    shares = np.cumsum(weights) / np.sum(weights)
    shares[-1] = 1.0
    entries = []
    for _ in range(_PLAN // _BLOCK):
        points = (np.arange(_BLOCK) + chance.random()) / _BLOCK
        entries.append(chance.permutation(np.searchsorted(shares, points, side="right")))
    turns = [int(chance.integers(len(pictures))) for pictures in bodies]
    plan = []
    for entry in np.concatenate(entries).tolist():
        plan.append((entry, turns[entry]))
        turns[entry] = (turns[entry] + 1) % len(bodies[entry])
    return plan


def _prepare(scenario: Scenario, model_name: str, item: MixItem, picture: _Picture, request_id: str) -> Prepared:
    text = _text(item, picture)
    parameters = {**scenario.parameters, **item.parameters}
    as_text = scenario.encoding == "json"
    data = base64.b64encode(picture.data) if as_text else picture.data
    values = {INPUT_IMAGE: data, TASK_PROMPT: item.task.encode()}
    if text:
        values[TEXT_PROMPT] = text.encode()
    if scenario.protocol == "rest" and as_text:
        body = json_body(request_id, {name: value.decode() for name, value in values.items()}, parameters)
        return Prepared(item.task, body, {"Content-Type": "application/json"}, len(body))
    tensors = {name: bytes_array([value]).reshape(1, 1) for name, value in values.items()}
    if scenario.protocol == "rest":
        body, headers = encode_request(tensors, request_id=request_id, parameters=parameters, outputs=[PARSED_JSON])
        return Prepared(item.task, body, headers, len(body))
    message = wire.infer_request(
        model_name, [Tensor(*pair) for pair in tensors.items()], request_id=request_id, parameters=parameters
    )
    body = message.SerializeToString()
    return Prepared(item.task, body, {}, len(body))


def json_body(request_id: str, values: dict[str, str], parameters: dict[str, Any]) -> bytes:
    """Returns what the replaced deployment's clients send: `requests` writes their dict with the json module."""
    content: dict[str, Any] = {
        "id": request_id,
        "inputs": [
            {"name": name, "shape": [1, 1], "datatype": "BYTES", "data": [value]} for name, value in values.items()
        ],
    }
    if parameters:
        content["parameters"] = parameters
    return json.dumps(content).encode()


def _request_id(ids: random.Random) -> str:
    return uuid.UUID(int=ids.getrandbits(128), version=4).hex


def _text(item: MixItem, picture: _Picture) -> str:
    takes = TASKS[item.task].takes
    if takes is TaskInput.NONE or item.text is not None:
        return item.text or ""
    example = picture.scene.truth(item.task) if picture.scene else None
    return example.text if example else _ANY_TEXT[takes]


def _check_size(scenario: Scenario, sizes: Sequence[int]) -> None:
    size = sum(sizes) * len(scenario.mix)
    size = size * 4 // 3 if scenario.encoding == "json" else size
    if size > _MOST_BYTES:
        raise ValueError(
            f"{len(sizes)} pictures for {len(scenario.mix)} tasks make {size / 1024**2:.0f} MiB of requests, "
            f"more than {_MOST_BYTES / 1024**2:.0f}: take fewer or smaller ones, or fewer tasks"
        )


def _read_folder(scenario: Scenario) -> list[_Picture]:
    folder = scenario.pictures.folder
    assert folder is not None
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)[: scenario.pictures.most]
        _check_size(scenario, [path.stat().st_size for path in paths])
        found = [_Picture(path.read_bytes()) for path in paths]
    except OSError as error:
        raise ValueError(f"pictures: {error.filename or folder}: {error.strerror}") from None
    if not found:
        raise ValueError(f"pictures: there are none in {folder} ({', '.join(sorted(_SUFFIXES))})")
    return found


def _draw(pictures: Pictures) -> list[_Picture]:
    size = (pictures.width, pictures.height)
    return [_draw_one(pictures.seed * 100_003 + number, size) for number in range(pictures.scenes)]


@cache
def _draw_one(seed: int, size: tuple[int, int]) -> _Picture:
    # Each has a word, so that all tasks have something to ask about. Regions are relative, they survive the resize.
    scene = draw_scene(seed, words=(1, 1))
    buffer = io.BytesIO()
    Image.fromarray(scene.image).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return _Picture(buffer.getvalue(), scene)
