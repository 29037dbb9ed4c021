"""Crops and flips of training images, and the fixed views that pre-tokenisation encodes.

Random numbers are drawn by position in the run, so the crop of an image does not depend on the
rank, worker or batch that reads it. Not torchvision, which the core does not install, and whose
crops draw from a global generator.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from titok_fast.data.sources import BadRecord
from titok_fast.settings import require

# views of one image, in the order of their rows
VIEWS = {
    "center": ("center",),
    "center_flip": ("center", "mirrored center"),
    "ten_crop": tuple(
        f"{mirror}{corner}"
        for mirror in ("", "mirrored ")
        for corner in ("top left", "top right", "bottom left", "bottom right", "center")
    ),
}
_WORDS = 4  # 64-bit words of one Philox counter value, which is what a position gets
_MAX_ASPECT = 100  # as in images.py: a thin strip would become gigapixels


def philox(seed: int, stream: int, counter: int = 0) -> np.random.Philox:
    """A bit generator whose raw words are the same on any machine and numpy version.

    Each `stream` (0 or more) of a seed (any integer) is independent; a `counter` is four words.
    """
    return np.random.Philox(key=np.array([seed % 2**64, stream], np.uint64), counter=counter)


def crop_draws(seed: int, first: int, count: int) -> np.ndarray:
    """Random numbers for the crops of `count` positions of a run, from position `first` on.

    Returns:
        (count, 3) float64 in [0, 1): for top, left and flip.
    """
    words = np.asarray(philox(seed, 0, first).random_raw(count * _WORDS), np.uint64)
    return (words.reshape(count, _WORDS)[:, :3] >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class Crop:
    """Resize of the shorter edge (bicubic, antialiased), square crop, mirroring.

    Evaluation is `Crop(S, S, False, False)`. Source: the official data reader.

    Attributes:
        size: S, side of the result in pixels.
        shorter_edge: pixels of the shorter edge before the crop, S or more.
        random_crop: anywhere in the image; else the center.
        random_flip: mirror half of the images.
    """

    size: int
    shorter_edge: int
    random_crop: bool
    random_flip: bool

    def __post_init__(self) -> None:
        wanted = f"crop_size {self.size} or more"
        require(self.shorter_edge >= self.size, "resize_shorter_edge", wanted, self.shorter_edge)

    def offsets(
        self, draws: np.ndarray, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Top and left, (B,) int64 in pixels, and which to mirror, (B,) bool, by (B, 3) draws."""
        room = np.array([height, width]) - self.size
        if self.random_crop:
            corner = np.floor(draws[:, :2] * (room + 1)).astype(np.int64)
        else:  # half to even, as torchvision
            corner = np.tile(np.rint(room / 2).astype(np.int64), (len(draws), 1))
        return corner[:, 0], corner[:, 1], (draws[:, 2] < 0.5) & self.random_flip

    def one(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Resize and crop an image (H, W, 3) uint8 of any size, by a row of `crop_draws`.

        Raises:
            BadRecord: no pixels, or one side over 100 times the other.
        """
        resized = resize_shorter_edge(image, self.shorter_edge)
        top, left, flip = (int(x[0]) for x in self.offsets(draws[None], *resized.shape[:2]))
        crop = resized[top : top + self.size, left : left + self.size]
        return crop[:, ::-1] if flip else crop

    def many(self, images: np.ndarray, indices: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Crop images of an array whose shorter edge needs no resize; as `one` for each.

        Args:
            images: (M, H, W) or (M, H, W, 3) uint8.
            indices: (B,) which of them.
            draws: (B, 3) as `crop_draws`.

        Returns:
            (B, S, S) or (B, S, S, 3) uint8, in new memory.
        """
        S, (H, W) = self.size, images.shape[1:3]
        top, left, flip = self.offsets(draws, H, W)
        if (H, W) == (S, S):
            crops = images[indices]
        else:
            rows, columns = top[:, None] + np.arange(S), left[:, None] + np.arange(S)
            crops = images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
        crops[flip] = crops[flip, :, ::-1]
        return crops


def resize_shorter_edge(image: np.ndarray, edge: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 so that the shorter edge has `edge` pixels, exactly as torchvision.

    Raises:
        BadRecord: no pixels, or one side over 100 times the other.
    """
    height, width = image.shape[:2]
    _check_sides(height, width)
    short, long = min(height, width), max(height, width)
    if short == edge:
        return image
    new_long = int(edge * long / short)  # torchvision truncates here
    size = (edge, new_long) if width <= height else (new_long, edge)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _check_sides(height: int, width: int) -> None:
    if min(height, width) < 1 or max(height, width) > _MAX_ASPECT * min(height, width):
        wanted = f"sides above zero and at most {_MAX_ASPECT} times each other"
        raise BadRecord(f"wants {wanted}; got {width} x {height}")


def adm_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """ADM's square of side `size`: halved by boxes while twice too large, bicubic, center.

    Raises:
        BadRecord: no pixels, or one side over 100 times the other.
    """
    _check_sides(*image.shape[:2])
    scaled = Image.fromarray(image)
    while min(scaled.size) >= 2 * size:
        scaled = scaled.resize((scaled.width // 2, scaled.height // 2), Image.Resampling.BOX)
    scale = size / min(scaled.size)
    fitted = (round(scaled.width * scale), round(scaled.height * scale))
    pixels = np.asarray(scaled.resize(fitted, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def views(image: np.ndarray, size: int, augmentation: str) -> np.ndarray:
    """The fixed views of an image that are tokenised.

    Args:
        image: (H, W, 3) uint8 of any size.
        size: side S of a view in pixels.
        augmentation: "center": ADM's center crop; "center_flip": that and its mirror image;
            "ten_crop": ADM's crop at 1.1 S, its four corners and center, then those of its mirror
            image.

    Returns:
        (A, S, S, 3) uint8, A = 1, 2 or 10, in the order of `VIEWS`.

    Raises:
        BadRecord: no pixels, or one side over 100 times the other.
    """
    if augmentation != "ten_crop":
        crop = adm_center_crop(image, size)
        return np.stack([crop, crop[:, ::-1]][: len(VIEWS[augmentation])])
    square = adm_center_crop(image, int(size * 1.1))
    room = len(square) - size
    middle = round(room / 2)  # half to even, as torchvision
    corners = ((0, 0), (0, room), (room, 0), (room, room), (middle, middle))
    sides = (square, square[:, ::-1])
    return np.stack([side[t : t + size, l : l + size] for side in sides for t, l in corners])
