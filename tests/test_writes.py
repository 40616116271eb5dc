"""On a read-only root only /tmp and the cache are writable: the servers write nowhere else."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests

from florence2_kserve.client import Florence2Client
from florence2_kserve.local import LocalService

from .client.pictures import png

# The command line in a process that notes each path that Python opens for writing, makes, moves or removes.
NOTING = """
import os, sys

log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OF_ONE = {"os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime"}
OF_TWO = {"os.rename", "os.link", "os.symlink"}

def note(event, arguments):
    writes = event == "open" and arguments[2] & WRITING
    for path in arguments[: 2 if event in OF_TWO else 1 if event in OF_ONE or writes else 0]:
        if isinstance(path, (str, bytes, os.PathLike)):
            os.write(log, os.fsencode(os.path.abspath(path)) + b"\\n")

sys.addaudithook(note)
open(os.environ["TMPDIR"] + "/probe", "w").close()
from florence2_kserve.cli import main
main()
"""


@pytest.mark.slow  # starts servers
def test_servers_write_to_the_temporary_folder_and_the_cache_only(tmp_path, monkeypatch):
    writable = {name: tmp_path / name for name in ("tmp", "cache")}
    for folder in writable.values():
        folder.mkdir()
    # As in the images.
    for name, value in {
        "TMPDIR": writable["tmp"],
        "HF_HOME": writable["cache"] / "huggingface",
        "XDG_CACHE_HOME": writable["cache"],
        "HOME": "/nonexistent",
        "PYTHONDONTWRITEBYTECODE": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    # torch names it in the environment of a process that compiled, such as this one after other tests.
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    logs = {command: tmp_path / f"{command}.log" for command in ("predictor", "transformer")}
    start = {command: (sys.executable, "-c", NOTING, str(log)) for command, log in logs.items()}
    with ExitStack() as stack:
        predictor = stack.enter_context(LocalService("predictor", python=start["predictor"]))
        transformer = stack.enter_context(
            LocalService("transformer", python=start["transformer"], predictor_host=predictor.grpc_url)
        )
        for url in (transformer.rest_url, f"grpc://{transformer.grpc_url}"):
            client = stack.enter_context(Florence2Client(url))
            client.infer_batch([png(0), png(1)], ["<OD>", "<OCR>"])
        assert (
            requests.post(f"{transformer.rest_url}/v2/models/florence2/infer", data="{", timeout=20).status_code == 400
        )
        for server in (predictor, transformer):
            assert requests.get(f"{server.rest_url}/metrics", timeout=20).status_code == 200
    for command, log in logs.items():
        paths = {Path(line) for line in log.read_text().splitlines()}
        assert writable["tmp"] / "probe" in paths, "nothing was noted"
        allowed = (*writable.values(), Path("/dev"))
        elsewhere = [path for path in paths if not any(path.is_relative_to(folder) for folder in allowed)]
        assert not elsewhere, f"the {command} writes elsewhere"
