"""Command line of the test cluster."""

from __future__ import annotations

import argparse
import sys

from .build import build
from .cluster import addresses, down, purge, status, up, why_not
from .shell import ClusterError, step

COMMANDS = {
    "build": "make binaries, images and manifests, and keep them; goes on where it was cut off",
    "up": "bring everything up until it is ready (builds first what isn't there)",
    "down": "take everything down; what was built stays, and the images",
    "status": "addresses, daemons, memory, pods",
    "env": "addresses alone, as `export` lines for a shell",
    "why-not": "the reason why no cluster can be had here, if there is one",
    "purge": "take everything down and remove what was kept",
}


def main() -> int:
    """Runs one command; returns the exit status."""
    commands = "\n".join(f"  {name:8} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.e2e.cluster",
        description="A real one-node Kubernetes cluster with Knative and KServe.",
        epilog=f"commands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    command = parser.parse_args().command
    try:
        if command == "build":
            if reason := why_not():
                raise ClusterError(f"no cluster can be made here: {reason}")
            with step("build, in all"):
                build()
        elif command == "env":
            print("\n".join(f"export {key}={value}" for key, value in addresses().items()))
        elif command == "status":
            print(status())
        elif command == "why-not":
            reason = why_not()
            print(reason or "nothing speaks against it")
            return 0 if reason is None else 1
        else:
            {"up": up, "down": down, "purge": purge}[command]()
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
