"""What of a service's address may be shown."""

from __future__ import annotations

import pytest

from florence2_kserve.urls import public_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:8080", "http://host:8080"),
        ("https://user:s3cret@host/path?token=s3cret#s3cret", "https://host/path"),
        ("grpc://user:s3cret@host:9000", "grpc://host:9000"),
        ("user:s3cret@host:9000", "host:9000"),
        ("http://host/a@b?s3cret", "http://host/a@b"),
        ("http://user:s3c@ret@[::1", "http://[::1"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert public_url(url) == shown
