"""A DNS server for one name whose addresses change, as those of a headless Service do."""

from __future__ import annotations

import socket
import struct
import threading
from types import TracebackType
from typing import Self

NAME = "predictor.test"
_ANSWER, _A, _IN = 0x8400, 1, 1  # flags of an authoritative answer; a record of an IPv4 address


class NameServer:
    """Answers on loopback until the context ends.

    Attributes:
        addresses: IPv4 addresses of the name; may be changed at any time.
        asked: How often they were asked for.
    """

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.asked = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))

    def __enter__(self) -> Self:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def target(self, port: int) -> str:
        """Returns the gRPC target that asks this server for the name."""
        return f"dns://127.0.0.1:{self._socket.getsockname()[1]}/{NAME}:{port}"

    def _run(self) -> None:
        while True:
            try:
                query, sender = self._socket.recvfrom(4096)
            except OSError:
                return
            end = query.index(b"\0", 12) + 5  # of the question: name, type, class
            (kind,) = struct.unpack(">H", query[end - 4 : end - 2])
            addresses = self.addresses if kind == _A else []  # there are no others, of IPv6 for example
            self.asked += kind == _A
            header = query[:2] + struct.pack(">HHHHH", _ANSWER, 1, len(addresses), 0, 0)
            record = struct.pack(">HHHIH", 0xC00C, _A, _IN, 0, 4)  # the question's name; to be kept for 0 seconds
            records = b"".join(record + socket.inet_aton(address) for address in addresses)
            self._socket.sendto(header + query[12:end] + records, sender)
