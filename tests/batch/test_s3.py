"""Pictures in S3, as moto's server on loopback speaks it."""

from __future__ import annotations

from collections.abc import Iterator

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from florence2_kserve.batch.sources import SourceError, Sources
from florence2_kserve.exit_codes import ExitCode
from tests.batch.runs import QUICK, draw, read_lines, run

pytestmark = pytest.mark.slow  # seconds, most of them to start the server


@pytest.fixture
def bucket(monkeypatch, tmp_path) -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    for number, path in enumerate(draw(tmp_path / "drawn", 3)):
        client.put_object(Bucket="pictures", Key=f"set/{number % 2}/{path.name}", Body=path.read_bytes())
    client.put_object(Bucket="pictures", Key="set/notes.txt", Body=b"text")
    client.put_object(Bucket="pictures", Key="other/x.png", Body=b"x")
    yield "s3://pictures"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_prefix_a_glob_and_one_object(bucket, tmp_path):
    sources = Sources([f"{bucket}/set"])
    pictures = list(sources)
    paths = ["set/0/00000.png", "set/0/00002.png", "set/1/00001.png"]
    assert [picture.address for picture in pictures] == [f"{bucket}/{path}" for path in paths]
    assert sources.skipped == 1
    assert pictures[2].read() == (tmp_path / "drawn" / "00001.png").read_bytes()
    (globbed,) = Sources([f"{bucket}/set/1/*.png"])
    (named,) = Sources([f"{bucket}/set/1/00001.png"])
    assert named.look is not None
    assert named.look() == globbed.state == pictures[2].state, "the state of an object depends on how it was found"


def test_a_batch_goes_on_where_it_was(bucket, tmp_path, service):
    output = tmp_path / "out.jsonl"
    ask = (f"{bucket}/set", "--output", output, "--url", service.rest_url, *QUICK)
    assert run(*ask, "--limit", "2").returncode == ExitCode.OK
    assert "1 pictures answered, 2 known before" in run(*ask).stdout
    assert [line["address"] for line in read_lines(output)] == sorted(
        f"{bucket}/set/{path}" for path in ("0/00000.png", "0/00002.png", "1/00001.png")
    )


def test_a_bucket_that_isnt_there_is_said(bucket):
    (picture,) = Sources(["s3://nosuch/x.png"])
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        picture.read()
    with pytest.raises(SourceError, match="nosuch"):
        list(Sources(["s3://nosuch/*.png"]))
