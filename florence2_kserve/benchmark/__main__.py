"""``python -m florence2_kserve.benchmark``: the benchmark without the command line's dependencies."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from florence2_kserve.benchmark.settings import (
    BackendName,
    BenchmarkSettings,
    CaptureName,
    DtypeName,
    LoadName,
    PolicyName,
    ProfileName,
    SizeName,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: Arguments; None takes the process's own.

    Returns:
        0, 1 if the two sides disagreed in float64, or 2 if it can't run here.
    """
    settings = parse(argv)
    try:
        from florence2_kserve.benchmark.run import run_benchmark
        from florence2_kserve.weights import find_device

        find_device(settings.device)
    except ModuleNotFoundError as error:
        print(f"error: {error}; the benchmark needs the extra [predictor]", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_benchmark(settings)


def parse(argv: Sequence[str] | None = None) -> BenchmarkSettings:
    """Reads the command line; a wrong one ends the program with its usage."""
    parser = argparse.ArgumentParser(
        prog="florence2 benchmark",
        description="Compare the engine with transformers' generate on static batches, on seeded random weights.",
    )
    profiles: tuple[ProfileName, ...] = get_args(ProfileName)
    defaults = BenchmarkSettings()
    parser.add_argument("--profile", choices=profiles, help="one profile; both without")
    parser.add_argument("--size", choices=get_args(SizeName), default=defaults.size)
    parser.add_argument("--quick", action="store_true", help="the smallest setting, inside a minute: --size quick")
    parser.add_argument("--load", type=_names(LoadName), dest="loads", help=f"of {', '.join(get_args(LoadName))}")
    parser.add_argument("--baselines", type=_names(PolicyName), help=f"of {', '.join(get_args(PolicyName))}")
    parser.add_argument("--requests", type=natural_number, help="requests of each load")
    parser.add_argument("--repeats", type=natural_number, help="interleaved repetitions; medians are taken")
    parser.add_argument("--length-scale", type=_positive, help="factor on the table's output lengths")
    parser.add_argument("--concurrency", type=natural_number, default=defaults.concurrency)
    parser.add_argument("--max-batch-size", type=natural_number, default=defaults.max_batch_size)
    parser.add_argument("--num-beams", type=natural_number, default=defaults.num_beams)
    parser.add_argument("--rate", type=_positive, help="requests a second of the open load")
    parser.add_argument("--device", default=defaults.device, help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--dtype", choices=get_args(DtypeName), default=defaults.dtype)
    parser.add_argument("--tf32", action="store_true", help="let a GPU round float32 products to TF32")
    parser.add_argument("--threads", type=natural_number, help="threads of a CPU")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--vision-backend", choices=get_args(BackendName), default=defaults.vision_backend)
    parser.add_argument("--compile-vision", action="store_true")
    parser.add_argument("--decode-capture", choices=get_args(CaptureName), default=defaults.decode_capture)
    parser.add_argument("--sweep", action="store_true", help="decode steps by rows in flight, beside the roofline")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of ratios and sweep")
    given = vars(parser.parse_args(argv))
    profile, quick = given.pop("profile"), given.pop("quick")
    if quick:
        given["size"] = "quick"
    return BenchmarkSettings(profiles=(profile,) if profile else profiles, **given)


class _names:  # noqa: N801 (stands where argparse takes a function)
    """Reads a list of names, separated by commas."""

    def __init__(self, literal: object) -> None:
        self._known = get_args(literal)

    def __call__(self, text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(self._known):
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(self._known)}"
            )
        return names


def natural_number(text: str) -> int:
    """Reads an option's value.

    Raises:
        ArgumentTypeError: If it is less than 1.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
