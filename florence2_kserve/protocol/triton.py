"""Triton's extensions to the protocol: model configuration and statistics, and model versions.

Triton's clients and its load generator ask for them. Field names are those of Triton's ``model_config.proto`` and of
its statistics extension; what means nothing here is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from florence2_kserve.errors import NotFound

EXTENSIONS = ("binary_tensor_data", "model_configuration", "statistics")
VERSION = "1"  # the only one of a model; a request may leave it out


def check_version(model_name: str, version: str) -> None:
    """Checks the version that a request names.

    Raises:
        NotFound: If it names another than the one there is.
    """
    if version not in ("", VERSION):
        raise NotFound(f"no version {version!r} of model {model_name!r} here; there is {VERSION}")


def model_configuration(
    name: str,
    *,
    platform: str,
    inputs: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    optional_inputs: Collection[str],
    max_batch_size: int,
) -> dict[str, Any]:
    """Returns a model's configuration.

    Args:
        name: The model's name.
        platform: As model metadata has it.
        inputs: As model metadata lists them.
        outputs: Likewise.
        optional_inputs: Names of inputs that a request may leave out.
        max_batch_size: Largest size of the first axis, which ``dims`` then leave out; 0 where tensors have no such
            axis in common.
    """
    return {
        "name": name,
        "platform": platform,
        "backend": "florence2_kserve",
        "version_policy": {"specific": {"versions": [int(VERSION)]}},
        "max_batch_size": max_batch_size,
        "input": [
            _tensor(tensor, max_batch_size) | {"optional": tensor["name"] in optional_inputs} for tensor in inputs
        ],
        "output": [_tensor(tensor, max_batch_size) for tensor in outputs],
        # In flight, at every decode step: nothing waits for others to come.
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
        "model_transaction_policy": {"decoupled": False},
    }


def _tensor(tensor: Mapping[str, Any], max_batch_size: int) -> dict[str, Any]:
    datatype = "STRING" if tensor["datatype"] == "BYTES" else tensor["datatype"]
    dims = tensor["shape"][1:] if max_batch_size else tensor["shape"]
    return {"name": tensor["name"], "data_type": f"TYPE_{datatype}", "dims": list(dims)}
