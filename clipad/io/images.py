"""How an image and its mask become pixels (METHOD.md section 1): whatever is no complete image is refused by name."""

from pathlib import Path

import numpy as np
from PIL import Image

PIXEL_LIMIT = 64_000_000  # of one image: 8000 x 8000
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # others (EPS runs a program) stay closed


class MaskSizeError(ValueError):
    """A mask has another size than its image."""


def read_image(path: str | Path) -> Image.Image:
    """Decode an image into mode L or RGB, 8 bits a channel, at its stored size and orientation.

    L and RGB stay as they are; palette, 1-bit, LA, RGBA and CMYK images become RGB, alpha is dropped, 16-bit grey is
    scaled by 255/65535 (METHOD.md section 1). Raises OSError (naming the file) for anything that is not
    a complete PNG, JPEG, BMP, TIFF or WebP image of at most `PIXEL_LIMIT` pixels of 8 or 16 bits.
    """
    return eight_bit(decode(path))


def read_mask(path: str | Path, image_size: int | None = None) -> np.ndarray:
    """Read a ground-truth mask as an S x S bool array, S = `image_size`; None: H x W as stored (METHOD.md section 1).

    A pixel is anomalous where any colour channel is > 0 (of a palette the index; alpha is ignored), decided at native
    size; then `resize_mask`. Errors as `read_image`.
    """
    image = decode(path)
    if image.mode in ("1", "L", "F", "P") or image.mode.startswith("I"):
        mask = np.asarray(image) > 0
    else:
        mask = np.asarray(eight_bit(image)).any(axis=-1)
    return mask if image_size is None else resize_mask(mask, image_size)


def require_mask_size(mask: Path, image: Path) -> None:
    """`MaskSizeError` unless a mask is as large as its image, by their headers. Other errors as `read_image`."""
    found, wanted = (decode(path, header_only=True).size for path in (mask, image))
    if found != wanted:
        raise MaskSizeError(
            f"mask {mask} has {found[0]} x {found[1]} pixels, its image {image.name} {wanted[0]} x {wanted[1]}: "
            "both are taken as stored (EXIF orientation is ignored)"
        )


def resize_mask(mask: np.ndarray, image_size: int) -> np.ndarray:
    """Resize an H x W bool mask to S x S bilinearly (antialiased) and threshold it at 0.5: thin regions can vanish.

    On the 8-bit result 127 is out and 128 is in, so that no value ties.

    >>> mask = np.zeros((96, 96), bool); mask[:, 10] = True
    >>> int(resize_mask(mask, 96).sum()), int(resize_mask(mask, 24).sum())
    (96, 0)
    """
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BILINEAR)) >= 128


def decode(path: str | Path, header_only: bool = False) -> Image.Image:
    """The image as its file has it, or only its header; errors as `read_image`."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > PIXEL_LIMIT:  # before any pixel is decoded
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            if not header_only:
                image.load()
            return image
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # a decoder meets broken data with whatever it happens to raise
        raise OSError(
            f"cannot read image {path}: {error}. Expected a complete {', '.join(IMAGE_FORMATS)} file of at most "
            f"{PIXEL_LIMIT:,} pixels"
        ) from error


def eight_bit(image: Image.Image) -> Image.Image:
    """Mode L or RGB; see `read_image`."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise OSError(
                f"cannot read image {getattr(image, 'filename', '')}: the pixels are floating-point or 32-bit numbers "
                "without a defined range; save it with 8 or 16 bits"
            )
        grey = np.round(values / 257).astype(np.uint8)  # 65535 / 257 = 255
        return Image.fromarray(grey).convert("RGB")
    if "transparency" in image.info:  # Pillow wants palettes with transparency to pass through RGBA
        image = image.convert("RGBA")
    return image.convert("RGB")
