"""The command line: ``florence2 transformer | predictor | serve | infer | batch | check | doctor | …``.

Server commands take every field of ``Settings`` that means something to them as a flag, with
hyphens or underscores, so that what KServe's controller injects fits.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from florence2_kserve import __version__
from florence2_kserve.batch.command import batch
from florence2_kserve.doctor import doctor
from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.infer import infer, tasks
from florence2_kserve.options import MODEL_NAME, Headers, ModelName, read_headers
from florence2_kserve.settings import ENV_PREFIX, PREDICTOR_FIELDS, TRANSFORMER_FIELDS, Settings

app = typer.Typer(
    help="Microsoft Florence-2 on KServe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def settings_command(name: str, fields: Sequence[str]) -> Callable[[Callable[[Settings], None]], None]:
    """Registers a command whose flags are `fields` of Settings.

    Args:
        name: The command's name.
        fields: Which fields become flags.

    Returns:
        A decorator for a function that takes the settings.
    """

    def register(function: Callable[[Settings], None]) -> None:
        def command(**given: Any) -> None:
            function(read_settings({key: value for key, value in given.items() if value is not None}))

        parameters = []
        for field in fields:
            spec = Settings.model_fields[field]
            flags = dict.fromkeys((f"--{field.replace('_', '-')}", f"--{field}"))
            # Values stay text here: pydantic reads them, as it reads the environment's.
            option = typer.Option(
                *flags, help=f"{spec.description} [env: {ENV_PREFIX}{field.upper()}] [default: {spec.default}]"
            )
            annotation = Annotated[str | None, option]
            parameters.append(
                inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__doc__ = function.__doc__
        command.__name__ = function.__name__
        app.command(name)(command)

    return register


def read_settings(given: dict[str, Any]) -> Settings:
    """Returns the settings: `given` over the environment over defaults; a wrong value ends the program.

    Raises:
        typer.BadParameter: If a value doesn't fit; names the flag.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        problems = "; ".join(
            f"--{problem['loc'][0]}: {problem['msg']}" if problem["loc"] else problem["msg"]
            for problem in error.errors()
        )
        raise typer.BadParameter(problems) from None


@settings_command("transformer", TRANSFORMER_FIELDS)
def transformer(settings: Settings) -> None:
    """Serve the transformer: images and task prompts in, answers out. Needs a predictor."""
    from florence2_kserve.sdk import import_sdk

    import_sdk(settings)
    from florence2_kserve.server import Florence2Server
    from florence2_kserve.transformer import Florence2Transformer

    _serve(lambda: Florence2Server(settings).start([Florence2Transformer(settings)]))


@settings_command("predictor", PREDICTOR_FIELDS)
def predictor(settings: Settings) -> None:
    """Serve the predictor: the model itself. Needs the extra [predictor]."""
    from florence2_kserve.sdk import import_sdk

    import_sdk(settings)
    from florence2_kserve.predictor import Florence2Predictor
    from florence2_kserve.server import Florence2Server

    _serve(lambda: Florence2Server(settings).start([Florence2Predictor(settings)]))


@settings_command("serve", list(dict.fromkeys([*TRANSFORMER_FIELDS, *PREDICTOR_FIELDS])))
def serve(settings: Settings) -> None:
    """Serve transformer and predictor together on this machine, as two processes under this one."""
    from florence2_kserve.local import run_local

    raise typer.Exit(run_local(settings))


app.command()(infer)
app.command()(batch)


@app.command()
def check(
    url: Annotated[str, typer.Option(help="The service, http://…, https://… or grpc://….")],
    grpc: Annotated[bool, typer.Option("--grpc", help="Speak gRPC, whatever the URL begins with.")] = False,
    header: Headers = None,
    model_name: ModelName = MODEL_NAME,
    wait: Annotated[
        float, typer.Option(help="Seconds in which it has to become ready and give a first answer.", min=0)
    ] = 60,
    timeout: Annotated[float, typer.Option(help="Seconds that each further answer may take.", min=0.001)] = 60,
) -> None:
    """Ask a running service about drawn pictures and say what is wrong; exit code 1 if anything is."""
    from florence2_kserve.check import run_check

    address = f"grpc://{url.partition('://')[2] or url}" if grpc else url
    try:
        code = run_check(
            address, model_name=model_name, headers=read_headers(header), wait=wait, timeout=timeout, say=typer.echo
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url") from None
    raise typer.Exit(code)


app.command()(doctor)
app.command()(tasks)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the annotated picture goes.")] = Path("demo-output"),
    model: Annotated[str, typer.Option(help="Checkpoint to try.")] = "embedded",
) -> None:
    """Start the service, ask it about drawn pictures, and show answers beside the truth."""
    from florence2_kserve.demo import run_demo

    raise typer.Exit(run_demo(output, model))


@app.command(
    "benchmark",
    # Its options are read where they are listed once, so that it runs without this command line too.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def benchmark(context: typer.Context) -> None:
    """Compare the engine (or, as `benchmark transformer`, the transformer) with transformers; --help lists options.

    `benchmark make-checkpoint` writes random weights at a real size, to time a whole service with.
    """
    if context.args[:1] == ["transformer"]:
        from florence2_kserve.benchmark.transformer import main as run_transformer

        raise typer.Exit(run_transformer(context.args[1:]))
    if context.args[:1] == ["make-checkpoint"]:
        from florence2_kserve.benchmark.checkpoint import main as make_checkpoint

        raise typer.Exit(make_checkpoint(context.args[1:]))
    from florence2_kserve.benchmark.__main__ import main as run

    raise typer.Exit(run(context.args))


@app.command(
    "loadtest",
    # Its commands are read where they are, since they need packages that the base install doesn't have.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def loadtest(context: typer.Context) -> None:
    """Load and scaling tests, sweeps of settings, reports; --help lists the commands. Needs the extra [loadtest]."""
    try:
        from florence2_loadtest.command import main as run_loadtest
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("florence2"):
            raise
        typer.echo(f"error: {error}; install the extra: pip install 'florence2-kserve[loadtest]'", err=True)
        raise typer.Exit(ExitCode.FAILED) from None
    run_loadtest(context.args)


@app.command("evaluate-embedded")
def evaluate_embedded(
    scenes: Annotated[int, typer.Option(help="Held-out scenes.", min=1)] = 500,
    url: Annotated[str | None, typer.Option(help="A running service; without it one is started.")] = None,
    write_card: Annotated[bool, typer.Option(help="Write the table into the model card.")] = False,
) -> None:
    """Score the embedded model on held-out scenes, through the service, by beam search."""
    from florence2_kserve.demo import run_evaluation

    raise typer.Exit(run_evaluation(scenes, url, write_card))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _serve(run: Callable[[], None]) -> None:
    """Runs a server; what makes it fail at start is said in one line, and the process ends with 1."""
    from kserve.logging import logger

    from florence2_kserve.model_files import ModelFilesError

    try:
        run()
    except (ModelFilesError, ValueError, OSError, RuntimeError) as error:
        logger.exception("server failed")
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        # Threads of a broken engine must not keep the process alive.
        os._exit(ExitCode.FAILED)


def complete_switches(arguments: Sequence[str]) -> list[str]:
    """Returns `arguments` with ``=true`` behind bare switches: KServe passes some without a value, some with one."""
    if arguments[:1] in (["benchmark"], ["loadtest"]):
        return list(arguments)
    switches = {
        flag
        for field, spec in Settings.model_fields.items()
        if spec.annotation is bool
        for flag in (f"--{field}", f"--{field.replace('_', '-')}")
    }
    followed_by_value = [not following.startswith("-") for following in [*arguments[1:], "-"]][: len(arguments)]
    return [
        f"{argument}=true" if argument in switches and not has_value else argument
        for argument, has_value in zip(arguments, followed_by_value, strict=True)
    ]


def main() -> None:
    """Runs the command line."""
    app(complete_switches(sys.argv[1:]))


if __name__ == "__main__":
    main()
