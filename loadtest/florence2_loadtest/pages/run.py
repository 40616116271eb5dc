"""The report of a run, and the tables of levels that other kinds show too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from florence2_loadtest import formats
from florence2_loadtest.formats import NOTHING, count, digits, rate, seconds, share
from florence2_loadtest.pages.common import facts_of, warnings_of
from florence2_loadtest.pages.document import Headline, Mark, Part, Row, Section, Table, section
from florence2_loadtest.plots.percentiles import lateness_plot, percentiles_plot
from florence2_loadtest.plots.run import breakdown_plot, load_of, load_plot, names_of, timeline_plot
from florence2_loadtest.reference import MACHINE, NOTE, REPLACED
from florence2_loadtest.results import Level, RunResult, ServerSide, TaskResult

_MOST_TIMELINES = 6


def run_part(result: RunResult) -> Part:
    """Returns the report of a run."""
    levels = result.levels
    return Part(
        title=result.name,
        facts=facts_of(result, result.target),
        verdict=verdict_of(levels),
        headlines=headlines_of(levels),
        warnings=warnings_of(levels, [result.target.model]),
        sections=run_sections(levels),
    )


def run_sections(levels: Sequence[Level]) -> list[Section]:
    """Returns the details of levels."""
    opened = [level for level in levels if level.mode == "open"][:_MOST_TIMELINES]
    return [
        *section("Throughput and latency", load_plot(levels), levels_table(levels)),
        *section("By task", task_table(levels), objectives_table(levels)),
        *section(
            "By the second",
            *(plot for level in opened for plot in (timeline_plot(level), lateness_plot(level))),
            text="Latency counts from when a request was meant to be sent, service time from when it was; slip is the "
            "time between the two. A service that stands still shows in the first alone.",
        ),
        *section("Latency by percentile", percentiles_plot(levels)),
        *section(
            "Where the time goes",
            breakdown_plot(levels),
            server_table(levels),
            text="From the servers' own metrics, before and after each level; the rest is what clients saw beyond.",
        ),
    ]


def verdict_of(levels: Sequence[Level]) -> str:
    """Says in a sentence how levels went."""
    answered = [level for level in levels if level.answered]
    if not answered:
        return "Nothing was answered." if levels else "Nothing was measured."
    if answered[0].mode == "open":
        return _open_verdict(max(answered, key=load_of))
    if len(answered) > 1 and len({load_of(level) for level in answered}) == 1:
        rates = {name: level.throughput for name, level in zip(names_of(answered), answered, strict=True)}
        slowest, fastest = (pick(rates, key=lambda name: rates[name]) for pick in (min, max))
        said = f"Between {rate(rates[slowest])} ({slowest}) and {rate(rates[fastest])} ({fastest})"
        at = f", at concurrency {answered[0].concurrency}" if "concurrency" not in slowest else ""
        return f"{said}{at}." + _objectives(answered)
    best = max(answered, key=lambda level: level.throughput)
    said = f"{rate(best.throughput)} at {best.name}, with 95 % of answers within {seconds(best.latency.p95_s)}"
    near = next((level for level in sorted(answered, key=load_of) if level.throughput >= 0.95 * best.throughput), best)
    if near is not best:
        said += f"; {near.name} already gives {rate(near.throughput)} within {seconds(near.latency.p95_s)}"
    return said + "." + _objectives(answered)


def _open_verdict(level: Level) -> str:
    kept = level.answered / level.planned if level.planned else 0.0
    said = (
        f"{share(kept)} of {count(level.planned)} planned requests were answered at {rate(level.rate)}, 95 % of them "
        f"within {seconds(level.latency.p95_s)} of the moment they were meant to be sent"
    )
    if level.service.count and level.latency.p95_s > 1.5 * level.service.p95_s:
        said += f" (the service's own time: {seconds(level.service.p95_s)})"
    return said + "." + _objectives([level])


def _objectives(levels: Sequence[Level]) -> str:
    told = [task.slo_met for level in levels for task in level.tasks.values() if task.slo_met is not None]
    if not told:
        return ""
    if all(told):
        return " All SLOs were met."
    missed = len(told) - sum(told)
    return f" {missed} of {len(told)} SLOs {'was' if missed == 1 else 'were'} missed."


def headlines_of(levels: Sequence[Level]) -> list[Headline]:
    """Returns a few figures of the level with most throughput."""
    answered = [level for level in levels if level.answered]
    if not answered:
        return []
    name, best = max(zip(names_of(answered), answered, strict=True), key=lambda pair: pair[1].throughput)
    figures = [
        Headline(rate(best.throughput), "throughput", name),
        Headline(seconds(best.latency.p50_s), "median latency", name),
        Headline(seconds(best.latency.p99_s), "99 % within", name),
    ]
    if best.goodput is not None:
        figures.append(Headline(rate(best.goodput), "within the SLO", name))
    asked = sum(level.answered + level.failed + level.unsent for level in levels)
    figures.append(Headline(share(sum(level.answered for level in levels) / asked), "answered", "all levels"))
    return figures


def levels_table(levels: Sequence[Level]) -> Table | None:
    """Every level on a row."""
    names = dict(zip(map(id, levels), names_of(levels), strict=True))
    columns: list[tuple[str, Callable[[Level], str]]] = [
        ("Level", lambda level: names[id(level)]),
        ("Seconds", lambda level: digits(level.seconds)),
        ("Answered", lambda level: count(level.answered)),
        ("Failed", lambda level: count(level.failed)),
        ("Unsent", lambda level: count(level.unsent)),
        ("Answers/s", lambda level: digits(level.throughput)),
        ("Goodput/s", lambda level: digits(level.goodput)),
        ("Mean", lambda level: _time(level, "mean_s")),
        ("50\N{NO-BREAK SPACE}%", lambda level: _time(level, "p50_s")),
        ("95\N{NO-BREAK SPACE}%", lambda level: _time(level, "p95_s")),
        ("99\N{NO-BREAK SPACE}%", lambda level: _time(level, "p99_s")),
        ("99.9\N{NO-BREAK SPACE}%", lambda level: _time(level, "p999_s")),
        ("Stable", lambda level: NOTHING if level.stable is None else "yes" if level.stable else "no"),
        ("Client CPU", lambda level: share(level.generator.cpu_share)),
    ]
    if all(level.goodput is None for level in levels):
        columns = [column for column in columns if column[0] != "Goodput/s"]
    if all(level.mode == "closed" for level in levels):
        columns = [column for column in columns if column[0] != "Unsent"]
    if all(level.stable is None for level in levels):
        columns = [column for column in columns if column[0] != "Stable"]
    best = max((level.throughput for level in levels), default=0.0)
    rows = []
    for level in levels:
        troubled = level.failed or level.generator.bottleneck or level.stable is False or not level.answered
        mark: Mark = "bad" if troubled else "best" if len(levels) > 1 and level.throughput == best else ""
        rows.append(Row([tell(level) for _, tell in columns], mark))
    note = "Latencies count from the intended start." if any(level.mode == "open" for level in levels) else ""
    return Table("Levels", [title for title, _ in columns], rows, note=note) if rows else None


def _time(level: Level, name: str) -> str:
    return seconds(getattr(level.latency, name)) if level.latency.count else NOTHING


def task_table(levels: Sequence[Level]) -> Table | None:
    """Throughput and latency by task, beside the replaced deployment's."""
    rows = []
    for level, task, told in _tasks(levels):
        known = REPLACED.get(task)
        load = str(level.concurrency) if level.mode == "closed" else rate(level.rate)
        rows.append(
            Row(
                [
                    task,
                    load,
                    digits(told.throughput),
                    digits(told.latency.mean_s) if told.latency.count else NOTHING,
                    f"{known.throughput:.1f}" if known else NOTHING,
                    f"{known.latency_s:.2f}" if known else NOTHING,
                ],
                "bad" if told.failed else "",
            )
        )
    if not rows:
        return None
    mixed = any(len(level.tasks) > 1 for level in levels)
    reference = f"{MACHINE} (another machine)"
    return Table(
        "Tasks",
        ["Task", "Concurrency", "Throughput", "Latency", f"{reference}: Throughput", f"{reference}: Latency"],
        rows,
        aside=frozenset({4, 5}),
        note="Answers a second and mean seconds. "
        + ("Tasks of one mixed load share its throughput; the reference ran them one by one. " if mixed else "")
        + f"The last two columns are of {NOTE}",
    )


def _tasks(levels: Sequence[Level]) -> list[tuple[Level, str, TaskResult]]:
    order = [*REPLACED, *sorted({task for level in levels for task in level.tasks} - set(REPLACED))]
    found = [(level, task, told) for level in levels for task, told in level.tasks.items()]
    return sorted(found, key=lambda row: (order.index(row[1]), load_of(row[0])))


def objectives_table(levels: Sequence[Level]) -> Table | None:
    """What each task's limit on latency came to; None where there is none."""
    rows = []
    names = dict(zip(map(id, levels), names_of(levels), strict=True))
    for level, task, told in _tasks(levels):
        if told.slo is None:
            continue
        met = NOTHING if told.slo_met is None else "yes" if told.slo_met else "no"
        times = told.latency
        name = f"concurrency {level.concurrency}" if names[id(level)] == task else level.name
        cells = [task, name, told.slo, met, digits(told.goodput), count(told.answered), count(told.failed)]
        cells += [seconds(times.p50_s), seconds(times.p95_s), seconds(times.p99_s)] if times.count else [NOTHING] * 3
        rows.append(Row(cells, "bad" if told.slo_met is False else ""))
    if not rows:
        return None
    return Table(
        "SLO and goodput",
        ["Task", "Level", "SLO", "Met", "Goodput/s", "Answered", "Failed", "50 %", "95 %", "99 %"],
        rows,
        text=frozenset({0, 1, 2, 3}),
        note="Goodput: answers a second that met the SLO.",
    )


def _column(name: str) -> str:
    """Returns a level's name as a column's title, which breaks at its words."""
    return formats.shorten(name.strip("<>").replace("_", " ").replace("concurrency ", "at "), 30)


_SERVER_ROWS: tuple[tuple[str, Callable[[ServerSide], str]], ...] = (
    ("Requests", lambda told: count(told.requests)),
    ("Failures", lambda told: count(told.failures)),
    ("In the transformer", lambda told: seconds(told.request_s)),
    ("Preprocess", lambda told: seconds(told.preprocess_s)),
    ("Queue", lambda told: seconds(told.queue_s)),
    ("Generate", lambda told: seconds(told.generate_s)),
    ("Postprocess", lambda told: seconds(told.postprocess_s)),
    ("Image tower, a pass", lambda told: seconds(told.vision_batch_s)),
    ("Images in one", lambda told: digits(told.vision_batch_images)),
    ("Text encoder, a pass", lambda told: seconds(told.prefill_s)),
    ("Decoder, a pass", lambda told: seconds(told.decode_step_s)),
    ("Rows in one", lambda told: digits(told.batch_rows)),
    ("Useful rows", lambda told: share(told.useful_rows_share)),
    ("Cache hits", lambda told: share(told.cache_hits_share)),
    ("Tokens/s", lambda told: digits(told.tokens_per_s)),
    ("Busy: image tower", lambda told: share(told.vision_busy_share)),
    ("Busy: text encoder", lambda told: share(told.prefill_busy_share)),
    ("Busy: decoder", lambda told: share(told.decode_busy_share)),
)
_MOST_COLUMNS = 9


def server_table(levels: Sequence[Level]) -> Table | None:
    """What the servers say of each level, a column a level; None where they said nothing."""
    told = [(level, level.server) for level in levels if level.server is not None][:_MOST_COLUMNS]
    rows = [Row([name, *(tell(server) for _, server in told)]) for name, tell in _SERVER_ROWS]
    rows = [row for row in rows if set(row.cells[1:]) - {NOTHING}]
    if not rows:
        return None
    names = [_column(name) for name in names_of([level for level, _ in told])]
    return Table("What the servers say", ["Mean", *names], rows)
