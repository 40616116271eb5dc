"""Who refused a request, as far as its words tell."""

from __future__ import annotations

from typing import Any

import orjson

TRANSFORMER, PREDICTOR, INGRESS = "transformer", "predictor", "ingress"
# Words of our transformer about its predictor, and of proxies in front of it (Envoy, Knative's activator).
_OF_PREDICTOR = "the predictor"
_OF_PROXIES = ("upstream", "http2 header with status", "activator", "queue-proxy", "no healthy")


def blame_rest(body: bytes) -> str:
    """Returns who wrote an HTTP answer that is no success: our servers write JSON, proxies don't."""
    try:
        content: Any = orjson.loads(body)
        message = content["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return INGRESS
    return blame_words(str(message))


def blame_words(message: str) -> str:
    """Returns who is to blame by an error's message."""
    lower = message.lower()
    if any(words in lower for words in _OF_PROXIES):
        return INGRESS
    return PREDICTOR if _OF_PREDICTOR in lower else TRANSFORMER
