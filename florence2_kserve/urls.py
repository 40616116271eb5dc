"""Services' addresses: what is wrong with one, said before anything is begun, and what of one may be shown."""

from __future__ import annotations

import re

import typer

_USER = re.compile(r"^([a-z][a-z0-9+.-]*://)?[^/?#]*@", re.IGNORECASE)


def url_problem(url: str) -> str | None:
    """Returns what is wrong with a service's URL, or None."""
    import httpx

    from florence2_kserve.client.core import split_url

    try:
        scheme, target = split_url(url)
        host = target if scheme == "grpc" else httpx.URL(url).host
    except (ValueError, httpx.InvalidURL) as error:
        return str(error)
    return None if host else f"url names no host: {url!r}"


def check_url(url: str | None) -> None:
    """Refuses an ``--url`` that can't be one.

    Raises:
        typer.BadParameter: Saying why.
    """
    if url is not None and (problem := url_problem(url)):
        raise typer.BadParameter(problem, param_hint="--url")


def public_url(url: str) -> str:
    """Returns a URL without what may be secret: user, password, query and fragment."""
    return _USER.sub(r"\1", re.split(r"[?#]", url, maxsplit=1)[0])
