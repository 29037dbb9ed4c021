"""Compare what a row of the waterfall draws with our float32: ids, logits and pixels."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import log10
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from titok_fast import SamplingConfig, TiTokPipeline
from titok_fast.sampling import unmask as sampling
from titok_fast.sampling.reference import generate

IMAGES = 8  # at least: one image has too few tokens for a share
Outputs = dict[str, Tensor]

# upstream's `generate` has these settings; the rest is fixed there
_OF_UPSTREAM = "guidance_scale guidance_decay guidance_scale_pow randomize_temperature"
_OF_UPSTREAM += " softmax_temperature_annealing num_sample_steps"


def labels_of(first: int, count: int) -> Tensor:
    """(count,) int64 classes of images first .. first + count - 1: distinct up to 1000."""
    return 37 * torch.arange(first, first + count) % 1000


@contextmanager
def first_candidates() -> Iterator[list[Tensor]]:
    """Collects the ids drawn in the first step of runs of more than one, before re-masking."""
    seen: list[Tensor] = []
    remask = sampling.remask

    def recorded(candidates: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs["step"] == 0:
            seen.append(candidates.clone())
        return remask(candidates, *args, **kwargs)

    with patch.object(sampling, "remask", recorded):
        yield seen


def _fixed_ids(pipe: TiTokPipeline, count: int) -> Tensor:
    assert pipe.generator is not None
    cfg, seeded = pipe.generator.config, torch.Generator().manual_seed(0)
    return torch.randint(cfg.codebook_size, (count, cfg.image_seq_len), generator=seeded)


def _parts(batch: int) -> list[int]:
    """First image of each call; calls have the batch that models were compiled for."""
    return list(range(0, IMAGES, batch))


@torch.no_grad()
def outputs(model: Any, pipe: TiTokPipeline, batch: int, config: SamplingConfig) -> Outputs:
    """A model's outputs, in float32 on the CPU; call it in the model's arithmetic.

    "logits" (batch, K, N) of ids that are half masked; "pixels" (batch, 3, S, S) of fixed ids, in
    [0, 1]; "final" (n, K), ids drawn for IMAGES images or a batch, whichever is more; of ours also
    "step1", those drawn in the first step. `pipe` gives shapes and the device.
    """
    assert pipe.generator is not None
    mask_id, K = pipe.generator.mask_token_id, pipe.generator.image_seq_len
    fixed = _fixed_ids(pipe, batch).to(pipe.device)
    masked = fixed.masked_fill(torch.arange(K, device=pipe.device) % 2 == 0, mask_id)
    labels = labels_of(0, batch).to(pipe.device)
    found = {
        "logits": [model.generator(masked, labels, 0.0).float()],
        "pixels": [model.tokenizer.decode_tokens(fixed).float().clamp(0, 1)],
    }
    for first in _parts(batch):
        for name, ids in _draw(model, pipe, first, batch, config).items():
            found.setdefault(name, []).append(ids)
    return {name: torch.cat(tensors).cpu() for name, tensors in found.items()}


def _draw(
    model: Any, pipe: TiTokPipeline, first: int, batch: int, config: SamplingConfig
) -> Outputs:
    """Ids (batch, K) of images `first` and on."""
    labels = labels_of(first, batch).to(pipe.device)
    if isinstance(model, TiTokPipeline):
        assert model.generator is not None
        seeds = sampling.sample_seeds(0, batch, first)
        with first_candidates() as seen:
            ids = sampling.sample(model.generator, labels, seeds, config)
        return {"final": ids, "step1": seen[0] if seen else ids}  # one step masks nothing again
    options = {name: getattr(config, name) for name in _OF_UPSTREAM.split()}
    with _global_seed(first):
        return {"final": model.generator.generate(condition=labels, **options).view(batch, -1)}


@torch.no_grad()
def reference_ids(pipe: TiTokPipeline, batch: int, config: SamplingConfig) -> Tensor:
    """(n, K) ids that upstream draws in `outputs` if it makes no rounding error of its own."""
    assert pipe.generator is not None
    drawn = []
    for first in _parts(batch):
        with _global_seed(first):
            labels = labels_of(first, batch).to(pipe.device)
            drawn.append(generate(pipe.generator, labels, config).cpu())
    return torch.cat(drawn)


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def compare(got: Outputs, wanted: Outputs) -> dict[str, float | None]:
    """How far outputs are from those of float32; None where not known.

    "logit_error" is the norm of the difference over that of what is wanted; "psnr_db" is None for
    identical pixels.
    """
    shares = {
        f"{name}_ids_equal": float((got[name] == wanted[name]).double().mean())
        if name in got and name in wanted
        else None
        for name in ("step1", "final")
    }
    logits, pixels = (got[n].double() - wanted[n].double() for n in ("logits", "pixels"))
    rms = float(pixels.square().mean().sqrt())
    return {
        **shares,
        "logit_error": float(logits.norm() / wanted["logits"].double().norm()),
        "pixel_rms": rms,
        "psnr_db": -20 * log10(rms) if rms > 0 else None,
    }
