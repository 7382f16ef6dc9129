"""Images that rows name: files, bytes and data URIs, all of them untrusted, and their pixels.

An image is known by a key of its pixels, so the same picture in another file or format is the same
image, and held-out splits and noise depend on what is seen.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..core.errors import Ar2DiffError, first_line, shortened
from .rows import kind_of

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MOST_PIXELS = 64 << 20  # of an image, by its header: more would be a bomb, not a picture
KEY_BITS = 42  # of an image's key, beside the 20 bits for the number of a placeholder
INSTALL = "pip install 'ar2diff[vision]'"
FIX = "correct or remove the row"


@dataclass(frozen=True)
class Shot:
    """Where an image is: in a file, or in bytes that a row holds, or as it was given."""

    place: Path | bytes | Any = field(repr=False)

    def pixels(self, where: str = "the data", most: int = MOST_PIXELS) -> Any:
        """The picture, in RGB and the right way up; of several frames the first.

        Args:
            where: what an error calls the row.
            most: pixels that it may have.

        Raises:
            Ar2DiffError: it is missing, broken, far too large, or of another format.
        """
        from PIL import Image

        place, name = self.place, self.name
        try:
            if isinstance(place, Image.Image):
                return _upright(place, f"{where}: {name}", most)
            source = io.BytesIO(place) if isinstance(place, bytes) else place
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of bombs, of which ours are smaller
                image = Image.open(source, formats=FORMATS)
            with image:
                return _upright(image, f"{where}: {name}", most)
        except Ar2DiffError:
            raise
        except Image.DecompressionBombError:  # Pillow's own limit, which is above ours
            raise _too_large(f"{where}: {name}", "more pixels", most) from None
        except FileNotFoundError:
            raise Ar2DiffError(f"{where}: {name} does not exist", "correct the path") from None
        except Image.UnidentifiedImageError:
            raise Ar2DiffError(
                f"{where}: {name} is no image of a known format",
                f"use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}",
            ) from None
        except Exception as error:  # each of Pillow's decoders raises what it likes
            raise Ar2DiffError(f"{where}: {name} is broken ({first_line(error)})", FIX) from None

    @property
    def name(self) -> str:
        """What an error calls it."""
        return f"image {self.place}" if isinstance(self.place, Path) else "the image"


def _upright(image: Any, what: str, most: int) -> Any:
    """An image as `Shot.pixels` has it, which is not decoded before its size is known."""
    from PIL import ImageOps

    width, height = image.size
    if width * height > most:
        raise _too_large(what, f"{width} x {height} pixels, more", most)
    if image.mode.startswith(
        "I;16"
    ):  # greys of 16 bits: Pillow would make nearly all of them white
        image = image.point(lambda grey: grey / 256).convert("L")
    return ImageOps.exif_transpose(image).convert("RGB")


def _too_large(what: str, has: str, most: int) -> Ar2DiffError:
    fix = "make it smaller, or remove the row"
    return Ar2DiffError(f"{what} has {has} than {most:,}", fix)


def shot_of(value: Any, where: str, folder: Path) -> Shot:
    """The image that a value of a row means: a path, relative to the folder of the data; a
    `file://` or `data:` URL; bytes; `{"bytes": ..., "path": ...}`; or an image of Pillow.

    Raises:
        Ar2DiffError: it means none, or one that would have to be downloaded.
    """
    if isinstance(value, dict):
        value = next((value[k] for k in ("bytes", "path", "url") if value.get(k)), None)
    if isinstance(value, bytes) or hasattr(value, "convert"):
        return Shot(value)
    if not isinstance(value, str) or not value:
        raise Ar2DiffError(
            f"{where}: an image is {kind_of(value)}, but must be a path, a data URI or bytes", FIX
        )
    if value.startswith(("http://", "https://")):
        raise Ar2DiffError(
            f"{where}: the image {shortened(value)} is on the web, from where nothing is fetched",
            "download the images, and name their files",
        )
    if value.startswith("data:"):
        return Shot(of_base64(value.partition(",")[2], where))
    if value.startswith("file://"):
        value = unquote(urlsplit(value).path)
    return Shot(folder / os.path.expanduser(value))  # noqa: PTH111 Path's may raise


def of_base64(text: Any, where: str) -> bytes:
    """The bytes that base64 says."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise Ar2DiffError(f"{where}: an image is not valid base64", FIX) from None


class Shots:
    """Images by their keys. The key of an image is that of its pixels.

    Attributes:
        most: pixels that an image may have.
        room: pixels that are left for others, each as often as it is named; None: any number.
    """

    def __init__(self) -> None:
        self.most = MOST_PIXELS
        self.room: int | None = None
        self.shots: dict[int, Shot] = {}
        self.sizes: dict[int, tuple[int, int]] = {}
        self._digests: dict[int, bytes] = {}
        self._known: dict[Any, int] = {}

    def __len__(self) -> int:
        return len(self.shots)

    def __iter__(self) -> Iterator[int]:
        return iter(self.shots)

    def add(self, shot: Shot, where: str) -> int:
        """The key of an image, which is read whole.

        Raises:
            Ar2DiffError: as `Shot.pixels`, or Pillow is not installed; or there is no room left.
        """
        key = self._added(shot, where)
        if self.room is not None:
            width, height = self.sizes[key]
            self.room -= width * height
            if self.room < 0:
                raise Ar2DiffError(
                    f"{where}: the images have too many pixels together", "make them smaller"
                )
        return key

    def _added(self, shot: Shot, where: str) -> int:
        named = shot.place if isinstance(shot.place, Path | bytes) else None
        if named is not None and named in self._known:
            return self._known[named]
        check_pillow()
        pixels = shot.pixels(where, self.most)
        digest = digest_of(pixels)
        key = self._key(digest)
        if key not in self.shots:
            self.shots[key], self.sizes[key], self._digests[key] = shot, pixels.size, digest
        if named is not None:
            self._known[named] = key
        return key

    def content(self, key: int) -> bytes:
        """The `digest_of` an image."""
        return self._digests[key]

    def _key(self, digest: bytes) -> int:
        """The key of a digest: its own, unless another image has that."""
        key = int.from_bytes(digest, "little") % (1 << KEY_BITS)
        while self._digests.get(key, digest) != digest:
            key = (key + 1) % (1 << KEY_BITS)
        return key

    def fingerprint(self) -> str:
        """The digest of all of them, in any order."""
        return hashlib.sha256(b"".join(sorted(self._digests.values()))).hexdigest()

    def include(self, other: Shots) -> dict[int, int]:
        """Add the images of another collection. Returns {their keys: the keys here}."""
        found = {}
        for key, digest in other._digests.items():
            found[key] = own = self._key(digest)
            self.shots[own], self.sizes[own] = other.shots[key], other.sizes[key]
            self._digests[own] = digest
        return found


def digest_of(pixels: Any) -> bytes:
    """16 bytes that tell an RGB image by its size and pixels."""
    hashed = hashlib.blake2b(f"{pixels.width} {pixels.height} ".encode(), digest_size=16)
    hashed.update(pixels.tobytes())
    return hashed.digest()


def check_pillow() -> None:
    """Refuse images where nothing reads them.

    Raises:
        Ar2DiffError: Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise Ar2DiffError(
            "images need the package Pillow, which is not installed", INSTALL
        ) from None
