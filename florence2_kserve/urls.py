"""What is wrong with a service's address, said before anything is begun."""

from __future__ import annotations

import typer


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
