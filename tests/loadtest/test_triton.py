"""tritonserver with the baseline's models: started, asked, and what it does with many requests at once."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from florence2_kserve.local import LocalService
from florence2_kserve.model_files import locate_model
from florence2_loadtest.peer_requests import for_triton, is_alike, with_lengths
from florence2_loadtest.reference import REPLACED
from florence2_loadtest.results import Target
from florence2_loadtest.scenario import MixItem, Pictures, Scenario
from florence2_loadtest.transport import open_transport
from florence2_loadtest.triton import BASELINE, Triton, set_up, why_not
from florence2_loadtest.workload import Workload, build_workload

CLIENTS = 36
SETTINGS = {
    "max_batch_size": 36,
    "process_instances": 3,
    "process_delay_us": 0,
    "model_delay_us": 0,
    "checkpoint": "/checkpoint",
    "device": "cpu",
    "dtype": "float32",
    "threads": 0,
}


@pytest.fixture(scope="module")
def start() -> ModuleType:
    spec = importlib.util.spec_from_file_location("triton_baseline_start", BASELINE / "start.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_repository_has_all_settings_filled_in(start: ModuleType, tmp_path: Path) -> None:
    repository = start.write_repository(tmp_path, SETTINGS)
    configs = {path.parent.name: path.read_text() for path in repository.glob("*/config.pbtxt")}
    assert configs.keys() == {"florence2", "florence2_process", "florence2_model"}
    assert all("$" not in text and "max_batch_size: 36" in text for text in configs.values())
    assert "KIND_CPU count: 3" in configs["florence2_process"]
    assert 'string_value: "/checkpoint"' in configs["florence2_model"]
    assert {path.parent.parent.name for path in repository.glob("*/1/model.py")} == configs.keys() - {"florence2"}
    assert (repository / "florence2" / "1").is_dir()


def test_the_stub_is_of_the_interpreters_version_and_may_run(start: ModuleType, tmp_path: Path) -> None:
    server = tmp_path / "server"
    (server / start.SERVER / "backends" / "python").mkdir(parents=True)
    stub = server / start.SERVER / "python_backend_stubs" / "3.12" / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.write_text("3.12's")
    written = start.write_backend(tmp_path / "out", server, "3.12") / "python" / stub.name
    assert written.read_text() == "3.12's"
    assert written.stat().st_mode & stat.S_IXUSR
    with pytest.raises(FileNotFoundError, match=r"3\.10"):
        start.write_backend(tmp_path / "other", server, "3.10")


def test_where_python_has_no_shared_library_a_carried_one_is_taken(start: ModuleType, tmp_path: Path) -> None:
    told = start.Told(version="3.12", home="/usr", folders=[str(tmp_path / "lib")], packages=[])
    with pytest.raises(FileNotFoundError, match=r"libpython3\.12\.so\.1\.0"):
        start.find_library(tmp_path, told)
    carried = tmp_path / "python"
    (carried / "lib").mkdir(parents=True)
    (carried / "lib" / "libpython3.12.so.1.0").touch()
    assert start.find_library(tmp_path, told) == (carried / "lib", carried)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libpython3.12.so.1.0").touch()
    assert start.find_library(tmp_path, told) == (tmp_path / "lib", Path("/usr"))


def test_the_interpreter_tells_of_itself(start: ModuleType) -> None:
    told = start.describe_python(sys.executable)
    assert told.version == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert told.packages
    assert Path(told.home) == Path(sys.base_prefix)


def test_a_set_up_of_other_locks_is_done_anew(tmp_path: Path) -> None:
    assert "isn't set up" in str(why_not(tmp_path))
    (tmp_path / ".installed").write_text("something else")
    assert "other lock files" in str(why_not(tmp_path))


def test_the_locks_are_complete() -> None:
    for name in ("models.txt", "server.txt"):
        lines = (BASELINE / name).read_text().splitlines()
        packages = [line for line in lines if line and not line.startswith(" ")]
        assert packages
        assert all("==" in line for line in packages)
        assert all("--hash=sha256:" in line for line in lines if line.startswith(" "))


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    options = {"server": tmp_path, "python": sys.executable}
    with (
        pytest.raises(RuntimeError, match=r"(?s)ended while starting.*FileNotFoundError"),
        Triton(tmp_path, options=options),
    ):
        pass


@pytest.fixture(scope="module")
def triton() -> Iterator[Triton]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    said: list[str] = []
    set_up(said.append)  # finds everything there
    assert len(said) == 1
    with Triton(locate_model().folder, options={"process_instances": 2}) as running:
        yield running


@pytest.fixture(scope="module")
def nine() -> Workload:
    scenario = Scenario(mix=[MixItem(task=task) for task in REPLACED], pictures=Pictures(scenes=3))
    return build_workload(scenario, "florence2")


def ask(target: Target, workload: Workload, numbers: range) -> list[Any]:
    """Returns the answers to requests that are sent all at once."""

    async def send() -> list[Any]:
        async with open_transport(target, connections=len(numbers)) as transport:
            return await asyncio.gather(*(transport.send(workload[number], 60.0) for number in numbers))

    sent = asyncio.run(send())
    assert {each.status for each in sent} == {"ok"}
    return [json.loads(json.loads(each.body)["outputs"][0]["data"][0]) for each in sent]


@dataclass
class Together:
    """Requests that came all at once.

    Attributes:
        answers: To them.
        batches: How many batches of each size the model ran.
    """

    answers: list[Any]
    batches: Counter[int]


@pytest.fixture(scope="module")
def together(triton: Triton, nine: Workload) -> Together:
    before = Counter(triton.batch_sizes()["florence2_model"])
    answers = ask(triton.target, nine.mapped(for_triton), range(CLIENTS))
    return Together(answers, Counter(triton.batch_sizes()["florence2_model"]) - before)


@pytest.mark.slow
def test_triton_answers_all_nine_tasks_as_we_do(together: Together, service: LocalService, nine: Workload) -> None:
    assert {nine[number].task for number in range(CLIENTS)} == set(REPLACED)
    ours = ask(Target(url=service.rest_url), nine, range(CLIENTS))
    unlike = [pair for pair in zip(ours, together.answers, strict=True) if not is_alike(*pair)]
    assert unlike == []


@pytest.mark.slow
def test_requests_that_come_together_are_run_together(triton: Triton, together: Together, nine: Workload) -> None:
    assert sum(size * count for size, count in together.batches.items()) == CLIENTS
    assert together.batches.total() <= CLIENTS / 4
    alone = [ask(triton.target, nine.mapped(for_triton), range(number, number + 1))[0] for number in range(3)]
    assert together.answers[:3] == alone


@pytest.mark.slow
def test_requests_of_one_batch_end_at_their_own_lengths(triton: Triton, service: LocalService, nine: Workload) -> None:
    free = nine.only("<MORE_DETAILED_CAPTION>")
    limited = with_lengths(free, "5", 0)
    mixed = Workload([[limited[0], free[1], limited[1], free[2]]], [1.0], 0)
    theirs = ask(triton.target, mixed.mapped(for_triton), range(4))
    assert theirs == ask(Target(url=service.rest_url), mixed, range(4))
    words = sorted(len(answer["<MORE_DETAILED_CAPTION>"].split()) for answer in theirs)
    assert words[1] <= 5 < words[2]


@pytest.mark.slow
def test_a_picture_that_is_none_fails_its_own_request_only(triton: Triton, nine: Workload) -> None:
    url = f"{triton.target.url}/v2/models/florence2/infer"
    broken = json.loads(nine[0].body)
    broken["inputs"][0]["data"] = ["bm9uZQ=="]
    refused = httpx.post(url, json=broken, timeout=60)
    assert refused.status_code >= 400
    assert "UnidentifiedImageError" in refused.json()["error"]
    assert httpx.post(url, content=nine[0].body, timeout=60).status_code == 200
