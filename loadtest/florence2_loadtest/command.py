"""``florence2 loadtest …``: the commands, each from its own module."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from florence2_loadtest.ceiling import ceiling
from florence2_loadtest.cluster.command import autoscale
from florence2_loadtest.compare import compare
from florence2_loadtest.inputs import inputs
from florence2_loadtest.peers import peers
from florence2_loadtest.report import report
from florence2_loadtest.run import run
from florence2_loadtest.sweep.command import sweep

app = typer.Typer(
    name="loadtest",
    help="Load tests: how fast the service is, how it scales, with which settings, and beside others.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (run, sweep, autoscale, report, compare, peers, inputs, ceiling):
    app.command()(command)


def main(arguments: Sequence[str]) -> None:
    """Runs one of the commands; ends the process with its exit code."""
    app(list(arguments), prog_name="florence2 loadtest")
