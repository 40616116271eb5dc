"""Encoded images → RGB pictures → the square of pixels that the model looks at.

What comes in is untrusted: only a few formats are opened, the size is checked before any pixel is
decoded, and whatever Pillow raises comes out as an ``ImageError`` with a message for the caller.

Colour profiles (ICC) are ignored: pixels are taken as they are stored, as transformers' image
processor takes them, and a picture in a wide-gamut space looks a little paler to the model.
"""

from __future__ import annotations

import io
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from florence2_kserve.processor import ImageSettings

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
}
# Named in the refusal, since they are what people send by mistake.
_OTHER_MAGIC = {
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"8BPS": "PSD",
    b"\x00\x00\x01\x00": "ICO",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
}
_OTHER_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}
_DECOMPRESSION_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImageError(ValueError):
    """Bytes aren't an image that can be read; the message says why, in words for the caller."""


class ImageTooLarge(ImageError):
    """The image has more pixels than allowed."""


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decodes an image file.

    The first frame counts where there are several. The EXIF orientation is applied, so that width,
    height and all coordinates are those of the picture as viewers show it. Transparent pixels lie
    on white; CMYK, palette, grey, one-bit and 16-bit grey become 8-bit RGB.

    Args:
        data: The file's bytes: JPEG, PNG, WEBP, GIF, BMP or TIFF.
        max_pixels: Largest width × height. Pillow refuses more than twice its own
            ``Image.MAX_IMAGE_PIXELS`` (179 million in all) however large this is.

    Returns:
        The picture, mode RGB.

    Raises:
        ImageTooLarge: If it has more than `max_pixels`; no pixel is decoded then.
        ImageError: If it is empty, no image, of another format or damaged.
    """
    if not data:
        raise ImageError("the image is empty: 0 bytes")
    image = _open(data)
    width, height = image.size
    if not width or not height:
        raise ImageError(f"the image has no pixels: {width}×{height}")
    if width * height > max_pixels:
        raise ImageTooLarge(f"the image has {width}×{height} pixels, {max_pixels:,} are allowed")
    try:
        image.load()
        with suppress(Exception):  # broken EXIF is no reason to refuse a picture that viewers show
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every kind there is
        raise _damaged(image.format, error) from None


def resize_image(image: Image.Image, settings: ImageSettings) -> np.ndarray[Any, Any]:
    """Resizes a picture to what the model looks at, its aspect ratio aside, as Florence-2's processor does.

    Args:
        image: Mode RGB.
        settings: Height, width and Pillow's resampling filter.

    Returns:
        UINT8 [H, W, 3], contiguous, neither rescaled nor normalised.
    """
    return np.array(image.resize((settings.width, settings.height), Image.Resampling(settings.resample)))


def _open(data: bytes) -> Image.Image:
    """Reads the file's header, without its pixels."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except _DECOMPRESSION_BOMB:
        raise ImageTooLarge("the image has far more pixels than are allowed") from None
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Exception as error:  # see decode_image
        raise _damaged(_claimed_format(data), error) from None


def _damaged(file_format: str | None, error: Exception) -> ImageError:
    reason = str(error) or type(error).__name__
    return ImageError(f"the {file_format or 'image'} file is damaged or cut short ({reason})")


def _unidentified(data: bytes) -> ImageError:
    known = ", ".join(FORMATS)
    if claimed := _claimed_format(data):
        return ImageError(f"the {claimed} file is damaged or cut short (its header can't be read)")
    other = _OTHER_BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else _lookup(_OTHER_MAGIC, data)
    if other:
        return ImageError(f"{other} images are not supported; send one of {known}")
    return ImageError(f"{len(data)} bytes that are no image in a supported format ({known})")


def _claimed_format(data: bytes) -> str | None:
    """Returns the format that a file's first bytes say it is in."""
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else _lookup(_MAGIC, data)


def _lookup(names: dict[bytes, str], data: bytes) -> str | None:
    return next((name for magic, name in names.items() if data.startswith(magic)), None)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_to_8_bits(image).convert("RGB")
    if image.mode == "F":
        raise ImageError("the image has floating-point pixels, whose range is not known; send 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Returns 16-bit grey in 8 bits, rounded; Pillow's own conversion cuts off. 32-bit modes carry 16 bits here."""
    values = np.asarray(image).clip(0, 0xFFFF).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
