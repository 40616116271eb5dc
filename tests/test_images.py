"""Decoding of every format and mode, of broken and hostile files, and resizing against transformers."""

from __future__ import annotations

import io
import math
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from florence2_kserve.benchmark.transformer import draw_photograph
from florence2_kserve.images import DRAFT_MARGIN, ImageError, ImageTooLarge, Picture, decode_image, resize_image
from florence2_kserve.processor import ImageSettings

MEGAPIXEL = 1_000_000
ORIENTATION = 0x0112
# How the stored pixels lie for each EXIF orientation, made from the upright picture.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def draw(size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Draws a picture that no turn or flip leaves unchanged, in few colours."""
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, size[0] // 3, size[1] // 4), fill="red")
    pen.rectangle((size[0] // 2, size[1] // 2, size[0], size[1]), fill=(0, 90, 200))
    return image


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """Decodes a file exactly."""
    picture = decode_image(data, max_pixels=MEGAPIXEL)
    assert picture.image.size == picture.size
    assert picture.image.mode in ("RGB", "L")
    return picture.image.convert("RGB")


def pixels(image: Image.Image) -> list[Any]:
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def png_file(width: int, height: int, *, bits: int = 1, colour: int = 0, data: bytes = b"", **chunks: bytes) -> bytes:
    """Returns a PNG file with the header given, `data` as compressed pixels and other chunks in front of them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    others = b"".join(chunk(name.encode(), body) for name, body in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + others + chunk(b"IDAT", data) + chunk(b"IEND", b"")


FILES: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encode(draw()),
    "JPEG": lambda: encode(draw(), "JPEG"),
    "WEBP": lambda: encode(draw(), "WEBP"),
    "GIF": lambda: encode(draw(), "GIF"),
    "BMP": lambda: encode(draw(), "BMP"),
    "TIFF": lambda: encode(draw(), "TIFF", compression="tiff_lzw"),
}

LOSSLESS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encode(draw()),
    "interlaced PNG": lambda: encode(draw(), "PNG", interlace=True),
    "palette PNG": lambda: encode(draw().quantize(8), "PNG"),
    "opaque RGBA PNG": lambda: encode(draw().convert("RGBA"), "PNG"),
    "animated PNG": lambda: encode(draw(), "PNG", save_all=True, append_images=[Image.new("RGB", (40, 24))]),
    "WEBP": lambda: encode(draw(), "WEBP", lossless=True),
    "animated WEBP": lambda: encode(
        draw(), "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (40, 24))]
    ),
    "GIF": lambda: encode(draw(), "GIF"),
    "animated GIF": lambda: encode(draw(), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 24))]),
    "BMP": lambda: encode(draw(), "BMP"),
    "TIFF": lambda: encode(draw(), "TIFF"),
    "deflated TIFF": lambda: encode(draw(), "TIFF", compression="tiff_adobe_deflate"),
    "TIFF of two pages": lambda: encode(draw(), "TIFF", save_all=True, append_images=[Image.new("RGB", (40, 24))]),
    "BigTIFF": lambda: encode(draw(), "TIFF", big_tiff=True),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_same_pixels_come_out_of_every_lossless_format(kind: str) -> None:
    assert pixels(decode(LOSSLESS[kind]())) == pixels(draw())


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}], ids=str)
def test_jpegs_come_out_as_their_decoder_has_them(options: dict[str, Any]) -> None:
    data = encode(draw(), "JPEG", **options)
    image = decode(data)
    assert pixels(image) == pixels(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(draw())).mean() < 12


def test_a_camera_file_of_several_pictures_gives_the_first() -> None:
    data = encode(draw(), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 24))])
    assert pixels(decode(data)) == pixels(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(file_format: str, orientation: int) -> None:
    upright, turn = draw(), STORED[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    options: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
    if file_format == "TIFF":
        tags = ImageFileDirectory_v2()
        tags[ORIENTATION] = orientation
        options["tiffinfo"] = tags
    else:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    image = decode(encode(stored, file_format, **options))
    assert image.size == upright.size
    if file_format == "JPEG":
        assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 12
    else:
        assert pixels(image) == pixels(upright)


@pytest.mark.parametrize("exif", [b"Exif\x00\x00", b"Exif\x00\x00MM\x00*\x00\x00", b"nonsense", bytes(100)])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_broken_exif_is_ignored(exif: bytes, file_format: str) -> None:
    assert decode(encode(draw(), file_format, exif=exif)).size == draw().size


def test_a_colour_profile_changes_nothing() -> None:
    assert pixels(decode(encode(draw(), icc_profile=b"not even a profile" * 20))) == pixels(draw())


HALF_RED = [255, 127, 127]
TRANSPARENT: dict[str, tuple[Callable[[], bytes], list[list[int]]]] = {
    "RGBA": (
        lambda: encode(_row("RGBA", [(255, 0, 0, 0), (255, 0, 0, 128), (255, 0, 0, 255)])),
        [[255, 255, 255], HALF_RED, [255, 0, 0]],
    ),
    "LA": (lambda: encode(_row("LA", [(0, 0), (0, 128), (9, 255)])), [[255] * 3, [127] * 3, [9] * 3]),
    "WEBP": (
        lambda: encode(_row("RGBA", [(255, 0, 0, 0), (255, 0, 0, 128)]), "WEBP", lossless=True, exact=True),
        [[255, 255, 255], HALF_RED],
    ),
    "TIFF": (lambda: encode(_row("RGBA", [(255, 0, 0, 0), (255, 0, 0, 128)]), "TIFF"), [[255] * 3, HALF_RED]),
    "palette with one transparent entry": (
        lambda: encode(_palette_row(), "PNG", transparency=1),
        [[255, 0, 0], [255, 255, 255], [0, 0, 255]],
    ),
    "palette with alpha": (
        lambda: encode(_palette_row(), "PNG", transparency=bytes([128, 255, 0])),
        [HALF_RED, [0, 255, 0], [255, 255, 255]],
    ),
    "GIF": (
        lambda: encode(_palette_row(), "GIF", transparency=2),
        [[255, 0, 0], [0, 255, 0], [255, 255, 255]],
    ),
    "grey with a transparent value": (
        lambda: encode(_row("L", [7, 8]), "PNG", transparency=7),
        [[255, 255, 255], [8, 8, 8]],
    ),
    "RGB with a transparent colour": (
        lambda: encode(_row("RGB", [(1, 2, 3), (3, 2, 1)]), "PNG", transparency=(1, 2, 3)),
        [[255, 255, 255], [3, 2, 1]],
    ),
    "one bit with a transparent value": (
        lambda: encode(_row("1", [0, 255]), "PNG", transparency=0),
        [[255, 255, 255], [255, 255, 255]],
    ),
}


def _row(mode: str, values: list[Any]) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def _palette_row() -> Image.Image:
    image = _row("P", [0, 1, 2])
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_pixels_lie_on_white(kind: str) -> None:
    write, expected = TRANSPARENT[kind]
    assert pixels(decode(write())) == [expected]


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "TIFF", "JPEG"])
def test_grey_is_grey(file_format: str) -> None:
    grey = draw().convert("L")
    image = np.asarray(decode(encode(grey, file_format)))
    assert (image == image[..., :1]).all()
    assert np.abs(image.astype(int) - np.asarray(grey)[..., None]).mean() <= (4 if file_format == "JPEG" else 0)


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "TIFF"])
def test_one_bit_is_black_and_white(file_format: str) -> None:
    black, white = [0] * 3, [255] * 3
    assert pixels(decode(encode(_row("1", [0, 255, 255, 0]), file_format))) == [[black, white, white, black]]


def test_cmyk_is_ink_on_white() -> None:
    inks = _row("CMYK", [(0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255), (255, 0, 0, 0)])
    assert pixels(decode(encode(inks, "TIFF"))) == [[[255] * 3, [255, 0, 0], [0] * 3, [0, 255, 255]]]
    red = decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.asarray(red).astype(int) - [255, 0, 0]).max() <= 8


def test_ycbcr_is_converted() -> None:
    image = decode(encode(draw().convert("YCbCr"), "TIFF"))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(draw())).max() <= 3


SIXTEEN_BITS = [0, 128, 129, 257, 385, 386, 32_768, 65_407, 65_535]
EIGHT_BITS = [round(value * 255 / 65_535) for value in SIXTEEN_BITS]


def _png_of_16_bits(**chunks: bytes) -> bytes:
    row = b"\x00" + struct.pack(f">{len(SIXTEEN_BITS)}H", *SIXTEEN_BITS)
    return png_file(len(SIXTEEN_BITS), 1, bits=16, data=zlib.compress(row), **chunks)


def _tiff_of(dtype: str) -> bytes:
    return encode(Image.fromarray(np.array([SIXTEEN_BITS], dtype=dtype)), "TIFF")


SIXTEEN_BIT_FILES: dict[str, Callable[[], bytes]] = {
    "PNG": _png_of_16_bits,
    "PNG with a transparent value": lambda: _png_of_16_bits(tRNS=struct.pack(">H", 257)),
    "TIFF": lambda: _tiff_of("<u2"),
    "TIFF, most significant byte first": lambda: _tiff_of(">u2"),
    "TIFF of 32 bits": lambda: _tiff_of("<i4"),
}


@pytest.mark.parametrize("kind", SIXTEEN_BIT_FILES)
def test_sixteen_bits_of_grey_are_rounded_to_eight(kind: str) -> None:
    assert pixels(decode(SIXTEEN_BIT_FILES[kind]())) == [[[grey] * 3 for grey in EIGHT_BITS]]


def test_thirty_two_bits_beyond_sixteen_are_clipped() -> None:
    data = encode(Image.fromarray(np.array([[-5, 70_000]], dtype=np.int32)), "TIFF")
    assert pixels(decode(data)) == [[[0] * 3, [255] * 3]]


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match="floating-point pixels"):
        decode(encode(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the image is empty: 0 bytes"),
        (b"\x00" * 1000, "1000 bytes that are no image in a supported format"),
        (b"hello", r"5 bytes that are no image in a supported format \(JPEG, PNG, WEBP, GIF, BMP, TIFF\)"),
        (b"<!doctype html><title>no</title>", "no image in a supported format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG images are not supported; send one of JPEG, PNG"),
        (b"%PDF-1.7\n", "PDF images are not supported"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "HEIC images are not supported"),
        (b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00", "no image in a supported format"),
        (encode(draw(), "ICO"), "ICO images are not supported"),
        (encode(draw(), "PPM"), "no image in a supported format"),
        (encode(draw(), "TGA"), "no image in a supported format"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", "no image in a supported format"),
        (encode(draw())[:8], r"the PNG file is damaged or cut short \(its header can't be read\)"),
        (encode(draw(), "JPEG")[:20], "the JPEG file is damaged or cut short"),
        (encode(draw(), "WEBP")[:16], "the WEBP file is damaged or cut short"),
        (encode(draw(), "TIFF")[:6], "the TIFF file is damaged or cut short"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", FILES)
def test_half_a_file_is_refused(file_format: str) -> None:
    data = FILES[file_format]()
    with pytest.raises(ImageError, match=f"the {file_format} file is damaged or cut short"):
        decode(data[: len(data) // 2])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", FILES)
def test_any_beginning_of_a_file_is_refused_or_read(file_format: str) -> None:
    data = FILES[file_format]()
    outcomes = [_outcome(data[:length]) for length in range(len(data))]
    assert outcomes.count("refused") > len(data) / 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", FILES)
def test_a_file_with_wrong_bytes_is_refused_or_read(file_format: str) -> None:
    data, chance = FILES[file_format](), random.Random(0)
    outcomes = []
    for _ in range(400):
        spoilt = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            # Mostly in the header, where sizes, offsets and counts are.
            end = len(spoilt) if chance.random() < 0.4 else min(60, len(spoilt))
            spoilt[chance.randrange(end)] = chance.randrange(256)
        outcomes.append(_outcome(bytes(spoilt)))
    assert outcomes.count("refused") > 20


def _outcome(data: bytes) -> str:
    """Returns what becomes of a file; anything but an ImageError or an RGB picture fails the test."""
    try:
        image = decode(data)
    except ImageTooLarge:
        return "too large"
    except ImageError:
        return "refused"
    assert image.mode == "RGB"
    assert len(image.tobytes()) == 3 * image.width * image.height
    return "read"


def test_the_limit_on_pixels_is_exact() -> None:
    data = encode(draw((40, 25)))
    assert decode_image(data, max_pixels=1000).size == (40, 25)
    with pytest.raises(ImageTooLarge, match=r"has 40×25 pixels, 999 are allowed"):
        decode_image(data, max_pixels=999)


def test_the_limit_counts_before_any_pixel_is_decoded() -> None:
    nothing_in_it = png_file(5000, 5000, data=b"no deflate stream")
    with pytest.raises(ImageTooLarge, match="5000×5000"):
        decode(nothing_in_it)
    with pytest.raises(ImageError, match="PNG file is damaged"):
        decode_image(nothing_in_it, max_pixels=5000 * 5000)


def test_a_decompression_bomb_is_too_large() -> None:
    with pytest.raises(ImageTooLarge, match="far more pixels than are allowed"):
        decode(png_file(30_000, 30_000))


def test_an_error_is_an_image_error() -> None:
    assert issubclass(ImageTooLarge, ImageError)
    assert issubclass(ImageError, ValueError)


@pytest.mark.parametrize(
    "data",
    [
        png_file(0, 5),
        b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b";",
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0),
    ],
    ids=["PNG", "GIF", "BMP"],
)
def test_an_image_without_pixels_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode(data)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def settings(height: int = 768, width: int = 768, resample: int = 3) -> ImageSettings:
    return ImageSettings(
        height=height,
        width=width,
        resample=resample,
        rescale_factor=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        image_seq_length=577,
    )


@pytest.mark.parametrize(
    ("size", "config"),
    [
        ((640, 480), settings()),
        ((1023, 1537), settings()),
        ((1, 1), settings()),
        ((1, 500), settings()),
        ((768, 768), settings()),
        ((300, 200), settings(192, 192)),
        ((300, 200), settings(100, 333)),
        ((300, 200), settings(192, 192, resample=0)),
        ((300, 200), settings(192, 192, resample=1)),
        ((300, 200), settings(192, 192, resample=2)),
    ],
    ids=str,
)
def test_pixel_values_equal_those_of_transformers_bit_by_bit(size: tuple[int, int], config: ImageSettings) -> None:
    theirs = CLIPImageProcessorPil(
        size={"height": config.height, "width": config.width},
        resample=config.resample,
        do_center_crop=False,
        rescale_factor=config.rescale_factor,
        image_mean=list(config.mean),
        image_std=list(config.std),
    )
    image = noise(*size)
    expected = theirs(image, return_tensors="np")["pixel_values"][0]

    resized = resize_image(image, config)
    assert (resized.shape, resized.dtype) == ((config.height, config.width, 3), np.dtype("uint8"))
    assert resized.flags.c_contiguous
    assert resized.flags.writeable
    rescaled = (resized.astype(np.float64) * config.rescale_factor).astype(np.float32)
    normalised = (rescaled - np.float32(config.mean)) / np.float32(config.std)
    assert normalised.dtype == expected.dtype == np.float32
    assert np.array_equal(normalised.transpose(2, 0, 1), expected)


def test_a_decoded_picture_goes_the_whole_way_as_in_transformers() -> None:
    config = settings(192, 192)
    data = encode(noise(250, 190), "JPEG")
    theirs = CLIPImageProcessorPil(
        size={"height": 192, "width": 192}, resample=3, do_center_crop=False, do_rescale=False, do_normalize=False
    )
    expected = theirs(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(resize_image(decode(data), config).transpose(2, 0, 1), expected)


@pytest.mark.parametrize("resample", Image.Resampling)
def test_a_grey_picture_is_resized_as_if_it_had_colours(resample: Image.Resampling) -> None:
    data = encode(noise(300, 200).convert("L"))
    config = settings(96, 120, resample)
    assert decode_image(data, max_pixels=MEGAPIXEL).image.mode == "L"
    as_colours = resize_image(Image.open(io.BytesIO(data)).convert("RGB"), config)
    assert np.array_equal(decode_image(data, max_pixels=MEGAPIXEL).resized(config), as_colours)


# Drafts: the model looks at 96×96 here, so that 365 pixels are the least that is halved, 730 and 1460 the least
# for a quarter and an eighth.
SMALL = settings(96, 96)
LEAST = math.ceil(DRAFT_MARGIN * 96)


def read_both(data: bytes, config: ImageSettings = SMALL) -> tuple[Any, Any]:
    """Returns a file's pixels as the model would get them: decoded whole, and in draft; as signed numbers."""
    whole = decode_image(data, max_pixels=64 * MEGAPIXEL)
    draft = decode_image(data, max_pixels=64 * MEGAPIXEL, draft_for=config)
    assert draft.size == whole.size == whole.image.size
    first, second = whole.resized(config), draft.resized(config)
    assert (first.shape, first.dtype) == (second.shape, second.dtype) == ((config.height, config.width, 3), np.uint8)
    return first.astype(int), second.astype(int)


def decoded_size(data: bytes, config: ImageSettings = SMALL) -> tuple[int, int]:
    return decode_image(data, max_pixels=64 * MEGAPIXEL, draft_for=config).image.size


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((2 * LEAST - 1, 900), (2 * LEAST - 1, 900)),
        ((900, 2 * LEAST - 1), (900, 2 * LEAST - 1)),
        ((2 * LEAST, 2 * LEAST), (LEAST, LEAST)),
        ((2 * LEAST + 1, 900), (LEAST + 1, 450)),
        ((4 * LEAST - 1, 1500), (2 * LEAST, 750)),
        ((4 * LEAST, 1500), (LEAST, 375)),
        ((8 * LEAST, 8 * LEAST), (LEAST, LEAST)),
        ((20 * LEAST, 20 * LEAST), (-(-20 * LEAST // 8), -(-20 * LEAST // 8))),
    ],
    ids=str,
)
def test_a_draft_leaves_a_margin_over_what_the_model_looks_at(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    data = encode(draw(size), "JPEG")
    assert decoded_size(data) == expected
    assert decode_image(data, max_pixels=64 * MEGAPIXEL).image.size == size


def test_pictures_of_twelve_megapixels_are_drafted_for_the_real_model() -> None:
    assert decoded_size(encode(draw((4000, 3000)), "JPEG"), settings()) == (2000, 1500)


def test_a_draft_for_another_shape_minds_both_sides() -> None:
    data = encode(draw((1000, 400)), "JPEG")
    assert decoded_size(data, settings(height=96, width=96)) == (500, 200)
    assert decoded_size(data, settings(height=192, width=96)) == (1000, 400)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_have_no_drafts(file_format: str) -> None:
    whole, draft = read_both(encode(draw((800, 800)), file_format))
    assert np.array_equal(whole, draft)


def test_nearest_neighbours_are_looked_up_in_the_whole_picture() -> None:
    config = settings(96, 96, Image.Resampling.NEAREST)
    whole, draft = read_both(encode(noise(800, 800), "JPEG"), config)
    assert np.array_equal(whole, draft)


MODEL_SIDE = 192  # smaller than Florence-2's; only the margin counts


def photograph(size: tuple[int, int]) -> Image.Image:
    """Soft colours and edges, no two quarters alike, with a little noise."""
    coarse = np.random.default_rng(3).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    pen.rectangle((size[0] // 9, size[1] // 7, size[0] // 3, size[1] // 4), fill="red")
    pen.ellipse((size[0] // 2, size[1] // 2, size[0], size[1]), fill=(0, 90, 200))
    grain = np.random.default_rng(4).normal(0, 3, (size[1], size[0], 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def text(pixels_seen: int) -> Callable[[tuple[int, int]], Image.Image]:
    """Returns what writes a page of letters so tall as the model sees them."""

    def write(size: tuple[int, int]) -> Image.Image:
        height = round(pixels_seen * size[0] / MODEL_SIDE)
        image, chance = Image.new("RGB", size, "white"), random.Random(height)
        pen, font = ImageDraw.Draw(image), ImageFont.load_default(height)
        for y in range(0, size[1], height * 4 // 3):
            line = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz    ABCDEFG0123456789", k=4 * size[0] // height))
            pen.text((3, y), line, fill=(chance.randrange(120), 0, chance.randrange(120)), font=font)
        return image

    return write


def checks(side: int) -> Callable[[tuple[int, int]], Image.Image]:
    def draw_checks(size: tuple[int, int]) -> Image.Image:
        y, x = np.indices((size[1], size[0]))
        return Image.fromarray(((x // side + y // side) % 2 * 255).astype(np.uint8)).convert("RGB")

    return draw_checks


def lines(size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for x in range(0, size[0], 12):
        pen.line((x, 0, size[0] - x // 2, size[1]), fill="black")
    return image


# By how many of 255 levels a draft may change a pixel: on average, one in a thousand, and at most. The heights are
# those that the model sees. docs/transformer.md states all of these.
LARGEST_DIFFERENCE = 48
TOLERANCE: dict[str, tuple[Callable[[tuple[int, int]], Image.Image], float, float]] = {
    "photograph": (photograph, 0.5, 8),
    "text 16 pixels tall": (text(16), 1.5, 20),
    "text 8 pixels tall": (text(8), 3, 24),
    "text 4 pixels tall": (text(4), 5, 26),
    "thin lines": (lines, 2, 32),
    "noise": (lambda size: noise(*size), 4, 16),
    "checks of 3 pixels": (checks(3), 1.5, 6),
    "checks of 5 pixels": (checks(5), 6, 16),
    "checks of 8 pixels": (checks(8), 6, 16),
}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("content", TOLERANCE)
def test_a_draft_changes_pixels_within_the_stated_tolerance(content: str, parts: int) -> None:
    draw_content, on_average, one_in_a_thousand = TOLERANCE[content]
    config = settings(MODEL_SIDE, MODEL_SIDE)
    side = round(1.9533 * parts * MODEL_SIDE)  # the margin that 12 megapixels have
    data = encode(draw_content((side, side)), "JPEG", quality=88)
    assert decoded_size(data, config)[0] < side
    whole, draft = read_both(data, config)
    difference = np.abs(whole - draft)
    assert difference.mean() <= on_average
    assert np.quantile(difference, 0.999) <= one_in_a_thousand
    assert difference.max() <= LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    "size", [(2 * LEAST + 1, 2 * LEAST + 1), (4 * LEAST + 3, 4 * LEAST + 1), (1463, 1467)], ids=str
)
def test_a_draft_of_odd_sizes_is_not_shifted(size: tuple[int, int]) -> None:
    whole, draft = read_both(encode(photograph(size), "JPEG", quality=95, subsampling=0))
    edges = np.abs(whole - draft)[:, -3:]
    assert np.abs(whole - draft).mean() < 0.6
    assert edges.mean() < 1


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("upright_size", [(801, 603), (603, 801)], ids=str)
def test_a_draft_is_turned_upright(upright_size: tuple[int, int], orientation: int) -> None:
    upright, turn = photograph(upright_size), STORED[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(stored, "JPEG", exif=exif, quality=95)
    config = settings(height=96, width=120)
    assert max(decoded_size(data, config)) == 401
    whole, draft = read_both(data, config)
    assert decode_image(data, max_pixels=MEGAPIXEL, draft_for=config).size == upright_size
    assert np.abs(whole - draft).mean() < 1
    assert np.abs(draft - resize_image(upright, config).astype(int)).mean() < 3


def test_a_sideways_draft_minds_the_side_that_it_ends_up_on() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encode(draw((1000, 400)), "JPEG", exif=exif)
    assert decoded_size(data, settings(height=192, width=96)) == (500, 200)
    assert decoded_size(data, settings(height=96, width=192)) == (400, 1000)  # whole, as 400 pixels become the width


@pytest.mark.parametrize("exif", [b"Exif\x00\x00", b"nonsense", bytes(100)])
def test_a_draft_minds_no_broken_exif(exif: bytes) -> None:
    assert decoded_size(encode(draw((800, 600)), "JPEG", exif=exif)) == (400, 300)


JPEGS: dict[str, Callable[[], bytes]] = {
    "baseline": lambda: encode(photograph((800, 600)), "JPEG"),
    "progressive": lambda: encode(photograph((800, 600)), "JPEG", progressive=True),
    "full resolution for colours": lambda: encode(photograph((800, 600)), "JPEG", subsampling=0),
    "grey": lambda: encode(photograph((800, 600)).convert("L"), "JPEG"),
    "CMYK": lambda: encode(photograph((800, 600)).convert("CMYK"), "JPEG"),
    "several pictures": lambda: encode(
        photograph((800, 600)), "MPO", save_all=True, append_images=[Image.new("RGB", (800, 600))]
    ),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_every_kind_of_jpeg_is_drafted(kind: str) -> None:
    data = JPEGS[kind]()
    assert decoded_size(data) == (400, 300)
    whole, draft = read_both(data)
    assert np.abs(whole - draft).mean() < 1


@pytest.mark.parametrize("kind", JPEGS)
def test_half_a_jpeg_is_refused_in_draft_too(kind: str) -> None:
    data = JPEGS[kind]()
    with pytest.raises(ImageError, match="file is damaged or cut short"):
        decode_image(data[: len(data) // 3], max_pixels=MEGAPIXEL, draft_for=SMALL)


def test_the_limit_on_pixels_counts_the_whole_picture() -> None:
    data = encode(draw((800, 600)), "JPEG")
    assert decode_image(data, max_pixels=480_000, draft_for=SMALL).size == (800, 600)
    with pytest.raises(ImageTooLarge, match=r"has 800×600 pixels, 479,999 are allowed"):
        decode_image(data, max_pixels=479_999, draft_for=SMALL)


@pytest.mark.filterwarnings("ignore")
def test_a_jpeg_with_wrong_bytes_is_refused_or_read_in_draft_too() -> None:
    data, chance = encode(photograph((400, 400)), "JPEG"), random.Random(0)
    sizes = set()
    for _ in range(300):
        spoilt = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            end = len(spoilt) if chance.random() < 0.4 else 640  # the headers
            spoilt[chance.randrange(end)] = chance.randrange(256)
        try:
            picture = decode_image(bytes(spoilt), max_pixels=4 * MEGAPIXEL, draft_for=SMALL)
        except ImageError:
            sizes.add(None)
            continue
        sizes.add(picture.image.size)
        assert picture.resized(SMALL).shape == (96, 96, 3)
    assert {None, (200, 200)} <= sizes


SWIFT_SIZES = [(640, 480), (500, 375), (333, 501), (1024, 768), (768, 768), (31, 17), (1, 900), (2900, 3), (1, 1)]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("content", ["photograph", "noise", "black and white"])
@pytest.mark.parametrize("size", SWIFT_SIZES, ids=str)
def test_the_swift_way_to_resize_is_pillows_but_for_two_levels(size: tuple[int, int], content: str, mode: str) -> None:
    """The tolerance that docs/transformer.md states."""
    chance = np.random.default_rng(0)
    match content:
        case "photograph":
            values = np.asarray(draw_photograph(size, seed=0))
        case "noise":
            values = chance.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        case _:
            values = np.repeat(255 * chance.integers(0, 2, (size[1], size[0], 1), dtype=np.uint8), 3, axis=2)
    image = Image.fromarray(values).convert(mode)
    width, height = size
    for box in (None, (0.3, 0.2, width - 0.4, height - 0.1)):
        picture = Picture(image, size, box)
        exact, swift = picture.resized(settings()), picture.resized(settings(), exact=False)
        assert (swift.shape, swift.dtype) == (exact.shape, exact.dtype)
        difference = np.abs(exact.astype(int) - swift)
        assert difference.max() <= 2
        assert (difference > 0).mean() <= 0.02


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.LANCZOS, Image.Resampling.NEAREST])
def test_filters_that_have_no_swift_way_are_pillows(resample: Image.Resampling) -> None:
    picture, wanted = Picture(draw(), draw().size), settings(resample=resample)
    assert np.array_equal(picture.resized(wanted, exact=False), picture.resized(wanted))


def test_very_large_pictures_are_resized_by_pillow() -> None:
    values = np.random.default_rng(0).integers(0, 256, (3001, 3000), dtype=np.uint8)
    picture = Picture(Image.fromarray(values), (3000, 3001))
    assert np.array_equal(picture.resized(settings(), exact=False), picture.resized(settings()))


@pytest.mark.parametrize("orientation", STORED)
def test_drafts_are_turned_whichever_way_they_are_resized(orientation: int) -> None:
    stored = draw_photograph((3200, 3000), seed=1)
    if (turn := STORED[orientation]) is not None:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture = decode_image(encode(stored, "JPEG", exif=exif), max_pixels=10 * MEGAPIXEL, draft_for=settings())
    assert picture.size == (3200, 3000)
    difference = np.abs(picture.resized(settings()).astype(int) - picture.resized(settings(), exact=False))
    assert difference.max() <= 2
