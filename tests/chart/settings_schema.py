"""What settings.py decides of the chart's values.schema.json: ``transformer.settings`` and ``predictor.settings``.

``python -m tests.chart.settings_schema`` writes it; a test holds it against the package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from florence2_kserve.settings import PREDICTOR_FIELDS, TRANSFORMER_FIELDS, Settings

SCHEMA = Path(__file__).parents[2] / "charts" / "florence2-kserve" / "values.schema.json"
FIELDS = {"transformer": TRANSFORMER_FIELDS, "predictor": PREDICTOR_FIELDS}

# What the chart sets by itself, from values of other names or since probes and Services rely on it.
OWNED_BY_THE_CHART = {
    "model": "model.source and what belongs to it",
    "model_revision": "model.revision",
    "model_name": "modelName",
    "device": "predictor.gpu.enabled",
    "host": "all addresses, which Services need",
    "http_port": "8080",
    "grpc_port": "8081",
    "enable_grpc": "on; the predictor is called over it",
    "workers": "1; replicas scale",
    "predictor_host": "the predictor's Service",
    "predictor_protocol": "the only one there is",
    "predictor_use_ssl": "plain inside the cluster; a mesh or the ingress has the TLS",
    "ssl_certfile": "as above",
    "ssl_keyfile": "as above",
}

# What templates count with, so that it can't be taken out of the values.
NEEDED_BY_THE_CHART = {
    "transformer": ["drain_seconds"],
    "predictor": ["drain_seconds", "max_batch_size", "max_queue_size", "max_rows"],
}


def settings_schema(part: str) -> dict[str, Any]:
    """Returns the JSON schema of a component's settings.

    Args:
        part: ``transformer`` or ``predictor``.
    """
    fields = Settings.model_json_schema()["properties"]
    names = sorted(set(FIELDS[part]) - set(OWNED_BY_THE_CHART))
    return {
        "type": "object",
        "additionalProperties": False,
        "required": NEEDED_BY_THE_CHART[part],
        "properties": {name: _field_schema(fields[name]) for name in names},
    }


def _field_schema(field: dict[str, Any]) -> dict[str, Any]:
    choices = field.get("anyOf", [field])  # a field that may be unset is one of its type and null
    kept = {key: value for choice in choices for key, value in choice.items() if key not in ("title", "default")}
    kept["description"] = field["description"]
    # null takes a value out of the chart's defaults.
    kept["type"] = [choices[0]["type"], "null"]
    if "enum" in kept:
        kept["enum"] = [*kept["enum"], None]
    return kept


def main() -> None:
    """Writes both parts into the chart's schema."""
    schema = json.loads(SCHEMA.read_text())
    for part in FIELDS:
        schema["definitions"][f"{part}Settings"] = settings_schema(part)
    SCHEMA.write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
