"""What is written of an answer, by `batch` and by ``infer --scores``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from florence2_kserve.client import Answer


def answer_fields(answer: Answer) -> dict[str, Any]:
    """Returns an answer as plain values.

    Returns:
        ``answer`` as the service gave it; ``score``, the beam's; ``scores``, one in 0..1 for each place in the order
        of the answer's lists, and one for a text; ``finish_reason``.
    """
    from florence2_kserve.client import Caption
    from florence2_kserve.client.results import Places

    items = answer if isinstance(answer, Places) else [answer] if isinstance(answer, Caption) else []
    return {
        "answer": answer.value,
        "score": answer.sequence_score,
        "scores": [item.score for item in items],
        "finish_reason": answer.finish_reason,
    }
