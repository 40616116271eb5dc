"""What samples of a cluster and the requests meanwhile tell about its scaling. Pure functions.

All times are seconds from the load's beginning; samples before it have negative ones. docs/loadtest.md says what each
figure means. Replicas that were needed in a second: as many as the most requests that were in flight in it fill,
by the autoscaler's target, within the component's bounds. A predictor counts the requests that the transformer has
in flight, which is more than reach it at a time, so its surplus is at least what is said. Where no target is known
(an HPA goes by CPU), any request needs all replicas there are, and none needs the fewest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from florence2_loadtest.cluster.pods import PHASES
from florence2_loadtest.cluster.service import Bounds
from florence2_loadtest.cluster.steps import detect_steps
from florence2_loadtest.results import PodTimes, Record, Sample

_EARLY_S = 1.0  # a pod may be seen so much before the request for which it was made


def find(
    bounds: Mapping[str, Bounds],
    samples: Sequence[Sample],
    pods: Sequence[PodTimes],
    records: Sequence[Record],
    rises: Sequence[tuple[float, float]] = (),
) -> dict[str, Any]:
    """Returns all findings by name, each component's under its own; None is what wasn't seen, or can't be.

    Args:
        bounds: Of each component.
        samples: Of the cluster, in their order.
        pods: Their ways to readiness.
        records: All planned requests.
        rises: When the planned rate rises, and to how much; empty: they are looked for among the requests.
    """
    found = {
        "sent_share": _share(sum(record.sent_s is not None for record in records), len(records)),
        "failures": sum(not record.is_ok and record.sent_s is not None for record in records),
        **_first_answer(bounds, samples, pods, records),
        **_held(samples, records),
    }
    rises = rises or detect_steps(records)
    found["steps"] = [{"second": second, "rate": rate} for second, rate in rises]
    parts = {
        name: _component(name, bounds[name], samples, pods, records, [second for second, _ in rises])
        for name in bounds
    }
    for name, merge in (("panics", _sum), ("back_s", _latest), ("gone_s", _latest), ("enough_s", _latest)):
        found[name] = merge([part[name] for part in parts.values()])
    return {**found, **parts}


def with_first_answer(pods: Sequence[PodTimes], records: Sequence[Record]) -> list[PodTimes]:
    """Returns the pods, with the first answer beside the one of each component that was alone when it came."""
    answered = _first_answered(records)
    if answered is None:
        return list(pods)
    told = []
    for pod in pods:
        ready = [
            other.name
            for other in pods
            if other.component == pod.component
            and other.ready_s is not None
            and other.created_s + other.ready_s <= answered
            and (other.gone_s is None or other.created_s + other.gone_s > answered)
        ]
        is_alone = ready == [pod.name]
        told.append(pod.model_copy(update={"first_answer_s": answered - pod.created_s} if is_alone else {}))
    return told


def statuses_per_second(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns how many requests ended how in which second, by the component that refused them (empty: none did)."""
    counts = Counter(
        (math.floor(record.done_s), record.component, record.status) for record in records if record.done_s is not None
    )
    return [
        {"second": second, "component": component, "status": status, "count": count}
        for (second, component, status), count in sorted(counts.items())
    ]


def _component(
    name: str,
    bounds: Bounds,
    samples: Sequence[Sample],
    pods: Sequence[PodTimes],
    records: Sequence[Record],
    rises: Sequence[float],
) -> dict[str, Any]:
    after = [sample for sample in samples if sample.second >= 0]
    held, surplus = _surplus(name, bounds, after, records)
    last = max((record.done_s or record.sent_s or 0.0 for record in records), default=0.0)
    reached = _enough(name, after, rises)
    return {
        "fewest": bounds.fewest,
        "most": bounds.most,
        "target": bounds.target,
        "most_ready": _most(name, after, "ready"),
        "most_desired": _most(name, after, "desired"),
        "pods_created": sum(pod.component == name and pod.created_s >= -_EARLY_S for pod in pods),
        "enough_s": _slowest(name, after, reached),
        "steps": reached,
        "panics": _panics(name, after),
        "replica_s": held,
        "surplus_replica_s": surplus,
        "surplus_share": _share(surplus, held),
        "activator_s": _lasting(name, after, "activator_in_path"),
        "back_s": _back(name, bounds, after, last, ("ready", "pending")),
        "gone_s": _back(name, bounds, after, last, ("ready", "pending", "terminating")),
    }


def _first_answer(
    bounds: Mapping[str, Bounds], samples: Sequence[Sample], pods: Sequence[PodTimes], records: Sequence[Record]
) -> dict[str, Any]:
    """Returns how long the first answer took where a component was at zero, and what happened when meanwhile."""
    asked = min((record.planned_s for record in records), default=None)
    before = [sample for sample in samples if asked is not None and sample.second <= asked + _EARLY_S / 2]
    at_zero = [name for name in bounds if before and _value(before[-1], name, "ready") == 0]
    answered = _first_answered(records)
    found: dict[str, Any] = {"from_zero": at_zero, "first_answer_s": None, "first_answer_parts": {}}
    if asked is None or not at_zero:
        return found
    found["first_answer_s"] = None if answered is None else answered - asked
    for name in at_zero:
        new = [pod for pod in pods if pod.component == name and pod.created_s >= asked - _EARLY_S]
        if new:
            first = min(new, key=lambda pod: (pod.ready_s is None, pod.created_s + (pod.ready_s or 0.0)))
            since = {"created": 0.0, **{phase: getattr(first, f"{phase}_s") for phase in PHASES}}
            found["first_answer_parts"][name] = {
                phase: first.created_s - asked + seconds for phase, seconds in since.items() if seconds is not None
            }
    return found


def _held(samples: Sequence[Sample], records: Sequence[Record]) -> dict[str, Any]:
    """Returns how many requests came while no transformer was ready, so that the activator had to keep them."""
    known = [sample for sample in samples if _value(sample, "transformer", "activator_in_path") is not None]
    if not known:
        return {"held": None, "held_longest_s": None}
    seconds = np.array([sample.second for sample in known])
    longest = []
    for record in records:
        if record.sent_s is None or record.done_s is None:
            continue
        sample = known[max(0, int(np.searchsorted(seconds, record.sent_s, side="right")) - 1)]
        in_path = _value(sample, "transformer", "activator_in_path") == 1
        if in_path and _value(sample, "transformer", "ready") == 0:
            longest.append(record.done_s - record.sent_s)
    return {"held": len(longest), "held_longest_s": max(longest, default=0.0)}


def _enough(name: str, samples: Sequence[Sample], rises: Sequence[float]) -> list[dict[str, Any]]:
    """Returns, of each step after which more replicas were wanted than there were, when there were enough.

    Enough are as many as were wanted at most; where fewer are wanted before those are ready, as many as then are.
    A step of which nothing is known has None for all.
    """
    reached = []
    known = list(_wishes(name, samples))
    for begin, end in pairwise([*rises, math.inf]):
        behind = [wish for wish in known if wish[0] >= begin]
        within = [wish for wish in behind if wish[0] < end]
        if not within:
            reached.append({"second": begin, **dict.fromkeys(("from", "to", "desired_s", "enough_s"))})
            continue
        had, most = within[0][2], max(desired for _, desired, _ in within)
        if most <= had:
            continue
        wanted = next(second for second, desired, _ in within if desired == most)
        enough = (second for second, desired, ready in behind if second >= wanted and ready >= desired)
        at = next(enough, None)
        reached.append(
            {
                "second": begin,
                "from": had,
                "to": most,
                "desired_s": wanted - begin,
                "enough_s": None if at is None else at - begin,
            }
        )
    return reached


def _wishes(name: str, samples: Sequence[Sample]) -> Iterator[tuple[float, float, float]]:
    """Yields when how many replicas were desired and ready, where both are known."""
    for sample in samples:
        desired, ready = (_value(sample, name, what) for what in ("desired", "ready"))
        if desired is not None and ready is not None:
            yield sample.second, desired, ready


def _slowest(name: str, samples: Sequence[Sample], reached: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns how long the slowest step took; 0 where never more was wanted than there was."""
    if reached:
        return _latest([step["enough_s"] for step in reached])
    return None if next(_wishes(name, samples), None) is None else 0.0


def _surplus(
    name: str, bounds: Bounds, samples: Sequence[Sample], records: Sequence[Record]
) -> tuple[float | None, float | None]:
    """Returns the replica-seconds that there were, pods that end included, and those beyond what was needed."""
    held, surplus, is_known = 0.0, 0.0, False
    for (sample, seconds), in_flight in zip(_spans(samples), _most_in_flight(samples, records), strict=True):
        counts = [_value(sample, name, what) for what in ("ready", "pending", "terminating")]
        if any(count is None for count in counts):
            continue
        is_known = True
        replicas = sum(count or 0.0 for count in counts)
        held += replicas * seconds
        surplus += max(0.0, replicas - _needed(bounds, in_flight, replicas)) * seconds
    return (held, surplus) if is_known else (None, None)


def _needed(bounds: Bounds, in_flight: int, replicas: float) -> float:
    if in_flight == 0:
        return bounds.fewest
    if bounds.target is None:
        return replicas
    wanted = max(math.ceil(in_flight / bounds.target), bounds.fewest)
    return wanted if bounds.most is None else min(wanted, bounds.most)


def _most_in_flight(samples: Sequence[Sample], records: Sequence[Record]) -> Iterator[int]:
    """Yields the most requests that were in flight at a time, between each sample and the next."""
    changes = sorted(
        change
        for record in records
        if record.sent_s is not None
        for change in ((record.sent_s, 1), (math.inf if record.done_s is None else record.done_s, -1))
    )
    in_flight, index = 0, 0
    for sample, seconds in _spans(samples):
        while index < len(changes) and changes[index][0] <= sample.second:
            in_flight += changes[index][1]
            index += 1
        most = in_flight
        while index < len(changes) and changes[index][0] < sample.second + seconds:
            in_flight += changes[index][1]
            index += 1
            most = max(most, in_flight)
        yield most


def _panics(name: str, samples: Sequence[Sample]) -> int | None:
    known = [value for sample in samples if (value := _value(sample, name, "panicking")) is not None]
    return sum(now == 1 and before != 1 for before, now in pairwise([None, *known])) if known else None


def _lasting(name: str, samples: Sequence[Sample], what: str) -> float | None:
    known = [
        (value, seconds) for sample, seconds in _spans(samples) if (value := _value(sample, name, what)) is not None
    ]
    return sum(seconds for value, seconds in known if value) if known else None


def _back(name: str, bounds: Bounds, samples: Sequence[Sample], last: float, counted: tuple[str, ...]) -> float | None:
    """Returns how long after `last` no more than the fewest replicas were left for good; None if they still are."""
    since: float | None = None
    for sample in samples:
        values = [_value(sample, name, what) for what in counted]
        if sample.second < last or any(value is None for value in values):
            continue
        if sum(value or 0.0 for value in values) > bounds.fewest:
            since = None
        elif since is None:
            since = sample.second - last
    return since


def _most(name: str, samples: Sequence[Sample], what: str) -> float | None:
    return max((value for sample in samples if (value := _value(sample, name, what)) is not None), default=None)


def _spans(samples: Sequence[Sample]) -> Iterator[tuple[Sample, float]]:
    """Yields each sample but the last with the seconds until the next."""
    for sample, following in pairwise(samples):
        yield sample, following.second - sample.second


def _value(sample: Sample, name: str, what: str) -> float | None:
    return sample.components.get(name, {}).get(what)


def _first_answered(records: Sequence[Record]) -> float | None:
    return min((record.done_s for record in records if record.is_ok and record.done_s is not None), default=None)


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if whole and part is not None else None


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _latest(values: Sequence[float | None]) -> float | None:
    """Returns the largest; None if one isn't known, since it may be later than all others."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None
