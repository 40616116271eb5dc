"""Encoded pictures of held-out scenes."""

from __future__ import annotations

import io

from PIL import Image

from florence2_kserve.tiny.scenes import held_out_scene


def png(index: int = 0) -> bytes:
    """Returns held-out scene `index` as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(held_out_scene(index).image).save(buffer, "PNG")
    return buffer.getvalue()
