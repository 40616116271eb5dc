"""SLOs as they are written."""

from __future__ import annotations

import pytest

from florence2_loadtest.results import Times
from florence2_loadtest.slo import Slo, parse_slo


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("p95<2s", Slo("p95", 2.0)),
        (" p99.9 < 800ms ", Slo("p99.9", 0.8)),
        ("mean<1.5s", Slo("mean", 1.5)),
        ("max<2min", Slo("max", 120.0)),
    ],
)
def test_an_slo_is_read(text: str, slo: Slo) -> None:
    read = parse_slo(text)
    assert (read.statistic, read.limit_s) == (slo.statistic, pytest.approx(slo.limit_s))


@pytest.mark.parametrize("text", ["", "p95", "p95<2", "p94<2s", "p95>2s", "p95<2 parsecs", "p95<-2s"])
def test_what_is_no_slo_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="p95<2s"):
        parse_slo(text)


def test_it_is_met_below_the_limit_only() -> None:
    slo = parse_slo("p95<2s")
    assert slo.is_met(Times(count=1, p95_s=1.999, max_s=50.0))
    assert not slo.is_met(Times(count=1, p95_s=2.0))


def test_nothing_meets_no_slo() -> None:
    assert not parse_slo("p95<2s").is_met(Times())
