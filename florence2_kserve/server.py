"""What the kserve SDK's model server lacks: our REST codec, errors, health, drain and disconnect watch.

The SDK makes one FastAPI application when it is imported; routes that are on it before the
server starts win over the SDK's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import kserve.model_server
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kserve import Model, ModelServer
from kserve.logging import logger
from kserve.predictor_config import PredictorConfig
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.rest.server import RESTServer
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from florence2_kserve import __version__, errors
from florence2_kserve.protocol import wire
from florence2_kserve.protocol.public import PLATFORM
from florence2_kserve.protocol.rest import decode_request, encode_response
from florence2_kserve.protocol.tensors import check_datatype
from florence2_kserve.protocol.triton import EXTENSIONS, VERSION, check_version, model_configuration
from florence2_kserve.settings import Settings
from florence2_kserve.statistics import model_statistics

T = TypeVar("T")

LIVENESS = "liveness"  # gRPC health service that stays SERVING while the model loads or the server drains
_HEALTH_WATCH_S = 0.5


class TruthfulDataPlane(DataPlane):
    """The SDK's data plane, ready only while every model is and the server doesn't drain.

    A model may have a property ``failure``, which says why the process must be replaced; the
    server isn't live then.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.draining = False

    def metadata(self) -> dict[str, Any]:
        """Returns the V2 server metadata."""
        return {"name": "florence2-kserve", "version": __version__, "extensions": list(EXTENSIONS)}

    async def model_metadata(self, model_name: str) -> dict[str, Any]:
        """Returns the V2 metadata of a model."""
        model = self.get_model_from_registry(model_name)
        return await super().model_metadata(model_name) | {
            "platform": _platform(model),
            "versions": [VERSION],
            "properties": _properties(model),
        }

    def model_configuration(self, model_name: str) -> dict[str, Any]:
        """Returns the configuration of a model, as Triton's extension has it."""
        model = self.get_model_from_registry(model_name)
        return model_configuration(
            model_name,
            platform=_platform(model),
            inputs=model.get_input_types(),
            outputs=model.get_output_types(),
            optional_inputs=getattr(model, "optional_inputs", ()),
            max_batch_size=getattr(model, "max_batch_size", 0),
        )

    def statistics(self, model_name: str) -> dict[str, Any]:
        """Returns the statistics of a model, or of all where it is "", as Triton's extension has them."""
        names = [self.get_model_from_registry(model_name).name] if model_name else self.model_registry.get_models()
        return {"model_stats": [model_statistics(name, VERSION) for name in names]}

    @property
    def failure(self) -> str | None:
        """Why this process can answer no more and must be replaced; None as long as it can."""
        reasons = (getattr(model, "failure", None) for model in self.model_registry.get_models().values())
        return next((reason for reason in reasons if reason), None)

    async def live(self) -> dict[str, str]:
        """Returns the status ``alive``, unless a model says that the process must be replaced."""
        return {"status": self.failure or "alive"}

    async def ready(self) -> bool:
        """Whether all models answer requests."""
        if self.draining:
            return False
        names = list(self.model_registry.get_models())
        return bool(names) and all([await self.model_registry.is_model_ready(name) for name in names])

    def get_model_from_registry(self, name: str) -> Any:
        """Returns the model called `name`.

        Raises:
            NotFound: If there is none.
        """
        model = self.model_registry.get_model(name)
        if model is None:
            raise errors.NotFound(f"no model {name!r} here; there is {', '.join(self.model_registry.get_models())}")
        return model

    async def get_model(self, name: str) -> Any:
        """As `get_model_from_registry`; the SDK would call load() on a model that isn't ready, in the event loop."""
        return self.get_model_from_registry(name)

    async def model_ready(self, model_name: str, disable_predictor_health_check: bool = False) -> bool:
        """Whether one model answers requests.

        Raises:
            NotFound: If there is no such model.
        """
        self.get_model_from_registry(model_name)
        return await super().model_ready(model_name, disable_predictor_health_check) and not self.draining


class _Health(health_pb2_grpc.HealthServicer):
    """The standard gRPC health service: "" and the model's name tell readiness, "liveness" tells life."""

    def __init__(self, dataplane: TruthfulDataPlane) -> None:
        self._dataplane = dataplane

    async def _status(self, service: str) -> int:
        try:
            if service == LIVENESS:
                serving = self._dataplane.failure is None
            elif service in ("", "inference.GRPCInferenceService"):
                serving = await self._dataplane.ready()
            else:
                serving = await self._dataplane.model_ready(service)
        except errors.NotFound:
            return int(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        status = health_pb2.HealthCheckResponse
        return int(status.SERVING if serving else status.NOT_SERVING)

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802, the protocol's name
        status = await self._status(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            raise errors.NotFound(f"no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802, the protocol's name
        last = None
        while True:
            status = await self._status(request.service)
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            if self._dataplane.draining:
                return  # an open stream would hold up the server's end
            await asyncio.sleep(_HEALTH_WATCH_S)


class _Servicer(InferenceServicer):
    """The SDK's servicer; it names the tensor whose data type nobody knows, and knows versions."""

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802, the protocol's name
        try:
            check_version(request.model_name, request.model_version)
            for tensor in request.inputs:
                check_datatype(tensor.name, tensor.datatype)
            return await super().ModelInfer(request, context)
        except errors.ServiceError as error:
            # As REST's headers; the status itself is left to the SDK's interceptor.
            context.set_trailing_metadata(tuple((name.lower(), value) for name, value in error.headers.items()))
            raise

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802, the protocol's name
        check_version(request.name, request.version)
        metadata = await super().ModelMetadata(request, context)
        metadata.versions[:] = [VERSION]  # the SDK's servicer leaves it out
        more = wire.MESSAGES["ModelMetadataResponse"](
            properties=_properties(self._data_plane.get_model_from_registry(request.name))
        )
        metadata.MergeFromString(more.SerializeToString())
        return metadata

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802, the protocol's name
        check_version(request.name, request.version)
        return await super().ModelReady(request, context)


class _ClosedRepository(_Servicer):
    """The same, without loading and unloading by clients."""

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802, the protocol's name
        raise _repository_closed()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802, the protocol's name
        raise _repository_closed()


class _GrpcServer(GRPCServer):
    """The SDK's gRPC server with health and an address to listen on."""

    def __init__(self, settings: Settings, dataplane: TruthfulDataPlane, repository: Any) -> None:
        super().__init__(settings.grpc_port, dataplane, repository, kwargs={}, grace_period=settings.grace_period)
        self._settings = settings

    async def start(self, max_workers: int) -> None:
        """Serves until stopped."""
        settings = self._settings
        self._server = aio.server(
            ThreadPoolExecutor(max_workers=max_workers),
            interceptors=(ExceptionToStatusInterceptor(),),
            options=_grpc_options(settings),
        )
        servicer = _Servicer if settings.open_model_repository else _ClosedRepository
        grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            servicer(self._data_plane, self._model_repository_extension), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(_Health(self._data_plane), self._server)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self._server.add_insecure_port(f"{host}:{settings.grpc_port}")
        await self._server.start()
        logger.info("gRPC on %s:%d", settings.host, settings.grpc_port)
        await self._server.wait_for_termination()


def _grpc_options(settings: Settings) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_send_message_length", settings.grpc_max_send_message_length),
        ("grpc.max_receive_message_length", settings.grpc_max_receive_message_length),
        # Two servers on one port would share requests at random; better fail at start.
        ("grpc.so_reuseport", 0),
    ]
    if settings.grpc_max_connection_age_seconds:
        # A gRPC client asks for its server's addresses only when a connection ends. Behind a headless
        # Service a new replica would get nothing for as long as the old ones' connections live. Calls in
        # flight end in their own time: the grace behind this age is unlimited unless it is set.
        options.append(("grpc.max_connection_age_ms", int(settings.grpc_max_connection_age_seconds * 1000)))
    return options


class _CloseWhileDraining:
    """ASGI middleware: once the server drains, its answers tell clients to connect anew, elsewhere."""

    def __init__(self, app: ASGIApp, dataplane: TruthfulDataPlane) -> None:
        self._app, self._dataplane = app, dataplane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and self._dataplane.draining:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, send_on)


class _RestServer(RESTServer):
    """The SDK's REST server without its middleware, which logs two lines of timing for every request."""

    def __init__(self, settings: Settings, dataplane: TruthfulDataPlane, repository: Any, http_port: int) -> None:
        super().__init__(
            "kserve.model_server:app",
            dataplane,
            repository,
            http_port,
            access_log_format=settings.access_log_format,
            grace_period=settings.grace_period,
            event_loop=settings.event_loop,
            timeout_keep_alive=settings.timeout_keep_alive,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
        self.config.host = settings.host
        # uvicorn would close its listener at the first signal, before the drain.
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]

    def _add_middlewares(self, app: FastAPI) -> None:
        if self.access_log_format:
            super()._add_middlewares(app)

    def stop(self) -> None:
        """Takes no more connections, and lets `start` return when the open ones are done."""
        self._server.should_exit = True


class _WellProbed(logging.Filter):
    """Keeps probes and scrapes that went well out of the access log, where they would bury what clients ask."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether uvicorn's record (client, method, path, version, status) is written."""
        match record.args:
            case (_, _, str(path), _, 200):
                return not path.partition("?")[0].endswith(("/ready", "/live", "/metrics"))
        return True


_WELL_PROBED = _WellProbed()


class Florence2Server(ModelServer):
    """Serves one model over REST and gRPC, and leaves no request unanswered when it ends.

    Args:
        settings: Ports, limits and times.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            http_port=settings.http_port,
            grpc_port=settings.grpc_port,
            max_threads=settings.max_threads,
            max_asyncio_workers=settings.max_asyncio_workers,
            enable_grpc=settings.enable_grpc,
            enable_latency_logging=settings.enable_latency_logging,
            access_log_format=settings.access_log_format,
            event_loop=settings.event_loop,
            timeout_keep_alive=settings.timeout_keep_alive,
            grace_period=settings.grace_period,
            # The transformer calls its predictor by itself; the SDK's own client stays unused.
            predictor_config=PredictorConfig(predictor_host=None, predictor_protocol="grpc-v2"),
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
        self._settings = settings
        own = logging.getLogger("florence2_kserve")
        if not own.handlers:  # the SDK configures its own loggers only; a log_config_file may name ours
            own.handlers, own.level = logger.handlers, logger.level
        logging.getLogger("uvicorn.access").addFilter(_WELL_PROBED)
        self.dataplane = TruthfulDataPlane(model_registry=self.registered_models)
        add_routes(kserve.model_server.app, self.dataplane, settings)

    def start(self, models: list[Any]) -> None:
        """Serves until SIGTERM or SIGINT, or until a part fails.

        Raises:
            Exception: What made the model or a server fail.
        """
        if self._settings.workers > 1:
            logger.warning("workers=%d: one process serves; scale by replicas", self._settings.workers)
        self._register_and_check_atleast_one_model_is_ready(models)
        for model in models:
            if document := getattr(model, "openapi", None):
                kserve.model_server.app.openapi = document
        asyncio.run(self._run(models))

    async def _run(self, models: list[Model]) -> None:
        self.setup_event_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        # The SDK's port, not the setting: with TLS it moves from 8080 to 8443.
        rest = _RestServer(self._settings, self.dataplane, self.model_repository_extension, self.http_port)
        grpc = _GrpcServer(self._settings, self.dataplane, self.model_repository_extension)
        begun = [asyncio.create_task(begin()) for model in models if (begin := getattr(model, "begin", None))]
        rest_task = asyncio.create_task(rest.start())
        parts = [rest_task, *map(asyncio.ensure_future, self.servers)]
        if self.enable_grpc:
            parts.append(asyncio.create_task(grpc.start(self.max_threads)))
        stopping = asyncio.create_task(stop.wait())
        try:
            await _until_stopped(stopping, parts)
            self.dataplane.draining = True
            logger.info("draining: not ready for %g s, then no new requests", self._settings.drain_seconds)
            await asyncio.sleep(self._settings.drain_seconds)
        finally:
            self.dataplane.draining = True
            # Both at once: neither protocol goes on taking requests while the other one drains.
            rest.stop()
            await asyncio.gather(rest_task, grpc.stop(), return_exceptions=True)
            for model in models:
                if close := getattr(model, "close", None):
                    await close()
                await asyncio.to_thread(model.stop)
            for part in (*parts, *begun):
                part.cancel()
            await asyncio.gather(*parts, *begun, return_exceptions=True)
        logger.info("stopped")


def add_routes(app: FastAPI, dataplane: TruthfulDataPlane, settings: Settings) -> None:
    """Puts our routes and the error handler on the SDK's application, ahead of the SDK's own routes.

    Args:
        app: The SDK's application.
        dataplane: Where models are looked up.
        settings: Limits.
    """

    app.add_middleware(_CloseWhileDraining, dataplane=dataplane)

    @app.exception_handler(errors.ServiceError)
    async def explain(request: Request, error: errors.ServiceError) -> Response:
        return JSONResponse({"error": error.details}, status_code=error.http_status, headers=error.headers)

    @app.get("/v2/health/live", tags=["V2"])
    async def live() -> dict[str, bool]:
        if failure := dataplane.failure:
            raise errors.Unavailable(failure)
        return {"live": True}

    @app.get("/v2/health/ready", tags=["V2"])
    async def ready() -> dict[str, bool]:
        if not await dataplane.ready():
            raise _not_ready(dataplane)
        return {"ready": True}

    @app.get("/v2/models/stats", tags=["V2"])
    async def all_statistics() -> dict[str, Any]:
        return dataplane.statistics("")

    # Triton's clients name a version where their user does.
    for path in ("/v2/models/{model_name}", "/v2/models/{model_name}/versions/{version}"):
        _add_model_routes(app, path, dataplane, settings)

    # The SDK would read bodies of any size here, and then answer that it can't.
    @app.post("/v1/models/{path:path}", include_in_schema=False)
    @app.post("/v2/models/{model_name}/versions/{path:path}", include_in_schema=False)
    async def other_protocols(path: str) -> Response:
        raise errors.NotFound("this server answers POST /v2/models/<model>/infer")

    if not settings.open_model_repository:

        @app.post("/v2/repository/models/{model_name}/load", tags=["V2"])
        @app.post("/v2/repository/models/{model_name}/unload", tags=["V2"])
        async def closed(model_name: str) -> Response:
            raise _repository_closed()


def _add_model_routes(app: FastAPI, path: str, dataplane: TruthfulDataPlane, settings: Settings) -> None:
    """Puts what one model answers under `path`, which holds ``{model_name}`` and may hold ``{version}``."""

    @app.get(path, tags=["V2"])
    async def metadata(model_name: str, version: str = "") -> dict[str, Any]:
        check_version(model_name, version)
        return await dataplane.model_metadata(model_name)

    @app.get(f"{path}/ready", tags=["V2"])
    async def ready(model_name: str, version: str = "") -> dict[str, Any]:
        check_version(model_name, version)
        # The SDK's own route logs a traceback for each probe that finds the model loading.
        if not await dataplane.model_ready(model_name):
            raise _not_ready(dataplane)
        return {"name": model_name, "ready": True}

    @app.get(f"{path}/config", tags=["V2"])
    async def configuration(model_name: str, version: str = "") -> dict[str, Any]:
        check_version(model_name, version)
        return dataplane.model_configuration(model_name)

    @app.get(f"{path}/stats", tags=["V2"])
    async def statistics(model_name: str, version: str = "") -> dict[str, Any]:
        check_version(model_name, version)
        return dataplane.statistics(model_name)

    @app.post(f"{path}/infer", tags=["V2"])
    async def infer(request: Request, model_name: str, version: str = "") -> Response:
        try:
            check_version(model_name, version)
            body = await _read_body(request, settings.max_body_bytes)
            return await _until_disconnect(request, _infer(body, dict(request.headers), model_name, dataplane))
        except errors.ServiceError:
            raise
        except ClientDisconnect:
            raise errors.ClientGone("the client closed the connection while sending") from None
        except Exception as error:
            # Left to the SDK, this would answer 500 and reset the connection's next request.
            logger.exception("request failed")
            raise errors.Internal(f"internal error: {type(error).__name__}") from error


async def _infer(body: bytes, headers: dict[str, str], model_name: str, dataplane: DataPlane) -> Response:
    model = dataplane.get_model_from_registry(model_name)
    infer_request = decode_request(body, headers, model_name)
    response, _ = await model(infer_request, headers=headers)
    content, content_headers = encode_response(response, infer_request)
    return Response(content, headers=content_headers)


async def _read_body(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "")
    chunks: list[bytes] = []
    size = 0
    too_large = announced.isdigit() and int(announced) > limit
    # An over-large body is still read to its end, though not kept: else the connection would be
    # reset before the client has read why.
    async for chunk in request.stream():
        size += len(chunk)
        too_large = too_large or size > limit
        if too_large:
            chunks.clear()
            if size > 2 * limit:
                break
        else:
            chunks.append(chunk)
    if too_large:
        raise errors.TooLarge(f"the request body is over the limit of {limit} bytes")
    return b"".join(chunks)


async def _until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns what `work` returns, and cancels it if the client goes away meanwhile."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise errors.ClientGone("the client closed the connection")
        return task.result()
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    # The body has been read, so what still comes from the connection is its end.
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _until_stopped(stopping: asyncio.Task[Any], parts: list[asyncio.Future[Any]]) -> None:
    """Waits for `stopping`; parts may end well before that, but not fail.

    Raises:
        Exception: What a part failed with.
    """
    running = set(parts)
    while not stopping.done():
        done, running = await asyncio.wait({stopping, *running}, return_when=asyncio.FIRST_COMPLETED)
        running.discard(stopping)
        for part in done - {stopping}:
            part.result()


def _platform(model: Any) -> str:
    return getattr(model, "platform", PLATFORM)


def _properties(model: Any) -> dict[str, str]:
    """Returns what tells a model's checkpoint from others, in words."""
    return getattr(model, "properties", {})


def _not_ready(dataplane: TruthfulDataPlane) -> errors.Unavailable:
    return errors.Unavailable(dataplane.failure or ("draining" if dataplane.draining else "the model isn't ready"))


def _repository_closed() -> errors.Forbidden:
    return errors.Forbidden("loading and unloading by clients is off; the setting open_model_repository opens it")
