"""Pictures as an image model reads them, by its preprocessor_config.json: the same in training and in deployment.

Resizing, cropping, scaling and normalising as transformers' processors do on Pillow; needs neither them nor torch.

    B  rows    C  channels (3)    H  height    W  width
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilpeft.errors import InputError
from distilpeft.machine.files import write_json

FILE = "preprocessor_config.json"
CHANNELS = 3
UNKNOWN = ("do_pad", "do_reduce_labels", "do_split_image", "do_thumbnail", "do_rotate")
"""Steps of other processors; a model that asks for one would be fed differently than in training."""
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Reader:
    """What stands in for a tokenizer, of an image model.

    Attributes:
        settings: of preprocessor_config.json.
        name: of the model, for messages.
    """

    settings: Mapping[str, Any]
    name: str
    pad_token_id = None

    @classmethod
    def of(cls, file: Path, name: str) -> Reader:
        """Read a model's file.

        Raises:
            InputError: it cannot be read, or asks for what is not known here.
        """
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{name}: cannot read its {FILE}, which says how it reads pictures: {error}") from None
        reader = cls(settings, name)
        wrong = [step for step in UNKNOWN if settings.get(step)]
        if wrong:
            raise InputError(f"{name}: its {FILE} asks for {wrong[0]}, which is not supported")
        if reader.shape is None:
            raise InputError(f"{name}: its {FILE} gives pictures no fixed size (size, crop_size), which is needed")
        return reader

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """C, H and W of every picture; None if they come in different sizes."""
        settings = self.settings
        size = settings.get("size") or {}
        if settings.get("do_center_crop"):
            size = settings.get("crop_size") or size
        elif "crop_pct" in settings and "shortest_edge" in size:
            size = {"height": size["shortest_edge"], "width": size["shortest_edge"]}
        size = {"height": size, "width": size} if isinstance(size, int) else size
        return (CHANNELS, int(size["height"]), int(size["width"])) if {"height", "width"} <= set(size) else None

    def pixels(self, picture: Any) -> Pixels:
        """One picture [C, H, W]: a file's path or bytes, a mapping with either, or one of Pillow's.

        Raises:
            InputError: it cannot be read.
        """
        image = opened(picture).convert("RGB")
        settings, size = self.settings, self.settings.get("size") or {}
        if settings.get("do_resize", True):
            image = image.resize(self._resized(image.size, size), settings.get("resample", 2))
        assert self.shape is not None
        _, height, width = self.shape
        if (image.height, image.width) != (height, width):
            image = _center(image, height, width)
        return np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1))

    def _resized(self, old: tuple[int, int], size: Mapping[str, int]) -> tuple[int, int]:
        """Width and height to resize to."""
        if "height" in size:
            return int(size["width"]), int(size["height"])
        short = size["shortest_edge"]
        if "crop_pct" in self.settings and short < 384:  # ConvNeXT: larger, then cropped
            short = int(short / self.settings["crop_pct"])
        elif "crop_pct" in self.settings:
            return short, short
        width, height = old
        long = int(short * max(old) / min(old))
        return (short, long) if width <= height else (long, short)

    def values(self, pixels_BCHW: Pixels) -> NDArray[np.float32]:
        """What the model takes."""
        settings = self.settings
        values = pixels_BCHW.astype(np.float32)
        if settings.get("do_rescale", True):
            values *= np.float32(settings.get("rescale_factor", 1 / 255))
        if settings.get("do_normalize", True) and settings.get("image_mean") is not None:
            mean, std = (np.array(settings[name], np.float32)[:, None, None] for name in ("image_mean", "image_std"))
            values = (values - mean) / std
        return values[:, ::-1].copy() if settings.get("do_flip_channel_order") else values

    def save_pretrained(self, folder: str) -> None:
        """Write its file."""
        write_json(Path(folder) / FILE, dict(self.settings))


def _center(image: Any, height: int, width: int) -> Any:
    """The middle of a picture; black where it is too small."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def opened(picture: Any) -> Any:
    """A picture of Pillow's, its file not yet decoded.

    Raises:
        InputError: there is no such file, or it holds no picture.
    """
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path")
    try:
        return Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else Path(str(picture)).expanduser())
    except OSError as error:
        what = f"{len(picture)} bytes" if isinstance(picture, bytes) else str(picture)
        raise InputError(f"{what}: not a picture that can be read ({error.strerror or type(error).__name__})") from None


def digest(pixels: Pixels) -> list[int]:
    """Names a picture by its content: four numbers of 32 bits."""
    code = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
    return [int(number) for number in np.frombuffer(code, "<i4")]


def varied(pixels: Pixels, chances: Sequence[float], *, flip: bool, shift: float) -> Pixels:
    """A picture mirrored or moved, without new colours: what is moved in repeats the edge.

    Args:
        pixels: [C, H, W].
        chances: three random numbers of [0, 1): whether to mirror, and how far to move.
        flip: mirror left and right in half of the cases.
        shift: of height and width, at most.
    """
    if flip and chances[0] < 0.5:
        pixels = pixels[:, :, ::-1]
    for axis, chance in ((1, chances[1]), (2, chances[2])):
        size = pixels.shape[axis]
        by = round((2 * chance - 1) * shift * size)
        pixels = np.take(pixels, np.clip(np.arange(size) - by, 0, size - 1), axis=axis)
    return np.ascontiguousarray(pixels)
