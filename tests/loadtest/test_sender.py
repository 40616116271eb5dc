"""How long to wait before a request is sent again."""

from __future__ import annotations

import pytest

from florence2_loadtest.sender import pause_before_retry


@pytest.mark.parametrize(
    ("attempts", "retry_after_s", "least"), [(1, None, 0.2), (3, None, 0.8), (50, None, 10), (1, 7, 7)]
)
def test_pauses_grow_and_are_never_shorter_than_the_server_wants(
    attempts: int, retry_after_s: float | None, least: float
) -> None:
    pauses = [pause_before_retry(attempts, retry_after_s) for _ in range(50)]
    assert all(least <= pause <= 1.5 * least for pause in pauses)
    assert len(set(pauses)) > 1  # clients that were refused together don't come back together
