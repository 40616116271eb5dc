from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from florence2_kserve.cli import app, complete_switches, read_settings
from florence2_kserve.settings import MIB, PREDICTOR_FIELDS, SDK_FIELDS, TRANSFORMER_FIELDS, Settings

# The flags that KServe's model server defines, in its spelling.
KSERVE_FLAGS = (
    "http_port grpc_port workers max_threads max_asyncio_workers enable_grpc enable_docs_url enable_latency_logging "
    "configure_logging log_config_file access_log_format event-loop timeout-keep-alive model_name predictor_host "
    "predictor_protocol predictor_use_ssl predictor_request_timeout_seconds grpc_max_send_message_length "
    "grpc_max_receive_message_length predictor_request_retries enable_predictor_health_check ssl_certfile ssl_keyfile"
).split()


@pytest.fixture
def parsed(monkeypatch):
    """Runs a command with its server left out and returns the settings that it would have run with."""

    def run(command: str, *arguments: str) -> Settings:
        seen: list[Settings] = []

        def note(given):
            seen.append(read_settings(given))
            raise typer.Exit(0)

        monkeypatch.setattr("florence2_kserve.cli.read_settings", note)
        result = CliRunner().invoke(app, [command, *complete_switches(arguments)])
        assert result.exit_code == 0, result.output
        return seen[0]

    return run


def test_flags_win_over_variables_and_those_over_defaults(monkeypatch, parsed):
    monkeypatch.setenv("FLORENCE2_HTTP_PORT", "9001")
    monkeypatch.setenv("FLORENCE2_MAX_ROWS", "5")
    settings = parsed("transformer", "--max-rows", "7")
    assert (settings.http_port, settings.max_rows, settings.grpc_port) == (9001, 7, 8081)


@pytest.mark.parametrize("flag", KSERVE_FLAGS)
def test_every_kserve_flag_is_a_setting_of_the_transformer(flag):
    assert flag.replace("-", "_") in TRANSFORMER_FIELDS


def test_every_listed_field_exists_and_every_field_is_a_flag_somewhere():
    fields = {*TRANSFORMER_FIELDS, *PREDICTOR_FIELDS}
    assert fields == set(Settings.model_fields)
    assert set(SDK_FIELDS) <= fields


def test_what_the_controller_injects_is_understood(parsed):
    settings = parsed(
        "transformer",
        *("--model_name", "f2", "--predictor_host", "f2-predictor.ns", "--http_port", "8080", "--workers", "32"),
        *("--enable_predictor_health_check", "--enable_grpc", "false", "--predictor_use_ssl=True"),
    )
    assert (settings.model_name, settings.predictor_host, settings.workers) == ("f2", "f2-predictor.ns", 32)
    assert settings.enable_predictor_health_check
    assert settings.predictor_use_ssl
    assert not settings.enable_grpc


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("transformer", ["--no-such-flag", "1"], "No such option"),
        ("transformer", ["--device", "cpu"], "No such option"),
        ("transformer", ["--http-port", "x"], "--http_port"),
        ("transformer", ["--http-port", "70000"], "--http_port"),
        ("transformer", ["--predictor_protocol", "v2"], "v2 is not spoken to the predictor"),
        ("predictor", ["--dtype", "int8"], "--dtype"),
        ("predictor", ["--predictor-host", "x"], "No such option"),
        ("predictor", ["--max-rows", "9", "--max-queue-size", "8"], "never fit max_queue_size=8"),
        ("predictor", ["--max-decode-rows", "7"], "max_num_beams=8 beams of one request never fit max_decode_rows=7"),
        ("predictor", ["--max-decode-tokens", "0"], "--max_decode_tokens"),
        ("predictor", ["--vision-batch-size", "0"], "--vision_batch_size"),
        ("predictor", ["--vision-backend", "onnx"], "--vision_backend"),
        ("predictor", ["--decode-capture", "on"], "--decode_capture"),
        ("predictor", ["--feature-cache-mib", "-1"], "--feature_cache_mib"),
        ("transformer", ["--max-batch-size", "8"], "No such option"),
    ],
)
def test_wrong_flags_end_the_program_with_the_flags_name(command, arguments, says):
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, [command, *arguments])
    assert result.exit_code == 2
    assert says in result.output


def test_the_engine_by_default():
    settings = Settings()
    assert (settings.max_batch_size, settings.max_decode_rows, settings.max_decode_tokens) == (36, None, None)
    assert (settings.vision_batch_size, settings.vision_backend, settings.compile_vision) == (None, "auto", False)
    assert (settings.decode_capture, settings.feature_cache_mib) == ("off", 256)


def test_the_engine_by_flags(parsed):
    settings = parsed(
        "serve",
        *("--max-batch-size", "4", "--max-decode-rows", "9", "--max_decode_tokens", "2000", "--vision-batch-size=2"),
        *("--vision-backend", "timm", "--compile-vision", "--decode-capture", "cuda-graph"),
        *("--feature-cache-mib", "0.5"),
    )
    assert (settings.max_batch_size, settings.max_decode_rows, settings.max_decode_tokens) == (4, 9, 2000)
    assert (settings.vision_batch_size, settings.vision_backend, settings.compile_vision) == (2, "timm", True)
    assert (settings.decode_capture, settings.feature_cache_bytes) == ("cuda-graph", MIB // 2)


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({}, 108),
        ({"max_batch_size": 1}, 8),
        ({"max_batch_size": 1, "max_num_beams": 2}, 3),
        ({"max_batch_size": 1, "max_decode_rows": 50}, 50),
    ],
)
def test_rows_of_a_decode_step_hold_a_batch_of_usual_requests_and_any_single_one(given, rows):
    assert Settings(**given).decode_rows == rows


def test_limits_are_given_in_the_units_that_the_code_wants():
    settings = Settings(max_body_mib=2, max_image_mib=0.5, max_image_megapixels=1.5)
    assert (settings.max_body_bytes, settings.max_image_bytes) == (2 * MIB, MIB // 2)
    assert settings.max_image_pixels == 1_500_000


def test_what_kserve_has_put_to_mnt_models_is_served_unless_another_model_is_named(monkeypatch, parsed):
    assert Settings().model == "embedded"
    # KServe writes the folder in place of the address, except for images (oci://).
    for value in ("/mnt/models", "oci://registry.example/florence:1"):
        monkeypatch.setenv("STORAGE_URI", value)
        assert Settings().model == "/mnt/models"
        assert parsed("predictor").model == "/mnt/models"
        assert parsed("predictor", "--model", "embedded").model == "embedded"
    monkeypatch.setenv("FLORENCE2_MODEL", "/elsewhere")
    assert Settings().model == "/elsewhere"
    monkeypatch.delenv("FLORENCE2_MODEL")
    monkeypatch.setenv("STORAGE_URI", "")
    assert Settings().model == "embedded"
