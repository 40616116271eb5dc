"""The benchmark as a whole, as small as it gets."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from florence2_kserve.benchmark.__main__ import main, parse
from florence2_kserve.benchmark.flops import Flops
from florence2_kserve.benchmark.models import build_model, find_shape
from florence2_kserve.benchmark.plot import draw_plot
from florence2_kserve.benchmark.run import compare_in_float64, ratios
from florence2_kserve.benchmark.settings import BenchmarkSettings, LoadName, ProfileName, SizeName, plan
from florence2_kserve.benchmark.sides import Answer, Run
from florence2_kserve.benchmark.workload import Workload

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    settings = (
        "--quick --profile decode-bound --load single,mixed,caption_beside_od,nine_tasks,unique,open --requests 9 "
        "--repeats 1 --length-scale 0.05 --rate 50 --seed 5 --max-batch-size 8 --sweep "
        f"--json {folder / 'figures.json'} --plot {folder / 'figures.png'}"
    )
    assert main(settings.split()) == 0
    return json.loads((folder / "figures.json").read_text()), folder / "figures.png"


def test_both_sides_agree_in_float64():
    comparison = compare_in_float64(BenchmarkSettings(seed=11), CPU, requests=18)
    assert (comparison.compared, comparison.identical) == (18, 18)


def test_every_ratio_has_its_name(figures):
    data, _ = figures
    closed = ["ratio_vs_arrival", "flop_ratio", "share_of_flop_ratio"]
    closed += ["ratio_vs_grouped", "flop_ratio_vs_grouped", "share_of_flop_ratio_vs_grouped"]
    latencies = ["p50_ratio", "p95_ratio", "p50_ratio_vs_grouped", "p95_ratio_vs_grouped"]
    expected = {
        f"decode_bound.{load}.{name}"
        for load, names in {
            "single_request.caption": ["ratio"],
            "single_request.detailed_caption": ["ratio"],
            "single_request.od": ["ratio"],
            "mixed.c9": closed,
            "nine_tasks": closed,
            "unique_captions": closed[:3],
            "caption_beside_od": closed + latencies,
            "open": latencies,
        }.items()
        for name in names
    }
    assert set(data["ratios"]) == expected
    assert all(value > 0 for value in data["ratios"].values())


def test_counts_stand_beside_the_ratios(figures):
    data, _ = figures
    nine = data["loads"]["decode_bound.nine_tasks"]
    assert nine["ours"]["counts"]["images_encoded"] == 1
    assert nine["arrival"]["counts"]["images_encoded"] == 9
    assert nine["ours"]["counts"]["cross_kv_bytes"] <= nine["arrival"]["counts"]["cross_kv_bytes"] / 3
    assert nine["ours"]["useful_share"] > nine["arrival"]["useful_share"]
    assert nine["ours"]["host_syncs_per_token"] > 0
    assert data["ratios"]["decode_bound.nine_tasks.flop_ratio"] == pytest.approx(
        nine["arrival"]["flops"]["total"] / nine["ours"]["flops"]["total"]
    )
    mixed = data["loads"]["decode_bound.mixed.c9"]
    for side in mixed.values():
        assert side["items"] == 9
        assert side["counts"]["generated_tokens"] == mixed["ours"]["counts"]["generated_tokens"]


def test_tokens_are_compared(figures):
    data, _ = figures
    assert data["parity"]["float64"]["rate"] == 1.0
    comparisons = {name: parity for name, parity in data["parity"].items() if name != "float64"}
    assert len(comparisons) == 3 + 4 * 2 + 1
    for parity in comparisons.values():
        assert parity["compared"] >= 1
        # Near-ties aside, in which float32 may choose either.
        assert all(divergence["score_gap"] < 1e-3 for divergence in parity["divergences"])


def test_the_machine_is_described(figures):
    machine = figures[0]["machine"]
    assert machine["torch"] == torch.__version__
    assert (machine["device"], machine["dtype"], machine["threads"]) == ("cpu", "float32", torch.get_num_threads())
    assert machine["peak_gflops"] > 0.1
    assert machine["cpu"]


def test_the_sweep_has_the_rows_asked_for(figures):
    points = figures[0]["sweeps"]["decode_bound"]["off"]
    assert [point["requests"] for point in points] == [1, 2, 4, 8]
    assert points[0]["rows"] == pytest.approx(3, rel=0.4)
    assert [point["rows"] for point in points] == sorted(point["rows"] for point in points)
    assert all(point["roofline_step_seconds"] > 0 for point in points)


def test_the_plot_shows_something(figures):
    _, path = figures
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image)
    assert (pixels == (0x24, 0x63, 0xB0)).all(-1).sum() > 100  # bars


def test_a_plot_without_figures_is_drawn(tmp_path):
    machine = {"cpu": "a cpu", "threads": 1, "dtype": "float32"}
    data = {"machine": machine, "settings": {"size": "quick"}, "ratios": {}, "sweeps": {}}
    draw_plot(data, tmp_path / "empty.png")
    assert Image.open(tmp_path / "empty.png").size[0] > 0


def test_ratios_say_by_how_much_ours_is_better():
    load = Workload(seed=0, length_scale=0.1, concurrency=2).caption_beside_od(1, clients=1)

    def run(seconds, od, caption, flops):
        answers = [Answer(np.array([2, 0, 2]), od), Answer(np.array([2, 0, 2]), caption)]
        return Run(seconds, answers, {}, Flops(tower=flops), {})

    ours = [run(1.0, 1.0, 0.2, 10), run(9.0, 1.0, 0.1, 10), run(1.0, 1.0, 0.1, 10)]
    named = ratios("x", load, {"ours": ours, "arrival": [run(4.0, 4.0, 0.8, 25)]})
    assert named == pytest.approx(
        {
            "x.ratio_vs_arrival": 4.0,
            "x.flop_ratio": 2.5,
            "x.share_of_flop_ratio": 1.6,
            "x.p50_ratio": 0.1 / 0.8,
            "x.p95_ratio": 0.1 / 0.8,
        }
    )


def test_weights_follow_from_the_seed_whatever_the_data_type():
    shape = dataclasses.replace(find_shape("quick", "decode-bound"), vocab_size=64)
    first, half, other = (
        build_model(shape, seed=seed, dtype=dtype, device=CPU).model.state_dict()
        for seed, dtype in ((1, torch.float32), (1, torch.bfloat16), (2, torch.float32))
    )
    assert all(torch.equal(first[name].to(torch.bfloat16), half[name]) for name in first if "pos_idx" not in name)
    drawn = [name for name in first if not torch.equal(first[name], other[name])]
    assert len(drawn) > 0.9 * len(first)


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_decode_bound_model_has_the_real_decoder(size):
    real, narrow = find_shape(size, "vision-bound"), find_shape(size, "decode-bound")
    for name in ("d_model", "heads", "positions", "vocab_size", "image_size", "image_tokens"):
        assert getattr(real, name) == getattr(narrow, name)
    assert (real.layers[1], real.ffn[1]) == (narrow.layers[1], narrow.ffn[1])
    assert narrow.dim_embed < real.dim_embed
    assert real.image_tokens == 577


def test_plans_take_what_is_given_and_decide_the_rest():
    for size, profile, on_gpu in product(get_args(SizeName), get_args(ProfileName), (False, True)):
        decided = plan(BenchmarkSettings(size=size), profile, on_gpu=on_gpu)
        assert set(decided.loads) <= set(get_args(LoadName))
        given = BenchmarkSettings(size=size, loads=("open", "tasks"), requests=7, repeats=2, length_scale=0.3)
        decided = plan(given, profile, on_gpu=on_gpu)
        # An open load's rate follows from what the sides answer of the mixed one.
        assert decided.loads == ("mixed", "tasks", "open")
        assert (decided.requests, decided.unique_requests, decided.repeats, decided.length_scale) == (7, 7, 2, 0.3)
        assert plan(dataclasses.replace(given, rate=2.0), profile, on_gpu=on_gpu).loads == ("tasks", "open")


def test_the_command_line_is_read():
    settings = parse(["--profile", "vision-bound", "--quick", "--load", "unique,mixed", "--threads", "2"])
    assert (settings.profiles, settings.size, settings.loads) == (("vision-bound",), "quick", ("unique", "mixed"))
    assert parse([]) == BenchmarkSettings()


@pytest.mark.parametrize("wrong", ["--load mixed,nothing", "--requests 0", "--length-scale 0", "--size huge"])
def test_a_wrong_command_line_is_refused(wrong, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(wrong.split())
    assert exit_info.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(capsys):
    assert main(["--quick", "--device", "tpu"]) == 2
    assert "'tpu'" in capsys.readouterr().err


def test_it_needs_no_server_and_no_settings_library():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('kserve', 'pydantic_settings', 'typer', 'fastapi', 'grpc')));"
        "import florence2_kserve.benchmark.run, florence2_kserve.benchmark.__main__"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_the_command_line_is_read_without_torch():
    code = (
        "import sys; from florence2_kserve.benchmark.__main__ import parse; parse(['--quick']);"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
