"""Conformance suite for the V2 (Open Inference Protocol) contract of a Florence-2 server.

It takes addresses and knows nothing of what answers there:

    pytest tests/conformance --rest-url http://127.0.0.1:8080 --grpc-url 127.0.0.1:8081

Options (each with its environment variable) are listed in ``conftest.py``. Without an
address the suite asks the surrounding project for a session fixture ``conformance_target``
with the attributes ``rest_url`` and ``grpc_url``; without that too, it is skipped.

Answers are held to the contract (form, types, coordinates within the picture, the same
answer on every way in), never to what a model ought to see: any Florence-2 checkpoint passes.
"""

import pytest

# Their assertions then explain themselves as the tests' own do.
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in ("contract", "messages", "wires")))
