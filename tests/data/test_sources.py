"""Sources of training records: what they read, what they refuse, what identifies them."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from support.records import encoded, pixels, saved, write_fashion, write_idx

from titok_fast.data.sources import (
    FASHION_MNIST,
    ArraySource,
    BadRecord,
    FolderSource,
    check_same_data,
    fashion_mnist,
)


def test_long_lists_of_changes_are_cut_short() -> None:
    before = {"kind": "webdataset", "shards": {f"{i}.tar": 1 for i in range(9)}}
    after = {"kind": "webdataset", "shards": {f"{i}.tar": 2 for i in range(9)}}
    with pytest.raises(ValueError, match=r"3\.tar was 1, now 2; and 5 more"):
        check_same_data(before, after)
    with pytest.raises(ValueError, match="kind was 'webdataset', now 'tokens'"):
        check_same_data(before, {"kind": "tokens", "shards": 3})


def image_folder(folder: Path) -> Path:
    for name in ("n02", "n01/deep", "n10"):
        (folder / name).mkdir(parents=True)
    for index, name in enumerate(["n01/deep/a.png", "n01/z.png", "n02/b.png", "n10/c.png"]):
        (folder / name).write_bytes(encoded(pixels(index)))
    (folder / "readme.txt").write_text("no class")
    (folder / ".cache").mkdir()
    return folder


def test_folder(tmp_path: Path) -> None:
    source = FolderSource(image_folder(tmp_path), classes=3)
    names = [source.name(i) for i in range(4)]
    assert names == ["n01/deep/a.png", "n01/z.png", "n02/b.png", "n10/c.png"]
    assert [source.read(i).label for i in range(4)] == [0, 0, 1, 2]
    assert all(np.array_equal(source.read(i).values, pixels(i)) for i in range(4))
    before = saved(source)
    assert (before["count"], before["classes"]) == (4, 3)
    (tmp_path / "n02/b.png").write_bytes(encoded(pixels(7, 11, 13)))
    with pytest.raises(ValueError, match="names_and_sizes_sha256 was"):
        check_same_data(before, saved(FolderSource(tmp_path)))


def test_folder_faults(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        FolderSource(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one or more sub-folders, one per class; got 0"):
        FolderSource(tmp_path)
    source = FolderSource(image_folder(tmp_path))
    with pytest.raises(ValueError, match="wants 1 to 2 sub-folders, one per class; got 3"):
        FolderSource(tmp_path, classes=2)
    (tmp_path / "n01/z.png").write_bytes(b"<html>404</html>")
    (tmp_path / "n02/b.png").unlink()
    with pytest.raises(BadRecord, match="not readable as a jpg, png or webp image"):
        source.read(1)
    with pytest.raises(FileNotFoundError):
        source.read(2)
    with pytest.raises(ValueError, match="n02"):  # a class without a picture
        FolderSource(tmp_path)


def test_fashion_mnist_is_padded_with_black(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    for split, count in (("train", 24), ("eval", 12)):
        source = fashion_mnist(split, tmp_path)
        assert len(source) == count
        assert source.images.shape == (count, 32, 32)
        record = source.read(11)
        assert (record.values.shape, record.label) == ((32, 32, 3), 1)
        assert np.array_equal(record.values[:, :, 0], record.values[:, :, 2])
        assert not record.values[:2].any()
        assert not record.values[:, 30:].any()
    raw = gzip.decompress((tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(raw[16:], np.uint8).reshape(12, 28, 28)
    assert np.array_equal(source.images[:, 2:30, 2:30], images)
    assert source.describe()["kind"] == "fashion-mnist"


def _ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (_ones(24, 28, 28), _ones(23), "got (24, 28, 28) and 23 labels"),
        (_ones(24, 14, 28), _ones(24), "got (24, 14, 28) and 24 labels"),
        (_ones(24, 28, 28), 10 * _ones(24), "wants labels 0..9; got 10"),
        (_ones(24, 28), _ones(24), "wants an idx file that starts 00 00 08 03; got 00 00 08 02"),
        (_ones(24, 28, 28), _ones(24, 1), "starts 00 00 08 01; got 00 00 08 02"),
        (_ones(0, 28, 28), _ones(0), "wants at least one image"),
    ],
)
def test_fashion_files_that_do_not_fit(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, message: str
) -> None:
    write_fashion(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    with pytest.raises(ValueError, match=re.escape(message)):
        fashion_mnist("train", tmp_path)


def test_damaged_fashion_files(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    raw = gzip.decompress(whole)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content, message in (
        (whole[:-100], "is damaged: Compressed file ended"),
        (bytes(flipped), "is damaged: "),
        (raw, "is damaged: Not a gzipped file"),
        (gzip.compress(raw[:-1]), "wants 18816 values, as its header says; got 18815 bytes"),
        (gzip.compress(raw + b"x"), "got 18817 bytes"),
        (gzip.compress(b""), "starts 00 00 08 03; got nothing"),
        (gzip.compress(raw[:10]), "wants an idx file"),
        (gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12 + raw[16:]), "values, as its header says"),
        (gzip.compress(b"\0\0\x0d\x03" + raw[4:]), "got 00 00 0d 03"),  # floats
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(message)):
            fashion_mnist("train", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="install Debian's package dataset-fashion-mnist"):
        fashion_mnist("train", tmp_path)
    with pytest.raises(ValueError, match="splits train and eval; got 'test'"):
        fashion_mnist("test", tmp_path)


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="wants Debian's dataset-fashion-mnist")
def test_the_real_fashion_mnist() -> None:
    source = fashion_mnist("eval")
    assert len(source) == 10_000
    assert np.array_equal(np.bincount(source.labels), np.full(10, 1000))
    assert source.labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert source.describe()["sha256"] == fashion_mnist("eval").describe()["sha256"]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 8, 8, 3)), np.zeros(2, int), "got (2, 8, 8, 3) float64"),
        (np.zeros((2, 8, 8, 4), np.uint8), np.zeros(2, int), "got (2, 8, 8, 4) uint8"),
        (np.zeros((2, 3, 8, 8), np.uint8), np.zeros(2, int), "got (2, 3, 8, 8) uint8"),
        (np.zeros((2, 8, 8), np.uint8), np.zeros(3, int), "wants labels (2,) integers; got (3,)"),
        (np.zeros((2, 8, 8), np.uint8), np.zeros(2), "got (2,) float64"),
        (np.zeros((2, 8, 8), np.uint8), np.array([0, -1]), "labels of 0 or more; got -1"),
        (np.zeros((0, 8, 8), np.uint8), np.zeros(0, int), "at least one image"),
    ],
)
def test_arrays_that_are_refused(images: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ArraySource(images, labels)


def test_arrays_are_known_by_content() -> None:
    images, labels = np.stack([pixels(i) for i in range(3)]), np.arange(3)
    before = ArraySource(images, labels).describe()
    check_same_data(before, ArraySource(images.copy(), labels.astype(np.uint8)).describe())
    for other in (ArraySource(images[::-1], labels), ArraySource(images, labels[::-1])):
        with pytest.raises(ValueError, match="sha256 was"):
            check_same_data(before, other.describe())
    assert ArraySource(images, labels).name(2) == "array[2]"
