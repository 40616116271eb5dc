"""What plots say, and that they can be drawn of anything a load test may leave."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from florence2_loadtest import formats
from florence2_loadtest.plots import replica_timeline
from florence2_loadtest.plots.autoscale import pods_plot, timeline_plot
from florence2_loadtest.plots.peers import ratios_plot
from florence2_loadtest.plots.percentiles import lateness_plot, percentiles_plot
from florence2_loadtest.plots.run import breakdown_plot, by_load, load_plot, names_of, parts_of
from florence2_loadtest.plots.run import timeline_plot as rates_plot
from florence2_loadtest.plots.style import Plot, spread
from florence2_loadtest.plots.sweep import concurrency_plot, effects_plot, frontier, top_plot, trade_plot
from florence2_loadtest.results import AutoscaleResult, Level, ServerSide, SweepResult
from tests.loadtest.example_results import (
    closed_level,
    nine_tasks_result,
    open_level,
    run_result,
    sweep_result,
    target,
    times,
)
from tests.loadtest.example_scaling import autoscale_result

PNG = b"\x89PNG\r\n\x1a\n"


def texts(plot: Plot) -> set[str]:
    """Returns all words on a plot."""
    figure = plot.figure()
    return {text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0000731, "73.1 µs"),
        (0.0382, "38.2 ms"),
        (0.9996, "1.00 s"),
        (1.312, "1.31 s"),
        (0.0, "0 s"),
        (1234.5, "1,234 s"),
        (None, "–"),
    ],
)
def test_a_time_has_its_unit(value: float | None, said: str) -> None:
    assert formats.seconds(value) == said


def test_what_isnt_all_never_reads_as_all() -> None:
    assert formats.share(0.99999) == "99.99 %"
    assert formats.share(1.0) == "100 %"


def test_labels_that_would_collide_are_moved_apart_and_keep_their_order() -> None:
    places = spread([0.1, 0.5, 0.5, 0.52, 0.9], 0.1)
    assert places == sorted(places)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(places))
    assert (places[0], places[-1]) == (0.1, 0.9)


def test_the_parts_of_a_request_add_up_to_its_latency() -> None:
    for level in (closed_level(36), open_level()):
        assert sum(parts_of(level) or []) == pytest.approx(level.latency.mean_s)


def test_an_open_loops_wait_to_be_sent_is_a_part_of_its_own() -> None:
    level = open_level()
    assert (parts_of(level) or [0])[0] == pytest.approx(level.latency.mean_s - level.service.mean_s)
    assert (parts_of(closed_level(12)) or [1])[0] == 0


def test_where_no_server_told_there_is_no_breakdown() -> None:
    assert breakdown_plot([closed_level(12, server=None), closed_level(24, server=ServerSide())]) is None


def test_tasks_measured_apart_are_rows_of_their_own() -> None:
    levels = nine_tasks_result().levels
    assert set(by_load(levels)) == set(names_of(levels)) == {next(iter(level.tasks)) for level in levels}
    assert list(by_load(run_result().levels)) == [""]


def test_one_load_is_bars_and_several_are_lines() -> None:
    one, several = load_plot(nine_tasks_result().levels), load_plot(run_result().levels)
    assert one is not None
    assert several is not None
    assert (one.title, several.title) == (
        "Throughput and latency by level",
        "Throughput and latency against concurrency",
    )
    assert "concurrency (requests in flight)" in texts(several)


def test_percentiles_are_labelled_by_their_nines() -> None:
    plot = percentiles_plot([closed_level(12)])
    assert plot is not None
    assert {"50 %", "90 %", "99 %", "99.9 %"} <= texts(plot)


def test_a_curve_ends_where_there_are_no_more_requests() -> None:
    plot = percentiles_plot([closed_level(12, latency=times(1.0, count=50))])
    assert plot is not None
    assert "90 %" in texts(plot)
    assert "99.9 %" not in texts(plot)


def test_the_frontier_is_what_nothing_beats_in_both() -> None:
    assert frontier([(1, 5), (2, 4), (3, 9), (3, 8), (4, 9), (5, 10)]) == [(1, 5), (3, 9), (5, 10)]


def test_the_replica_timeline_is_a_picture_on_disk(tmp_path: Path) -> None:
    replica_timeline(autoscale_result(), tmp_path / "plots" / "replicas.png")
    assert (tmp_path / "plots" / "replicas.png").read_bytes().startswith(PNG)


def test_the_replica_timeline_names_components_notes_and_statuses() -> None:
    said = texts(timeline_plot(autoscale_result()))
    assert {"transformer", "predictor", "spike to 40/s", "ingress http 503", "desired", "pending", "panic"} <= said


def test_replicas_that_nobody_told_are_a_gap() -> None:
    result = autoscale_result()
    for sample in result.samples[100:110]:
        sample.components["predictor"] |= dict.fromkeys(("ready", "pending", "terminating", "desired"))
    axes = next(axes for axes in timeline_plot(result).figure().axes if axes.get_title(loc="left") == "predictor")
    tops = [[path.get_extents() for path in area.get_paths()] for area in axes.collections]
    for area in tops[:2]:
        assert not [box for box in area if box.x0 < 105 < box.x1], "nothing is drawn across the gap"
    assert any(box.x1 <= 101 for box in tops[0])
    assert any(box.x0 >= 109 for box in tops[0])


def test_a_pods_bars_begin_when_it_was_created() -> None:
    result = autoscale_result()
    result.pods = result.pods[:1]
    plot = pods_plot(result)
    assert plot is not None
    pod, (axes,) = result.pods[0], plot.figure().axes
    bars = [bar for bar in axes.patches if bar.get_width() > 0]
    assert bars[0].get_x() == pytest.approx(pod.created_s)
    assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(pod.created_s + (pod.first_answer_s or 0))


def test_a_pod_that_never_became_ready_says_so() -> None:
    plot = pods_plot(autoscale_result())
    assert plot is not None
    assert "never ready" in texts(plot)


def test_the_default_stands_beside_the_best_with_the_values_it_has() -> None:
    plot = top_plot(sweep_result())
    assert plot is not None
    assert any(text.endswith("default") for text in texts(plot))
    assert any(text.endswith("recommended") for text in texts(plot))


def test_ratios_have_lines_at_one_and_at_the_goal() -> None:
    plot = ratios_plot({"ours": {"<OD>": 2.5, "mixed": 3.25}}, "triton")
    assert plot is not None
    assert {"as triton", "goal, 3×", "2.5×"} <= texts(plot)
    assert ratios_plot({"ours": {}}, "triton") is None


def test_a_level_without_an_answer_can_be_drawn() -> None:
    silent = Level(name="nothing", mode="closed", concurrency=4, failed=3, statuses={"timeout": 3})
    for levels in ([silent], [silent, closed_level(12)]):
        for plot in (load_plot(levels), percentiles_plot(levels), breakdown_plot(levels)):
            assert plot is None or plot.figure()
    late = Level(name="nothing", mode="open", rate=1.0, per_second=[{"second": 0, "planned": 1}])
    drawn = rates_plot(late)
    assert drawn is not None
    assert drawn.figure()
    assert lateness_plot(late) is None


def test_a_cluster_that_was_never_seen_can_be_drawn() -> None:
    empty = AutoscaleResult(
        name="nothing", target=target(), deployment_mode="Standard", level=Level(name="none", mode="open")
    )
    assert "no requests were counted by the second" in texts(timeline_plot(empty))
    assert pods_plot(empty) is None


def test_a_sweep_in_which_all_failed_has_nothing_to_draw() -> None:
    failed = SweepResult(name="none", target="both", objective="throughput", space={"max_batch_size": [6, 12]})
    assert [plot(failed) for plot in (top_plot, effects_plot, trade_plot, concurrency_plot)] == [None] * 4


def test_words_are_no_formulas() -> None:
    plot = load_plot([closed_level(4, name="costs $5 and $\\frac$"), closed_level(4, name="b")])
    assert plot is not None
    plot.figure().draw_without_rendering()
