"""Many images in one process: resumed, archived, refused."""

import errno
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.sample_runs import (
    GENERATOR,
    NAMES,
    NUM,
    main,
    options,
    pictures,
    stamps,
)
from support.tiny_models import (
    rebuilt,
    tiny_tokenizer_config,
)

from titok_fast import ImageBert, SamplingConfig, TiTokPipeline
from titok_fast.io.npz import write_archive
from titok_fast.io.sample_folder import RawFolder
from titok_fast.presets import PRESETS, Preset

pytestmark = pytest.mark.usefixtures("one_thread_for_all")  # as torchrun sets it


@pytest.mark.parametrize("batch", [3, 8])
def test_holes_are_filled_and_the_rest_left_alone(
    tmp_path: Path, models: Path, wanted: np.ndarray, batch: int
) -> None:
    arguments = options(models, tmp_path, f"--batch-size={batch}")
    assert main(arguments) == 0
    for i in (0, 4, 5, 19):
        (tmp_path / NAMES[i]).unlink()
    (tmp_path / ".000004_4.png.k1ll3d.png").write_bytes(b"half")  # as a killed writer leaves it
    before = stamps(tmp_path)
    assert main(arguments) == 0
    assert before.items() <= stamps(tmp_path).items()
    assert np.array_equal(pictures(tmp_path), wanted)


def test_nothing_to_draw(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, npz = tmp_path / "out", tmp_path / "new" / "all.npz"
    assert main(options(models, out)) == 0
    before = stamps(out)
    assert main(options(models, out)) == 0
    assert main(options(models, out, f"--npz={npz}")) == 0  # the archive may be asked for later
    assert np.array_equal(np.load(npz)["arr_0"], pictures(out))
    written = stamps(npz.parent)
    assert main(options(models, out, f"--npz={npz}")) == 0
    assert (stamps(out), stamps(npz.parent)) == (before, written)
    assert capsys.readouterr().out.splitlines() == [
        f"{NUM} images in {out}",
        f"{NUM} images in {out}, {NUM} of them from before",
        *[f"{NUM} images in {out} and {npz}, {NUM} of them from before"] * 2,
    ]


def test_archive_without_png_files(
    tmp_path: Path, models: Path, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    npz, parts = tmp_path / "all.npz", tmp_path / "all.npz.parts"
    arguments = [*options(models, tmp_path, f"--npz={npz}")]
    arguments.remove(f"--out={tmp_path}")
    write = RawFolder.write

    def fail_late(store: RawFolder, indices: np.ndarray, pixels: np.ndarray) -> None:
        if indices[0] >= 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(store, indices, pixels)

    monkeypatch.setattr(RawFolder, "write", fail_late)
    assert main([*arguments, "--batch-size=4"]) == 2
    monkeypatch.setattr(RawFolder, "write", write)
    runs = ["000000-000004.u8", "000004-000008.u8", "000008-000012.u8"]
    assert sorted(path.name for path in parts.iterdir()) == [*runs, "manifest.json"]
    assert not npz.exists()
    (parts / runs[1]).write_bytes(b"cut short by a copy")
    assert main([*arguments, "--batch-size=5"]) == 0
    with np.load(npz) as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["all.npz"]
    before = stamps(tmp_path)
    assert main(arguments) == 0  # the archive itself says that all is done
    assert stamps(tmp_path) == before
    assert main([*arguments, "--force"]) == 0
    assert stamps(tmp_path) != before
    assert np.array_equal(np.load(npz)["arr_0"], wanted)


def test_raw_runs_that_overlap_count_once(tmp_path: Path) -> None:
    store = RawFolder(tmp_path, 2, np.zeros(8, np.int64))
    pixels = np.arange(8 * 12, dtype=np.uint8).reshape(8, 2, 2, 3)
    for indices in ([0, 1, 2, 5], [1, 2, 3], [4, 5, 6, 7]):
        store.write(np.array(indices), pixels[indices])
    assert store.done().all()
    assert np.array_equal(np.stack(list(store.read())), pixels)
    (tmp_path / "000001-000004.u8").unlink()
    assert store.done().tolist() == [True] * 3 + [False] + [True] * 4
    with pytest.raises(FileNotFoundError, match="lacks image 3"):
        list(store.read())


def test_damaged_picture_is_named_and_leaves_no_archive(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, npz = tmp_path / "out", tmp_path / "all.npz"
    assert main(options(models, out)) == 0
    Image.new("RGB", (16, 16)).save(out / NAMES[3])
    assert main(options(models, out, f"--npz={npz}")) == 2
    assert "000003_3.png wants 32 x 32 pixels" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_archive_takes_the_memory_of_a_few_pictures(tmp_path: Path) -> None:
    pictures = (np.full((256, 256, 3), i, np.uint8) for i in range(100))  # 20 MB
    tracemalloc.start()
    write_archive(tmp_path / "a.npz", pictures, 256, {"num": 100}, lambda count: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    with np.load(tmp_path / "a.npz") as archive:
        assert archive["arr_0"][:, 0, 0, 0].tolist() == list(range(100))
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (["--seed=8"], "seed was 7, now 8"),
        (["--steps=5", "--guidance=1"], "guidance_scale was 3.0, now 1.0; sampling.num_sample_s"),
        (["--annealing"], "sampling.softmax_temperature_annealing was False, now True"),
        (["--count=25"], "num was 20, now 25"),
        (["--dtype=bfloat16"], "dtype was 'float32', now 'bfloat16'"),
        (["--generator={other}"], "weights_sha256 was '"),
        (["--labels=1,2"], "classes was 5, now None; labels was None, now [1, 2]"),
    ],
)
def test_other_settings_are_refused_by_name(
    begun: Path, models: Path, capsys: pytest.CaptureFixture[str], change: list[str], phrase: str
) -> None:
    before = stamps(begun)
    change = [text.format(other=models / "other") for text in change]
    assert main(options(models, begun, *change)) == 2
    message = capsys.readouterr().err
    assert f"{begun} was begun with other settings: " in message
    assert phrase in message
    assert stamps(begun) == before


def test_force_begins_anew(tmp_path: Path, models: Path) -> None:
    assert main(options(models, tmp_path)) == 0
    first = pictures(tmp_path)
    assert main(options(models, tmp_path, "--seed=8", "--count=10", "--force")) == 0
    assert len(pictures(tmp_path)) == 10
    assert not np.array_equal(pictures(tmp_path), first[:10])


def test_labels_take_turns(tmp_path: Path, models: Path, wanted: np.ndarray) -> None:
    assert main(options(models, tmp_path, "--labels=0,1,2,3,4,0,1", "--count=9")) == 0
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == [f"{i:06d}_{label}.png" for i, label in enumerate([0, 1, 2, 3, 4, 0, 1, 0, 1])]
    made = np.stack([np.asarray(Image.open(tmp_path / name)) for name in names])
    assert np.array_equal(made[:7], wanted[:7])
    assert not np.array_equal(made[7:], wanted[7:9])


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    out = tmp_path_factory.mktemp("begun")
    assert main(options(models, out)) == 0
    (out / NAMES[2]).unlink()
    return out


def test_weights_are_known_by_content(begun: Path, models: Path, tmp_path: Path) -> None:
    rebuilt(ImageBert(GENERATOR)).save_pretrained(tmp_path / "moved")
    try:
        assert main(options(models, begun, f"--generator={tmp_path / 'moved'}")) == 0
    finally:
        (begun / NAMES[2]).unlink()


def test_bad_requests(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("x")
    other.mkdir()
    (other / "000000.png").write_text("not ours")
    np.savez(tmp_path / "taken.npz", arr_0=np.zeros(3))
    cases = [
        ([f"--out={file}"], "File exists"),
        ([f"--out={file / 'below'}"], "Not a directory"),
        ([f"--out={other}"], "holds 000000.png but no manifest.json of an earlier run"),
        ([f"--npz={tmp_path / 'taken.npz'}"], "taken.npz exists and is not of this run"),
    ]
    for change, message in cases:
        assert main(options(models, tmp_path / "out", *change)) == 2, change
        error = capsys.readouterr().err
        assert error.startswith("titok-fast: error: "), error
        assert message in error
    assert not list((tmp_path / "out").glob("*.png"))


def test_broken_manifest(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (("{", "manifest.json is damaged"), ("[]", "wants a JSON object")):
        (tmp_path / "manifest.json").write_text(content)
        assert main(options(models, tmp_path)) == 2
        assert message in capsys.readouterr().err


def test_random_weights_of_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingConfig(3, 2.0, "linear", softmax_temperature_annealing=True)
    monkeypatch.setitem(PRESETS, "tiny", Preset(tiny_tokenizer_config(), GENERATOR, sampling))
    monkeypatch.setitem(PRESETS, "tiny-vq", Preset(tiny_tokenizer_config("vq")))
    arguments = ["--random-weights", "--count=5", "--device=cpu", "--quiet", "--dtype=bfloat16"]
    assert main([*arguments, "--model=tiny", f"--out={tmp_path / 'a'}"]) == 0
    drawn = TiTokPipeline.random("tiny", dtype="bfloat16")(range(5), output="numpy")
    assert isinstance(drawn, np.ndarray)
    assert np.array_equal(pictures(tmp_path / "a"), drawn)
    assert main([*arguments, "--model=tiny-vq", f"--out={tmp_path / 'b'}"]) == 2
