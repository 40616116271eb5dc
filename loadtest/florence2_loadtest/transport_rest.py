"""Sending prepared requests over HTTP."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping

import aiohttp
import orjson
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

from florence2_kserve.client.errors import read_retry_after
from florence2_kserve.protocol.rest import JSON_LENGTH_HEADER
from florence2_loadtest.blame import blame_rest
from florence2_loadtest.results import OK
from florence2_loadtest.transport import CONNECTION, MALFORMED, TIMEOUT, Sent
from florence2_loadtest.workload import Prepared


class RestTransport:
    """Connections to a service over HTTP/1.1.

    Args:
        url: The service's.
        model_name: Model's name in the path.
        connections: Most connections at a time.
        headers: Sent with every request.
        keep_alive: Whether connections are kept.
        context: For https.
    """

    def __init__(
        self,
        url: str,
        model_name: str,
        *,
        connections: int,
        headers: Mapping[str, str],
        keep_alive: bool,
        context: ssl.SSLContext | None,
    ) -> None:
        self._url = f"{url.rstrip('/')}/v2/models/{model_name}/infer"
        self._clock = asyncio.get_running_loop().time
        ssl_of: ssl.SSLContext | bool = True if context is None else context
        connector = (
            # A server may drop a connection after five idle seconds; to find out by a request would be our fault.
            aiohttp.TCPConnector(limit=connections, ssl=ssl_of, keepalive_timeout=4.0)
            if keep_alive
            else aiohttp.TCPConnector(limit=connections, ssl=ssl_of, force_close=True)
        )
        # Cookies, if a proxy sets any, would pin all requests to one pod. Answers aren't decompressed in vain.
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=dict(headers),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
            skip_auto_headers=("Accept-Encoding",),
        )

    async def send(self, prepared: Prepared, timeout_s: float) -> Sent:
        """As `Transport.send`."""
        clock, body = self._clock, _Body(prepared.body, self._clock)
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.post(self._url, data=body, headers=prepared.headers, allow_redirects=False) as response,
            ):
                first_byte = clock()
                content = await response.read()
                done = clock()
        except TimeoutError:
            return Sent(TIMEOUT, clock(), send_s=body.send_s)
        except (aiohttp.ClientError, OSError) as error:
            return Sent(CONNECTION, clock(), send_s=body.send_s, body=repr(error).encode())
        sent = Sent(OK, done, len(content), body.send_s, done - first_byte, body=content)
        if response.status != 200:
            sent.status = f"http {response.status}"
            sent.component = blame_rest(content)
            sent.retry_after_s = read_retry_after(response.headers.get("Retry-After"))
        elif not _has_outputs(content, response.headers.get(JSON_LENGTH_HEADER)):
            sent.status = MALFORMED
        return sent

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()


class _Body(Payload):
    """A body that notes how long handing it over to the socket took, waiting for room in its buffer included."""

    _autoclose = True

    def __init__(self, value: bytes, clock: Callable[[], float]) -> None:
        super().__init__(value, content_type="application/octet-stream")
        self._size = len(value)
        self._clock = clock
        self.send_s = 0.0

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return str(self._value.decode(encoding, errors))

    async def write(self, writer: AbstractStreamWriter) -> None:
        began = self._clock()
        await writer.write(self._value)
        self.send_s = self._clock() - began


def _has_outputs(content: bytes, json_length: str | None) -> bool:
    """Whether a body is a V2 answer with something in it."""
    try:
        outputs = orjson.loads(content if json_length is None else memoryview(content)[: int(json_length)])["outputs"]
        size = sum(output.get("parameters", {}).get("binary_data_size", 0) for output in outputs)
        is_whole = json_length is None or int(json_length) + size == len(content)
        return bool(outputs) and is_whole and all(output.get("data") or size for output in outputs)
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
