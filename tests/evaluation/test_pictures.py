"""Sets of images: archives, folders, sources, drawings; by their location on the command line."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import tiny_generator_config, tiny_tokenizer

from titok_fast import ImageBert, TiTokPipeline
from titok_fast.data.sources import ArraySource, BadRecord
from titok_fast.evaluation.generation import read_reference
from titok_fast.evaluation.pictures import (
    ArrayPictures,
    DrawnPictures,
    FolderPictures,
    SourcePictures,
    batches,
    find_source,
    open_pictures,
)
from titok_fast.evaluation.statistics import Gaussian, read_statistics, write_statistics
from titok_fast.io.images import save_png, to_tensor, to_uint8
from titok_fast.io.npz import Batch, NpzPictures, write_archive

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)


def labelled(batch: Batch) -> tuple[torch.Tensor, list[int]]:
    images, labels = batch
    assert labels is not None
    return images, labels.tolist()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_parts(tmp_path: Path, save: object) -> None:
    save(tmp_path / "a.npz", PIXELS)  # type: ignore[operator]
    pictures = NpzPictures(tmp_path / "a.npz")
    assert len(pictures) == 7
    for part in (range(0, 3), range(3, 7), range(1, 2)):
        images, labels = pictures.read(part)
        assert labels is None
        assert np.array_equal(images, PIXELS[part.start : part.stop])


def test_npz_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", PIXELS, np.arange(7) * 3)  # ADM's samples have them as arr_1
    _, labels = labelled(NpzPictures(tmp_path / "a.npz").read(range(2, 5)))
    assert labels == [6, 9, 12]
    manifest = {"num": 7, "classes": 3}
    write_archive(tmp_path / "b.npz", iter(PIXELS), 8, manifest, lambda n: None)
    images, labels = labelled(NpzPictures(tmp_path / "b.npz").read(range(2, 7)))
    assert labels == [2, 0, 1, 2, 0]
    assert np.array_equal(images, PIXELS[2:])


def test_npz_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        NpzPictures(tmp_path / "none.npz")
    path = tmp_path / "a.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"no \.npz file"):
        NpzPictures(path)
    shape = r"\(n, H, W, 3\) uint8"
    for arrays, message in (
        ({"images": PIXELS}, "arr_0"),
        ({"arr_0": PIXELS.astype(np.float32)}, shape),
        ({"arr_0": PIXELS[..., 0]}, shape),
        ({"arr_0": PIXELS[:0]}, shape),
        ({"arr_0": np.asfortranarray(PIXELS)}, "Fortran"),
        ({"arr_0": PIXELS, "arr_1": np.arange(6)}, r"\(7,\) integer classes"),
    ):
        np.savez(path, **arrays)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            NpzPictures(path)


def test_npz_with_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="readable statistics"):
        read_statistics(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="uint8"):
        NpzPictures(tmp_path / "b.npz")


def test_npz_shorter_than_its_header(tmp_path: Path) -> None:
    np.save(tmp_path / "arr_0.npy", PIXELS)
    whole = (tmp_path / "arr_0.npy").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", whole[:-100])
    pictures = NpzPictures(tmp_path / "a.npz")
    pictures.read(range(0, 4))
    with pytest.raises(ValueError, match="truncated in image"):
        pictures.read(range(4, 7))


def test_statistics_file(tmp_path: Path) -> None:
    made = Gaussian(torch.rand(4).double(), torch.rand(4, 4).double(), 12)
    write_statistics(tmp_path / "s.npz", made, "fashion-classifier")
    found = read_statistics(tmp_path / "s.npz")
    assert found is not None
    got, network = found
    assert network == "fashion-classifier"
    assert got.count == 12
    assert torch.equal(got.mean, made.mean)
    assert torch.equal(got.covariance, made.covariance)
    with pytest.raises(ValueError, match=r"ending in \.npz"):
        write_statistics(tmp_path / "s.json", made, "x")


def test_adm_reference(tmp_path: Path) -> None:
    path = tmp_path / "VIRTUAL.npz"
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(path, PIXELS, mu=np.ones(3, np.float32), sigma=np.eye(3), **spatial)
    reference = read_reference(str(path))
    assert reference.network == "inception"
    assert reference.statistics is not None
    assert reference.statistics.mean.dtype == torch.float64
    assert reference.pictures is not None
    assert len(reference.pictures) == 7
    np.savez(path, mu=np.ones(3), sigma=np.eye(3))
    assert read_reference(str(path)).pictures is None
    np.savez(path, mu=np.ones(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"sigma \(d, d\)"):
        read_reference(str(path))


def test_flat_folder_in_file_order(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        save_png(tmp_path / f"{i:06d}_{i + 5}.png", Image.fromarray(PIXELS[i]))
    pictures = open_pictures(str(tmp_path))
    images, labels = labelled(pictures.read(range(1, 3)))
    assert np.array_equal(images, PIXELS[1:3])
    assert labels == [6, 7]
    save_png(tmp_path / "000003_1.png", Image.new("RGB", (9, 8)))
    with pytest.raises(ValueError, match=r"000003_1.png is \(9, 8\)"):
        FolderPictures(tmp_path).read(range(4))
    resized, _ = FolderPictures(tmp_path, 4).read(range(4))
    assert resized.shape == (4, 4, 4, 3)
    wanted = to_uint8(to_tensor(tmp_path / "000000_5.png", 4), rounding="round")
    assert torch.equal(resized[:1], wanted)


def test_folder_of_sample_many(tmp_path: Path) -> None:
    for i in range(5):
        save_png(tmp_path / f"{i:06d}.png", Image.fromarray(PIXELS[i]))
    assert FolderPictures(tmp_path).read(range(5))[1] is None
    (tmp_path / "manifest.json").write_text(json.dumps({"classes": 3}))
    assert labelled(FolderPictures(tmp_path).read(range(5)))[1] == [0, 1, 2, 0, 1]


def test_folder_of_classes(tmp_path: Path) -> None:
    for i, name in enumerate(("cat", "ant")):
        (tmp_path / name).mkdir()
        save_png(tmp_path / name / "a.png", Image.fromarray(PIXELS[i]))
    found = find_source(str(tmp_path))
    assert found is not None
    assert found[1] == 2
    with pytest.raises(ValueError, match="--size"):
        open_pictures(str(tmp_path))
    images, labels = labelled(open_pictures(str(tmp_path), 8).read(range(2)))
    assert labels == [0, 1]
    assert np.array_equal(images, PIXELS[[1, 0]])


def test_archive_of_another_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", PIXELS)
    with pytest.raises(ValueError, match="wanted 16 x 16"):
        open_pictures(str(tmp_path / "a.npz"), 16)


def test_missing_locations(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_pictures(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError):
        open_pictures("webdataset:" + str(tmp_path / "s-{00..01}.tar"), 32)
    with pytest.raises(ValueError, match="splits train and eval"):
        open_pictures("fashion-mnist:test")


def test_source_pictures_name_a_damaged_record() -> None:
    class Torn(ArraySource):
        def read(self, index: int) -> object:  # type: ignore[override]
            if index == 3:
                raise BadRecord("it is empty")
            return super().read(index)

    pictures = SourcePictures(Torn(PIXELS, np.arange(7)), 8)
    images, labels = labelled(pictures.read(range(3)))
    assert np.array_equal(images, PIXELS[:3])
    assert labels == [0, 1, 2]
    with pytest.raises(ValueError, match=r"array\[3\]: it is empty"):
        pictures.read(range(2, 5))


def test_drawn_pictures_are_those_of_the_pipeline() -> None:
    torch.manual_seed(0)
    pipe = TiTokPipeline(tiny_tokenizer(), ImageBert(tiny_generator_config()).eval())
    pictures = DrawnPictures(pipe, 6, seed=3, num_sample_steps=2)
    images, labels = labelled(pictures.read(range(4, 6)))
    assert labels == [4, 5]
    whole = pipe(list(range(6)), seed=3, output="tensor", num_sample_steps=2)
    assert torch.equal(images, whole[4:6])  # type: ignore[index]
    with pytest.raises(ValueError, match="generator"):
        DrawnPictures(TiTokPipeline(tiny_tokenizer()), 6)


def test_batches_cover_a_set_once() -> None:
    pictures = ArrayPictures(PIXELS, np.arange(7))
    parts = list(batches(pictures, 3))
    assert [first for first, _, _ in parts] == [0, 3, 6]
    assert np.array_equal(torch.cat([images for _, images, _ in parts]), PIXELS)
    with pytest.raises(ValueError, match="wants 7 labels"):
        ArrayPictures(PIXELS, np.arange(6))
