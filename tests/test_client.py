from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
from PIL import Image

from florence2_kserve.client import (
    ClientError,
    DeadlineError,
    Florence2Client,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from florence2_kserve.local import LocalService, free_port
from florence2_kserve.tiny.scenes import held_out_scene


def png(index: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(held_out_scene(index).image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(params=["rest", "grpc"])
def client(request, service) -> Iterator[Florence2Client]:
    url = service.rest_url if request.param == "rest" else f"grpc://{service.grpc_url}"
    with Florence2Client(url) as client:
        yield client


def test_one_question(client, tmp_path):
    path = tmp_path / "scene.png"
    path.write_bytes(png())
    answers = [client.infer(image, task) for image in (path, str(path), png()) for task in ("<CAPTION>", "caption")]
    assert answers[0].keys() == {"<CAPTION>"}
    assert answers[0]["<CAPTION>"]
    assert answers == [answers[0]] * 6


def test_a_batch_gives_what_its_rows_give_alone(client):
    tasks = ["<OD>", "<CAPTION_TO_PHRASE_GROUNDING>", "<OCR>"]
    texts = [None, held_out_scene(1).truth("<CAPTION_TO_PHRASE_GROUNDING>").text, ""]
    images = [png(0), png(1), png(2)]
    alone = [client.infer(image, task, text) for image, task, text in zip(images, tasks, texts, strict=True)]
    assert client.infer_batch(images, tasks, texts) == alone


def test_parameters_reach_the_engine(client):
    assert client.infer(png(), "<CAPTION>", max_new_tokens=3) != client.infer(png(), "<CAPTION>")
    client.infer(png(), "<CAPTION>", num_beams=1, length_penalty=0.5)


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


def test_an_unknown_model_raises_not_found(service):
    for url in (service.rest_url, f"grpc://{service.grpc_url}"):
        with Florence2Client(url, model_name="other") as client, pytest.raises(NotFoundError):
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
def test_nobody_there(scheme):
    with Florence2Client(f"{scheme}://127.0.0.1:{free_port()}", retries=1, timeout=5) as client:
        assert not client.is_ready()
        with pytest.raises(UnavailableError):
            client.infer(png(), "<OD>")
        with pytest.raises(UnavailableError, match="isn't ready after"):
            client.wait_ready(0.5)


def test_lengths_that_differ_are_refused(client):
    with pytest.raises(ValueError, match="don't match"):
        client.infer_batch([png()], ["<OD>", "<OCR>"])


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://x", ""])
def test_a_wrong_url_is_refused(url):
    with pytest.raises(ValueError, match="url has to start with"):
        Florence2Client(url)


def overloaded(connection: socket.socket) -> None:
    answer(connection, "429 Too Many Requests", '{"error": "the queue is full"}')


def unavailable(connection: socket.socket) -> None:
    answer(connection, "503 Service Unavailable", '{"error": "loading"}', "Retry-After: 1\r\n")


def bad_gateway(connection: socket.socket) -> None:
    answer(connection, "502 Bad Gateway", "<html>")


def reset(connection: socket.socket) -> None:
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def answer(connection: socket.socket, status: str, body: str, headers: str = "") -> None:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, rest = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(rest) < length:
        rest += connection.recv(65536)
    reply = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n{body}"
    connection.sendall(reply.encode())


@contextmanager
def breaking_first(
    service: LocalService, break_it: Callable[[socket.socket], None], times: int
) -> Iterator[tuple[str, list[int]]]:
    """Passes connections on to the service, after the first `times` were broken; yields a URL and a counter."""
    seen: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def copy(source: socket.socket, target: socket.socket) -> None:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

        def run() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                seen.append(1)
                if len(seen) <= times:
                    with closing(connection):
                        break_it(connection)
                else:
                    onward = socket.create_connection(("127.0.0.1", service.http_port))
                    for pair in ((connection, onward), (onward, connection)):
                        threading.Thread(target=copy, args=pair, daemon=True).start()

        threading.Thread(target=run, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen


@pytest.mark.parametrize("break_it", [overloaded, unavailable, bad_gateway, reset])
def test_a_server_that_recovers_is_asked_again(service, break_it):
    with breaking_first(service, break_it, 2) as (url, seen), Florence2Client(url) as client:
        assert client.infer(png(), "<CAPTION>")["<CAPTION>"]
        assert len(seen) == 3


@pytest.mark.parametrize(
    ("break_it", "error"), [(overloaded, OverloadedError), (unavailable, UnavailableError), (reset, UnavailableError)]
)
def test_a_server_that_does_not_recover_is_given_up(service, break_it, error):
    with breaking_first(service, break_it, 99) as (url, seen), Florence2Client(url, retries=2) as client:
        with pytest.raises(error):
            client.infer(png(), "<CAPTION>")
        assert len(seen) == 3


def test_retries_are_counted(service):
    with breaking_first(service, unavailable, 2) as (url, _), Florence2Client(url) as client:
        client.infer(png(), "<CAPTION>")
        assert client.retries_made == 2
        client.infer(png(), "<CAPTION>")
        assert client.retries_made == 2


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_service_behind_an_ingress_is_named_by_the_host_header(scheme):
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
        client = Florence2Client(address, headers={"Host": host, "X-Team": "vision"}, retries=0, timeout=5)
        with client, pytest.raises(ClientError):
            client.infer(png(), "<OD>")
        thread.join(10)
    sent = b"".join(seen)
    if scheme == "http":
        assert f"\r\nhost: {host}\r\n".encode() in sent.lower()
        assert sent.lower().count(b"\r\nhost:") == 1
    else:
        assert host.encode() in sent
        assert b"127.0.0.1" not in sent
