"""Where training examples come from and how an image is cropped."""

from dataclasses import dataclass

from titok_fast.settings import Settings, among, within


@dataclass(frozen=True)
class DataConfig(Settings):
    """Settings of the data.

    Attributes:
        kind: what `train` and `eval` are: a folder with Fashion-MNIST's four files ("" is where
            Debian's package puts them), a pattern of tar shards, a folder of images, or a
            folder of token shards (or an official JSONL file).
        train, eval: path or pattern; shards as "name-{0000..0252}.tar".
        crop_size: image side S in pixels.
        resize_shorter_edge: pixels, before the crop; None is crop_size.
        random_crop, random_flip: training only.
        workers: loading processes per rank; 0 loads in the training process.
        max_bad_share: share of unreadable records above which the run stops.
    """

    kind: str = among("webdataset", "fashion-mnist", "webdataset", "folder", "tokens")
    train: str = ""
    eval: str = ""
    crop_size: int = within(256, 1)
    resize_shorter_edge: int | None = within(None, 1)
    random_crop: bool = True
    random_flip: bool = True
    workers: int = within(0, 0)
    max_bad_share: float = within(0.01, 0, 1)
