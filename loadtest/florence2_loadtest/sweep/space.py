"""What is searched: settings and their values."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from florence2_kserve.settings import Settings
from florence2_loadtest.masking import VARIABLE, is_secret
from florence2_loadtest.servers import Half, check_name

UNSET = "unset"
_WORDS_FOR_NONE = frozenset({UNSET, "null", "none", "~", ""})
# A sweep can't recommend them: the chart decides on them, or they name what is served rather than tune it.
NOT_SEARCHED = {
    "model": "it is what is tuned: --set model=…",
    "model_revision": "it is what is tuned: --set model_revision=…",
    "model_name": "it changes nothing",
    "workers": "a server is one process, whatever it says; the cluster scales by replicas",
    "enable_grpc": "the predictor is called over gRPC",
    "predictor_protocol": "there is one only",
    "predictor_use_ssl": "the servers talk on the loopback address",
    "ssl_certfile": "the servers talk on the loopback address",
    "ssl_keyfile": "the servers talk on the loopback address",
}
Number = int | float


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        low: The least.
        high: The largest.
        step: Distance between two; None in a space for optuna alone, of which a grid can't be made.
        log: Whether small numbers are to be tried as often as large ones.
    """

    low: Number
    high: Number
    step: Number | None = None
    log: bool = False

    @property
    def values(self) -> list[Number]:
        """All of them.

        Raises:
            ValueError: If there is no step.
        """
        if self.step is None:
            raise ValueError(f"a grid needs values or a step: {self.low}:{self.high}:STEP, or values a,b,c")
        return [self.low + index * self.step for index in range(int((self.high - self.low) / self.step + 1e-9) + 1)]

    @property
    def is_whole(self) -> bool:
        """Whether its numbers are integers."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 0))


@dataclass(frozen=True, slots=True)
class Space:
    """Settings and what they may be.

    Attributes:
        parameters: By the setting's name, values or a range.
        notes: What is to be said of it.
    """

    parameters: Mapping[str, tuple[Any, ...] | Range]
    notes: tuple[str, ...] = field(default=(), compare=False)

    def configurations(self) -> Iterator[dict[str, Any]]:
        """Yields all of them in order, the last setting changing fastest.

        Raises:
            ValueError: If a range has no step.
        """
        values = [self._values(name) for name in self.parameters]
        for chosen in itertools.product(*values):
            yield dict(zip(self.parameters, chosen, strict=True))

    def as_lists(self) -> dict[str, list[Any]]:
        """Returns it as a result tells it: the values, or a range as a mapping of its numbers."""
        return {
            name: list(of)
            if isinstance(of, tuple)
            else [{"low": of.low, "high": of.high, "step": of.step, "log": of.log}]
            for name, of in self.parameters.items()
        }

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Returns the configuration that an optuna trial chooses."""
        return {name: _suggest(trial, name, of) for name, of in self.parameters.items()}

    def distributions(self) -> dict[str, Any]:
        """Returns optuna's view of it."""
        return {name: _distribution(of) for name, of in self.parameters.items()}

    def _values(self, name: str) -> Sequence[Any]:
        of = self.parameters[name]
        try:
            return of.values if isinstance(of, Range) else of
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def make_space(given: Mapping[str, Any], target: Half) -> Space:
    """Reads a space.

    Args:
        given: By name: a text as ``--param`` takes it, a list of values, or a mapping low, high, step, log.
        target: Whose settings they are to be.

    Raises:
        ValueError: If a setting or value is none of the target's; says which.
    """
    if not given:
        raise ValueError("name a setting to search over: --param max_batch_size=6,12,24,36")
    parameters = {}
    for name, values in given.items():
        check_name(name, target)
        if name in NOT_SEARCHED:
            raise ValueError(f"{name} isn't searched over: {NOT_SEARCHED[name]}")
        if is_secret(name):
            raise ValueError(f"{name} isn't searched over: it is a secret, by its name: --set {name}=…")
        parameters[name] = _read_values(name, values)
    return Space(parameters)


def read_space(path: Path, target: Half) -> Space:
    """Reads a space from YAML: a mapping from settings to values.

    Raises:
        ValueError: If the file is no such mapping, or as for `make_space`.
    """
    try:
        # All scalars as texts, as on the command line: YAML itself would read `off` as false.
        given = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: can't be read: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path}: has to map settings to lists of values, or to low, high and step")
    try:
        return make_space(given, target)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_assignments(texts: Iterable[str], option: str) -> dict[str, str]:
    """Reads ``NAME=VALUE`` of an option.

    Raises:
        ValueError: If one isn't of that form, or a name comes twice.
    """
    read: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name if name.startswith(VARIABLE) else name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"{option} has to be NAME=VALUE, not {text!r}")
        if name in read:
            raise ValueError(f"{option} {name} is given twice")
        read[name] = value.strip()
    return read


def read_value(name: str, value: Any) -> Any:
    """Reads one value of a setting, as the settings class would.

    Raises:
        ValueError: If the setting can't have it.
    """
    if name.startswith(VARIABLE):
        return str(value)
    spec = Settings.model_fields[name]
    if isinstance(value, str) and value.lower() in _WORDS_FOR_NONE and spec.default is None:
        return None
    try:
        return _adapter(name).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{name}={value}: {error.errors()[0]['msg']}") from None


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    spec = Settings.model_fields[name]
    kind: Any = Annotated[spec.annotation, spec]
    return TypeAdapter(kind)


def _read_values(name: str, given: Any) -> tuple[Any, ...] | Range:
    if isinstance(given, Mapping):
        return _read_range(name, given)
    if isinstance(given, str):
        bounds = given.split(":")
        if len(bounds) in (2, 3) and all(_number(bound) is not None for bound in bounds):
            return _read_range(name, dict(zip(("low", "high", "step"), bounds, strict=False)))
        given = given.split(",")
    values = tuple(read_value(name, value.strip() if isinstance(value, str) else value) for value in given)
    if not values:
        raise ValueError(f"{name}: name its values")
    if len(set(values)) < len(values):
        raise ValueError(f"{name}: a value is given twice")
    return values


def _read_range(name: str, given: Mapping[str, Any]) -> Range:
    if unknown := given.keys() - {"low", "high", "step", "log"}:
        raise ValueError(f"{name}: a range has low, high, step and log, not {', '.join(sorted(unknown))}")
    numbers = {key: _number(given[key]) for key in ("low", "high", "step") if key in given}
    low, high, step = numbers.get("low"), numbers.get("high"), numbers.get("step")
    if low is None or high is None or (step is None and "step" in numbers):
        raise ValueError(f"{name}: a range has numbers low and high, and may have a step")
    if low > high or (step is not None and step <= 0):
        raise ValueError(f"{name}: a range goes up, by a step above 0")
    log = str(given.get("log", "false")).lower() == "true"
    if log and (step is not None or low <= 0):
        raise ValueError(f"{name}: with log, a range begins above 0 and has no step")
    for number in (low, high, low + (step or 0)):
        read_value(name, number)
    return Range(low, high, step, log)


def _number(given: Any) -> Number | None:
    for kind in (int, float):
        try:
            return kind(given)
        except (TypeError, ValueError):
            continue
    return None


def _distribution(of: tuple[Any, ...] | Range) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(of, tuple):
        return CategoricalDistribution(of)
    if of.is_whole:
        return IntDistribution(of.low, of.high, log=of.log, step=of.step or 1)
    return FloatDistribution(of.low, of.high, log=of.log, step=of.step)


def _suggest(trial: Any, name: str, of: tuple[Any, ...] | Range) -> Any:
    if isinstance(of, tuple):
        return trial.suggest_categorical(name, of)
    if of.is_whole:
        return trial.suggest_int(name, of.low, of.high, step=of.step or 1, log=of.log)
    return trial.suggest_float(name, of.low, of.high, step=of.step, log=of.log)
