"""Prepared requests: what goes over the wire, and in which order."""

from __future__ import annotations

import base64
import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from florence2_kserve.protocol import wire
from florence2_kserve.protocol.tensors import unpack
from florence2_kserve.tasks import TASKS, TaskInput
from florence2_loadtest.scenario import MixItem, Pictures, Scenario
from florence2_loadtest.workload import Workload, build_workload

SMALL = Pictures(scenes=3, width=64, height=48)


def take(workload: Workload, count: int) -> list[Any]:
    return [workload[index] for index in range(count)]


def scenario(*tasks: str, **fields: Any) -> Scenario:
    return Scenario(mix=[MixItem(task=task) for task in tasks], **{"pictures": SMALL, **fields})


def json_tensors(body: bytes) -> dict[str, str]:
    return {tensor["name"]: tensor["data"][0] for tensor in json.loads(body)["inputs"]}


def test_a_json_body_is_what_the_replaced_deployments_clients_send() -> None:
    prepared = build_workload(scenario("<CAPTION_TO_PHRASE_GROUNDING>"), "florence2")[0]
    content = json.loads(prepared.body)
    image, task, text = (tensor["data"][0] for tensor in content["inputs"])
    # Word for word as their README builds it.
    asked = {
        "id": content["id"],
        "inputs": [
            {"name": "INPUT_IMAGE", "shape": [1, 1], "datatype": "BYTES", "data": [image]},
            {"name": "TASK_PROMPT", "shape": [1, 1], "datatype": "BYTES", "data": [task]},
            {"name": "TEXT_PROMPT", "shape": [1, 1], "datatype": "BYTES", "data": [text]},
        ],
    }
    assert prepared.body == json.dumps(asked).encode()
    assert len(content["id"]) == 32
    assert base64.b64decode(image, validate=True).startswith(b"\xff\xd8\xff")
    assert task == "<CAPTION_TO_PHRASE_GROUNDING>"
    assert text
    assert prepared.headers == {"Content-Type": "application/json"}
    assert prepared.size == len(prepared.body)


def test_parameters_go_with_the_request_a_tasks_own_before_all_others() -> None:
    asked = Scenario(
        mix=[MixItem(task="OD", parameters={"num_beams": 1})],
        parameters={"num_beams": 3, "max_new_tokens": 9},
        pictures=SMALL,
    )
    assert json.loads(build_workload(asked, "m")[0].body)["parameters"] == {"num_beams": 1, "max_new_tokens": 9}


@pytest.mark.parametrize("encoding", ["json", "binary"])
def test_a_grpc_body_is_a_message_with_the_picture_as_asked(encoding: str) -> None:
    asked = scenario("<OD>", protocol="grpc", encoding=encoding, parameters={"max_new_tokens": 9})
    message = wire.MESSAGES["ModelInferRequest"].FromString(build_workload(asked, "mine")[0].body)
    assert message.model_name == "mine"
    assert [tensor.name for tensor in message.inputs] == ["INPUT_IMAGE", "TASK_PROMPT"]
    assert all(list(tensor.shape) == [1, 1] for tensor in message.inputs)
    image = unpack("", "BYTES", [1], message.raw_input_contents[0])[0]
    picture = base64.b64decode(image, validate=True) if encoding == "json" else image
    assert picture.startswith(b"\xff\xd8\xff")
    assert wire.response_parameters(message) == {"max_new_tokens": 9}


def test_a_binary_rest_body_holds_the_picture_as_it_is() -> None:
    prepared = build_workload(scenario("<OD>", encoding="binary"), "m")[0]
    length = int(prepared.headers["Inference-Header-Content-Length"])
    sizes = [tensor["parameters"]["binary_data_size"] for tensor in json.loads(prepared.body[:length])["inputs"]]
    assert length + sum(sizes) == prepared.size
    assert b"\xff\xd8\xff" in prepared.body


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_task_gets_the_text_or_region_that_it_takes(task: Any) -> None:
    for prepared in take(build_workload(scenario(task.name), "m"), 3):
        text = json_tensors(prepared.body).get("TEXT_PROMPT", "")
        match task.takes:
            case TaskInput.NONE:
                assert not text
            case TaskInput.TEXT:
                assert text
                assert "<loc_" not in text
            case TaskInput.REGION:
                assert text.count("<loc_") == 4


def test_a_mixs_own_text_is_asked() -> None:
    mix = [MixItem(task="<OPEN_VOCABULARY_DETECTION>", text="a bicycle")]
    asked = Scenario(mix=mix, pictures=SMALL)
    assert json_tensors(build_workload(asked, "m")[0].body)["TEXT_PROMPT"] == "a bicycle"


def test_tasks_come_by_their_weights_in_every_hundred() -> None:
    mix = [MixItem(task=task, weight=weight) for task, weight in (("OD", 6), ("OCR", 3), ("CAPTION", 1))]
    workload = build_workload(Scenario(mix=mix, pictures=SMALL), "m")
    requests = take(workload, 1000)
    for start in range(0, 1000, 100):
        counts = Counter(prepared.task for prepared in requests[start : start + 100])
        assert counts["<OD>"] == pytest.approx(60, abs=1)
        assert counts["<OCR>"] == pytest.approx(30, abs=1)
        assert counts["<CAPTION>"] == pytest.approx(10, abs=1)
    # Their order is random: runs of a task are as long as chance makes them, 1/(1 - 0.6) on average.
    changes = sum(a.task != b.task for a, b in pairwise(requests))
    assert changes / 999 == pytest.approx(1 - 0.6**2 - 0.3**2 - 0.1**2, abs=0.06)


def test_a_rare_task_comes_as_often_as_it_should_in_the_long_run() -> None:
    mix = [MixItem(task="OD", weight=999), MixItem(task="OCR", weight=1)]
    counts = Counter(
        prepared.task for prepared in take(build_workload(Scenario(mix=mix, pictures=SMALL), "m"), 10_000)
    )
    assert 1 <= counts["<OCR>"] <= 30


def test_pictures_come_equally_often_for_each_task() -> None:
    workload = build_workload(scenario("<OD>", "<OCR>"), "m")
    for task in workload.tasks:
        bodies = Counter(prepared.body for prepared in take(workload, 600) if prepared.task == task)
        assert len(bodies) == 3
        assert max(bodies.values()) - min(bodies.values()) <= 1


def test_a_seed_makes_the_same_requests_again() -> None:
    first, again = (take(build_workload(scenario("<OD>", "<OCR>", seed=1), "m"), 300) for _ in range(2))
    other = take(build_workload(scenario("<OD>", "<OCR>", seed=2), "m"), 300)
    assert first == again
    assert [prepared.task for prepared in first] != [prepared.task for prepared in other]


def test_numbers_have_no_end() -> None:
    workload = build_workload(scenario("<OD>", "<OCR>"), "m")
    assert workload[10**9].task in ("<OD>", "<OCR>")
    with pytest.raises(TypeError, match="no end"):
        list(islice(workload, 3))


def test_one_task_can_be_taken_out() -> None:
    workload = build_workload(scenario("<OD>", "<OCR>"), "m").only("<OCR>")
    assert {prepared.task for prepared in take(workload, 100)} == {"<OCR>"}
    with pytest.raises(KeyError, match="<CAPTION> isn't among <OCR>"):
        workload.only("<CAPTION>")


def test_a_folders_pictures_are_sent_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "b.PNG").write_bytes(b"second")
    (tmp_path / "a.jpg").write_bytes(b"first")
    (tmp_path / "c.jpg").write_bytes(b"third")
    (tmp_path / "notes.txt").write_bytes(b"none")
    asked = scenario("<REGION_TO_OCR>", pictures=Pictures(folder=tmp_path, most=2))
    tensors = [json_tensors(prepared.body) for prepared in take(build_workload(asked, "m"), 10)]
    assert {base64.b64decode(each["INPUT_IMAGE"]) for each in tensors} == {b"first", b"second"}
    assert all(each["TEXT_PROMPT"].count("<loc_") == 4 for each in tensors)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are none in"):
        build_workload(scenario("<OD>", pictures=Pictures(folder=tmp_path)), "m")
    with pytest.raises(ValueError, match="No such file"):
        build_workload(scenario("<OD>", pictures=Pictures(folder=tmp_path / "nowhere")), "m")


def test_requests_that_do_not_fit_into_memory_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(200 * 1024**2)
    asked = scenario(*TASKS, pictures=Pictures(folder=tmp_path))
    with pytest.raises(ValueError, match=r"4000 MiB of requests, more than 512"):
        build_workload(asked, "m")
