"""The reference sampler: plain, eager, float32, in upstream's order of random draws.

After the same torch.manual_seed it gives upstream's ids (modeling/maskgit.py), with one repair:
each sample masks by its own count, where upstream applies sample 0's to all. They agree when all
samples start with the same number of masked tokens. unmask.py is the fast sampler.
"""

from math import acos, cos, floor, pi

import torch
from torch import Tensor

from titok_fast.sampling.network import Generator, check_labels
from titok_fast.sampling_config import SamplingConfig


def _log(t: Tensor) -> Tensor:
    return torch.log(t.clamp(min=1e-20))


def _gumbel_like(t: Tensor) -> Tensor:
    return -_log(-_log(torch.zeros_like(t).uniform_(0, 1)))


@torch.no_grad()
def generate(model: Generator, labels: Tensor, config: SamplingConfig) -> Tensor:
    """Draw the tokens of (B,) labels with TiTok's rule: (B, K) int64 ids in [0, N).

    Raises:
        ValueError: another schedule or confidence, or a label out of range.
    """
    if (config.schedule, config.confidence) != ("arccos", "logit"):
        raise ValueError(
            "the reference sampler knows schedule 'arccos' and confidence 'logit'; got "
            f"{config.schedule!r} and {config.confidence!r}: use titok_fast.sampling.unmask.sample"
        )
    check_labels(labels, model.config.condition_num_classes)
    K, mask_id = model.config.image_seq_len, model.config.mask_token_id
    T, g, decay = config.num_sample_steps, config.guidance_scale, config.guidance_decay
    low, high = config.guidance_interval  # upstream has none: all steps
    ids = torch.full((labels.shape[0], K), mask_id, device=labels.device)
    cfg = g if decay == "constant" else 0.0

    for step in range(T):
        r = (step + 1) / T
        t = config.randomize_temperature * (1.0 - r)
        is_mask = ids == mask_id
        if decay == "power-cosine":
            rise = (1 - cos((step / T) ** config.guidance_scale_pow * pi)) / 2
            cfg = (g - 1) * rise + 1

        cond = model(ids, labels, cond_drop_prob=0.0).float()
        if cfg != 0 and low <= step / T < high:
            uncond = model(ids, labels, cond_drop_prob=1.0).float()
            base = uncond if decay == "power-cosine" else cond
            logits = base + (cond - uncond) * cfg
        else:
            logits = cond
        if config.softmax_temperature_annealing:
            logits = logits / (0.5 + 0.8 * (1 - r))

        candidates = (logits + t * _gumbel_like(logits)).argmax(dim=-1)
        score = logits.gather(-1, candidates[..., None]).squeeze(-1)
        candidates = torch.where(is_mask, candidates, ids)
        score = torch.where(is_mask, score, torch.inf)

        # of the masked tokens, the least confident stay masked: at least one, and one fewer
        keep = floor(K * acos(r) / (pi * 0.5))
        count = (is_mask.sum(dim=-1, keepdim=True) - 1).clamp(max=keep).clamp(min=1)
        confidence = score + t * _gumbel_like(score)
        cutoff = confidence.sort(dim=-1).values.gather(-1, count - 1)
        if step == T - 1:
            ids = candidates
        else:
            ids = torch.where(confidence <= cutoff, mask_id, candidates)
        if decay == "linear":
            cfg = r * g
    return ids
