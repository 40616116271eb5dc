"""The same requests in the words of each peer, and whether both answer them alike."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from florence2_loadtest.results import Target
from florence2_loadtest.transport import open_transport
from florence2_loadtest.workload import Prepared, Workload

LIMIT = "max_new_tokens"
TYPICAL = "typical"
_INPUT = "MAX_NEW_TOKENS"
_TIMEOUT_S = 300.0
_NEAR_PIXELS = 1.0  # one rounds, the other cuts off


def with_lengths(workload: Workload, lengths: str | None, seed: int) -> Workload:
    """Returns requests that say how many tokens to generate.

    Random weights never end a sentence by themselves.

    Args:
        workload: The requests.
        lengths: A number for all; ``typical`` draws one for each request, from the lengths that answers to its task
            have; None leaves requests as they are.
        seed: Of the draws.

    Raises:
        ValueError: If `lengths` is none of that.
    """
    if lengths is None:
        return workload
    if lengths == TYPICAL:
        return workload.mapped(lambda prepared: _limited(prepared, _typical(prepared, seed)))
    if not lengths.isdecimal() or not 3 <= int(lengths) <= 1024:
        raise ValueError(f"lengths: has to be 3 to 1024, or {TYPICAL}, not {lengths!r}")
    return workload.mapped(lambda prepared: _limited(prepared, int(lengths)))


def for_triton(prepared: Prepared) -> Prepared:
    """Returns a request as Triton's ensemble takes it: the bound on tokens as a tensor.

    Raises:
        ValueError: If it isn't JSON, or has parameters that the ensemble knows nothing of.
    """
    content = _read(prepared)
    parameters = content.pop("parameters", {})
    if not parameters:
        return prepared
    if unknown := sorted(parameters.keys() - {LIMIT}):
        raise ValueError(f"Triton's ensemble has no {', '.join(unknown)}")
    tensor = {"name": _INPUT, "shape": [1, 1], "datatype": "INT32", "data": [parameters[LIMIT]]}
    content["inputs"].append(tensor)
    return _written(prepared, content)


async def ask_each(target: Target, workload: Workload, count: int) -> dict[str, list[Any]]:
    """Asks the first requests of each task, one at a time, which warms the service up as well.

    Args:
        target: The service.
        workload: Its requests.
        count: How many of each task.

    Returns:
        By task, the answers without the key that names the task.

    Raises:
        RuntimeError: If one isn't answered.
    """
    answers: dict[str, list[Any]] = {}
    async with open_transport(target, connections=1) as transport:
        for task in workload.tasks:
            requests = workload.only(task)
            for number in range(count):
                sent = await transport.send(requests[number], _TIMEOUT_S)
                if sent.status != "ok":
                    raise RuntimeError(
                        f"{target.url}: {task}: {sent.status}: {sent.body[:300].decode(errors='replace')}"
                    )
                answers.setdefault(task, []).append(_answer(sent.body))
    return answers


def differences(one: Mapping[str, Sequence[Any]], other: Mapping[str, Sequence[Any]]) -> list[str]:
    """Returns the tasks to which two services gave answers that aren't alike, in words.

    Coordinates may differ by a pixel.
    """
    found = []
    for task in one.keys() & other.keys():
        pairs = list(zip(one[task], other[task], strict=True))
        if unlike := sum(not is_alike(*pair) for pair in pairs):
            found.append(f"{task} ({unlike} of {len(pairs)})")
    return sorted(found)


def is_alike(one: Any, other: Any) -> bool:
    """Whether two answers say the same, but for a pixel."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(is_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_alike, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) <= _NEAR_PIXELS
    return bool(one == other)


def _answer(body: bytes) -> Any:
    (output,) = [each for each in orjson.loads(body)["outputs"] if each["name"] == "PARSED_JSON"]
    return orjson.loads(output["data"][0])


def _typical(prepared: Prepared, seed: int) -> int:
    from florence2_kserve.benchmark.workload import TASKS

    task = TASKS[prepared.task.strip("<>").lower()]
    # By the request itself, so that both peers are asked for the same lengths.
    digest = hashlib.sha256(prepared.body).hexdigest()
    return random.Random(f"{seed} {digest}").randint(task.shortest, task.longest)


def _limited(prepared: Prepared, length: int) -> Prepared:
    content = _read(prepared)
    content["parameters"] = {**content.get("parameters", {}), LIMIT: length}
    return _written(prepared, content)


def _read(prepared: Prepared) -> dict[str, Any]:
    try:
        content = orjson.loads(prepared.body)
    except orjson.JSONDecodeError:
        raise ValueError("peers are asked over REST, in JSON") from None
    return dict(content)


def _written(prepared: Prepared, content: Mapping[str, Any]) -> Prepared:
    body = orjson.dumps(content)
    return replace(prepared, body=body, size=len(body))
