"""Bytes to pixels: every kind of picture that people send, and bytes that are no picture at all."""

import io
import resource
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.tiny import encode
from training.bundle.images import (
    FORMATS,
    PNG_END,
    ImageCorrupt,
    ImageRejected,
    ImageTooLarge,
    NotAnImage,
    decode,
    decode_quickly,
)
from training.bundle.manifest import Fit, InputSpec
from training.drawings import pen_digit

RED, GREEN, BLUE, YELLOW = (220, 30, 30), (30, 200, 30), (30, 30, 220), (220, 220, 30)


def grey(height: int, width: int, fit: Fit = "stretch") -> InputSpec:
    return InputSpec(channels=1, height=height, width=width, fit=fit)


def colour(height: int, width: int, fit: Fit = "stretch") -> InputSpec:
    return InputSpec(channels=3, height=height, width=width, fit=fit)


def quadrants(size: int = 32) -> Image.Image:
    """Red and green above, blue and yellow below: shows which way is up."""
    image = Image.new("RGB", (size, size), RED)
    half = size // 2
    for colour_, x, y in ((GREEN, half, 0), (BLUE, 0, half), (YELLOW, half, half)):
        image.paste(colour_, (x, y, x + half, y + half))
    return image


def corners(pixels: NDArray[np.uint8]) -> list[list[int]]:
    """The colours at the middles of the four quadrants, each [C]."""
    _, height, width = pixels.shape
    places = [(height // 4, width // 4), (height // 4, -width // 4), (-height // 4, width // 4)]
    return [pixels[:, y, x].tolist() for y, x in [*places, (-height // 4, -width // 4)]]


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- formats and modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read(form: str) -> None:
    pixels = decode(encode(quadrants(), form), colour(16, 16))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert np.abs(np.array(corners(pixels)) - [RED, GREEN, BLUE, YELLOW]).max() <= 6  # JPEG and WebP lose a little


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF"])
def test_lossless_grey_comes_out_unchanged(form: str) -> None:
    picture = noise(8, 9)
    assert np.array_equal(decode(encode(Image.fromarray(picture), form), grey(8, 9)), picture[None])


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
def test_lossless_colour_comes_out_unchanged(form: str) -> None:
    picture = noise(8, 9, 3)
    data = encode(Image.fromarray(picture), form)
    assert np.array_equal(decode(data, colour(8, 9)), picture.transpose(2, 0, 1))


def test_grey_in_three_channels_is_the_same_in_each() -> None:
    picture = noise(8, 8)
    assert np.array_equal(decode(encode(Image.fromarray(picture)), colour(8, 8)), np.stack([picture] * 3))


def test_colour_in_one_channel_is_its_brightness() -> None:
    (top_left, top_right, bottom_left, bottom_right) = corners(decode(encode(quadrants()), grey(16, 16)))
    luma = [round(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in (RED, GREEN, BLUE, YELLOW)]
    assert [*top_left, *top_right, *bottom_left, *bottom_right] == pytest.approx(luma, abs=1)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(form: str) -> None:
    picture = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = decode(encode(Image.fromarray(picture), form), grey(8, 8))
    assert np.array_equal(pixels[0], np.round(picture / 257).astype(np.uint8))


@pytest.mark.parametrize(
    ("scale", "depth"), [(1.0, 1.0), (255.0, 255.0), (65535.0, 65535.0)], ids=["to 1", "to 255", "to 65535"]
)
def test_a_floating_point_tiff_is_scaled_by_its_range(scale: float, depth: float) -> None:
    picture = np.linspace(0, scale, 64, dtype=np.float32).reshape(8, 8)
    pixels = decode(encode(Image.fromarray(picture), "TIFF"), grey(8, 8))
    assert np.array_equal(pixels[0], np.round(picture.astype(np.float64) * 255 / depth).astype(np.uint8))


def test_what_is_no_number_in_a_floating_point_tiff_is_black() -> None:
    picture = np.full((8, 8), 0.5, np.float32)
    picture[0, 0] = np.nan
    pixels = decode(encode(Image.fromarray(picture), "TIFF"), grey(8, 8))
    assert (pixels[0, 0, 0], pixels[0, 1, 1]) == (0, 128)


def test_32_bit_grey_is_scaled_by_its_range() -> None:
    picture = np.linspace(0, 60000, 64).astype(np.int32).reshape(8, 8)
    pixels = decode(encode(Image.fromarray(picture), "TIFF"), grey(8, 8))
    assert np.array_equal(pixels[0], np.round(picture / 257).astype(np.uint8))


def test_one_bit_is_black_and_white() -> None:
    picture = noise(8, 8) > 127
    assert np.array_equal(decode(encode(Image.fromarray(picture)), grey(8, 8))[0], picture * np.uint8(255))


def test_a_palette_is_looked_up() -> None:
    pixels = decode(encode(quadrants().quantize(4)), colour(16, 16))
    assert np.abs(np.array(corners(pixels)) - [RED, GREEN, BLUE, YELLOW]).max() <= 2


def test_a_transparent_palette_entry_is_white() -> None:
    picture = Image.new("P", (16, 16), 0)
    picture.putpalette([*RED, *BLUE])
    picture.paste(1, (8, 0, 16, 16))
    top_left, top_right, *_ = corners(decode(encode(picture, transparency=1), colour(16, 16)))
    assert (top_left, top_right) == (list(RED), [255, 255, 255])


def test_dark_ink_on_nothing_lies_on_white() -> None:
    picture = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    picture.paste((20, 20, 20, 255), (0, 0, 8, 16))
    top_left, top_right, *_ = corners(decode(encode(picture), grey(16, 16)))
    assert (top_left, top_right) == ([20], [255])


def test_white_ink_on_nothing_lies_on_black() -> None:
    picture = Image.new("LA", (16, 16), (0, 0))
    picture.paste((255, 255), (0, 0, 8, 16))
    top_left, top_right, *_ = corners(decode(encode(picture), grey(16, 16)))
    assert (top_left, top_right) == ([255], [0])


def test_half_transparent_colour_is_mixed_with_white() -> None:
    pixels = decode(encode(Image.new("RGBA", (8, 8), (200, 0, 0, 128))), colour(8, 8))
    assert pixels[:, 4, 4].tolist() == pytest.approx([227, 127, 127], abs=1)


def test_a_fully_transparent_picture_is_white() -> None:
    assert (decode(encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), grey(8, 8)) == 255).all()


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    pixels = decode(encode(quadrants().convert("CMYK"), "JPEG", quality=95), colour(16, 16))
    assert np.abs(np.array(corners(pixels)) - [RED, GREEN, BLUE, YELLOW]).max() <= 12


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("L", (8, 8), shade) for shade in (40, 240)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(data, grey(8, 8)) == 40).all()


STORED_AS = {  # how a camera stores an upright picture, for each value of EXIF's Orientation
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED_AS)
def test_a_photograph_comes_out_upright(orientation: int) -> None:
    method = STORED_AS[orientation]
    stored = quadrants() if method is None else quadrants().transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encode(stored, "JPEG", exif=exif, quality=95), colour(16, 16))
    assert np.abs(np.array(corners(pixels)) - [RED, GREEN, BLUE, YELLOW]).max() <= 12


def test_a_large_jpeg_decoded_small_looks_the_same() -> None:
    pixels = decode(encode(quadrants(2048), "JPEG", quality=95), colour(16, 16))
    assert np.abs(np.array(corners(pixels)) - [RED, GREEN, BLUE, YELLOW]).max() <= 12


# --- fits -------------------------------------------------------------------------------------------------------------


def stripes() -> bytes:
    """60 x 20 pixels: a dark third, a grey one, a light one."""
    picture = np.repeat(np.array([10, 128, 245], np.uint8), 20)
    return encode(Image.fromarray(np.tile(picture, (20, 1))))


def test_cover_cuts_the_middle() -> None:
    assert decode(stripes(), grey(10, 10, "cover"))[0, :, 1:-1] == pytest.approx(np.full((10, 8), 128), abs=1)


def test_contain_pads_with_black() -> None:
    pixels = decode(stripes(), grey(12, 12, "contain"))[0]
    assert pixels[:4].max() == pixels[8:].max() == 0
    assert pixels[6, [1, 6, 10]].tolist() == pytest.approx([10, 128, 245], abs=2)


def test_stretch_shows_all_of_it() -> None:
    pixels = decode(stripes(), grey(12, 12, "stretch"))[0]
    assert pixels[:, [1, 6, 10]] == pytest.approx(np.tile([10, 128, 245], (12, 1)), abs=2)


@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_of_the_right_size_passes_unchanged(fit: Fit, channels: int) -> None:
    picture = noise(10, 14, 3) if channels == 3 else noise(10, 14)
    spec = InputSpec(channels=channels, height=10, width=14, fit=fit)
    pixels = decode(encode(Image.fromarray(picture)), spec)
    assert np.array_equal(pixels, picture.transpose(2, 0, 1) if channels == 3 else picture[None])


@pytest.mark.parametrize("fit", ["cover", "contain", "stretch", "digit"])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3), (64, 48)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_fit_takes_every_size(fit: Fit, size: tuple[int, int], channels: int) -> None:
    spec = InputSpec(channels=channels, height=28, width=20, fit=fit)
    assert decode(encode(Image.new("RGB", size, RED)), spec).shape == (channels, 28, 20)


# --- refusals ---------------------------------------------------------------------------------------------------------


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def huge_png(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def huge_bmp(side: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, *[0] * 6)


def huge_gif(side: int) -> bytes:
    frame = struct.pack("<cHHHHBB", b",", 0, 0, side, side, 0, 8)
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + frame + b"\0;"


@pytest.mark.parametrize("make", [huge_png, huge_bmp, huge_gif])
def test_a_picture_of_900_million_pixels_is_refused_from_its_header(make: Callable[[int], bytes]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageTooLarge, match="30000 x 30000 = 900000000 pixels; the limit is 50000000"):
        decode(make(30_000), colour(32, 32))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_the_limit_counts_pixels() -> None:
    data = encode(Image.new("L", (20, 10)))
    assert decode(data, grey(8, 8), max_pixels=200).shape == (1, 8, 8)
    with pytest.raises(ImageTooLarge, match="20 x 10 = 200 pixels; the limit is 199"):
        decode(data, grey(8, 8), max_pixels=199)


def test_a_large_picture_with_transparency_is_reduced_before_it_is_blended() -> None:
    """Memory: 49 megapixels of float64 planes would be gigabytes."""
    clear = Image.new("P", (7000, 7000))
    clear.putpalette([10, 20, 30] * 256)
    buffer = io.BytesIO()
    clear.save(buffer, "PNG", bits=1, transparency=0)
    tracemalloc.start()
    pixels = decode(buffer.getvalue(), grey(8, 8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pixels.min() == 255
    assert peak < 100_000_000


def test_an_empty_picture_is_refused() -> None:
    with pytest.raises(
        NotAnImage, match=r"^the image is empty \(0 bytes\); send one of PNG, JPEG, WEBP, GIF, BMP, TIFF$"
    ):
        decode(b"", grey(8, 8))


@pytest.mark.parametrize("data", [b"\0", b"hello", b"%PDF-1.7", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(
        NotAnImage, match="no image of a format that is read here; send one of PNG, JPEG, WEBP, GIF, BMP, TIFF"
    ):
        decode(data, grey(8, 8))


@pytest.mark.parametrize("form", ["ICO", "PPM", "TGA"])
def test_formats_with_unsafe_or_needless_decoders_are_refused(form: str) -> None:
    with pytest.raises(NotAnImage):
        decode(encode(quadrants(), form), grey(8, 8))


@pytest.mark.parametrize("form", FORMATS)
def test_a_truncated_picture_is_refused(form: str) -> None:
    data = encode(Image.fromarray(noise(64, 64, 3)), form)
    with pytest.raises(ImageRejected):
        decode(data[: len(data) // 2], grey(8, 8))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_truncation_is_named(form: str) -> None:
    data = encode(Image.fromarray(noise(64, 64, 3)), form)
    with pytest.raises(ImageCorrupt, match=f"the {form} image is truncated or damaged"):
        decode(data[: len(data) // 2], grey(8, 8))


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ImageRejected):
        decode(data, grey(8, 8))


# --- whatever the bytes -----------------------------------------------------------------------------------------------

SPECS = [grey(8, 6), colour(8, 8, "cover"), colour(6, 8, "contain"), grey(28, 28, "digit")]
MAGIC = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF\x20\0\0\0WEBPVP8 "]


def decodes_or_is_rejected(data: bytes, spec: InputSpec) -> bool:
    try:
        pixels = decode(data, spec, max_pixels=100_000)
    except ImageRejected as error:
        return bool(str(error))
    return pixels.shape == spec.shape and pixels.dtype == np.uint8


@settings(max_examples=200, deadline=None)
@given(magic=st.sampled_from(MAGIC), rest=st.binary(max_size=200), spec=st.sampled_from(SPECS))
def test_any_bytes_decode_or_are_rejected(magic: bytes, rest: bytes, spec: InputSpec) -> None:
    assert decodes_or_is_rejected(magic + rest, spec)


def valid() -> list[bytes]:
    pictures = [encode(Image.fromarray(noise(12, 9, 3)), form) for form in FORMATS]
    pictures += [encode(Image.fromarray(noise(12, 9)), form) for form in FORMATS]
    pictures.append(encode(Image.fromarray(noise(9, 9)).convert("P"), transparency=3))
    pictures.append(encode(Image.fromarray(noise(9, 9, 4))))
    pictures.append(encode(Image.fromarray(noise(9, 9).astype(np.uint16) * 257), "TIFF"))
    pictures.append(encode(Image.fromarray(noise(9, 9).astype(np.float32)), "TIFF"))
    exif = Image.Exif()
    exif[0x0112] = 6
    return [*pictures, encode(Image.fromarray(noise(9, 9, 3)), "JPEG", exif=exif)]


@settings(max_examples=300, deadline=None)
@given(
    data=st.sampled_from(valid()),
    changes=st.lists(st.tuples(st.integers(0, 1_000_000), st.integers(0, 255)), max_size=6),
    keep=st.floats(0.2, 1),
    spec=st.sampled_from(SPECS),
)
def test_any_damage_decodes_or_is_rejected(
    data: bytes, changes: list[tuple[int, int]], keep: float, spec: InputSpec
) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    assert decodes_or_is_rejected(bytes(damaged[: int(len(damaged) * keep)]), spec)


@settings(max_examples=50, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "F"]),
    spec=st.sampled_from(SPECS),
    seed=st.integers(0, 99),
)
def test_any_valid_picture_decodes(height: int, width: int, mode: str, spec: InputSpec, seed: int) -> None:
    picture = (
        Image.fromarray(noise(height, width, 3, seed=seed)).convert("L" if mode == "I;16" else "RGB").convert(mode)
    )
    file = io.BytesIO()
    picture.save(file, "TIFF")
    assert decode(file.getvalue(), spec).shape == spec.shape


def texts() -> bytes:
    """A small PNG of the input's own size that unpacks to twelve megabytes."""
    info = PngInfo()
    for number in range(12):
        info.add_text(f"text {number}", "a" * 1_000_000, zip=True)
    return encode(quadrants(32), pnginfo=info)


@pytest.mark.parametrize(
    ("data", "spec"),
    [
        (encode(quadrants(33)), colour(32, 32)),
        (encode(quadrants(32).convert("P")), colour(32, 32)),
        (encode(quadrants(32), "JPEG"), colour(32, 32)),
        (texts(), colour(32, 32)),
        (encode(Image.fromarray(noise(74, 74, 3))), colour(74, 74)),
        (encode(Image.new("RGB", (74, 74))), colour(74, 74)),
        (encode(Image.new("L", (28, 28), 128)), grey(28, 28, "digit")),
        (encode(quadrants(32))[:23], colour(32, 32)),
        (encode(quadrants(32))[:-20], colour(32, 32)),
        (b"", colour(32, 32)),
    ],
    ids=[
        "another size",
        "a palette",
        "another format",
        "much to unpack",
        "a long file",
        "many pixels",
        "a digit on grey",
        "a head alone",
        "cut off",
        "nothing",
    ],
)
def test_what_may_take_long_is_not_decoded_quickly(data: bytes, spec: InputSpec) -> None:
    assert len(data) <= 16_384 or spec.width == 74
    assert decode_quickly(data, spec) is None


@pytest.mark.parametrize(
    ("picture", "spec"),
    [
        (quadrants(32), colour(32, 32)),
        (quadrants(32), grey(32, 32)),
        (Image.fromarray(noise(32, 32)), colour(32, 32)),
        (Image.fromarray(noise(73, 73, 3)), colour(73, 73)),
        (Image.fromarray(pen_digit(3, Random(3))), grey(28, 28, "digit")),
        (Image.fromarray(255 - pen_digit(3, Random(3))), colour(28, 28, "digit")),
    ],
    ids=["colour", "colour to grey", "grey to colour", "as large as may be", "MNIST's", "its negative"],
)
def test_a_small_plain_png_of_the_input_s_own_size_is_decoded_quickly_and_rightly(
    picture: Image.Image, spec: InputSpec
) -> None:
    quick = decode_quickly(encode(picture), spec)
    assert quick is not None
    assert np.array_equal(quick, decode(encode(picture, "BMP"), spec))
    assert (quick.shape, quick.dtype, quick.flags.c_contiguous) == (spec.shape, np.uint8, True)


def with_pixels_of(png: bytes, block: bytes) -> bytes:
    """A PNG of one block, with other bytes in it that its checksum is right for."""
    length, content = struct.pack(">I", len(block)), b"IDAT" + block
    return png[:33] + length + content + struct.pack(">I", zlib.crc32(content)) + PNG_END


@given(
    mode=st.sampled_from(["L", "RGB"]),
    side=st.sampled_from([8, 9]),
    seed=st.integers(0, 9),
    level=st.integers(0, 9),
    changes=st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=2)), max_size=2),
    sealed=st.booleans(),
    spec=st.sampled_from([grey(8, 8), colour(8, 8)]),
)
@settings(max_examples=500, deadline=None)
def test_a_plain_png_is_read_as_pillow_reads_it(
    mode: str, side: int, seed: int, level: int, changes: list[tuple[int, bytes]], sealed: bool, spec: InputSpec
) -> None:
    """Whatever is damaged in it: what the short way takes, Pillow's own must take, for the same pixels."""
    file = io.BytesIO()
    Image.fromarray(noise(side, side, 3, seed=seed)).convert(mode).save(file, "PNG", compress_level=level)
    png = file.getvalue()
    block = png[41:-16]
    for place, content in changes:
        block = block[:place] + content + block[place + 1 :]
    png = with_pixels_of(png, block) if sealed else png[:41] + block + png[-16:]
    try:
        image = Image.open(io.BytesIO(png)).convert("L" if spec.channels == 1 else "RGB")
    except Exception:
        with pytest.raises(ImageRejected):
            decode(png, spec)
        return
    pixels = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(decode(png, spec), np.moveaxis(np.atleast_3d(pixels), 2, 0))
