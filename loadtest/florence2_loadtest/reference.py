"""What the deployment that this one replaces was measured with: a yardstick from another machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """One task, asked by 36 clients at once.

    Attributes:
        throughput: Answers a second.
        latency_s: Mean.
    """

    throughput: float
    latency_s: float


CONCURRENCY = 36
MACHINE = "RTX 4090"
NOTE = (
    "another machine: the Triton deployment that this service replaces, by its own README: Florence-2-large-ft on one "
    "RTX 4090, perf_analyzer at concurrency 36 with windows of 60 s, one picture full of objects. Another model size, "
    "device or picture makes the two columns incomparable."
)
REPLACED = {
    "<CAPTION>": Reference(26.6, 1.35),
    "<DETAILED_CAPTION>": Reference(14.5, 2.45),
    "<MORE_DETAILED_CAPTION>": Reference(19.6, 1.83),
    "<CAPTION_TO_PHRASE_GROUNDING>": Reference(29.7, 1.21),
    "<OD>": Reference(5.8, 6.13),
    "<DENSE_REGION_CAPTION>": Reference(7.3, 4.90),
    "<REGION_PROPOSAL>": Reference(6.3, 4.72),
    "<OCR>": Reference(29.4, 1.22),
    "<OCR_WITH_REGION>": Reference(21.6, 1.66),
}
