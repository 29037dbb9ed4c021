"""Run the sampling loop with each of its techniques as a switch, for the rows of waterfall.py.

With the default switches it draws the ids of titok_fast/sampling/unmask.py; all off, it does
upstream's arithmetic. The noise, which upstream does not fix, is a function of the seed here as
there, so that every variant draws the same ids but for rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titok_fast.config import SamplingConfig
from titok_fast.kernels.guided_sample import guided_sample
from titok_fast.kernels.lm_head_sample import lm_head_sample
from titok_fast.models.generator import MaskedGenerator
from titok_fast.sampling import unmask as sampling
from titok_fast.sampling.schedules import steps


@dataclass(frozen=True)
class Switches:
    """Techniques of the loop; the defaults are what titok_fast does.

    `one_batch`: both passes of a guided step in one doubled batch. `mixed`: guidance on the last
    hidden state, so one head. `skips`: no unconditional pass where its weight is 0 (in power-cosine
    upstream has one).
    """

    one_batch: bool = True
    mixed: bool = True
    skips: bool = True


def unmask(
    generator: MaskedGenerator,
    ids: Tensor,
    class_ids: Tensor,
    seeds: Tensor,
    config: SamplingConfig,
    on_step: Callable[[], object] | None = None,
    *,
    switches: Switches,
) -> Tensor:
    """In place of `titok_fast.sampling.unmask.unmask`: its arguments, and the switches."""
    mask_id, K = generator.config.mask_token_id, generator.image_seq_len
    base = sampling.maskable(ids, config, mask_id)
    no_class = torch.full_like(class_ids, generator.config.no_class_id)
    for step in steps(config):
        always = not switches.skips and config.guidance_decay == "power-cosine"
        uncond = None
        if step.guidance == 0 and not always:
            cond = generator.hidden(ids, class_ids)
        elif switches.one_batch:
            both = torch.cat([class_ids, no_class])
            cond, uncond = generator.hidden(ids.repeat(2, 1), both).chunk(2)
        else:
            cond, uncond = (generator.hidden(ids, c) for c in (class_ids, no_class))
        settings = {
            "step": step.index,
            "guidance": step.guidance,
            "softmax_temperature": step.softmax_temperature,
            "noise_temperature": step.token_noise,
            "rule": config.confidence,
        }
        if switches.mixed:
            candidates, scores = lm_head_sample(
                cond.flatten(0, 1),
                None if uncond is None else uncond.flatten(0, 1),
                generator.lm_head.weight,
                generator.lm_head.bias,
                seeds=seeds.repeat_interleave(K),
                positions=torch.arange(K, device=seeds.device).repeat(len(seeds)),
                **settings,
            )
        else:  # as upstream: the head for both passes, then the draw for all positions
            candidates, scores = guided_sample(
                generator.lm_head(cond),
                None if uncond is None else generator.lm_head(uncond),
                mask=torch.ones_like(ids, dtype=torch.bool),
                ids=torch.zeros_like(ids),
                seeds=seeds,
                **settings,
            )
        ids = sampling.end_step(
            ids,
            candidates.view_as(ids),
            scores.view_as(ids),
            step,
            base,
            mask_id=mask_id,
            seeds=seeds,
            rule=config.confidence,
        )
        if on_step is not None:
            on_step()
    return ids
