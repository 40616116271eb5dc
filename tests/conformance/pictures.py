"""Pictures drawn here, in the file formats that clients send, whole and spoilt."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

# 500 and 375 over 1000 location bins are exact binary fractions: pixels and bins convert without rounding.
SIZE = (500, 375)
RED_CIRCLE_PIXELS = "[50, 48, 150, 147]"
RED_CIRCLE_BINS = "<loc_100><loc_128><loc_300><loc_392>"


@cache
def draw(number: int = 0) -> Image.Image:
    """Draws a scene of two shapes and a word; each `number` (0, 1, 2) gives another one, of SIZE."""
    background, shape, word = (("white", "blue", "STOP"), ("beige", "green", "EXIT"), ("silver", "purple", "HI 5"))[
        number
    ]
    image = Image.new("RGB", SIZE, background)
    pen = ImageDraw.Draw(image)
    pen.ellipse((50, 48, 150, 147), fill="red")
    pen.rectangle((300, 60 + 20 * number, 400, 160 + 20 * number), fill=shape)
    pen.text((150, 260), word, fill="black", font=ImageFont.load_default(size=64))
    return image


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """Returns `image` as the bytes of a file of `file_format`."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@cache
def png(number: int = 0) -> bytes:
    """Returns scene `number` as a PNG file."""
    return encode(draw(number))


def base64_text(data: bytes) -> bytes:
    """Returns `data` as base64 text (ASCII bytes)."""
    return base64.b64encode(data)


def urlsafe_text(data: bytes) -> bytes:
    """Returns `data` as URL-safe base64 text without padding (ASCII bytes)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def data_uri(data: bytes, media_type: str = "image/png") -> bytes:
    """Returns `data` as a ``data:`` URI (ASCII bytes)."""
    return b"data:" + media_type.encode() + b";base64," + base64.b64encode(data)


def noise(size: int = 4096) -> bytes:
    """Returns `size` random bytes, the same ones every time."""
    return random.Random(0).randbytes(size)


def truncated(file_format: str) -> bytes:
    """Returns the first half of a picture's file."""
    whole = encode(draw(), file_format)
    return whole[: len(whole) // 2]


@cache
def vast_png(side: int = 30_000) -> bytes:
    """Returns a valid one-bit PNG of `side` by `side` pixels, small as a file and vast when decoded."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
