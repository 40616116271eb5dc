"""``florence2 batch`` against the real service."""

from __future__ import annotations

import json
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from florence2_kserve.batch.command import _fitting
from florence2_kserve.batch.identity import content_hash
from florence2_kserve.batch.journal import Journal
from florence2_kserve.batch.ledger import FIELDS
from florence2_kserve.client import Florence2Client
from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.local import free_port
from tests.batch.relay import Relay
from tests.batch.runs import CLI, QUICK, draw, failures, names, read_lines, run, start, wait_for, whole_lines


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    draw(folder, 4)
    return folder


def test_each_picture_has_a_line_with_what_the_client_gets(pictures, tmp_path, service):
    output = tmp_path / "out.jsonl"
    (pictures / "notes.txt").write_text("no picture")
    result = run(pictures, "--url", service.rest_url, "--output", output, "--task", "OD", *QUICK)
    assert result.returncode == ExitCode.OK, result.stderr
    lines = read_lines(output)
    assert names(lines) == [f"{number:05}.png" for number in range(4)]
    with Florence2Client(service.rest_url) as client:
        for line in lines:
            path = Path(line["address"])
            assert tuple(line) == FIELDS
            assert line["content"] == content_hash(path.read_bytes())
            assert line["task"] == "<OD>"
            assert line["text"] is None
            assert line["platform"] == "florence2_embedded"
            assert line["parameters"] == {"num_beams": 1, "max_new_tokens": 4}
            answer = client.ask(path, "OD", num_beams=1, max_new_tokens=4)
            assert line["answer"] == answer.value
            assert line["score"] == pytest.approx(answer.sequence_score, abs=1e-3)
            assert len(line["scores"]) == len(line["answer"]["labels"])
            assert line["finish_reason"] == answer.finish_reason
    assert len({line["key"] for line in lines}) == 4
    assert "4 pictures answered" in result.stdout
    assert "1 files skipped" in result.stdout
    assert not failures(output)


def test_off_a_terminal_nothing_has_control_characters(pictures, tmp_path, service):
    result = run(pictures, "--url", service.rest_url, "--output", tmp_path / "out.jsonl", *QUICK)
    assert result.stdout.endswith("out.jsonl\n")
    assert all(character.isprintable() or character == "\n" for character in result.stdout + result.stderr)


def test_on_a_terminal_a_bar_moves(pictures, tmp_path, service):
    parent, child = pty.openpty()
    output = tmp_path / "out.jsonl"
    command = [*CLI, "batch", str(pictures), "--url", service.rest_url, "--output", str(output), *QUICK]
    running = subprocess.Popen(command, stderr=child, stdout=subprocess.PIPE, env={**os.environ, "TERM": "xterm"})
    os.close(child)
    shown = b""
    with suppress(OSError):  # how a terminal says that its other end was closed
        while data := os.read(parent, 65536):
            shown += data
    os.close(parent)
    told, _ = running.communicate(timeout=60)
    assert running.returncode == ExitCode.OK
    assert b"\x1b[" in shown
    assert b"pictures" in shown
    assert b"4 pictures answered" in told
    assert b"\x1b" not in told


def test_a_rerun_asks_only_what_is_missing(pictures, tmp_path, service):
    output = tmp_path / "out.jsonl"
    ask = (pictures, "--output", output, *QUICK)
    run(*ask, "--url", service.rest_url, "--limit", "2")
    first = read_lines(output)
    assert len(first) == 2
    result = run(*ask, "--url", service.rest_url)
    assert "2 pictures answered, 2 known before" in result.stdout
    lines = read_lines(output)
    assert lines[:2] == first
    assert len(names(lines)) == len(set(names(lines))) == 4
    # Whichever way it is reached, it is the same model.
    result = run(*ask, "--url", f"grpc://{service.grpc_url}")
    assert "0 pictures answered, 4 known before" in result.stdout
    assert read_lines(output) == lines


def test_other_questions_are_other_lines(pictures, tmp_path, service):
    output = tmp_path / "out.jsonl"
    ask = (pictures, "--output", output, "--url", service.rest_url, "--limit", "1")
    for change in ((), ("--task", "OCR"), ("--num-beams", "2"), ("--model-revision", "abc")):
        assert run(*ask, *QUICK, *change).returncode == 0
    assert run(*ask, *QUICK, "--timeout-ms", "60000").returncode == 0, "asks a second picture: it changes no answer"
    lines = read_lines(output)
    assert names(lines) == ["00000.png"] * 4 + ["00001.png"]
    assert len({line["key"] for line in lines}) == 5


def test_a_changed_picture_is_asked_about_again_and_a_moved_or_copied_one_is_not(pictures, tmp_path, service):
    output = tmp_path / "out.jsonl"
    ask = ("--output", output, "--url", service.rest_url, *QUICK)
    run(pictures, *ask)
    shutil.copy(pictures / "00003.png", pictures / "00000.png")
    (pictures / "00001.png").rename(pictures / "moved.png")
    draw(pictures, 1, first=50)
    result = run(pictures, *ask)
    assert "1 pictures answered, 2 known before, 2 copied from the same bytes" in result.stdout
    lines = read_lines(output)
    by_name = {Path(line["address"]).name: line for line in lines}
    assert by_name["00000.png"]["answer"] == by_name["00003.png"]["answer"]
    assert by_name["00000.png"]["key"] == by_name["00003.png"]["key"]
    assert Counter(names(lines))["00000.png"] == 2, "its answer of before stays, above the new one"
    assert len(lines) == 7


def test_pictures_with_the_same_bytes_are_asked_about_once_also_when_they_come_together(tmp_path, service):
    (original,) = draw(tmp_path / "p", 1)
    for number in range(10):
        shutil.copy(original, tmp_path / "p" / f"copy-{number}.png")
    output = tmp_path / "out.jsonl"
    result = run(tmp_path / "p", "--output", output, "--url", service.rest_url, *QUICK)
    assert "1 pictures answered, 0 known before, 10 copied from the same bytes" in result.stdout
    lines = read_lines(output)
    assert len(set(names(lines))) == len(lines) == 11
    assert len({(line["key"], json.dumps(line["answer"])) for line in lines}) == 1


def test_unchanged_files_arent_read_again_unless_rehash_says_so(pictures, tmp_path, service):
    output = tmp_path / "out.jsonl"
    ask = (pictures, "--output", output, "--url", service.rest_url, *QUICK)
    run(*ask)
    target = pictures / "00002.png"
    status = target.stat()
    # Other bytes behind the same size and time: what no rerun can see without reading.
    data = bytearray(target.read_bytes())
    data[-1] ^= 255
    target.write_bytes(data)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "4 known before" in run(*ask).stdout
    assert "3 known before" in run(*ask, "--rehash").stdout


def test_the_last_line_of_an_address_is_about_the_file_as_it_is(tmp_path, service):
    first, second = (path.read_bytes() for path in draw(tmp_path / "drawn", 2))
    path, output = tmp_path / "x.png", tmp_path / "out.jsonl"
    ask = (path, "--output", output, "--url", service.rest_url, *QUICK)
    for time, data, said in (
        (1, first, "1 pictures answered, 0 known before"),
        (2, second, "1 pictures answered, 0 known before"),
        (3, first, "0 pictures answered, 0 known before, 1 copied"),
        (4, first, "0 pictures answered, 1 known before"),  # only touched
        (4, first, "0 pictures answered, 1 known before"),
    ):
        path.write_bytes(data)
        os.utime(path, (time, time))
        assert said in run(*ask).stdout
    lines = read_lines(output)
    assert [line["content"] == content_hash(first) for line in lines] == [True, False, True, True]
    assert [line["state"].rpartition("-")[2] for line in lines] == [f"{time}000000000" for time in (1, 2, 3, 4)]


def test_a_failure_to_read_is_forgotten_when_a_killed_run_has_answered_it(pictures, tmp_path, service):
    output, listed = tmp_path / "out.jsonl", tmp_path / "list.txt"
    listed.write_text(f"{tmp_path}/late.png\n")
    ask = ("--list", listed, "--output", output, "--url", service.rest_url, *QUICK)
    assert run(*ask).returncode == ExitCode.SOME_UNANSWERED
    stood = tmp_path / "out.jsonl.failures.jsonl"
    before = stood.read_bytes()
    (pictures / "00000.png").rename(tmp_path / "late.png")
    assert run(*ask).returncode == ExitCode.OK
    stood.write_bytes(before)  # as if that run had been killed instead of ended
    assert "1 known before" in run(*ask).stdout
    assert not failures(output)


def test_several_tasks_are_kept_apart_and_one_that_is_refused_takes_no_other_along(pictures, tmp_path, service):
    output = tmp_path / "out.jsonl"
    tasks = ("--task", "CAPTION", "--task", "REGION_TO_CATEGORY", "--task", "OCR")
    ask = (pictures, "--output", output, "--url", service.rest_url, *QUICK, *tasks)
    result = run(*ask, "--text", "no region")
    assert result.returncode == ExitCode.SOME_REFUSED
    assert Counter(line["task"] for line in read_lines(output)) == {"<CAPTION>": 4, "<OCR>": 4}
    assert {failure["task"] for failure in failures(output)} == {"<REGION_TO_CATEGORY>"}
    assert {failure["text"] for failure in failures(output)} == {"no region"}
    result = run(*ask, "--text", "<loc_0><loc_0><loc_500><loc_500>")
    assert result.returncode == ExitCode.OK, result.stdout
    lines = read_lines(output)
    assert Counter(line["task"] for line in lines) == {"<CAPTION>": 4, "<OCR>": 4, "<REGION_TO_CATEGORY>": 4}
    assert len(failures(output)) == 4, "the other text still has no answer"


def test_bad_pictures_are_set_apart_and_left_alone(pictures, tmp_path, service):
    output = tmp_path / "out.jsonl"
    (pictures / "bad.png").write_bytes(b"no picture")
    listed = tmp_path / "list.txt"
    listed.write_text(f"{pictures}\n{tmp_path}/gone.png\n")
    ask = (
        "--list",
        listed,
        "--output",
        output,
        "--url",
        service.rest_url,
        "--task",
        "OCR",
        "--task",
        "CAPTION",
        *QUICK,
    )
    result = run(*ask)
    assert result.returncode == ExitCode.SOME_UNANSWERED
    assert "2 failed" in result.stdout
    assert len(read_lines(output)) == 8
    by_name = {Path(failure["address"]).name: failure for failure in failures(output)}
    assert len(failures(output)) == 4
    assert (by_name["bad.png"]["kind"], by_name["bad.png"]["status"]) == ("refused", 400)
    assert by_name["bad.png"]["reason"].startswith("INPUT_IMAGE, row 0: ")
    assert by_name["bad.png"]["attempts"] == 1
    assert by_name["gone.png"]["kind"] == "unread"
    before = by_name["bad.png"]
    # A rerun leaves the refused one alone, and looks again for the one that couldn't be read.
    draw(tmp_path, 1, first=70)[0].rename(tmp_path / "gone.png")
    result = run(*ask)
    assert result.returncode == ExitCode.SOME_REFUSED
    assert "1 pictures answered, 4 known before, 0 copied from the same bytes, 1 failed" in result.stdout
    assert before in failures(output)
    assert {Path(failure["address"]).name for failure in failures(output)} == {"bad.png"}
    stood = tmp_path / "out.jsonl.failures.jsonl"
    long_ago = "2000-01-01T00:00:00Z"
    stood.write_text(stood.read_text().replace(before["at"], long_ago))
    assert run(*ask, "--retry-failed").returncode == ExitCode.SOME_REFUSED
    assert all(failure["at"] > long_ago for failure in failures(output)), "it wasn't tried again"
    draw(pictures, 1, first=71)[0].rename(pictures / "bad.png")
    assert run(*ask).returncode == ExitCode.OK
    assert not failures(output)


def test_a_parameter_that_the_service_refuses_ends_the_run_and_blames_no_picture(pictures, tmp_path, service):
    result = run(pictures, "--output", tmp_path / "o.jsonl", "--url", service.rest_url, "--num-beams", "99")
    assert result.returncode == ExitCode.USAGE
    assert "parameter num_beams: 99 is over" in result.stderr
    assert not failures(tmp_path / "o.jsonl")


def test_a_wrong_model_name_ends_the_run(pictures, tmp_path, service):
    result = run(pictures, "--output", tmp_path / "o.jsonl", "--url", service.rest_url, "--model-name", "other")
    assert result.returncode == ExitCode.FAILED
    assert "no model 'other' here" in result.stderr
    assert not (tmp_path / "o.jsonl").exists()


def test_a_service_that_isnt_there(pictures, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    result = run(pictures, "--output", tmp_path / "o.jsonl", "--url", url, "--give-up-after", "0.5")
    assert result.returncode == ExitCode.UNREACHABLE
    assert "can't be reached" in result.stderr


@pytest.mark.slow
def test_a_service_that_goes_away_ends_the_run_and_blames_no_picture(tmp_path, service):
    draw(tmp_path / "p", 24)
    output = tmp_path / "out.jsonl"
    with Relay(service.http_port) as relay:
        ask = (tmp_path / "p", "--output", output, "--url", relay.url, "--give-up-after", "1", *QUICK)
        running = start(*ask, "--concurrency", "2")
        wait_for(lambda: whole_lines(output) >= 3, running)
        relay.shut()
        _, said = running.communicate(timeout=120)
        assert running.returncode == ExitCode.UNREACHABLE, said
        assert "has answered no question for" in said
        assert 3 <= len(read_lines(output)) < 24
        assert not failures(output)
        relay.open()
        assert run(*ask).returncode == ExitCode.OK
    lines = read_lines(output)
    assert len(lines) == len(set(names(lines))) == 24


@pytest.mark.slow
def test_a_service_that_comes_back_in_time_is_waited_for(tmp_path, service):
    draw(tmp_path / "p", 16)
    output = tmp_path / "out.jsonl"
    with Relay(service.http_port) as relay:
        running = start(tmp_path / "p", "--output", output, "--url", relay.url, "--concurrency", "2", *QUICK)
        wait_for(lambda: whole_lines(output) >= 3, running)
        relay.shut()
        relay.open()
        _, said = running.communicate(timeout=120)
    assert running.returncode == ExitCode.OK, said
    lines = read_lines(output)
    assert len(lines) == len(set(names(lines))) == 16


def test_killed_at_random_moments_it_loses_nothing_and_does_nothing_twice(tmp_path, service):
    draw(tmp_path / "p", 24)
    output = tmp_path / "out.jsonl"
    ask = (tmp_path / "p", "--output", output, "--url", service.rest_url, *QUICK, "--task", "OD", "--task", "CAPTION")
    chance = random.Random(7)
    partial = []
    for _ in range(3):
        goal = whole_lines(output) + chance.randint(1, 12)
        running = start(*ask)
        wait_for(lambda: whole_lines(output) >= goal, running)  # noqa: B023
        running.kill()
        running.communicate()
        partial.append(whole_lines(output))
    assert 0 < partial[0] < 48
    assert partial == sorted(partial)
    result = run(*ask)
    assert result.returncode == ExitCode.OK, result.stderr
    lines = read_lines(output)
    asked = Counter((Path(line["address"]).name, line["task"]) for line in lines)
    assert set(asked.values()) == {1}
    assert len(asked) == 48
    assert run(*ask).returncode == ExitCode.OK
    assert read_lines(output) == lines


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED)]
)
def test_a_signal_lets_what_is_in_flight_be_written(tmp_path, service, number, code):
    draw(tmp_path / "p", 60)
    output = tmp_path / "out.parquet"
    journal = tmp_path / "out.parquet.journal.jsonl"
    running = start(tmp_path / "p", "--output", output, "--url", service.rest_url, *QUICK)
    wait_for(lambda: whole_lines(journal) >= 2, running)
    running.send_signal(number)
    told, said = running.communicate(timeout=120)
    assert running.returncode == code, said
    assert "in flight" in said
    lines = read_lines(journal)
    assert 2 <= len(lines) < 60
    assert f"{len(lines)} pictures answered" in told
    assert pyarrow.parquet.read_table(output).num_rows == len(lines)
    assert not failures(output)


def test_a_signal_ends_a_run_whose_sources_keep_it_waiting(pictures, tmp_path, service):
    """Of a pipe that nobody writes to, and of standard input that nobody closes."""
    output = tmp_path / "out.parquet"
    journal = tmp_path / "out.parquet.journal.jsonl"
    os.mkfifo(tmp_path / "pipe.png")
    ask = ("@-", "--output", output, "--url", service.rest_url, "--grace", "600", *QUICK)
    running = start(*ask, stdin=subprocess.PIPE)
    assert running.stdin is not None
    running.stdin.write(f"{pictures}/00000.png\n{tmp_path}/pipe.png\n")
    running.stdin.flush()
    wait_for(lambda: whole_lines(journal) >= 1, running)
    running.send_signal(signal.SIGTERM)
    assert running.wait(120) == ExitCode.TERMINATED
    assert running.stdout is not None
    assert "1 pictures answered" in running.stdout.read()
    assert pyarrow.parquet.read_table(output).num_rows == len(read_lines(journal)) == 1
    running.communicate()


def test_a_run_on_an_output_in_use_is_refused(pictures, tmp_path, service):
    output = tmp_path / "out.jsonl"
    with Journal(output):
        result = run(pictures, "--output", output, "--url", service.rest_url, *QUICK)
    assert result.returncode == ExitCode.FAILED
    assert "another run writes to" in result.stderr
    assert read_lines(output) == []


def test_an_output_that_is_somebody_elses_is_refused(pictures, tmp_path, service):
    output = tmp_path / "notes.jsonl"
    output.write_text('{"a": 1}\n')
    result = run(pictures, "--output", output, "--url", service.rest_url)
    assert result.returncode == ExitCode.FAILED
    assert "isn't one that this command writes" in result.stderr
    assert output.read_text() == '{"a": 1}\n'


def test_parquet_out_holds_the_journals_lines(pictures, tmp_path, service):
    output = tmp_path / "out.parquet"
    ask = (pictures, "--output", output, "--url", service.rest_url, "--task", "OD", "--task", "OCR", *QUICK)
    assert run(*ask, "--limit", "2").returncode == ExitCode.OK
    assert pyarrow.parquet.read_table(output).num_rows == 4
    assert run(*ask).returncode == ExitCode.OK
    table = pyarrow.parquet.read_table(output)
    lines = read_lines(tmp_path / "out.parquet.journal.jsonl")
    assert table.column_names == list(FIELDS)
    rows = table.to_pylist()
    assert [row["key"] for row in rows] == [line["key"] for line in lines]
    assert [json.loads(row["answer"]) for row in rows] == [line["answer"] for line in lines]
    assert [row["score"] for row in rows] == [line["score"] for line in lines]
    assert not list(tmp_path.glob(".*"))


def test_parquet_in_with_a_text_for_each_row(pictures, tmp_path, service):
    data = [path.read_bytes() for path in sorted(pictures.iterdir())]
    texts = ["a red circle", None, "a star"]
    table = pyarrow.table({"image": [*data[:2], b"broken"], "phrase": texts})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    output = tmp_path / "out.jsonl"
    ask = (tmp_path / "in.parquet", "--column", "image", "--text-column", "phrase", "--url", service.rest_url)
    result = run(*ask, "--output", output, "--task", "CAPTION_TO_PHRASE_GROUNDING", *QUICK)
    assert result.returncode == ExitCode.SOME_REFUSED, result.stderr
    (line,) = read_lines(output)
    assert (line["address"], line["text"]) == (f"{tmp_path}/in.parquet#0", "a red circle")
    reasons = {failure["address"].rpartition("#")[2]: failure["reason"] for failure in failures(output)}
    assert "needs a text" in reasons["1"]
    assert "no image" in reasons["2"]


def test_shards_write_files_of_their_own_and_leave_none_out(tmp_path, service):
    draw(tmp_path / "p", 9)
    ask = (tmp_path / "p", "--output", tmp_path / "out", "--url", service.rest_url, *QUICK)
    for index in range(2):
        assert run(*ask, "--shard", f"{index}/3").returncode == ExitCode.OK
    result = run(*ask, "--shard", "auto/3", env={"JOB_COMPLETION_INDEX": "2"})
    assert result.returncode == ExitCode.OK
    files = sorted((tmp_path / "out").glob("*"))
    assert [path.name for path in files] == [f"answers-{index:05}-of-00003.jsonl" for index in range(3)]
    lines = [line for path in files for line in read_lines(path)]
    assert names(lines) == [f"{number:05}.png" for number in range(9)]


@pytest.mark.slow  # starts a service of its own
def test_without_an_address_it_starts_a_service(tmp_path):
    draw(tmp_path / "p", 2)
    output = tmp_path / "out.jsonl"
    result = run(tmp_path / "p", "--output", output, *QUICK)
    assert result.returncode == ExitCode.OK, result.stderr
    assert {line["revision"].partition("@")[0] for line in read_lines(output)} == {"embedded"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "name a folder, a glob, an address or a list"),
        (("gone",), "'gone' isn't there"),
        ((".", "--task", "NONE"), "unknown task 'NONE'"),
        ((".", "--task", "REGION_TO_OCR"), "needs --text or --text-column"),
        ((".", "--text", "a star"), "takes a text"),
        ((".", "--text-column", "x", "--task", "REGION_TO_OCR"), "--column is needed too"),
        ((".", "--output", "s3://bucket/out.jsonl"), "has to be a file here"),
        ((".", "--output", "-"), "has to be a file"),
        ((".", "--url", "localhost:8080"), "url has to start with"),
        ((".", "--url", "http://[::1"), "Invalid port"),
        ((".", "--url", "http://"), "names no host"),
        ((".", "--url", "grpc://"), "names no host"),
        ((".", "--shard", "3/3"), "I from 0 to N-1"),
        ((".", "--shard", "1"), "I from 0 to N-1"),
        ((".", "--shard", "-1/3"), "I from 0 to N-1"),
        ((".", "--shard", "auto/3"), "JOB_COMPLETION_INDEX, which isn't set"),
        ((".", "--header", "Host"), "has to be 'NAME: VALUE'"),
    ],
)
def test_wrong_command_lines(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.returncode == ExitCode.USAGE
    assert says in " ".join(result.stderr.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_few_descriptors_are_made_more_where_nothing_bounds_them(monkeypatch):
    limits = {"now": (256, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, wanted: limits.update(now=wanted))
    assert _fitting(200) == 200
    assert limits["now"] == (64 + 3 * 200, resource.RLIM_INFINITY)
    limits["now"] = (256, 256)
    assert _fitting(200) == 64


@pytest.mark.slow  # a thousand pictures
def test_a_thousand_pictures_with_few_descriptors(tmp_path, service):
    drawn = draw(tmp_path / "p", 100)
    for number in range(1000):
        shutil.copy(drawn[number % 100], tmp_path / "p" / f"copy-{number:04}.png")
    output = tmp_path / "out.jsonl"
    ask = (tmp_path / "p", "--output", output, "--url", service.rest_url, *QUICK)
    running = start(*ask, "--concurrency", "100", preexec_fn=_few_descriptors)
    _, said = running.communicate(timeout=900)
    assert running.returncode == ExitCode.OK, said
    assert "needs more files than `ulimit -n` of 256 allows; taking 64" in said
    lines = read_lines(output)
    assert len(lines) == len(set(names(lines))) == 1100


def _few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
