"""``florence2 loadtest autoscale``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.options import MODEL_NAME, Headers, ModelName, read_headers
from florence2_kserve.urls import check_url
from florence2_loadtest.run import Protocol

if TYPE_CHECKING:
    from florence2_loadtest.cluster.expectations import Expectation
    from florence2_loadtest.results import AutoscaleResult, Record

SCENARIO = "zero-step-spike-zero"
RESULT, SAMPLES, RECORDS, TIMELINE = "result.json", "samples.csv", "records.jsonl", "timeline.png"


def autoscale(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The InferenceService.")] = "florence2",
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Its namespace; else the context's, or the pod's own.")
    ] = None,
    scenario: Annotated[str, typer.Option(help="A file, or one that comes with the package.")] = SCENARIO,
    schedule: Annotated[
        str | None, typer.Option(help="In place of the scenario's, e.g. 'steps:1/s,20s;8/s,30s'.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Where requests go, http://… or grpc://…; without it the service's address inside the cluster."
        ),
    ] = None,
    protocol: Annotated[
        Protocol | None, typer.Option(help="Without --url: what the service's first port speaks; else the scenario's.")
    ] = None,
    host_header: Annotated[
        bool,
        typer.Option(
            "--host-header", help="Send the host name that the service has at the ingress, for --url of one."
        ),
    ] = False,
    header: Headers = None,
    model_name: ModelName = MODEL_NAME,
    ca_file: Annotated[Path | None, typer.Option(help="Certificates to trust beside the system's.")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds for each request, cold start included; else the scenario's.", min=0.001),
    ] = None,
    retries: Annotated[int | None, typer.Option(help="Of each request; else the scenario's.", min=0)] = None,
    kubeconfig: Annotated[
        Path | None, typer.Option(help="Else KUBECONFIG or ~/.kube/config; in a pod its own ServiceAccount.")
    ] = None,
    context: Annotated[str | None, typer.Option(help="Of the kubeconfig; else its current one.")] = None,
    knative_namespace: Annotated[
        str, typer.Option(help="Where Knative's autoscaler runs: its log says when it panics.")
    ] = "knative-serving",
    wait_ready: Annotated[float, typer.Option(help="Seconds that the service may take to be ready.", min=0)] = 600,
    wait_before: Annotated[
        float,
        typer.Option(
            help="Seconds that it may take to shrink to its fewest replicas before the load; 0: as it is.", min=0
        ),
    ] = 180,
    wait_after: Annotated[
        float | None,
        typer.Option(help="The same after the load; else 300 in Knative mode, and 900 in Standard mode.", min=0),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME<VALUE'", help="Of a finding, e.g. 'first_answer<60s'; may be repeated."),
    ] = None,
    expect_replicas: Annotated[
        list[str] | None,
        typer.Option(metavar="'COMPONENT>=N'", help="Ready at a time, at least once; may be repeated."),
    ] = None,
    min_sent: Annotated[
        float, typer.Option(help="Share of planned requests that has to be sent.", min=0, max=1)
    ] = 0.999,
    max_failures: Annotated[int, typer.Option(help="Requests that may fail for good.", min=0)] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the result, samples, requests and a picture.")] = Path(
        "autoscale-output"
    ),
) -> None:
    """Watch a service in a cluster scale under a schedule; exit code 1 if it isn't as expected.

    Ctrl-C or SIGTERM ends it, and what there is by then is written.
    """
    import asyncio

    from florence2_loadtest.cluster.api import Api, ClusterError
    from florence2_loadtest.cluster.expectations import parse_expectation, parse_replicas
    from florence2_loadtest.cluster.interruption import Interrupted
    from florence2_loadtest.cluster.run import Plan, watch_scaling
    from florence2_loadtest.overrides import override
    from florence2_loadtest.scenario import read_scenario

    check_url(url)
    expected: list[Expectation] = []
    try:
        expected += [parse_expectation(f"sent_share>={min_sent:g}"), parse_expectation(f"failures<={max_failures}")]
        expected += [*map(parse_expectation, expect or ()), *map(parse_replicas, expect_replicas or ())]
        spoken = protocol.value if protocol else None
        if url is not None:
            spoken = "grpc" if url.startswith("grpc") else "rest"
        others = {"protocol": spoken, "timeout_s": timeout, "retries": retries}
        given = read_scenario(scenario)
        # Where it doesn't say, it depends on the way to the service.
        keep_alive = given.keep_alive if "keep_alive" in given.model_fields_set else None
        chosen = override(given, schedule=schedule, others=others)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        api = Api.connect(kubeconfig, context)
        plan = Plan(
            name, namespace or api.namespace, chosen, url, read_headers(header), host_header, model_name, ca_file,
            knative_namespace, wait_ready, wait_before, wait_after, keep_alive, expected,
        )  # fmt: skip
        _probe(output)
        result, records = asyncio.run(watch_scaling(api, plan, typer.echo))
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except Interrupted as interrupted:
        if interrupted.outcome is not None:
            _show(*interrupted.outcome, output)
        raise typer.Exit(interrupted.code) from None
    except ClusterError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(ExitCode.UNREACHABLE) from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _show(result, records, output)
    raise typer.Exit(ExitCode.FAILED if result.problems else ExitCode.OK)


def _probe(folder: Path) -> None:
    """Makes the folder of the results, and tries whether it can be written to: afterwards it would be too late."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        typer.echo(f"error: {folder} can't be written to: {error.strerror}", err=True)
        raise typer.Exit(ExitCode.FAILED) from None


def _show(result: AutoscaleResult, records: list[Record], output: Path) -> None:
    """Says what was found, and writes it."""
    from florence2_loadtest.cluster.table import changes, findings_text

    typer.echo(f"\n{changes(result)}\n\n{findings_text(result.findings)}")
    if bottleneck := result.level.generator.bottleneck:
        typer.echo(f"\nthe load generator itself was too slow: {bottleneck}")
    for problem in result.problems:
        typer.echo(f"not as expected: {problem}")
    try:
        _write(result, records, output)
    except OSError as error:
        typer.echo(f"error: the result can't be written to {output}: {error.strerror}", err=True)
        raise typer.Exit(ExitCode.FAILED) from None
    typer.echo(f"\n{output / RESULT}: {'not as expected' if result.problems else 'all as expected'}")


def _write(result: AutoscaleResult, records: list[Record], output: Path) -> None:
    from florence2_loadtest.cluster.table import write_csv
    from florence2_loadtest.plots.autoscale import replica_timeline
    from florence2_loadtest.results import write_records, write_result

    write_result(result, output / RESULT)
    write_records(records, output / RECORDS)
    write_csv(result, output / SAMPLES)
    replica_timeline(result, output / TIMELINE)
