"""The CSV beside what perf_analyzer 2.59.1 wrote of the service with the embedded model."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from florence2_loadtest.perf_csv import write_csv
from florence2_loadtest.results import Level, ServerSide, TaskResult, Times

HEADER = (
    "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
    "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency"
)
VERBOSE_RATE_HEADER = (
    "Request Rate,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
    "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency,"
    "Avg latency,request/response,response wait"
)
# Its own rows; it also printed the average latency of the first.
ROW = "2,10.6115,103,12462,9304,8450,151069,139,0,187840,298188,337432,434447"
AVERAGE_US = 181530
VERBOSE_RATE_ROW = "2,1.74448,214,21322,124090,11145,1465010,170,0,1148589,3954502,3954502,4592757,1621953,214,1621724"
OF_DIFFERENCES_US = 20  # it rounds each of the averages that it subtracts from each other


def level(row: str, average_us: int, **fields: object) -> Level:
    """Returns the level that perf_analyzer measured."""
    values = [float(value) for value in row.split(",")]
    us = [value / 1e6 for value in values]
    times = Times(
        count=32, mean_s=average_us / 1e6, p50_s=us[9], p90_s=us[10], p95_s=us[11], p99_s=us[12], max_s=us[12]
    )
    server = ServerSide(queue_s=us[4], preprocess_s=us[5], generate_s=us[6], postprocess_s=us[7])
    given = {
        "name": "a",
        "mode": "closed",
        "concurrency": int(values[0]),
        "throughput": values[1],
        "send_s": us[2],
        "receive_s": us[8],
        "latency": times,
        "service": times,
        "server": server,
    }
    return Level(**{**given, **fields})


def read(path: Path) -> tuple[str, list[list[str]]]:
    header, *lines = path.read_text().splitlines()
    return header, list(csv.reader(lines))


def assert_same(row: list[str], expected: str) -> None:
    assert [float(value) for value in row] == pytest.approx(
        [float(value) for value in expected.split(",")], abs=OF_DIFFERENCES_US
    )
    assert row[:3] == expected.split(",")[:3]
    assert row[4:13] == expected.split(",")[4:13]


def test_header_and_row_are_perf_analyzers(tmp_path):
    path = tmp_path / "perf.csv"
    assert write_csv([level(ROW, AVERAGE_US)], path) == [path]
    header, rows = read(path)
    assert header == HEADER
    (row,) = rows
    assert_same(row, ROW)


def test_an_open_loop_has_rates_and_verbose_its_averages(tmp_path):
    path = tmp_path / "perf.csv"
    write_csv([level(VERBOSE_RATE_ROW, 1621953, mode="open", concurrency=None, rate=2.0)], path, verbose=True)
    header, rows = read(path)
    assert header == VERBOSE_RATE_HEADER
    (row,) = rows
    assert_same(row, VERBOSE_RATE_ROW)


def test_rows_are_in_the_order_of_throughput(tmp_path):
    levels = [level(ROW, AVERAGE_US, concurrency=c, throughput=t) for c, t in ((1, 9.0), (8, 30.25), (4, 20.0))]
    write_csv(levels, tmp_path / "perf.csv")
    _, rows = read(tmp_path / "perf.csv")
    assert [row[:2] for row in rows] == [["1", "9"], ["4", "20"], ["8", "30.25"]]


def test_without_a_word_of_the_server_its_columns_are_left_out(tmp_path):
    write_csv([level(ROW, AVERAGE_US, server=None)], tmp_path / "perf.csv")
    header, _ = read(tmp_path / "perf.csv")
    assert header == "Concurrency,Inferences/Second,Client Send,Client Recv," + HEADER.split("Client Recv,")[1]
    levels = [level(ROW, AVERAGE_US, server=server) for server in (None, ServerSide(generate_s=0.1))]
    write_csv([levels[0], levels[1].model_copy(update={"concurrency": 3})], tmp_path / "one.csv")
    header, rows = read(tmp_path / "one.csv")
    assert header == HEADER
    assert sorted(row[4:8] for row in rows) == [["0", "0", "0", "0"], ["0", "0", "100000", "0"]]


def test_what_the_server_took_longer_than_the_client_waited_is_no_negative_network(tmp_path):
    write_csv([level(ROW, 100_000)], tmp_path / "perf.csv")
    _, rows = read(tmp_path / "perf.csv")
    assert rows[0][3] == "0"


def test_in_an_open_loop_percentiles_count_from_the_intended_start_and_parts_from_sending(tmp_path):
    late = Times(count=3, mean_s=9.0, p50_s=9.0, p90_s=9.0, p95_s=9.0, p99_s=9.0)
    write_csv([level(ROW, AVERAGE_US, mode="open", rate=7.5, latency=late)], tmp_path / "perf.csv", verbose=True)
    _, (row,) = read(tmp_path / "perf.csv")
    assert row[0] == "7.5"
    assert float(row[3]) == pytest.approx(12462, abs=OF_DIFFERENCES_US)
    assert row[9:14] == ["9000000"] * 5
    assert float(row[15]) == pytest.approx(AVERAGE_US - 103, abs=1)


def test_tasks_measured_one_by_one_get_a_file_each(tmp_path):
    levels = [
        level(ROW, AVERAGE_US, concurrency=concurrency, tasks={task: TaskResult()})
        for task in ("<OD>", "<CAPTION>")
        for concurrency in (1, 2)
    ]
    paths = write_csv(levels, tmp_path / "deep" / "perf.csv")
    assert [path.name for path in paths] == ["OD.perf.csv", "CAPTION.perf.csv"]
    assert [[row[0] for row in read(path)[1]] for path in paths] == [["1", "2"], ["1", "2"]]


@pytest.mark.parametrize("modes", [[], ["closed", "open"]], ids=["none", "both"])
def test_levels_that_no_csv_of_perf_analyzer_could_hold_are_refused(modes, tmp_path):
    levels = [level(ROW, AVERAGE_US, mode=mode, rate=1.0) for mode in modes]
    with pytest.raises(ValueError, match="closed levels or of open ones"):
        write_csv(levels, tmp_path / "perf.csv")
    assert not (tmp_path / "perf.csv").exists()
