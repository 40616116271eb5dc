"""Encoded images → RGB pictures → the square of pixels that the model looks at.

What comes in is untrusted: only a few formats are opened, the size is checked before any pixel is
decoded, and whatever Pillow raises comes out as an ``ImageError`` with a message for the caller.

Colour profiles (ICC) are ignored: pixels are taken as they are stored, as transformers' image
processor takes them, and a picture in a wide-gamut space looks a little paler to the model.
"""

from __future__ import annotations

import io
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

if TYPE_CHECKING:
    from florence2_kserve.processor import ImageSettings

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# How many times what the model looks at a draft has, in width and in height; 12 megapixels halved have 1.95.
DRAFT_MARGIN = 1.9

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
# What a stored picture lacks to be upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset(turn for orientation, turn in _TURNS.items() if orientation > 4)
# Pillow's bicubic is Catmull's and Rom's spline.
_SWIFT_FILTERS: dict[int, FilterType] = {Image.Resampling.BICUBIC: FilterType.catmull_rom}
# It wants pixels packed, a copy that costs memory, and of more of them than any draft has more time than it saves.
_MOST_SWIFT_PIXELS = 9_000_000
_Box: TypeAlias = tuple[float, float, float, float]
_DECOMPRESSION_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImageError(ValueError):
    """Bytes aren't an image that can be read; the message says why, in words for the caller."""


class ImageTooLarge(ImageError):
    """The image has more pixels than allowed."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture.

    Attributes:
        image: Its pixels, mode RGB, or L where the file is grey. Where it was decoded in draft (see
            `decode_image`) it is smaller than `size` and lies as it is stored, before any turn.
        size: (width, height) as viewers show it, in pixels; all coordinates are in these.
    """

    image: Image.Image
    size: tuple[int, int]
    _box: _Box | None = None  # what of `image` a draft fills, to fractions of a pixel
    _turn: Image.Transpose | None = None  # what a draft still lacks

    def resized(self, settings: ImageSettings, *, exact: bool = True) -> np.ndarray[Any, Any]:
        """Resizes the picture as `resize_image` does, and turns it the right way up.

        Args:
            settings: Height, width and Pillow's resampling filter.
            exact: Whether to resize by Pillow itself; else, in a third of the time, by what differs from it by up to
                two levels in one of fifty values (``docs/transformer.md``).

        Returns:
            UINT8 [H, W, 3], contiguous, neither rescaled nor normalised.
        """
        size = _sideways((settings.width, settings.height), self._turn)
        swift = _SWIFT_FILTERS.get(settings.resample)
        if exact or swift is None or self.image.width * self.image.height > _MOST_SWIFT_PIXELS:
            image = self.image.resize(size, Image.Resampling(settings.resample), box=self._box)
        else:
            values = _resize_swiftly(self.image, size, self._box, swift)
            if self._turn is None:
                return values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
            image = Image.fromarray(values)
        # Turned when it is small; a turn by 90° before would make levels differ by one or two.
        image = image if self._turn is None else image.transpose(self._turn)
        return np.array(image.convert("RGB"))


def decode_image(data: bytes, *, max_pixels: int, draft_for: ImageSettings | None = None) -> Picture:
    """Decodes an image file.

    The first frame counts where there are several. The EXIF orientation is applied, so that width,
    height and all coordinates are those of the picture as viewers show it. Transparent pixels lie
    on white; CMYK, palette, grey, one-bit and 16-bit grey become 8 bits a channel.

    Args:
        data: The file's bytes: JPEG, PNG, WEBP, GIF, BMP or TIFF.
        max_pixels: Largest width × height. Pillow refuses more than twice its own
            ``Image.MAX_IMAGE_PIXELS`` (179 million in all) however large this is.
        draft_for: Where the picture will be resized to these settings, a large JPEG may be decoded at a half,
            quarter or eighth of its size, as long as `DRAFT_MARGIN` times what the model looks at is left;
            ``docs/transformer.md`` says what that does to pixels. None decodes all of it.

    Returns:
        The picture.

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
        if draft_for is not None and (draft := _decode_draft(image, draft_for)):
            return draft
        image.load()
        with suppress(Exception):  # broken EXIF is no reason to refuse a picture that viewers show
            ImageOps.exif_transpose(image, in_place=True)
        size = image.size
        return Picture(_to_8_bits(image), size)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every kind there is
        raise _damaged(image.format, error) from None


def resize_image(image: Image.Image, settings: ImageSettings) -> np.ndarray[Any, Any]:
    """Resizes a picture to what the model looks at, its aspect ratio aside, as Florence-2's processor does.

    Args:
        image: Mode RGB, or L.
        settings: Height, width and Pillow's resampling filter.

    Returns:
        UINT8 [H, W, 3], contiguous, neither rescaled nor normalised.
    """
    return Picture(image, image.size).resized(settings)


def _resize_swiftly(
    image: Image.Image, size: tuple[int, int], box: _Box | None, kind: FilterType
) -> np.ndarray[Any, Any]:
    """Resizes by vector instructions, in Pillow's order: width, rounded to whole levels, and then height.

    Returns:
        UINT8 [H, W, 3] of a picture in mode RGB, [H, W] of one in L; read-only.
    """
    left, top, right, bottom = box or (0, 0, *image.size)
    pixel = PixelType.U8x3 if image.mode == "RGB" else PixelType.U8
    pixels = ImageData(*image.size, pixel, image.tobytes())
    resizer = Resizer()
    for (width, height), crop in (
        ((size[0], image.height), CropBox(left, 0, right - left, image.height)),
        (size, CropBox(0, top, size[0], bottom - top)),
    ):
        target = ImageData(width, height, pixel)
        resizer.resize(pixels, target, ResizeOptions(ResizeAlg.convolution(kind), crop_box=crop))
        pixels = target
    shape = (size[1], size[0], 3) if image.mode == "RGB" else (size[1], size[0])
    return np.frombuffer(pixels.get_buffer(), dtype=np.uint8).reshape(shape)


def _decode_draft(image: Image.Image, settings: ImageSettings) -> Picture | None:
    """Decodes a JPEG at a part of its size; returns None, with nothing decoded, where it has to be decoded whole."""
    if not isinstance(image, JpegImageFile) or settings.resample == Image.Resampling.NEAREST:
        return None
    turn = None
    with suppress(Exception):  # see decode_image
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    whole = image.size
    width, height = (math.ceil(DRAFT_MARGIN * side) for side in (settings.width, settings.height))
    least = _sideways((width, height), turn)
    if whole[0] < 2 * least[0] or whole[1] < 2 * least[1]:
        return None
    drafted = image.draft(None, least)
    if drafted is None:
        return None
    _, box = drafted
    image.load()
    return Picture(_to_8_bits(image), _sideways(whole, turn), box, turn)


def _sideways(size: tuple[int, int], turn: Image.Transpose | None) -> tuple[int, int]:
    """Returns width and height, swapped where `turn` swaps them."""
    return (size[1], size[0]) if turn in _SIDEWAYS else size


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


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Returns the picture in mode RGB, or L where it is grey: that is resized in a third of the time, to the same."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_to_8_bits(image)
    if image.mode == "F":
        raise ImageError("the image has floating-point pixels, whose range is not known; send 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Returns 16-bit grey in 8 bits, rounded; Pillow's own conversion cuts off. 32-bit modes carry 16 bits here."""
    values = np.asarray(image).clip(0, 0xFFFF).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
