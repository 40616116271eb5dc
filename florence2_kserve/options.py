"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from florence2_kserve.settings import Settings

MODEL_NAME = Settings.model_fields["model_name"].default

Url = Annotated[str | None, typer.Option(help="A running service, http://… or grpc://…; without it one is started.")]
Model = Annotated[str, typer.Option(help="Checkpoint, where a service is started.")]
ModelName = Annotated[str, typer.Option(help="The model's name.")]
Headers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="'NAME: VALUE'",
        help="Sent with every call, e.g. 'Host: florence2.example.com' (over gRPC the authority); may be repeated.",
    ),
]
Text = Annotated[str | None, typer.Option(help="Text or region, for the tasks that take one.")]
NumBeams = Annotated[int | None, typer.Option(help="Beams.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Bound on generated tokens.")]
LengthPenalty = Annotated[float | None, typer.Option(help="Exponent of the length that a beam's score is divided by.")]
TimeoutMs = Annotated[int | None, typer.Option(help="Milliseconds that the service may take for one request.", min=1)]


def read_headers(lines: Sequence[str] | None) -> dict[str, str]:
    """Reads headers as they are typed.

    Raises:
        typer.BadParameter: If one isn't ``NAME: VALUE``.
    """
    headers = {}
    for line in lines or ():
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise typer.BadParameter(f"has to be 'NAME: VALUE', not {line!r}", param_hint="--header")
        headers[name.strip()] = value.strip()
    return headers


def given(**options: Any) -> Mapping[str, Any]:
    """Returns the options that were given."""
    return {name: value for name, value in options.items() if value is not None}
