"""Nothing grows with time."""

from __future__ import annotations

import os
import random
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from florence2_kserve.engine.engine import InflightEngine

from .embedded import loaded, processor, request

MIB = 2**20


def resident_bytes() -> int:
    """Returns the memory that this process holds; Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_stays_flat_over_many_requests(full, capsys):
    """Changing pictures, tasks, beams and limits; some are cancelled; the cache is full all the time."""
    count = 20_000 if full else 4_000
    chance = random.Random(0)
    tasks = ("<CAPTION>", "<OD>", "<REGION_PROPOSAL>", "<OCR>")
    kinds = [[request(index, task) for task in tasks] for index in range(6)]
    engine = InflightEngine(loaded(), processor().image, feature_cache_bytes=MIB)
    pending: deque = deque()
    held: list[int] = []
    answered = 0
    for number in range(count):
        picture = number // 10  # ten requests about each
        kind = chance.choice(kinds[picture % len(kinds)])
        pixels = kind.pixel_values.copy()
        pixels[0, 0] = np.frombuffer(picture.to_bytes(4, "little"), dtype=np.uint8)[:3]
        row = replace(
            kind,
            pixel_values=pixels,
            image_key=str(picture).encode(),
            max_new_tokens=chance.choice((4, 8, 16)),
            num_beams=chance.choice((1, 3, 3, 3, 5)),
        )
        pending.extend(engine.submit([row]))
        if chance.random() < 0.02:
            pending[chance.randrange(len(pending))].cancel()
        while len(pending) >= 100:
            future = pending.popleft()
            answered += not future.cancelled() and len(future.result(60).sequence) > 1
        if number % (count // 10) == count // 10 - 1:
            held.append(resident_bytes())
    answered += sum(not future.cancelled() and len(future.result(60).sequence) > 1 for future in pending)
    values = engine.metrics.snapshot()
    engine.close()
    with capsys.disabled():
        print(f"\nresident MiB after each tenth of {count} requests: {[round(held_ / MIB) for held_ in held]}")
    assert answered + values["requests_cancelled"] == count
    assert values["feature_cache_evictions"] > count / 20
    assert values["feature_cache_bytes"] <= MIB
    # The first 2,000 fill pools and caches; of what comes then, a leak of a few KiB a request would show.
    filled = 2_000 // (count // 10) - 1
    growth = max(held[filled + 1 :]) - held[filled]
    assert growth < (32 if full else 8) * MIB
