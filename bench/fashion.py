"""Measure the quality of the small model in this package, or the minutes its training took.

    python bench/fashion.py --json bench/results --plots bench/results
    python bench/fashion.py --times runs/fashion --json bench/results

--times reads the logs of runs instead: the time of a run is that from the first line of its log to
the last, pauses included; updates before the first line count as much as the others. The record
names the commit that read the logs; the runs may be older.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lib.harness import say
from lib.options import SHARED, in_mode, new_record, parser, save, stem
from lib.quality_tables import figures_table
from lib.tables import recipe_times_table
from PIL.Image import Image
from torch import Tensor

from titok_fast import TiTokPipeline, preset
from titok_fast.evaluation.generation import Reference, evaluate_generation, measure_pictures
from titok_fast.evaluation.networks import FeatureNetwork, open_network
from titok_fast.evaluation.pictures import ArrayPictures, DrawnPictures, Pictures, open_pictures
from titok_fast.evaluation.reconstruction import evaluate_reconstruction, reconstructor
from titok_fast.evaluation.statistics import Gaussian, frechet_distance
from titok_fast.io.images import grid, save_png, to_pil
from titok_fast.models.classifier import NAME
from titok_fast.training.logs import LOG_NAME

MODEL = "fashion-16"
FAST_MODES = ("fast", "int8")  # a CPU's, of options.MODES; the same seeds as in float32
# not in the package: with it the weights would pass 12 MB
CLASSIFIER = Path(__file__).parent / MODEL / "classifier"
_COMPARED = 200  # pictures decoded by each fast mode and in float32
_IN_ROW, _ROWS = 10, 3  # of the sheet of reconstructions
_ZOOM = 2  # pictures of 32 pixels are hard to see


def _floats(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


def quality(
    pipe: TiTokPipeline,
    network: FeatureNetwork,
    train: Pictures,
    test: Pictures,
    *,
    count: int,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Measure a tokenizer and its generator against real pictures.

    `count` pictures are drawn, class i % classes. Every Frechet distance is taken to the training
    set (`fid_real`: the floor), but for `fid_to_originals`, the protocol of rFID. `precision` and
    `recall` of samples are among the test set. Shares are 0..1. `fast_modes` has the figures of
    samples again for each of FAST_MODES, in bfloat16, and `psnr_to_float32` in dB, of pictures
    decoded from the same tokens.
    """
    measure = partial(measure_pictures, networks=[network], batch_size=batch_size)
    say("real pictures")
    (seen,), (unseen,) = measure(train), measure(test)
    known = seen.sums.gaussian()
    say("reconstructions")
    back = evaluate_reconstruction(
        reconstructor(pipe.tokenizer),
        test,
        codebook_size=pipe.tokenizer.config.codebook_size,
        networks=[network],
        with_ssim=False,
        batch_size=batch_size,
    )
    originals = _floats(test.read(range(len(test)))[0])
    made: Any = pipe.reconstruct(originals, batch_size=batch_size, output="numpy")
    (again,) = measure(ArrayPictures(made))
    name, reference = f"[{network.name}]", Reference(test, known, network.name)

    def distance(other: Gaussian) -> float:
        return frechet_distance(other, known)

    def samples(own: TiTokPipeline) -> dict[str, float]:
        drawn = DrawnPictures(own, count, seed)
        found = evaluate_generation(drawn, reference, [network], batch_size=batch_size)
        keys = {"fid_samples": "fid"} | {k: k for k in ("label_agreement", "precision", "recall")}
        return {key: found[f"{figure}{name}"] for key, figure in keys.items()}

    low = copy.deepcopy(pipe).to(torch.bfloat16)
    modes = {}
    for mode in FAST_MODES:
        say(f"{count} samples, bf16, {mode}")
        own = in_mode(low, mode)
        modes[mode] = {"psnr_to_float32": _psnr_to(pipe, own, test), **samples(own)}
    say(f"{count} samples")

    return {
        "psnr": back["psnr"],
        "codebook_usage": back["codebook_usage"],
        "accuracy_real": back[f"accuracy_originals{name}"],
        "accuracy_reconstructions": back[f"accuracy_reconstructions{name}"],
        "fid_real": distance(unseen.sums.gaussian()),
        "fid_reconstructions": distance(again.sums.gaussian()),
        "fid_to_originals": back[f"fid{name}"],
        **samples(pipe),
        "fast_modes": modes,
    }


@torch.no_grad()
def _psnr_to(pipe: TiTokPipeline, other: TiTokPipeline, test: Pictures) -> float:
    """PSNR in dB between what two pipelines decode from the first test pictures' tokens."""
    ids = pipe.tokenize(_floats(test.read(range(min(_COMPARED, len(test))))[0]))
    made, wanted = (p.tokenizer.decode_tokens(ids).double().clamp(0, 1) for p in (other, pipe))
    return float(-10 * (made - wanted).square().mean().log10())


def sheets(pipe: TiTokPipeline, test: Pictures, seed: int) -> dict[str, Image]:
    """Pictures to look at, not chosen by hand.

    "reconstructions": the first of the test set, rows of originals over what came back. "samples":
    a row for each class.
    """
    originals, _ = test.read(range(_IN_ROW * _ROWS))
    made = pipe.reconstruct(_floats(originals), output="tensor")
    assert isinstance(made, Tensor)
    pairs = torch.stack([t.view(_ROWS, _IN_ROW, *t.shape[1:]) for t in (originals, made)], dim=1)
    assert pipe.generator is not None
    classes = torch.arange(pipe.generator.config.condition_num_classes)
    samples = pipe(classes.repeat_interleave(_IN_ROW), seed=seed, output="tensor")
    assert isinstance(samples, Tensor)
    return {"reconstructions": _sheet(pairs.flatten(0, 2)), "samples": _sheet(samples)}


def _sheet(pictures: Tensor) -> Image:
    large = pictures.repeat_interleave(_ZOOM, dim=1).repeat_interleave(_ZOOM, dim=2)
    return grid(to_pil(large), _IN_ROW)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, draw, and write what was asked for."""
    network = open_network(NAME, args.classifier)
    folder = args.weights or preset(MODEL).folder
    parts = {part: str(folder / part) for part in ("tokenizer", "generator")}
    pipe = TiTokPipeline.from_pretrained(MODEL, **parts)
    where = f":{args.data}" if args.data else ""
    train, test = (open_pictures(f"fashion-mnist:{s}{where}") for s in ("train", "eval"))
    options = {"count": args.count, "seed": args.seed, "batch_size": args.batch_size}
    record = new_record(
        "fashion",
        "cpu",
        model=MODEL,
        trained="in this package" if args.weights is None else "local files",
        features=f"{NAME}, {network.dim} features, float32",
        reference=f"Fashion-MNIST, {len(train)} training pictures, 32 x 32",
        real=f"{len(test)} test pictures",
        samples=args.count,
        seed=args.seed,
        sampling=asdict(pipe.sampling),
        rounding="reconstructions rounded to bytes, samples truncated",
    )
    record["figures"] = quality(pipe, network, train, test, **options)
    if args.plots:
        record["sheets"] = {}
        for name, sheet in sheets(pipe, test, args.seed).items():
            path = args.plots / f"{stem(args.json, record)}-{name}.png"
            save_png(path, sheet)
            record["sheets"][name] = path.name
    save(args.json, record)
    return record


def times(runs: Path) -> list[dict[str, Any]]:
    """Run, updates, minutes and start (seconds since 1970) of the trainings in a folder, in order.

    Raises:
        ValueError: there is no run, or a log holds fewer than two updates.
    """
    found = []
    for path in runs.glob(f"*/{LOG_NAME}"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        steps = lines[-1]["step"] - lines[0]["step"] if lines else 0
        if steps < 1:
            raise ValueError(f"{path} holds no two updates: this run has not begun")
        first, last = lines[0], lines[-1]
        each = (last["time"] - first["time"]) / steps
        run = {"run": path.parent.name, "updates": last["step"]}
        run["minutes"] = each * last["step"] / 60
        found.append(run | {"started": first["time"] - each * first["step"]})
    if not found:
        raise ValueError(f"{runs} wants folders with a {LOG_NAME} in each; there is none")
    return sorted(found, key=lambda run: run["started"])


def run_times(args: argparse.Namespace) -> dict[str, Any]:
    """Read the logs, and write what was asked for."""
    timing = "first line of each run's log to the last, pauses included"
    record = new_record("recipe-times", "cpu", timing=timing) | {"cases": times(args.times)}
    save(args.json, record)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = parser(__doc__, "json")
    add = p.add_argument
    weights = "folder with `tokenizer` and `generator`; default: those in the package"
    add("--weights", type=Path, metavar="DIR", help=weights)
    trained = "trained by the recipe fashion/classifier; default: bench/fashion-16/classifier"
    add("--classifier", type=Path, default=CLASSIFIER, metavar="DIR", help=trained)
    data = "the four files of Fashion-MNIST; default: of Debian's package"
    add("--data", metavar="DIR", help=data)
    add("--count", type=int, default=10_000, metavar="N", help="samples; default: 10000")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=100, metavar="N", help="default: 100")
    plots = SHARED["plots"] | {"help": "write the two sheets of pictures there"}
    add("--plots", **plots)
    add("--times", type=Path, metavar="RUNS", help="read minutes of training there instead")
    args = p.parse_args(argv)
    if args.count < 10 or args.batch_size < 1:
        p.error("--count wants at least 10, --batch-size at least 1")
    try:
        record = run(args) if args.times is None else run_times(args)
    except (OSError, ValueError) as error:
        p.error(str(error))
    print(figures_table(record) if args.times is None else recipe_times_table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
