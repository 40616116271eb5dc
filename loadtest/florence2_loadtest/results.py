"""What load tests find out, as they are written to disk and read by reports and comparisons.

A result is one JSON file with a ``kind``. Times are seconds, rates are a second, sizes are bytes.
The requests themselves stand beside it, a line of JSON each (`Record`).
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, field_serializer

from florence2_kserve import __version__
from florence2_kserve.urls import public_url

FORMAT = 1
OK, UNSENT = "ok", "unsent"


@dataclass(slots=True)
class Record:
    """One request.

    Times count from the run's beginning, by the monotonic clock.

    Attributes:
        index: Place in the plan, from 0.
        task: Task prompt.
        planned_s: When it was meant to be sent; in a closed loop, when it was sent.
        sent_s: When it was first sent; None if it never was.
        done_s: When its answer, or failure, was there.
        status: ``ok``, ``unsent``, ``timeout``, ``connection``, ``malformed`` (an answer without its outputs), or what
            the server said: ``http 503``, ``grpc UNAVAILABLE``.
        attempts: How often it was sent.
        request_bytes: Size of its body.
        response_bytes: Size of the answer's.
        send_s: Time to hand the request over to the socket.
        receive_s: Time from the answer's first byte to its last.
        component: Who refused it where that is known (``transformer``, ``predictor``, ``ingress``), else empty.
    """

    index: int
    task: str
    planned_s: float
    sent_s: float | None = None
    done_s: float | None = None
    status: str = UNSENT
    attempts: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    send_s: float = 0.0
    receive_s: float = 0.0
    component: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether it was answered."""
        return self.status == OK

    @property
    def latency_s(self) -> float | None:
        """From the intended start to the answer: what a user who comes at that moment waits for."""
        return None if self.done_s is None else self.done_s - self.planned_s

    @property
    def service_s(self) -> float | None:
        """From being sent to the answer: what the server alone would be blamed for."""
        return None if self.done_s is None or self.sent_s is None else self.done_s - self.sent_s

    @property
    def slip_s(self) -> float | None:
        """How late it was sent."""
        return None if self.sent_s is None else self.sent_s - self.planned_s


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Times(_Result):
    """The distribution of one time."""

    count: int = 0
    mean_s: float = 0.0
    stdev_s: float = 0.0
    min_s: float = 0.0
    p50_s: float = 0.0
    p90_s: float = 0.0
    p95_s: float = 0.0
    p99_s: float = 0.0
    p999_s: float = 0.0
    max_s: float = 0.0
    curve: list[tuple[float, float]] = Field(
        default_factory=list, description="(percentile, seconds), for plots; up to some 60 points"
    )


class Window(_Result):
    """One measuring window of a closed loop."""

    seconds: float
    throughput: float
    latency_s: float = Field(description="Mean")


class TaskResult(_Result):
    """One task of a level."""

    answered: int = 0
    failed: int = 0
    throughput: float = 0.0
    goodput: float | None = Field(None, description="Answers a second that met the SLO; None without one")
    slo: str | None = Field(None, description="As it was given: p95<2s")
    slo_met: bool | None = None
    latency: Times = Field(default_factory=Times)


class ServerSide(_Result):
    """What the servers' own metrics say of a level, from scrapes before and after it.

    Seconds of phases are means a request. What no server told is None.
    """

    sources: list[str] = Field(default_factory=list, description="URLs scraped")
    requests: int | None = None
    failures: int | None = None
    request_s: float | None = Field(None, description="In the transformer, all phases")
    preprocess_s: float | None = None
    queue_s: float | None = None
    generate_s: float | None = None
    postprocess_s: float | None = None
    vision_batch_s: float | None = Field(None, description="A pass of the image tower")
    vision_batch_images: float | None = Field(None, description="Images in one")
    prefill_s: float | None = Field(None, description="A pass of the text encoder")
    decode_step_s: float | None = Field(None, description="A pass of the decoder")
    batch_rows: float | None = Field(None, description="Rows (beams) in one")
    useful_rows_share: float | None = None
    cache_hits_share: float | None = None
    images_encoded: int | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    vision_busy_share: float | None = Field(None, description="Share of the time spent in the image tower")
    prefill_busy_share: float | None = None
    decode_busy_share: float | None = None
    counters: dict[str, float] = Field(default_factory=dict, description="All growth of our metrics, by name")
    problems: list[str] = Field(default_factory=list, description="Servers left out, and why")

    @field_serializer("sources")
    def _without_secrets(self, sources: list[str]) -> list[str]:
        return [public_url(source) for source in sources]


class Generator(_Result):
    """How the load generator itself fared: whether its figures can be believed."""

    cpu_share: float = Field(0.0, description="Of one processor")
    loop_lag_p99_s: float = Field(0.0, description="How late the event loop ran what was due")
    slip_p99_s: float = 0.0
    bottleneck: str | None = Field(None, description="Why the generator, not the server, set the figures; None if not")


class Level(_Result):
    """One measured load: a concurrency, or a schedule.

    ``latency`` counts from the intended start, ``service`` from when a request was sent; in a closed
    loop they are equal.
    """

    name: str
    mode: Literal["closed", "open"]
    concurrency: int | None = None
    rate: float | None = Field(None, description="Planned, mean, of an open loop")
    seconds: float = Field(0.0, description="Of a stable closed loop: of its last windows, those that agree")
    stable: bool | None = Field(None, description="Of a closed loop: whether its last three windows agree")
    windows: list[Window] = Field(default_factory=list)
    planned: int = 0
    sent: int = 0
    answered: int = 0
    failed: int = 0
    unsent: int = 0
    held_back: int = Field(0, description="Of an open loop: fell due while as many as allowed were in flight")
    retried: int = Field(0, description="Requests sent more than once")
    throughput: float = Field(0.0, description="Answers a second")
    goodput: float | None = None
    latency: Times = Field(default_factory=Times)
    service: Times = Field(default_factory=Times)
    slip: Times = Field(default_factory=Times)
    send_s: float = Field(0.0, description="Mean of handing a request over")
    receive_s: float = Field(0.0, description="Mean of reading an answer")
    statuses: dict[str, int] = Field(default_factory=dict)
    tasks: dict[str, TaskResult] = Field(default_factory=dict)
    per_second: list[dict[str, int]] = Field(
        default_factory=list, description="second, planned, sent, answered, failed: counts by the second"
    )
    server: ServerSide | None = None
    generator: Generator = Field(default_factory=Generator)


class Target(_Result):
    """What was asked."""

    url: str = Field(description="Recorded without user, password and query")
    protocol: Literal["rest", "grpc"] = "rest"
    keep_alive: bool = True
    model_name: str = "florence2"
    model: str | None = Field(None, description="Checkpoint, by the service's metadata")
    revision: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict, description="The servers' settings, where we started them")
    note: str = ""

    @field_serializer("url")
    def _without_secrets(self, url: str) -> str:
        return public_url(url)


def describe_host() -> dict[str, str]:
    """Returns what figures depend on of the machine that generated the load."""
    cpu = platform.processor() or platform.machine()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    from florence2_kserve.cpus import available_cpus

    return {
        "cpu": cpu,
        "cpus": str(available_cpus()),
        "python": platform.python_version(),
        "system": platform.system(),
    }


class Result(_Result):
    """What is common to all results."""

    format: int = FORMAT
    kind: str
    name: str
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    version: str = __version__
    host: dict[str, str] = Field(default_factory=describe_host)
    scenario: dict[str, Any] = Field(default_factory=dict, description="As it was run, defaults filled in")


class RunResult(Result):
    """Of ``loadtest run``: one target, one level or several."""

    kind: Literal["run"] = "run"
    target: Target
    levels: list[Level] = Field(default_factory=list)


class Sample(_Result):
    """One second of a cluster."""

    second: float
    components: dict[str, dict[str, float | None]] = Field(
        default_factory=dict,
        description="Component → ready, desired, pending, terminating, activator_in_path, panicking, …",
    )


class PodTimes(_Result):
    """A pod's way to its first readiness, seconds from its creation; None where it wasn't seen."""

    name: str
    component: str
    created_s: float = Field(description="From the run's beginning")
    scheduled_s: float | None = None
    pulled_s: float | None = None
    started_s: float | None = None
    loaded_s: float | None = None
    ready_s: float | None = None
    first_answer_s: float | None = None
    gone_s: float | None = None


class AutoscaleResult(Result):
    """Of ``loadtest autoscale``."""

    kind: Literal["autoscale"] = "autoscale"
    target: Target
    deployment_mode: str
    level: Level
    samples: list[Sample] = Field(default_factory=list)
    pods: list[PodTimes] = Field(default_factory=list)
    notes: list[tuple[float, str]] = Field(default_factory=list, description="(second, what happened)")
    statuses_per_second: list[dict[str, Any]] = Field(
        default_factory=list, description="second, component, status, count"
    )
    findings: dict[str, Any] = Field(default_factory=dict, description="Figures by name; see docs/loadtest.md")
    problems: list[str] = Field(default_factory=list, description="Expectations that weren't met")


class Trial(_Result):
    """One configuration of a sweep."""

    number: int
    settings: dict[str, Any]
    state: Literal["done", "failed"] = "done"
    error: str | None = None
    score: float | None = Field(None, description="The objective's value")
    admissible: bool | None = Field(None, description="Whether it meets the constraint")
    levels: list[Level] = Field(default_factory=list)
    seconds: float = 0.0
    confirms: int | None = Field(None, description="Number of the trial whose settings this one measured again")


class SweepResult(Result):
    """Of ``loadtest sweep``."""

    kind: Literal["sweep"] = "sweep"
    target: Literal["transformer", "predictor", "both"]
    objective: str
    constraint: str | None = None
    direction: Literal["maximize", "minimize"] = "maximize"
    space: dict[str, list[Any]] = Field(default_factory=dict)
    trials: list[Trial] = Field(default_factory=list)
    best: int | None = Field(None, description="Number of the recommended trial")


class PeersResult(Result):
    """Of ``loadtest peers``: the same load on several services, in turn."""

    kind: Literal["peers"] = "peers"
    baseline: str = Field(description="Name of the run that others are divided by")
    runs: dict[str, RunResult] = Field(default_factory=dict)


_KINDS: dict[str, type[Result]] = {
    "run": RunResult,
    "autoscale": AutoscaleResult,
    "sweep": SweepResult,
    "peers": PeersResult,
}
R = TypeVar("R", bound=Result)


def write_result(result: Result, path: Path) -> None:
    """Writes `result` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(orjson.dumps(result.model_dump(mode="json"), option=orjson.OPT_INDENT_2) + b"\n")
    temporary.replace(path)


def read_result(path: Path) -> Result:
    """Reads what `write_result` wrote.

    Raises:
        ValueError: If `path` is no such file; names it and says why.
    """
    try:
        given = orjson.loads(path.read_bytes())
        return _KINDS[given["kind"]].model_validate(given)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a result of florence2 loadtest: {error}") from None


def write_records(records: Iterable[Record], path: Path) -> None:
    """Writes each record as a line of JSON; all of them or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.writelines(map(record_line, records))
    temporary.replace(path)


def record_line(record: Record) -> bytes:
    """Returns a record as `write_records` writes it."""
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def read_records(path: Path) -> Iterator[Record]:
    """Reads what `write_records` wrote."""
    with path.open("rb") as file:
        for line in file:
            yield Record(**orjson.loads(line))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
