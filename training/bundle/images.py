"""Bytes to pixels: an arbitrary picture becomes the uint8 array [C, H, W] that a bundle's input asks for.

Training (class folders) and serving (requests) both come through here, so that they can't disagree. Knows nothing of
networks, and nothing of who sent the bytes: they are treated as hostile.
"""

import math
import struct
import zlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from training import SafelightError
from training.bundle.digits import as_mnist, fit_digit
from training.bundle.manifest import InputSpec

Pixels = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000  # a 50-megapixel photograph: 150 MB once decoded, 400 MB while transparency is taken from one
PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # then width and height
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PNG_MODES = {(8, 0, 0, 0, 0): "L", (8, 2, 0, 0, 0): "RGB"}  # by depth, colour, compression, filter and interlacing
PLAIN_BYTES = 57  # head, one block, end: without a pixel
QUICK_BYTES = 16_384  # of a file, and of the pixels in it: these decode in 15 to 40 µs
AMPLE_PIXELS = 2_000_000  # a larger picture is reduced before any arithmetic on it: what it becomes is small

# Pillow's own guard warns at one size and raises at another. Ours is stricter, and is applied before any decoding.
Image.MAX_IMAGE_PIXELS = None


class ImageRejected(SafelightError):
    """These bytes don't become an input; the message says why, for the person who sent them."""


class NotAnImage(ImageRejected):
    """Empty, or of no format that we read."""


class ImageTooLarge(ImageRejected):
    """More pixels than the limit. Found from the header, before any decoding. `facts` hold the limit."""


class ImageCorrupt(ImageRejected):
    """Starts like an image, then is truncated or damaged."""


def decode_quickly(data: bytes, spec: InputSpec) -> Pixels | None:
    """What `decode` gives, where that takes about as long as handing the bytes to a thread; None where it may not.

    That is a small PNG of the input's own size and nothing but pixels: texts and profiles may unpack to a thousand
    times their length, and a digit that isn't as MNIST has it takes fifty times as long.
    """
    small = len(data) <= QUICK_BYTES and math.prod(spec.shape) <= QUICK_BYTES
    if not small or not data.startswith(PNG_HEAD + struct.pack(">II", spec.width, spec.height)):
        return None
    image = _plain_png(data)
    if image is None:
        return None
    if spec.fit == "digit":
        digit = as_mnist(_grey(image), (spec.width, spec.height))
        return None if digit is None else _channels_first(digit, spec)
    return fit(image if image.mode == _mode(spec) else image.convert(_mode(spec)), spec)


def decode(data: bytes, spec: InputSpec, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode one picture and fit it to the input: uint8 [C, H, W], contiguous. Raises ImageRejected."""
    quick = decode_quickly(data, spec)
    if quick is not None:
        return quick
    image = _open(data, max_pixels)
    try:
        image = _load(image, spec)
    except MemoryError:  # ours to answer for, not the picture's
        raise
    except Exception as error:  # decoders raise what they like on hostile bytes: OSError, SyntaxError, struct.error …
        raise ImageCorrupt(
            f"the {image.format} image is truncated or damaged ({error}); send the whole file, or save it anew"
        ) from error
    return fit(image, spec)


def fit(image: Image.Image, spec: InputSpec) -> Pixels:
    """Fit a loaded picture of mode L or RGB: uint8 [C, H, W]."""
    size = (spec.width, spec.height)
    if spec.fit == "digit":
        pixels = fit_digit(_grey(image), size)  # [H, W]
    elif image.size == size:
        pixels = np.asarray(image)
    elif spec.fit == "cover":
        pixels = np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC))
    elif spec.fit == "contain":
        pixels = np.asarray(ImageOps.pad(image, size, Image.Resampling.BICUBIC))
    else:
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    return _channels_first(pixels, spec)


def _grey(image: Image.Image) -> Pixels:
    return np.asarray(image if image.mode == "L" else image.convert("L"))


def _channels_first(pixels: Pixels, spec: InputSpec) -> Pixels:
    """[H, W] or [H, W, C] to [C, H, W]."""
    if pixels.ndim == 2:
        return np.repeat(pixels[None], spec.channels, axis=0)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _plain_png(data: bytes) -> Image.Image | None:
    """An 8-bit PNG of grey or RGB pixels and nothing else, as most small ones are; None for any other or a damaged one.

    It is one block of what Pillow calls `zip`. To let Pillow find that among all that a picture may hold takes five
    times as long.
    """
    if len(data) < PLAIN_BYTES:
        return None
    width, height, *kind = struct.unpack_from(">IIBBBBB", data, 16)
    (length,) = struct.unpack_from(">I", data, 33)
    mode, start, end = PNG_MODES.get(tuple(kind)), 41, 41 + length
    if mode is None or data[37:start] != b"IDAT" or data[end + 4 :] != PNG_END:
        return None
    if zlib.crc32(data[12:29]) != _crc(data, 29) or zlib.crc32(data[37:end]) != _crc(data, end):
        return None
    try:
        return Image.frombytes(mode, (width, height), data[start:end], "zip", mode)
    except ValueError:
        return None


def _crc(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 4])


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise NotAnImage(f"the image is empty (0 bytes); send one of {', '.join(FORMATS)}")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise NotAnImage(f"this is no image of a format that is read here; send one of {', '.join(FORMATS)}") from None
    except Exception as error:  # as in decode: a header can be as hostile as a body
        raise ImageCorrupt(f"the image's header is damaged ({error}); send the whole file, or save it anew") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} = {width * height} pixels; the limit is {max_pixels}: scale it down",
            limit=max_pixels,
        )
    return image


def _load(image: Image.Image, spec: InputSpec) -> Image.Image:
    """Decode, turn upright, and bring to mode L (one channel) or RGB (three), 8 bits deep."""
    if image.format in ("JPEG", "MPO"):  # MPO: what many phones write, a JPEG with another one behind it
        # JPEG decodes at 1/2, 1/4 or 1/8 size for a fraction of the work. A digit may fill little of its photograph.
        ample = 32 if spec.fit == "digit" else 4
        image.draft(None, (ample * spec.width, ample * spec.height))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    image = _eight_bits(image)
    if image.has_transparency_data:
        image = _without_alpha(image)
    return image if image.mode == _mode(spec) else image.convert(_mode(spec))


def _mode(spec: InputSpec) -> str:
    return "L" if spec.channels == 1 else "RGB"


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and floating-point greyscale to mode L. Pillow's own conversion clips at 255 instead."""
    if not image.mode.startswith(("I", "F")):
        return image
    if image.mode.startswith("I;16"):
        scale = (np.arange(65536) / 257).round().astype(np.uint8)
        return Image.fromarray(scale[np.asarray(image)])
    values = np.nan_to_num(np.asarray(_reduced(image), dtype=np.float64))
    # 32 bits hold anything; the values tell what was meant.
    depths = (1.0, 255.0) if image.mode == "F" else (255.0,)
    depth = next((depth for depth in depths if values.max() <= depth), 65535.0)
    return Image.fromarray((values.clip(0, depth) * (255.0 / depth)).round().astype(np.uint8))


def _reduced(image: Image.Image) -> Image.Image:
    """At most about AMPLE_PIXELS, by whole-number averaging."""
    factor = math.ceil(math.sqrt(image.width * image.height / AMPLE_PIXELS))
    return image.reduce(factor) if factor > 1 else image


def _without_alpha(image: Image.Image) -> Image.Image:
    """Lay a picture with transparency on white, as a viewer shows it; light ink on nothing goes on black instead."""
    rgba = _reduced(image.convert("RGBA"))
    alpha = np.asarray(rgba.getchannel("A"), dtype=np.float64)
    light = np.asarray(rgba.convert("L"), dtype=np.float64)
    weight = alpha.sum()
    is_light = weight > 0 and (light * alpha).sum() / weight > 235  # white or nearly: it would vanish on white
    backdrop = Image.new("RGBA", rgba.size, "black" if is_light else "white")
    return Image.alpha_composite(backdrop, rgba)
