"""The same load on several services in turn, their ratios, and whether they answer alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from florence2_loadtest.peer_requests import LIMIT, differences, for_triton, is_alike, with_lengths
from florence2_loadtest.peer_table import explain
from florence2_loadtest.peers import OURS, TRITON, Peer, Service, compare_peers, peers
from florence2_loadtest.results import Level, PeersResult, RunResult, ServerSide, Target, read_records, read_result
from florence2_loadtest.scenario import ClosedLoad, MixItem, Pictures, Scenario
from florence2_loadtest.workload import Workload, build_workload
from tests.loadtest.fake_server import OUTPUT, FakeServer, Reply

SCENARIO = Scenario(
    mix=[MixItem(task="CAPTION"), MixItem(task="OD")],
    pictures=Pictures(scenes=3, width=64, height=48),
    load=ClosedLoad(concurrency=2, warmup_s=0, window_s=0.2, max_windows=2, max_requests=8),
)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return build_workload(SCENARIO, "florence2")


def content(prepared: Any) -> dict[str, Any]:
    return dict(json.loads(prepared.body))


def limits(workload: Workload, count: int = 30) -> list[int]:
    return [content(workload[number])["parameters"][LIMIT] for number in range(count)]


class Fake:
    """A peer whose server answers as told."""

    def __init__(self, server: FakeServer, log: list[str], name: str) -> None:
        self.server, self.log, self.name = server, log, name
        self.target = Target(url="")
        self.metrics_urls: list[str] = []

    @contextmanager
    def start(self) -> Iterator[Service]:
        self.log.append(f"{self.name} starts")
        with self.server.serve() as url:
            self.target = Target(url=url)
            yield self
        self.log.append(f"{self.name} ends")


def fakes(workload: Workload, *servers: FakeServer) -> tuple[list[Peer], list[str]]:
    log: list[str] = []
    names = ("Triton", "ours")
    made = [Fake(server, log, name) for name, server in zip(names, servers, strict=True)]
    return [Peer(fake.name, fake.start, workload) for fake in made], log


def compare(chosen: list[Peer], **options: Any) -> tuple[PeersResult, list[str]]:
    said: list[str] = []
    return compare_peers(chosen, SCENARIO, say=said.append, **options), said


@dataclass
class Compared:
    """One comparison, and what it left behind."""

    result: PeersResult
    servers: tuple[FakeServer, FakeServer]
    folder: Path


@pytest.fixture(scope="module")
def compared(workload: Workload, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    servers, folder = (FakeServer(), FakeServer()), tmp_path_factory.mktemp("peers")
    result, _ = compare(fakes(workload, *servers)[0], output=folder)
    return Compared(result, servers, folder)


def test_both_get_the_same_requests_from_the_same_beginning(compared: Compared) -> None:
    one, other = (server.bodies for server in compared.servers)
    assert one[:5] == other[:5]  # asked one at a time, then by two clients
    assert set(one) == set(other)
    assert len(set(one)) == 2 * 3  # tasks, pictures


def test_each_task_alone_and_all_mixed_are_levels_of_their_own(compared: Compared) -> None:
    expected = ["<CAPTION>, concurrency 2", "<OD>, concurrency 2", "mixed, concurrency 2"]
    for run in compared.result.runs.values():
        assert [level.name for level in run.levels] == expected
        assert all(level.answered for level in run.levels)
    assert compared.result.baseline == "Triton"


def test_each_run_is_written_with_its_requests(compared: Compared) -> None:
    written = read_result(compared.folder / "ours-1" / "result.json")
    assert isinstance(written, RunResult)
    assert written.levels == compared.result.runs["ours"].levels
    assert list(read_records(compared.folder / "ours-1" / "records-mixed-concurrency-2.jsonl"))


def test_services_run_in_turn_in_alternating_order_and_medians_count(workload: Workload) -> None:
    slow_at_first = FakeServer(seconds=lambda number: 0.05 if number < 14 else 0.0)
    chosen, log = fakes(workload, FakeServer(), slow_at_first)
    result, _ = compare(chosen, alone=False, repeats=3)
    one, other = ["Triton starts", "Triton ends"], ["ours starts", "ours ends"]
    assert log == [*one, *other, *other, *one, *one, *other]
    assert slow_at_first.took[4] > 0.04  # in the first repeat
    (level,) = result.runs["ours"].levels
    assert level.latency.mean_s < 0.04


def test_answers_that_differ_are_said_before_anything_is_compared(workload: Workload) -> None:
    other = json.dumps({"outputs": [{**OUTPUT, "data": ['{"<CAPTION>": "a blue square"}']}]})
    chosen, _ = fakes(workload, FakeServer(), FakeServer(replies=(Reply(body=other),)))
    result, said = compare(chosen, alone=False)
    told = next(line for line in said if "DIFFER" in line)
    assert "<CAPTION> (1 of 2)" in told
    assert "<OD>" not in told
    assert "answers differ: <CAPTION> (1 of 2)" in result.runs["ours"].target.note
    assert said.index(told) < said.index("concurrency 2 …", said.index("ours: starting …"))


def test_a_service_that_fails_ends_the_comparison(workload: Workload) -> None:
    chosen, _ = fakes(workload, FakeServer(), FakeServer(replies=(Reply(status=500, body='{"error": "no"}'),)))
    with pytest.raises(RuntimeError, match="<CAPTION>: http 500"):
        compare(chosen)


def test_there_has_to_be_something_to_measure(workload: Workload) -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        compare([], alone=False, mixed=False)


def test_the_bound_on_tokens_is_a_parameter_here_and_a_tensor_there(workload: Workload) -> None:
    ours = with_lengths(workload, "20", 0)[0]
    theirs = for_triton(ours)
    assert content(ours)["parameters"] == {LIMIT: 20}
    expected = {"name": "MAX_NEW_TOKENS", "shape": [1, 1], "datatype": "INT32", "data": [20]}
    assert content(theirs)["inputs"] == [*content(ours)["inputs"], expected]
    assert "parameters" not in content(theirs)
    assert theirs.size == len(theirs.body)


def test_a_request_without_parameters_is_the_same_for_both(workload: Workload) -> None:
    assert for_triton(workload[0]) is workload[0]
    assert with_lengths(workload, None, 0) is workload


def test_typical_lengths_are_drawn_by_task_and_equal_in_every_run(workload: Workload) -> None:
    drawn = limits(with_lengths(workload, "typical", 0))
    assert drawn == limits(with_lengths(build_workload(SCENARIO, "florence2"), "typical", 0))
    assert drawn != limits(with_lengths(workload, "typical", 1))
    assert all(10 <= length <= 14 for length in limits(with_lengths(workload.only("<CAPTION>"), "typical", 0)))
    assert all(60 <= length <= 300 for length in limits(with_lengths(workload.only("<OD>"), "typical", 0)))


@pytest.mark.parametrize("lengths", ["many", "0", "-3", "4096", ""])
def test_lengths_that_are_none_are_refused(workload: Workload, lengths: str) -> None:
    with pytest.raises(ValueError, match="lengths: has to be"):
        with_lengths(workload, lengths, 0)


def test_parameters_that_triton_does_not_know_are_refused() -> None:
    scenario = SCENARIO.model_copy(update={"parameters": {"num_beams": 1}})
    with pytest.raises(ValueError, match="has no num_beams"):
        for_triton(build_workload(scenario, "florence2")[0])


def test_requests_that_are_not_json_are_refused() -> None:
    scenario = SCENARIO.model_copy(update={"encoding": "binary"})
    with pytest.raises(ValueError, match="over REST, in JSON"):
        for_triton(build_workload(scenario, "florence2")[0])


def test_answers_may_differ_by_a_pixel_and_by_no_more() -> None:
    box = {"<OD>": {"bboxes": [[1, 2, 30, 40]], "labels": ["circle"]}}
    assert is_alike(box, {"<OD>": {"bboxes": [[1.4, 2.0, 30.5, 39.5]], "labels": ["circle"]}})
    assert not is_alike(box, {"<OD>": {"bboxes": [[1, 2, 30, 42]], "labels": ["circle"]}})
    assert not is_alike(box, {"<OD>": {"bboxes": [[1, 2, 30, 40]], "labels": ["square"]}})
    assert not is_alike(box, {"<OD>": {"bboxes": [], "labels": []}})
    assert not is_alike({"<OCR>": "a"}, {"<OCR>": "b"})
    assert differences({"<OCR>": ["a", "b"], "<OD>": [1]}, {"<OCR>": ["a", "c"], "<OD>": [1]}) == ["<OCR> (1 of 2)"]


def peers_result(ours: Level, theirs: Level) -> PeersResult:
    runs = {"Triton": theirs, "ours": ours}
    return PeersResult(
        name="both",
        baseline="Triton",
        runs={name: RunResult(name=name, target=Target(url="u"), levels=[level]) for name, level in runs.items()},
    )


def level(throughput: float, **server: Any) -> Level:
    return Level(name="mixed", mode="closed", throughput=throughput, server=ServerSide(**server) if server else None)


def test_where_ours_is_slower_the_busiest_part_is_named() -> None:
    busy = {"vision_busy_share": 0.2, "prefill_busy_share": 0.1, "decode_busy_share": 0.6, "batch_rows": 90.0}
    (line,) = explain(peers_result(level(1, **busy), level(2)), "ours")
    assert line == (
        "mixed: slower than Triton: most of the time went to the decoder "
        "(the image tower 20%, the text encoder 10%, the decoder 60%, 90 rows in a pass)"
    )
    idle = {"vision_busy_share": 0.1, "decode_busy_share": 0.2}
    (line,) = explain(peers_result(level(1, **idle), level(2)), "ours")
    assert "the model had nothing to do for 70% of the time" in line
    assert "metrics weren't read" in explain(peers_result(level(1), level(2)), "ours")[0]
    assert explain(peers_result(level(2), level(1)), "ours") == []


def test_the_command_says_how_to_set_triton_up_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLORENCE2_CACHE", str(tmp_path))
    app = typer.Typer()
    app.command()(peers)
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 1
    assert "--setup" in done.output


def test_names_of_the_services_are_those_of_reports() -> None:
    assert (OURS, TRITON) == ("florence2-kserve", "Triton")
