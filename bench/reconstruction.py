"""Measure images per second through the tokenizer: encode (to tokens) and decode (to uint8).

    python bench/reconstruction.py
    python bench/reconstruction.py --models titok-l-32 --upstream PATH --json bench/results

Inputs are photographs from scikit-image where it is installed, else noise. Both directions start
and end on the host. Candidates take turns; each is compared with the eager float32 model.
"""

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lib import upstream as official
from lib.candidates import Candidate, arithmetic, candidate, in_dtypes, shared
from lib.options import contenders, load, matrix_parser, measure_case, parse_matrix, start_record
from lib.tables import reconstruction_table
from torch import Tensor

from titok_fast import TiTokPipeline
from titok_fast.costs import decoding_costs, tokenizer_costs
from titok_fast.io.images import to_tensor, to_uint8

MODELS = ("titok-l-32", "titok-b-64", "titok-s-128")
PHOTOGRAPHS = "astronaut.png chelsea.png coffee.png motorcycle_left.png rocket.jpg"
PHOTOGRAPHS += " hubble_deep_field.jpg"


def inputs(batch: int, size: int) -> tuple[Tensor, str]:
    """(B, 3, size, size) float32 in [0, 1], photographs repeated as needed, and what they are."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        noise = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        return noise, "uniform noise (scikit-image is not installed)"
    folder = Path(spec.origin).parent / "data"
    files = [folder / name for name in PHOTOGRAPHS.split() if (folder / name).is_file()]
    images = to_tensor(files[:batch], size)
    return images[torch.arange(batch) % len(images)], "photographs of scikit-image"


def encode(model: Any, images: Tensor, device: torch.device) -> Tensor:
    """Images on the host to tokens (VAE: means) on the host; ours or upstream's model."""
    _, result = model.tokenizer.encode(images.to(device))
    latent = result["min_encoding_indices"] if isinstance(result, dict) else result.mode()
    return latent.cpu()


def decode(model: Any, latent: Tensor, device: torch.device) -> Tensor:
    """Tokens (VAE: means) on the host to (B, S, S, 3) uint8 on the host."""
    return to_uint8(model.tokenizer.decode_tokens(latent.to(device)), rounding="round").cpu()


def candidates(
    direction: str,
    pipe: TiTokPipeline,
    by_dtype: Mapping[str, TiTokPipeline],
    rival: official.Upstream | None,
    modes: Sequence[str],
    images: Tensor,
) -> list[Candidate]:
    """Ours in eager float32 first, whether asked for or not; then the rest."""
    device = pipe.device
    with arithmetic("fp32-ieee"):
        latent = encode(pipe, images, device)
    work, value = (encode, images) if direction == "encode" else (decode, latent)

    def probe(model: Any) -> dict[str, Tensor]:
        if direction == "decode":
            pixels = model.tokenizer.decode_tokens(latent.to(device))
            return {"pixels": pixels.float().clamp(0, 1).cpu()}
        codes = encode(model, images, device)
        return {} if codes.is_floating_point() else {"ids": codes}

    first = ("ours", "fp32-ieee", "eager")
    others = (one for one in contenders(by_dtype, rival, modes) if one[:3] != first)
    made = []
    for *key, model in [(*first, shared(pipe)), *others]:
        call = partial(work, model, value, device)
        made.append(candidate(*key, model, call, partial(probe, model), clocked=False))
    return made


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the whole matrix; the JSON, where asked for, is rewritten after every group."""
    record = start_record("reconstruction", args)
    for name in args.models:
        pipe = load(name, args.weights, args.device, generate=False)
        cfg = pipe.tokenizer.config
        rival = official.load(args.upstream, pipe.tokenizer)
        by_dtype = in_dtypes(pipe, args.dtype)
        decoding = decoding_costs(cfg)
        for batch in args.batch:
            images, record["protocol"]["inputs"] = inputs(batch, cfg.crop_size)
            for direction in ("encode", "decode"):
                made = candidates(direction, pipe, by_dtype, rival, args.modes, images)
                gflop = {
                    stage: cost.flops / 1e9
                    for stage, cost in tokenizer_costs(cfg).items()
                    if (stage in decoding) == (direction == "decode")
                }
                case = {"model": name, "batch": batch, "direction": direction}
                case |= {"gflop_per_image": gflop}
                measure_case(record, args, case, made)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; status 1 when a candidate failed."""
    args = parse_matrix(matrix_parser(__doc__), argv, MODELS)
    record = run(args)
    print(reconstruction_table(record, details=True))
    return int(any("error" in case for case in record["cases"]))


if __name__ == "__main__":
    sys.exit(main())
