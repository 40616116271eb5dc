"""Variables that servers get and no file may hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

VARIABLE = "env."
MASK = "***"
_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD")
_HARMLESS = "TOKENIZERS"  # TOKENIZERS_PARALLELISM is a setting like any other
_SALT, _ROUNDS, _DIGITS = b"florence2 loadtest sweep", 100_000, 8


def is_secret(name: str) -> bool:
    """Whether a setting is a variable whose name says that its value is a secret."""
    upper = name.upper().replace(_HARMLESS, "")
    return name.startswith(VARIABLE) and any(word in upper for word in _WORDS)


def masked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with stars for secrets."""
    return {name: MASK if is_secret(name) else value for name, value in settings.items()}


def hashed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with hashes for secrets, which tell whether they are the same ones, and too short for more."""
    return {name: _hash(str(value)) if is_secret(name) else value for name, value in settings.items()}


def hide(text: str, settings: Mapping[str, Any]) -> str:
    """Returns a text, such as a server's log, with stars for the values of secrets."""
    for name, value in settings.items():
        if is_secret(name) and str(value):
            text = text.replace(str(value), MASK)
    return text


def _hash(value: str) -> str:
    return f"hash {hashlib.pbkdf2_hmac('sha256', value.encode(), _SALT, _ROUNDS).hex()[:_DIGITS]}"
