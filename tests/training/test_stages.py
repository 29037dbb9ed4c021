"""Every stage in small, by the recipes of the package and the documented commands, in order.

The data are drawn shapes in the files of Fashion-MNIST, which a fresh machine does not have.
"""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.records import write_idx

from titok_fast.cli import main as cli
from titok_fast.data.token_shards import TokenSource
from titok_fast.training.logs import read_log

CLASSES = 10
BATCH = 20
TRAIN = 2 * BATCH  # so that two updates see all of them, and means over updates are free of noise
# overrides of every run here
SHORT = (
    "experiment.log_every=1 experiment.save_every=0 experiment.generate_every=0 "
    "experiment.eval_every=0 lr_scheduler.params.warmup_steps=5 training.num_generated_images=10"
)


def under(prefix: str, settings: str) -> str:
    """`key=value` words with a prefix before each key."""
    return " ".join(prefix + word for word in settings.split())


FASHION = "dataset.params.train_shards_path_or_url=shapes"
FAST = "optimizer.params.learning_rate=2e-3"
PIXEL = "hidden_channels=32 num_res_blocks=1 z_channels=16 codebook_size=64"
VIT = under(
    "model.vq_model.", "vit_enc_model_size=[48,2,2] vit_dec_model_size=[48,2,2] codebook_size=64"
)
TITOK = f"{VIT} {under('model.vq_model.pixel.', PIXEL)}"
BERT = under(
    "model.generator.",
    "hidden_size=48 num_hidden_layers=2 num_attention_heads=2 intermediate_size=96 num_steps=4 "
    "dropout=0 attn_drop=0",
)
TOKENS = "vit_enc_patch_size=8 vit_dec_patch_size=8 num_latent_tokens=16 token_size=12"
FROM_START = (
    f"{FASHION} {VIT} {under('model.vq_model.', TOKENS)} dataset.params.kind=fashion-mnist "
    "dataset.params.eval_shards_path_or_url= dataset.preprocessing.crop_size=32 "
    "dataset.preprocessing.resize_shorter_edge=32 losses.perceptual_loss=none "
    "losses.discriminator_start=35 losses.discriminator_channels=32 experiment.name=single_stage "
    "experiment.output_dir=runs/fashion/single_stage optimizer.params.learning_rate=1e-3"
)
# stage -> overrides, updates, and the share of the first updates' loss that the last stay below
STAGES = {
    "vqgan": (f"{FASHION} {under('model.pixel.', PIXEL)}", 40, 0.5),
    "stage1": (f"{FASHION} {TITOK} {FAST}", 50, 0.9),
    "stage2": (f"{FASHION} {TITOK} {FAST} losses.discriminator_start=35", 40, 0.9),
    "generator": (f"{TITOK} {BERT}", 60, 0.9),
    "classifier": (FASHION, 30, 0.5),
    "single_stage": (FROM_START, 40, 0.9),
}


def shapes(count: int, seed: int) -> np.ndarray:
    """(count, 28, 28) of ten shapes in turn, at random places and greys."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-14:14, -14:14]
    cx, cy = rng.integers(-3, 4, (2, count, 1, 1))
    x, y = np.abs(x - cx), np.abs(y - cy)
    far = np.hypot(x, y)
    square = np.maximum(x, y)
    drawings = [far < 4, far < 9, (far > 5) & (far < 9), square < 7, (x < 2) | (y < 2)]
    drawings += [x < 3, y < 3, np.abs(x - y) < 2, x + y < 9, (square > 4) & (square < 8)]
    which = np.arange(count) % CLASSES
    inside = np.stack(drawings)[which, np.arange(count)]
    return inside * rng.integers(120, 250, (count, 1, 1)) + rng.integers(0, 6, (count, 28, 28))


def titok_fast(command: str) -> None:
    assert cli.main(shlex.split(command)) == 0, command


def train(stage: str) -> None:
    overrides, updates, _ = STAGES[stage]
    single_stage = "imagenet/single_stage/titok_bl64_vq8k"
    recipe = single_stage if stage == "single_stage" else f"fashion/{stage}"
    titok_fast(
        f"train {recipe} {SHORT} training.max_train_steps={updates} "
        f"training.per_gpu_batch_size={BATCH} {overrides} --quiet --device cpu"
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the runs of all stages, each begun from what the one before it made."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "shapes").mkdir()
    for stem, count in (("train", TRAIN), ("t10k", 20)):
        images = shapes(count, count)
        write_idx(folder / "shapes" / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(folder / "shapes" / f"{stem}-labels-idx1-ubyte.gz", np.arange(count) % CLASSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in ("vqgan", "stage1", "stage2"):
            train(stage)
        titok_fast(
            "pretokenize --data fashion-mnist --path shapes --augmentation center --quiet "
            "--tokenizer runs/fashion/stage2/final --out runs/fashion/tokens --device cpu"
        )
        for stage in ("generator", "classifier", "single_stage"):
            train(stage)
        yield folder


@pytest.mark.parametrize("stage", STAGES)
def test_loss_falls(runs: Path, stage: str) -> None:
    _, updates, share = STAGES[stage]
    folder = runs / "runs" / "fashion" / stage
    name = "loss" if stage in ("generator", "classifier") else "reconstruction_loss"
    losses = [line[name] for line in read_log(folder / "log.jsonl")]
    assert len(losses) == updates
    first, last = np.mean(losses[:4]), np.mean(losses[-10:])
    assert last < share * first, losses
    assert (folder / "final" / "model.safetensors").is_file()


def test_tokens(runs: Path) -> None:
    tokens = TokenSource(runs / "runs/fashion/tokens").tokens
    assert tokens.shape == (TRAIN, 16)
    assert len(np.unique(tokens)) > 1


def test_classifier_knows_the_shapes(runs: Path) -> None:
    last = read_log(runs / "runs/fashion/classifier/log.jsonl")[-5:]
    assert np.mean([line["accuracy"] for line in last]) > 0.5  # one class in ten by chance


def test_sample(runs: Path) -> None:
    titok_fast(
        "sample --tokenizer runs/fashion/stage2/final --generator runs/fashion/generator/final "
        "--label 7 --num 3 --steps 4 --out drawn --device cpu --quiet"
    )
    drawn = [np.asarray(Image.open(path)) for path in sorted((runs / "drawn").glob("*.png"))]
    assert [picture.shape for picture in drawn] == [(32, 32, 3)] * 3
    assert all(picture.std() > 1 for picture in drawn)


def test_eval_reconstruction(runs: Path) -> None:
    pytest.importorskip("torchmetrics", reason="extra eval")
    titok_fast(
        "eval reconstruction fashion-mnist:eval:shapes --tokenizer runs/fashion/stage2/final "
        "--network fashion-classifier=runs/fashion/classifier/final --json measured.json "
        "--device cpu --quiet"
    )
    figures = json.loads((runs / "measured.json").read_text())["figures"]
    assert figures["psnr"] > 8
