"""What is asked, and how hard: the scenario of a load test, as YAML holds it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator

from florence2_kserve.tasks import find_task
from florence2_loadtest.slo import parse_slo

_MOST_LEVELS = 100
_MOST_CONCURRENCY = 10_000
_INT, _FLOAT = _NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_RANGE = re.compile(r"(\d+):(\d+)(?::(\d+))?")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MixItem(_Part):
    """One task of a mix.

    Attributes:
        task: Task prompt, with or without angle brackets.
        weight: Its share of the requests, relative to the others'.
        text: Text or region, where the task takes one; None for what the drawn scene has to ask about.
        parameters: Request parameters of this task alone.
        slo: ``p95<2s``.
    """

    task: str
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    text: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    slo: str | None = None

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        try:
            return find_task(task).name
        except KeyError as error:
            raise ValueError(error.args[0]) from None

    @field_validator("slo")
    @classmethod
    def _readable(cls, slo: str | None) -> str | None:
        if slo is not None:
            parse_slo(slo)
        return slo


class Pictures(_Part):
    """The pictures that are asked about.

    Attributes:
        folder: Where they lie; None draws scenes.
        most: How many of the folder's are taken, by name.
        scenes: How many scenes are drawn. Equal pictures share work in the predictor (its feature cache), so that a
            few of them flatter the figures: read ``cache_hits_share``.
        width: Of a drawn scene, in pixels.
        height: Of a drawn scene, in pixels.
        seed: Of the scenes.
    """

    folder: Path | None = None
    most: int = Field(default=64, ge=1, le=10_000)
    scenes: int = Field(default=16, ge=1, le=10_000)
    width: int = Field(default=640, ge=16, le=8192)
    height: int = Field(default=480, ge=16, le=8192)
    seed: int = 0


class ClosedLoad(_Part):
    """Clients that each send their next request when the last one was answered.

    Attributes:
        concurrency: How many: ``36``, ``[1, 4]``, or from, to and step: ``"12:60:12"``; a level each.
        window_s: Length of a measuring window.
        max_windows: Most windows of a level.
        stable_windows: How many windows in a row have to agree for the level to end.
        tolerance: How far each may lie from their mean, in throughput and in mean latency.
        warmup_s: Not measured; it lasts until each client has had an answer, at least.
        max_requests: Bound on what is sent after the warm-up.
    """

    concurrency: str | int | list[int] = 1
    window_s: float = Field(default=5.0, gt=0, le=3600)
    max_windows: int = Field(default=10, ge=1, le=1000)
    stable_windows: int = Field(default=3, ge=2)
    tolerance: float = Field(default=0.10, gt=0, lt=1)
    warmup_s: float = Field(default=2.0, ge=0, le=3600)
    max_requests: int | None = Field(default=None, ge=1)

    @field_validator("concurrency")
    @classmethod
    def _readable(cls, value: str | int | list[int]) -> str | int | list[int]:
        parse_concurrency(value)
        return value

    @property
    def concurrencies(self) -> list[int]:
        """The level's concurrencies, in the order in which they are measured."""
        return parse_concurrency(self.concurrency)


class OpenLoad(_Part):
    """Requests that come when they come, whatever was answered by then.

    Attributes:
        schedule: See `florence2_loadtest.schedules.parse_schedule`.
        max_in_flight: Bound on what is unanswered at a time; what it holds back counts as late, or unsent.
        grace_s: How long after its end the schedule may still be caught up with.
    """

    schedule: str
    max_in_flight: int = Field(default=1000, ge=1, le=_MOST_CONCURRENCY)
    grace_s: float = Field(default=10.0, ge=0, le=3600)

    @field_validator("schedule")
    @classmethod
    def _readable(cls, value: str) -> str:
        from florence2_loadtest.schedules import parse_schedule

        if not value.startswith("replay:"):  # a trace is looked for when it is run
            parse_schedule(value, 0)
        return value


class _Loader(yaml.SafeLoader):
    """YAML whose ``1:4:1`` is a text; by YAML 1.1 it is a number to the base of 60, and would be 3841 clients."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [entry for entry in entries if entry[0] not in _NUMBERS]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$"), list("-+0123456789.")
)


def _kind_of_load(value: Any) -> str:
    has_schedule = "schedule" in value if isinstance(value, dict) else isinstance(value, OpenLoad)
    return "open" if has_schedule else "closed"


Load = Annotated[Annotated[ClosedLoad, Tag("closed")] | Annotated[OpenLoad, Tag("open")], Discriminator(_kind_of_load)]


class Scenario(_Part):
    """A load test, whatever it is run against.

    Attributes:
        name: Name in results.
        mix: What is asked.
        pictures: About what.
        load: How hard.
        separately: A level for each task of the mix, instead of one of all.
        protocol: ``rest`` or ``grpc``.
        encoding: How pictures travel: ``json`` as base64 text in a BYTES tensor [1,1], as clients of the replaced
            deployment send them; ``binary`` as bytes.
        keep_alive: Whether connections are kept, or made for each request.
        parameters: Request parameters of all tasks.
        timeout_s: For one request, its retries included.
        retries: How often a request is sent again that was refused for the moment, or got no answer.
        seed: Of everything that is drawn.
    """

    name: str = "scenario"
    mix: list[MixItem] = Field(default_factory=lambda: [MixItem(task="<CAPTION>")], min_length=1)
    pictures: Pictures = Field(default_factory=lambda: Pictures())
    load: Load = Field(default_factory=lambda: ClosedLoad())
    separately: bool = False
    protocol: Literal["rest", "grpc"] = "rest"
    encoding: Literal["json", "binary"] = "json"
    keep_alive: bool = True
    parameters: dict[str, Any] = Field(default_factory=dict)
    timeout_s: float = Field(default=60.0, gt=0, le=3600)
    retries: int = Field(default=0, ge=0, le=100)
    seed: int = 0

    @property
    def tasks(self) -> list[str]:
        """The mix's tasks, each once, in its order."""
        return list(dict.fromkeys(item.task for item in self.mix))


def parse_concurrency(value: str | int | list[int]) -> list[int]:
    """Reads ``36``, ``"36"``, ``[1, 4]``, ``"1,4"`` or from, to (included) and step: ``"12:60:12"``.

    Raises:
        ValueError: If it is none of that, or bounds are exceeded.
    """
    if isinstance(value, int):
        levels = [value]
    elif isinstance(value, list):
        levels = value
    elif form := _RANGE.fullmatch(value.strip()):
        first, last, step = int(form[1]), int(form[2]), int(form[3] or 1)
        if step < 1 or last < first:
            raise ValueError(f"concurrency {value!r}: from, to and step go upwards, as in 12:60:12")
        levels = list(range(first, last + 1, step)[: _MOST_LEVELS + 1])
    else:
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError(f"concurrency has to look like 36, 1,4,16 or 12:60:12, not {value!r}")
        levels = [int(part) for part in parts]
    if not levels or not all(1 <= level <= _MOST_CONCURRENCY for level in levels):
        raise ValueError(f"concurrency {value!r}: each level has to be from 1 to {_MOST_CONCURRENCY}")
    if len(levels) > _MOST_LEVELS or len(set(levels)) < len(levels):
        raise ValueError(f"concurrency {value!r}: at most {_MOST_LEVELS} levels, each once")
    return levels


def scenario_path() -> Path:
    """Returns the folder of the built-in scenarios."""
    here = Path(__file__).resolve().parent
    in_wheel = here / "scenarios"
    return in_wheel if in_wheel.is_dir() else here.parent / "scenarios"


def read_scenario(path_or_name: str | Path) -> Scenario:
    """Reads a scenario from a file of YAML, or a built-in one by its name.

    Raises:
        ValueError: If there is none, or it is wrong; says where and why.
    """
    built_in = sorted(path.stem for path in scenario_path().glob("*.yaml"))
    path = scenario_path() / f"{path_or_name}.yaml" if str(path_or_name) in built_in else Path(path_or_name)
    try:
        content = yaml.load(path.read_text(), Loader=_Loader)
    except OSError as error:
        raise ValueError(
            f"{path_or_name}: neither a file that can be read ({error.strerror}) nor one of {', '.join(built_in)}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: has to hold a scenario's fields by name, not {type(content).__name__}")
    try:
        scenario = Scenario.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from None
    if scenario.pictures.folder is not None:  # relative to the file that names it
        folder = path.parent / scenario.pictures.folder
        scenario = scenario.model_copy(update={"pictures": scenario.pictures.model_copy(update={"folder": folder})})
    return scenario


def explain(error: ValidationError) -> str:
    """Returns what is wrong with a scenario, in a line."""
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc'] if part not in ('open', 'closed'))}: "
        f"{problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors()
    )
