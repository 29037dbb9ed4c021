"""WebDataset shards: their names, what is read of them and refused, what identifies them."""

import gzip
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support.records import Trap, encoded, pixels, saved, write_shards, write_tar

from titok_fast.data.sources import BadRecord, check_same_data
from titok_fast.data.webdataset import WebDatasetSource, expand
from titok_fast.io.images import load_image


def test_patterns_count_up_keep_zeros_and_multiply() -> None:
    assert expand("a/b.tar") == [Path("a/b.tar")]
    names = expand("imagenet-train-{0000..0252}.tar")
    assert names == [Path(f"imagenet-train-{i:04d}.tar") for i in range(253)]
    wanted = [Path(f"{a}/x{b}.tar") for a in (8, 9, 10) for b in (0, 1)]
    assert expand("{8..10}/x{0..1}.tar") == wanted


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("pipe:cat x.tar", "not through 'pipe:'"),
        ("https://host/x-{0..3}.tar", "not through 'https:'"),
        ("s3://bucket/x.tar", "not through 's3:'"),
        ("file:/data/x.tar", "not through 'file:'"),
        ("x-{3..1}.tar", "3..1 runs backwards"),
        ("x-{a..c}.tar", "braces want two numbers"),
        ("x-{0,1}.tar", "braces want two numbers"),
        ("x-{0..1.tar", "braces want two numbers"),
        ("x-{0..999999999999}.tar", "more than 1000000 shards"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        expand(pattern)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_records_of_all_formats_of_tar_and_picture(tmp_path: Path, kind: int) -> None:
    long = "orange-" * 20 + "/1"  # over the 100 bytes of a plain header
    members = [
        ("a.json", b"{}"),  # neither picture nor class
        ("a.cls", b"3\n"),  # any order
        ("a.png", encoded(pixels(0))),
        ("b.jpg", encoded(pixels(1), "JPEG")),
        ("b.cls", b"0"),
        ("c.JPEG", encoded(pixels(2), "PNG")),  # ImageNet has a PNG of that name
        ("c.seg.png", b"of another suffix"),
        ("c.cls", b"999"),
        (f"{long}.webp", encoded(pixels(3), "WEBP")),
        (f"{long}.cls", b"7"),
        ("only.txt", b"no record"),
    ]
    path = write_tar(tmp_path / "x.tar", members, kind)
    source = WebDatasetSource(str(path))
    assert len(source) == 4
    records = [source.read(i) for i in range(4)]
    assert [record.label for record in records] == [3, 0, 999, 7]
    for index in (0, 2, 3):
        assert np.array_equal(records[index].values, pixels(index))
    (tmp_path / "b.jpg").write_bytes(members[3][1])
    assert np.array_equal(records[1].values, np.asarray(load_image(tmp_path / "b.jpg")))
    assert source.name(3) == f"x.tar:{long}"
    with pytest.raises(IndexError):
        source.read(4)


def test_indices_run_on_over_shards(tmp_path: Path) -> None:
    source = WebDatasetSource(write_shards(tmp_path, [3, 1, 4]))
    assert len(source) == 8
    for index in range(8):
        assert np.array_equal(source.read(index).values, pixels(index))
    assert source.name(3) == "train-001.tar:00000003"
    copy = pickle.loads(pickle.dumps(source))  # as a spawned worker gets it
    assert np.array_equal(copy.read(7).values, pixels(7))


def test_nothing_is_unpickled_or_extracted(tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    members = [("0.png", encoded(pixels(0))), ("0.cls", b"1")]
    members += [(f"0.{suffix}", trap) for suffix in ("pkl", "pickle", "pth", "pyd", "npy")]
    write_tar(tmp_path / "x.tar", [*members, ("../1.png", b"x"), ("/abs/2.cls", b"1")])
    source = WebDatasetSource(str(tmp_path / "x.tar"))
    assert source.read(0).label == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    pickle.loads(trap)  # the trap works
    assert (tmp_path / "sprung").is_dir()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", b"garbage"), ("0.cls", b"1")], "not readable as a jpg, png or webp"),
        ([("0.jpg", b""), ("0.cls", b"1")], "it is empty"),
        ([("0.jpg", encoded(pixels(0), "JPEG")[:400]), ("0.cls", b"1")], "OSError: "),
        ([("0.jpg", encoded(pixels(0), "BMP")), ("0.cls", b"1")], "UnidentifiedImageError"),
        ([("0.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n"), ("0.cls", b"1")], "UnidentifiedImageError"),
        ([("0.png", encoded(pixels(0)))], "it has no cls"),
        ([("0.cls", b"1")], "it has no image"),
        ([("0.png", encoded(pixels(0))), ("0.cls", b"dog")], "got 'dog'"),
        ([("0.png", encoded(pixels(0))), ("0.cls", b"-1")], "got '-1'"),
        ([("0.png", encoded(pixels(0))), ("0.cls", b"")], "got ''"),
        ([("0.png", encoded(pixels(0))), ("0.cls", b"1" * 17)], "got 17 bytes"),
        ([("0.png", encoded(pixels(0))), ("0.cls", b"10")], r"a class in 0..9; got 10"),
    ],
)
def test_damaged_records(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    sound = [("1.png", encoded(pixels(1))), ("1.cls", b"9")]
    source = WebDatasetSource(str(write_tar(tmp_path / "x.tar", [*members, *sound])), classes=10)
    with pytest.raises(BadRecord, match=re.escape(message)):
        source.read(0)
    assert source.name(0) == "x.tar:0"
    assert np.array_equal(source.read(1).values, pixels(1))


def test_oversized_picture_is_one_damaged_record(tmp_path: Path) -> None:
    bomb = encoded(np.zeros((20000, 10000, 3), np.uint8))  # over twice Pillow's limit
    members = [("0.png", bomb), ("0.cls", b"1")]
    source = WebDatasetSource(str(write_tar(tmp_path / "x.tar", members)))
    with pytest.raises(BadRecord, match="DecompressionBombError"):
        source.read(0)


def member_offsets(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def test_truncated_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, [4])
    whole, path = (tmp_path / "train-000.tar").read_bytes(), tmp_path / "cut.tar"
    border = member_offsets(tmp_path / "train-000.tar")[4]
    end = whole.rstrip(b"\0")
    # nothing, a header, a border between members, in a header, in a picture, at the last byte
    for size in (0, 512, border, border + 100, border + 1600, len(end)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"shard .*cut\.tar is truncated, damaged or compr"):
            WebDatasetSource(str(path))
    path.write_bytes(whole)
    assert len(WebDatasetSource(str(path))) == 4


def test_damaged_header_inside_a_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, [4])
    path = tmp_path / "train-000.tar"
    content = bytearray(path.read_bytes())
    content[member_offsets(path)[4] + 5] ^= 0xFF  # in a name: the check sum is wrong
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is truncated, damaged or compressed: no end mark"):
        WebDatasetSource(str(path))


def test_shards_that_cannot_be_used(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, [1, 1, 1])
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress((tmp_path / "train-000.tar").read_bytes()))
    write_tar(tmp_path / "empty.tar", [])
    write_tar(tmp_path / "texts.tar", [("0.txt", b"x")])
    write_tar(tmp_path / "twice.tar", [("0.cls", b"1"), ("0.cls", b"2")])
    for name, message in (
        ("packed", "unpacked if it was compressed"),
        ("empty", "wants records with jpg, png, jpeg, webp and cls; got none"),
        ("texts", "wants records with jpg, png, jpeg, webp and cls; got none"),
        ("twice", "holds 0.cls twice"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            WebDatasetSource(str(tmp_path / f"{name}.tar"))
    (tmp_path / "train-001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 shards .*/train-001\.tar first"):
        WebDatasetSource(pattern)


def test_pictures_in_a_shard_that_shrank_or_went(tmp_path: Path) -> None:
    source = WebDatasetSource(write_shards(tmp_path, [4]))
    path = tmp_path / "train-000.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadRecord):
        source.read(3)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        source.read(0)


def test_shards_are_known_by_content_and_not_by_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    before = saved(WebDatasetSource(write_shards(tmp_path / "a", [2, 3, 2])))
    assert before["count"] == 7
    shutil.move(tmp_path / "a", tmp_path / "b")
    pattern = f"{tmp_path}/b/train-{{000..002}}.tar"
    check_same_data(before, saved(WebDatasetSource(pattern)))

    fewer = saved(WebDatasetSource(f"{tmp_path}/b/train-{{000..001}}.tar"))
    with pytest.raises(ValueError, match=r"there were 3 shards, now 2; count was 7, now 5;"):
        check_same_data(before, fewer)
    members = [("x.png", encoded(pixels(9))), ("x.cls", b"1")]
    write_tar(tmp_path / "b/train-001.tar", [*members, ("y.cls", b"7" * 30000)])
    with pytest.raises(ValueError, match=r"shards\.train-001\.tar was \d+, now \d+"):
        check_same_data(before, saved(WebDatasetSource(pattern)))


@pytest.mark.parametrize("names", ["ab", ("00000000", "00000001")])
def test_same_sizes_and_other_records_are_other_data(tmp_path: Path, names: str) -> None:
    before = saved(WebDatasetSource(write_shards(tmp_path, [2])))
    members = []
    for index, name in enumerate(names):  # as before, but for the names or for a byte at the end
        members += [(f"{name}.png", encoded(pixels(index)) + b"x" * (len(name) > 1))]
        members += [(f"{name}.cls", str(index).encode())]
    write_tar(tmp_path / "train-000.tar", members)
    now = saved(WebDatasetSource(f"{tmp_path}/train-000.tar"))
    assert (before["count"], before["shards"]) == (now["count"], now["shards"])  # tar pads
    with pytest.raises(ValueError, match=r"index_sha256 was .*\. Give it the same files"):
        check_same_data(before, now)
