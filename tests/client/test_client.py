from __future__ import annotations

import asyncio
import io
import socket
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence2_kserve.client import (
    AsyncFlorence2Client,
    Caption,
    ClientError,
    DeadlineError,
    Detections,
    DetectionsOrMasks,
    Florence2Client,
    InvalidRequestError,
    Masks,
    NotFoundError,
    OcrRegions,
    RowError,
    ServerError,
    UnavailableError,
)
from florence2_kserve.local import free_port
from florence2_kserve.tiny.scenes import held_out_scene
from tests.client.pictures import png


def test_one_question(client, tmp_path):
    path = tmp_path / "scene.png"
    path.write_bytes(png())
    answers = [
        client.infer(image, task) for image, task in ((path, "<CAPTION>"), (str(path), "caption"), (png(), "Caption"))
    ]
    assert answers[0].keys() == {"<CAPTION>"}
    assert answers[0]["<CAPTION>"]
    assert answers == [answers[0]] * 3


def test_a_batch_gives_what_its_rows_give_alone(client):
    tasks = ["<OD>", "<CAPTION_TO_PHRASE_GROUNDING>", "<OCR>"]
    texts = [None, held_out_scene(1).truth("<CAPTION_TO_PHRASE_GROUNDING>").text, ""]
    images = [png(0), png(1), png(2)]
    alone = [
        client.infer(image, task, text, num_beams=1) for image, task, text in zip(images, tasks, texts, strict=True)
    ]
    assert client.infer_batch(images, tasks, texts, num_beams=1) == alone


def test_parameters_reach_the_engine(client):
    short = client.infer(png(), "<CAPTION>", max_new_tokens=3, num_beams=1, length_penalty=0.5)
    assert short != client.infer(png(), "<CAPTION>", num_beams=1)


@pytest.mark.parametrize(
    ("image", "task", "text", "parameters", "says"),
    [
        (b"", "<OD>", None, {}, "INPUT_IMAGE, row 0: is empty"),
        (b"\x89PNG\r\n\x1a\n but no more", "<OD>", None, {}, "INPUT_IMAGE, row 0"),
        (png(), "<NONE>", None, {}, "TASK_PROMPT, row 0: unknown task '<NONE>'"),
        (png(), "<OD>", "a car", {}, "TEXT_PROMPT, row 0: <OD> takes no text"),
        (png(), "<OPEN_VOCABULARY_DETECTION>", "word " * 2000, {}, "TEXT_PROMPT, row 0: .* tokens"),
        (png(), "<REGION_TO_OCR>", "[1,2]", {}, "TEXT_PROMPT, row 0"),
        (png(), "<OD>", None, {"num_beams": 99}, "num_beams: 99 is over this server's bound"),
        (png(), "<OD>", None, {"nonsense": 1}, "unknown parameter 'nonsense'"),
    ],
)
def test_a_wrong_request_raises_the_servers_message(client, image, task, text, parameters, says):
    with pytest.raises(InvalidRequestError, match=says) as caught:
        client.infer(image, task, text, **parameters)
    assert caught.value.status in (400, "INVALID_ARGUMENT")


def test_an_unknown_model_raises_not_found(open_client, url):
    with open_client(url, model_name="other") as client, pytest.raises(NotFoundError):
        client.infer(png(), "<OD>")


def test_a_deadline_raises(client):
    with pytest.raises(DeadlineError):
        client.infer(png(), "<MORE_DETAILED_CAPTION>", timeout_ms=1)


def test_readiness_and_metadata(client):
    assert client.is_ready()
    assert client.is_live()
    client.wait_ready(5)
    metadata = client.metadata()
    assert metadata["name"] == "florence2"
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["INPUT_IMAGE", "TASK_PROMPT", "TEXT_PROMPT"]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_there(open_client, scheme):
    with open_client(f"{scheme}://127.0.0.1:{free_port()}", retries=1, timeout=5) as client:
        assert not client.is_ready()
        with pytest.raises(UnavailableError):
            client.infer(png(), "<OD>")
        with pytest.raises(UnavailableError, match="isn't ready after"):
            client.wait_ready(0.5)


def test_lengths_that_differ_are_refused(client):
    with pytest.raises(ValueError, match="don't match"):
        client.infer_batch([png()], ["<OD>", "<OCR>"])
    with pytest.raises(ValueError, match="don't match"):
        client.ask_tasks(png(), ["<OD>", "<OCR>"], ["a car"])


@pytest.mark.parametrize("address", ["localhost:8080", "ftp://x", ""])
@pytest.mark.parametrize("client_class", [Florence2Client, AsyncFlorence2Client])
def test_a_wrong_url_is_refused(address, client_class):
    with pytest.raises(ValueError, match="url has to start with"):
        client_class(address)


def test_grpc_tells_of_the_model_what_rest_does(service, open_client):
    with open_client(service.rest_url) as rest, open_client(f"grpc://{service.grpc_url}") as grpc:
        assert grpc.metadata() == rest.metadata()


TYPES = {
    "<CAPTION>": Caption,
    "<OD>": Detections,
    "<REGION_PROPOSAL>": Detections,
    "<CAPTION_TO_PHRASE_GROUNDING>": Detections,
    "<OCR_WITH_REGION>": OcrRegions,
    "<REFERRING_EXPRESSION_SEGMENTATION>": Masks,
    "<OPEN_VOCABULARY_DETECTION>": DetectionsOrMasks,
}


@pytest.fixture(scope="module")
def raw(service) -> list[dict[str, Any]]:
    """What `infer_batch` gives of each of `TYPES`."""
    texts = [held_out_scene(36).truth(task).text for task in TYPES]
    with Florence2Client(service.rest_url) as client:
        return client.infer_batch([png(36)] * len(TYPES), list(TYPES), texts, num_beams=1)


def test_answers_are_typed_and_hold_what_infer_gives(client, raw):
    texts = [held_out_scene(36).truth(task).text for task in TYPES]
    answers = client.ask_tasks(png(36), [task.strip("<>").lower() for task in TYPES], texts, num_beams=1)
    assert [answer.task for answer in answers] == list(TYPES)
    assert [type(answer) for answer in answers] == list(TYPES.values())
    assert [answer.raw for answer in answers] == raw
    assert all(answer.finish_reason == "stop" and not answer.is_truncated for answer in answers)
    assert all(answer.sequence_score < 0 for answer in answers)


def test_items_have_scores_and_masks(client):
    boxes = client.ask(png(36), "<OD>", num_beams=1)
    assert len(list(boxes)) >= 2
    assert all(0 < item.score <= 1 for item in boxes)
    (area,) = client.ask(png(36), "<REFERRING_EXPRESSION_SEGMENTATION>", "a pink square", num_beams=1)
    mask = area.decode_mask(None)
    assert mask.shape == (192, 192)
    x1, y1, x2, y2 = (round(side) for side in area.box)
    assert mask.sum() == mask[y1 : y2 + 1, x1 : x2 + 1].sum() > 0


def test_an_answer_that_was_cut_off_says_so(client):
    answer = client.ask(png(), "<DETAILED_CAPTION>", max_new_tokens=3)
    assert answer.finish_reason == "length"
    assert answer.is_truncated


def test_a_row_without_an_answer_is_an_error_of_its_own(client):
    with pytest.raises(RowError, match="unknown task '<NONE>'") as caught:
        client.ask_tasks(png(), ["<CAPTION>", "<NONE>"], partial=True)
    assert caught.value.status == 400
    good, bad = client.infer_batch([png(), b"no image"], ["<CAPTION>", "<CAPTION>"], partial=True)
    assert good["<CAPTION>"]
    assert bad["error"]["status"] == 400


def test_a_message_over_the_limit_is_refused_at_once(open_client, service):
    """gRPC says RESOURCE_EXHAUSTED, as a full queue does; this one stays full."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    with open_client(f"grpc://{service.grpc_url}", max_message_bytes=4096) as client:
        with pytest.raises(InvalidRequestError, match="larger than max"):
            client.infer(buffer.getvalue(), "<CAPTION>")
        assert client.retries_made == 0


@pytest.mark.parametrize("body", ["<html>Log in</html>", "[]", '{"outputs": [{"name": "PARSED_JSON"}]}'])
def test_an_answer_that_is_none_is_the_servers_fault(open_client, body):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

        thread = threading.Thread(target=serve)
        thread.start()
        with (
            open_client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=10) as client,
            pytest.raises(ServerError, match="can't be read"),
        ):
            client.infer(b"x", "<CAPTION>")
        thread.join(10)


def test_tasks_of_one_loop_share_a_client(small_server):
    async def ask_at_once() -> list[dict[str, str]]:
        async with AsyncFlorence2Client(small_server) as client:
            return await asyncio.gather(*(client.infer(str(number).encode(), "<CAPTION>") for number in range(20)))

    assert asyncio.run(ask_at_once()) == [{"<CAPTION>": str(number)} for number in range(20)]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_service_behind_an_ingress_is_named_by_the_host_header(open_client, scheme):
    """What goes out is read off the wire."""
    host = "florence2.default.example.com"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        seen: list[bytes] = []

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                if scheme == "grpc":
                    connection.sendall(b"\0\0\0\4\0\0\0\0\0")  # HTTP/2's SETTINGS, for which the client waits
                while data := connection.recv(65536):
                    seen.append(data)
                    if host.encode() in b"".join(seen):
                        return

        thread = threading.Thread(target=serve)
        thread.start()
        headers = {"Host": host, "X-Team": "vision"}
        with (
            open_client(address, headers=headers, retries=0, timeout=5) as client,
            pytest.raises(ClientError),
        ):
            client.infer(png(), "<OD>")
        thread.join(10)
    sent = b"".join(seen)
    if scheme == "http":
        assert f"\r\nhost: {host}\r\n".encode() in sent.lower()
        assert sent.lower().count(b"\r\nhost:") == 1
    else:
        assert host.encode() in sent
        assert b"127.0.0.1" not in sent
