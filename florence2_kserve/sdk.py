"""Importing the kserve SDK without letting it read our command line.

``import kserve`` parses ``sys.argv`` with its own flags and prefixes: ``--model X`` would set
the model's name and ``--grpc`` ends the process. So the servers import it through here, with
the few settings in ``argv`` that the SDK takes from nowhere else.
"""

from __future__ import annotations

import sys

from florence2_kserve.settings import SDK_FIELDS, Settings


def import_sdk(settings: Settings | None = None) -> None:
    """Imports kserve with `settings` as its command line, and with an empty one without them."""
    if "kserve" in sys.modules:
        return
    flags = []
    for name in SDK_FIELDS if settings else ():
        value = getattr(settings, name)
        if value is not None:
            flags.append(f"--{name}={value}")
    argv, sys.argv = sys.argv, [sys.argv[0], *flags]
    try:
        import kserve  # noqa: F401
    finally:
        sys.argv = argv
