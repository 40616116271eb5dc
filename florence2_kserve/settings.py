"""The one settings class: environment variables, command-line flags and chart values share its names.

A field ``max_queue_size`` is the flag ``--max-queue-size`` (or ``--max_queue_size``, as
KServe's controller spells flags) and the variable ``FLORENCE2_MAX_QUEUE_SIZE``. Flags win
over variables, variables over defaults. Fields marked ``KServe`` are those of KServe's own
model server, under its names.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "FLORENCE2_"
# KServe's storage initializer looks for this variable and puts what it names into this folder.
STORAGE_VARIABLE, STORAGE_FOLDER = "STORAGE_URI", "/mnt/models"
MIB = 1024 * 1024
_USUAL_BEAMS = 3  # what checkpoints ask for


class Settings(BaseSettings):
    """All settings of transformer and predictor; each field's description says what it does."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="ignore", protected_namespaces=(), frozen=True, validate_default=True
    )

    # The model
    model: str = Field(
        "embedded",
        description='Checkpoint: "embedded", a folder such as /mnt/models, or a hub id; '
        "unset where KServe has put a checkpoint to /mnt/models: that one.",
    )
    model_revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    device: str = Field("auto", description='"auto", "cpu", "cuda" or "cuda:N"; only "auto" may fall back to CPU.')
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "float32", description='Weights\' data type; "auto" keeps the stored one.'
    )

    # The engine
    max_batch_size: int = Field(36, ge=1, description="Requests decoded together.")
    max_decode_rows: int | None = Field(
        None, ge=1, description="Beams decoded together; unset: 3 for each of max_batch_size, max_num_beams at least."
    )
    max_decode_tokens: int | None = Field(
        None,
        ge=1,
        description="Beams times max_new_tokens that may be in flight; unset: as max_decode_rows need at most.",
    )
    admission_delay_us: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Time that a row waits for others to be encoded with, in microseconds; it ends when "
        "vision_batch_size of them (at least 4) wait.",
    )
    vision_batch_size: int | None = Field(
        None, ge=1, description="Images encoded between two decode steps; unset: 1 on CPU, 8 on a GPU."
    )
    vision_backend: Literal["auto", "transformers", "timm"] = Field(
        "auto", description="Whose code runs the image tower."
    )
    compile_vision: bool = Field(False, description="Compile the image tower at start.")
    decode_capture: Literal["off", "compile", "cuda-graph"] = Field(
        "off", description="How decode steps are captured to spare their launches."
    )
    feature_cache_mib: float = Field(
        256, ge=0, description="Image features kept on the device for images asked about again, in MiB; 0 keeps none."
    )
    max_queue_size: int = Field(256, ge=1, description="Rows that may wait; beyond it requests get 429.")
    max_num_beams: int = Field(8, ge=1, le=8, description="Largest num_beams that a request may ask for, 8 at most.")

    # Limits on what clients send
    max_body_mib: float = Field(
        64, gt=0, description="Largest REST body, in MiB; over gRPC grpc_max_receive_message_length bounds it."
    )
    max_image_mib: float = Field(20, gt=0, description="Largest encoded image, in MiB.")
    max_image_megapixels: float = Field(64, gt=0, description="Largest decoded image, in millions of pixels.")
    exact_images: bool = Field(
        False,
        description="Decode large JPEGs whole and resize by Pillow: pixels are then transformers' own, and take "
        "several times as long; see docs/transformer.md.",
    )
    # 32 pictures of 768×768 fit into a gRPC message of the default size, on their way to the predictor.
    max_rows: int = Field(32, ge=1, description="Largest number of answers (images times tasks) in one request.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Largest max_new_tokens of a request; unset: as many as the model has positions for."
    )
    request_timeout_seconds: float = Field(600, gt=0, description="Time for a request that names no timeout_ms.")

    # Life cycle
    drain_seconds: float = Field(
        0, ge=0, description="Time after SIGTERM in which the server reports not ready but still answers."
    )
    grace_period: int = Field(30, ge=0, description="Time after that for requests in flight to finish.")
    grpc_max_connection_age_seconds: float = Field(
        30,
        ge=0,
        description="Age at which a gRPC connection is replaced, its calls undisturbed, "
        "so that clients look up new replicas; 0 never.",
    )
    host: str = Field("0.0.0.0", description="Address to listen on.")
    open_model_repository: bool = Field(
        False, description="Let clients unload the model by the repository extension; only a restart brings it back."
    )

    # KServe: the server
    model_name: str = Field("florence2", description="Name of the model in the URL (KServe).")
    http_port: int = Field(8080, ge=1, le=65535, description="REST port (KServe).")
    grpc_port: int = Field(8081, ge=1, le=65535, description="gRPC port (KServe).")
    workers: int = Field(1, ge=1, description="Accepted for KServe; one process serves, scale by replicas (KServe).")
    max_threads: int = Field(4, ge=1, description="gRPC handler threads (KServe).")
    max_asyncio_workers: int | None = Field(None, ge=1, description="Threads for decoding and tokenising (KServe).")
    enable_grpc: bool = Field(True, description="Serve gRPC too (KServe).")
    enable_docs_url: bool = Field(False, description="Serve /docs (KServe).")
    enable_latency_logging: bool = Field(False, description="Log each request's phases (KServe).")
    configure_logging: bool = Field(True, description="Let the SDK set up logging (KServe).")
    log_config_file: str | None = Field(None, description="Logging configuration, YAML or JSON (KServe).")
    access_log_format: str | None = Field(None, description="Access log format (KServe).")
    event_loop: Literal["auto", "asyncio", "uvloop"] = Field(
        "auto", description="Accepted for KServe; asyncio's own loop serves (KServe)."
    )
    timeout_keep_alive: int = Field(65, ge=0, description="Seconds an idle REST connection is kept (KServe).")
    ssl_certfile: str | None = Field(None, description="TLS certificate of the REST port (KServe).")
    ssl_keyfile: str | None = Field(None, description="TLS key of the REST port (KServe).")
    grpc_max_send_message_length: int = Field(64 * MIB, ge=1, description="Bytes of a gRPC answer (KServe).")
    grpc_max_receive_message_length: int = Field(64 * MIB, ge=1, description="Bytes of a gRPC request (KServe).")

    # KServe: the transformer's way to its predictor
    predictor_host: str | None = Field(
        None, description="Predictor's host, with or without port, or a gRPC target such as dns:///HOST:PORT (KServe)."
    )
    predictor_protocol: Literal["grpc-v2"] = Field("grpc-v2", description="Only grpc-v2 is spoken (KServe).")
    predictor_use_ssl: bool = Field(False, description="Speak TLS to the predictor (KServe).")
    predictor_request_timeout_seconds: int = Field(600, ge=1, description="Longest call to the predictor (KServe).")
    predictor_request_retries: int = Field(
        10, ge=0, description="Retries of a predictor that is away; 10 take about 25 seconds (KServe)."
    )
    enable_predictor_health_check: bool = Field(
        False, description="Be ready only while the predictor is; keeps it from scaling to zero (KServe)."
    )

    @model_validator(mode="before")
    @classmethod
    def _what_the_storage_initializer_brought(cls, given: Any) -> Any:
        # Serving the embedded toy instead of the checkpoint that was asked for would go unnoticed.
        if isinstance(given, dict) and "model" not in given and os.environ.get(STORAGE_VARIABLE):
            return {**given, "model": STORAGE_FOLDER}
        return given

    @field_validator("predictor_protocol", mode="before")
    @classmethod
    def _only_grpc(cls, value: object) -> object:
        if value in ("v1", "v2"):
            raise ValueError(f"{value} is not spoken to the predictor; images travel as raw tensors over grpc-v2")
        return value

    @model_validator(mode="after")
    def _a_request_fits_into_the_queue(self) -> Settings:
        if self.max_rows > self.max_queue_size:
            raise ValueError(
                f"max_rows={self.max_rows} rows of one request never fit max_queue_size={self.max_queue_size}"
            )
        return self

    @model_validator(mode="after")
    def _a_request_fits_into_a_decode_step(self) -> Settings:
        if self.max_decode_rows is not None and self.max_num_beams > self.max_decode_rows:
            raise ValueError(
                f"max_num_beams={self.max_num_beams} beams of one request never fit "
                f"max_decode_rows={self.max_decode_rows}"
            )
        return self

    @property
    def decode_rows(self) -> int:
        """Beams decoded together: max_decode_rows, or what it stands for where it is unset."""
        if self.max_decode_rows is not None:
            return self.max_decode_rows
        return max(_USUAL_BEAMS * self.max_batch_size, self.max_num_beams)

    def bound_new_tokens(self, positions: int) -> int:
        """Returns the largest max_new_tokens of a request to a model that can generate `positions` tokens."""
        return min(self.max_new_tokens or positions, positions)

    @property
    def feature_cache_bytes(self) -> int:
        """Bound on image features kept, in bytes."""
        return int(self.feature_cache_mib * MIB)

    @property
    def max_body_bytes(self) -> int:
        """Largest request body in bytes."""
        return int(self.max_body_mib * MIB)

    @property
    def max_image_bytes(self) -> int:
        """Largest encoded image in bytes."""
        return int(self.max_image_mib * MIB)

    @property
    def max_image_pixels(self) -> int:
        """Largest decoded image in pixels."""
        return int(self.max_image_megapixels * 1_000_000)


# Which flags each command takes; a command refuses those that would do nothing there.
SERVER_FIELDS = [
    "model_name",
    "host",
    "http_port",
    "grpc_port",
    "workers",
    "max_threads",
    "max_asyncio_workers",
    "enable_grpc",
    "enable_docs_url",
    "enable_latency_logging",
    "configure_logging",
    "log_config_file",
    "access_log_format",
    "event_loop",
    "timeout_keep_alive",
    "ssl_certfile",
    "ssl_keyfile",
    "grpc_max_send_message_length",
    "grpc_max_receive_message_length",
    "max_body_mib",
    "max_rows",
    "max_new_tokens",
    "request_timeout_seconds",
    "max_num_beams",
    "drain_seconds",
    "grace_period",
    "grpc_max_connection_age_seconds",
    "open_model_repository",
    "model",
    "model_revision",
]
TRANSFORMER_FIELDS = [
    *SERVER_FIELDS,
    "max_image_mib",
    "max_image_megapixels",
    "exact_images",
    "predictor_host",
    "predictor_protocol",
    "predictor_use_ssl",
    "predictor_request_timeout_seconds",
    "predictor_request_retries",
    "enable_predictor_health_check",
]
PREDICTOR_FIELDS = [
    *SERVER_FIELDS,
    "device",
    "dtype",
    "max_queue_size",
    "max_batch_size",
    "max_decode_rows",
    "max_decode_tokens",
    "admission_delay_us",
    "vision_batch_size",
    "vision_backend",
    "compile_vision",
    "decode_capture",
    "feature_cache_mib",
]
# What the SDK's own argument parser reads from the command line and nowhere else.
SDK_FIELDS = [
    "enable_docs_url",
    "configure_logging",
    "log_config_file",
    "grpc_max_send_message_length",
    "grpc_max_receive_message_length",
]
