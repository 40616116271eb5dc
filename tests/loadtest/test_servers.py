"""Servers of a load test: both halves, and each alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from florence2_kserve.client import Florence2Client
from florence2_kserve.model_files import locate_model
from florence2_kserve.processor import Processor
from florence2_kserve.settings import ENV_PREFIX, STORAGE_VARIABLE
from florence2_loadtest.scenario import MixItem, Pictures, Scenario
from florence2_loadtest.servers import Servers, environment
from florence2_loadtest.sweep.instant_predictor import InstantPredictor, canned_sequence
from florence2_loadtest.sweep.predictor_workload import predictor_workload

TASKS = ["<CAPTION>", "<OD>", "<OCR_WITH_REGION>", "<CAPTION_TO_PHRASE_GROUNDING>", "<REGION_TO_CATEGORY>"]


def test_settings_are_checked_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="max_batch_size: the transformer doesn't take it"):
        Servers({"max_batch_size": 6}, "transformer")
    with pytest.raises(ValueError, match="no such setting"):
        Servers({"batch": 6})


def test_only_what_was_asked_for_sets_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}MAX_BATCH_SIZE", "1")
    monkeypatch.setenv(STORAGE_VARIABLE, "s3://elsewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment({"max_batch_size": 6}) == {
        name: value
        for name, value in os.environ.items()
        if name not in (f"{ENV_PREFIX}MAX_BATCH_SIZE", STORAGE_VARIABLE)
    }
    assert environment({"env.OMP_NUM_THREADS": 2})["OMP_NUM_THREADS"] == "2"


def test_the_canned_answer_has_the_length_asked_for() -> None:
    processor = Processor.load(locate_model("embedded", with_weights=False))
    for tokens in (3, 4, 40, 500):
        sequence = canned_sequence(processor, tokens)
        assert len(sequence) == tokens
        assert sequence[-1] == processor.eos_token_id
        assert processor.pad_token_id not in sequence


def test_requests_to_a_predictor_alone_are_the_same_each_time_and_one_for_each_picture_and_task() -> None:
    scenario = Scenario(mix=[MixItem(task=task) for task in TASKS], pictures=Pictures(scenes=2))
    first, second = predictor_workload(scenario, "florence2"), predictor_workload(scenario, "florence2")
    bodies = {first[index].body for index in range(100)}
    assert len(bodies) == 2 * len(TASKS)
    assert [first[index] for index in range(50)] == [second[index] for index in range(50)]
    assert {first.only("<OD>")[index].task for index in range(5)} == {"<OD>"}


def test_pixels_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florence2_loadtest.sweep.predictor_workload._MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"16 requests make .* GiB of pixels"):
        predictor_workload(Scenario(), "florence2")


@pytest.mark.slow
class TestStarted:
    def test_the_transformer_alone_answers_from_a_canned_sequence(self, tmp_path: Path) -> None:
        picture = _picture(tmp_path)
        with Servers({"max_asyncio_workers": 1, "env.HF_TOKEN": "x"}, "transformer", answer_tokens=30) as servers:
            with Florence2Client(servers.target.url) as client:
                boxes = client.infer(picture, "<OD>")["<OD>"]
                quads = client.infer(picture, "<OCR_WITH_REGION>")["<OCR_WITH_REGION>"]
            assert boxes["labels"]
            assert quads["quad_boxes"]
            (url,) = servers.metrics_urls
            assert 'florence2_requests_total{model="florence2",outcome="success"} 2.0' in httpx.get(url).text
            assert servers.ended is None
            assert servers.target.settings == {"max_asyncio_workers": 1, "env.HF_TOKEN": "***"}

    def test_a_server_that_cannot_start_is_said_with_its_log_and_leaves_none_behind(self) -> None:
        with pytest.raises(RuntimeError, match="was asked for, but no GPU is visible"):
            Servers({"device": "cuda:99"}).__enter__()

    def test_a_server_that_ends_is_noticed(self) -> None:
        with Servers({}, "transformer") as servers:
            process = servers._services["transformer"].process
            assert process is not None
            process.kill()
            process.wait()
            assert servers.ended == "the transformer ended with code -9"
            assert "--- transformer" in servers.log_tail()

    def test_an_instant_predictor_ends_with_a_parent_that_is_killed(self) -> None:
        code = (
            "from florence2_loadtest.sweep.instant_predictor import InstantPredictor\n"
            "import time\n"
            "with InstantPredictor() as predictor: print(predictor._process.pid, flush=True); time.sleep(60)\n"
        )
        parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        end = time.monotonic() + 20
        while Path(f"/proc/{child}").exists() and _state(child) != "Z":
            assert time.monotonic() < end
            time.sleep(0.1)

    def test_an_instant_predictor_of_no_checkpoint_says_so(self) -> None:
        with pytest.raises(RuntimeError, match="the instant predictor ended while starting"):
            InstantPredictor("/nowhere").__enter__()


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def _picture(folder: Path) -> Path:
    from PIL import Image

    path = folder / "picture.png"
    Image.new("RGB", (64, 48), "white").save(path)
    return path
