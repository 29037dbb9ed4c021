"""The sampling loop with each of its techniques as a switch, for the rows of waterfall.py.

With the default switches it draws the ids of titok_fast/sampling/unmask.py; all off, it does
upstream's arithmetic. What upstream does not fix, the noise, is a function of the seed here as
there, so that every variant draws the same ids but for rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titok_fast.config import SamplingConfig
from titok_fast.kernels.guided_sample import guided_sample
from titok_fast.kernels.lm_head_sample import lm_head_sample
from titok_fast.models.attention import attend
from titok_fast.models.blocks import Attention, PostNormBlock, PreNormBlock
from titok_fast.models.generator import ImageBert, MaskedGenerator, UViTBert
from titok_fast.sampling import unmask as sampling
from titok_fast.sampling.schedules import Step, steps


@dataclass(frozen=True)
class Switches:
    """Techniques of the loop; the defaults are what titok_fast does.

    Attributes:
        one_batch: both passes of a guided step in one doubled batch.
        mixed: guidance on the last hidden state, so one head; off: two heads, logits mixed.
        skips: no unconditional pass where its weight is 0; off: upstream runs both in every step of
            power-cosine.
        masked_rows: head and draw for the masked positions only; wants `mixed`. Waits for the
            device.
        once_per_class: one row per distinct class, and one without, while all tokens are masked.
            Waits for the device.
        read_rows: beyond its attention, the last block runs for the masked positions only; with
            masked_rows, since nothing else may read the others.

    Raises:
        ValueError: a switch without the one it wants.
    """

    one_batch: bool = True
    mixed: bool = True
    skips: bool = True
    masked_rows: bool = False
    once_per_class: bool = False
    read_rows: bool = False

    def __post_init__(self) -> None:
        if (self.masked_rows and not self.mixed) or (self.read_rows and not self.masked_rows):
            raise ValueError(
                f"masked_rows wants mixed, and read_rows wants masked_rows; got {self}"
            )


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
    """In place of `titok_fast.sampling.unmask`: its arguments, and the switches.

    Returns:
        (B, K) int64 ids in [0, N).
    """
    mask_id = generator.config.mask_token_id
    base = sampling.maskable(ids, config, mask_id)
    for step in steps(config):
        guided = step.guidance != 0
        if not switches.skips and config.guidance_decay == "power-cosine":
            guided = True
        rows = None
        if switches.masked_rows:
            rows = (ids == mask_id).view(-1).nonzero().squeeze(1)
        cond, uncond = _hidden(generator, ids, class_ids, guided, rows, step, switches)
        if switches.mixed:
            picked = rows if not switches.read_rows else None  # else the others are gone already
            where = slice(None) if rows is None else rows
            candidates, scores = _draw(
                generator, cond, uncond, seeds, step, config.confidence, picked, where
            )
        else:
            candidates, scores = _draw_from_logits(
                generator, cond, uncond, seeds, step, config.confidence
            )
        if rows is not None:
            candidates = ids.view(-1).scatter(0, rows, candidates)
            scores = torch.zeros(ids.numel(), device=ids.device).scatter(0, rows, scores)
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


def _hidden(
    generator: MaskedGenerator,
    ids: Tensor,
    class_ids: Tensor,
    guided: bool,
    rows: Tensor | None,
    step: Step,
    switches: Switches,
) -> tuple[Tensor, Tensor | None]:
    """Last hidden states with and without class, (B * K, D), or (R, D) with read_rows."""
    no_class = torch.full_like(class_ids, generator.config.no_class_id)
    fresh = step.index == 0 and bool((ids == generator.config.mask_token_id).all())
    if switches.once_per_class and fresh:
        classes, of_class = class_ids.unique(return_inverse=True)
        asked = torch.cat([classes, no_class[:1]]) if guided else classes
        found = generator.hidden(ids[:1].expand(len(asked), -1), asked)
        cond = found[of_class].flatten(0, 1)
        return cond, found[-1:].expand(*ids.shape, -1).flatten(0, 1) if guided else None
    if switches.read_rows:
        assert rows is not None
        shift = rows + ids.numel()  # of the second half
        if not guided:
            return hidden_of_rows(generator, ids, class_ids, rows), None
        both = torch.cat([class_ids, no_class]), torch.cat([rows, shift])
        cond, uncond = hidden_of_rows(generator, ids.repeat(2, 1), *both).chunk(2)
        return cond, uncond
    if not guided:
        return generator.hidden(ids, class_ids).flatten(0, 1), None
    if switches.one_batch:
        asked = torch.cat([class_ids, no_class])
        cond, uncond = generator.hidden(ids.repeat(2, 1), asked).flatten(0, 1).chunk(2)
        return cond, uncond
    cond, uncond = (generator.hidden(ids, c).flatten(0, 1) for c in (class_ids, no_class))
    return cond, uncond


def _draw(
    generator: MaskedGenerator,
    cond: Tensor,
    uncond: Tensor | None,
    seeds: Tensor,
    step: Step,
    rule: str,
    picked: Tensor | None,
    where: Tensor | slice,
) -> tuple[Tensor, Tensor]:
    """As sampling.py does: one head, on rows `picked` of cond, those of `where` in the batch."""
    K = generator.image_seq_len
    return lm_head_sample(
        cond,
        uncond,
        generator.lm_head.weight,
        generator.lm_head.bias,
        rows=picked,
        seeds=seeds.repeat_interleave(K)[where],
        positions=torch.arange(K, device=seeds.device).repeat(len(seeds))[where],
        step=step.index,
        guidance=step.guidance,
        softmax_temperature=step.softmax_temperature,
        noise_temperature=step.token_noise,
        rule=rule,
    )


def _draw_from_logits(
    generator: MaskedGenerator,
    cond: Tensor,
    uncond: Tensor | None,
    seeds: Tensor,
    step: Step,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """As upstream does: the head for both passes and all positions, then the draw for all."""
    shape = len(seeds), generator.image_seq_len
    return guided_sample(
        generator.lm_head(cond).view(*shape, -1),
        None if uncond is None else generator.lm_head(uncond).view(*shape, -1),
        mask=torch.ones(shape, dtype=torch.bool, device=seeds.device),
        ids=torch.zeros(shape, dtype=torch.int64, device=seeds.device),
        seeds=seeds,
        step=step.index,
        guidance=step.guidance,
        softmax_temperature=step.softmax_temperature,
        noise_temperature=step.token_noise,
        rule=rule,
    )


def hidden_of_rows(
    generator: MaskedGenerator, ids: Tensor, class_ids: Tensor, rows: Tensor
) -> Tensor:
    """`generator.hidden(ids, class_ids).flatten(0, 1)[rows]`, the last block for `rows` alone.

    Args:
        generator: ImageBert or UViTBert.
        ids: (B, K) int64 image tokens or mask.
        class_ids: (B,) int64 in token space.
        rows: (R,) int64 in [0, B * K).

    Returns:
        (R, D) in the weights' dtype.
    """
    tokens = torch.cat([class_ids[:, None], ids], dim=1)
    K = ids.shape[1]
    rows = rows + rows // K + 1  # each image has its class in front
    if isinstance(generator, UViTBert):
        x, skip = _before_last_uvit(generator, tokens)
        last = generator.out_blocks[-1]
        assert isinstance(last, PreNormBlock)
        assert last.skip_linear is not None
        x = last.skip_linear(torch.cat([x, skip], dim=-1))
        return generator.norm(pre_norm_rows(last, x, rows))
    assert isinstance(generator, ImageBert)
    x = generator.embeddings(tokens) + generator.type_embed[0] + generator.pos_embed[: 1 + K]
    x = generator.norm_in(x)
    for block in generator.blocks[:-1]:
        x = block(x)
    last = generator.blocks[-1]
    assert isinstance(last, PostNormBlock)
    h = attention_before_projection(last.attn, x).flatten(0, 1)[rows]
    x = last.norm1(last.attn.proj(h) + x.flatten(0, 1)[rows])
    return last.norm2(last.mlp(x) + x)


def _before_last_uvit(generator: UViTBert, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the last block: (B, 1 + K, D), and the skip it merges."""
    x = generator.embeddings(tokens) + generator.pos_embed[:, : tokens.shape[1]]
    skips = []
    for block in generator.in_blocks:
        x = block(x)
        skips.append(x)
    x = generator.mid_block(x)
    for block in generator.out_blocks[:-1]:
        x = block(x, skips.pop())
    return x, skips.pop()


def attention_before_projection(attention: Attention, x: Tensor) -> Tensor:
    """(B, L, D), normalised -> (B, L, D): attention without its output projection."""
    B, L, D = x.shape
    qkv = attention.qkv(x).view(B, L, 3, attention.heads, D // attention.heads)
    return attend(qkv, attention.backend)


def pre_norm_rows(block: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """A PreNormBlock, its skip already merged, whose results are wanted for some rows only.

    Args:
        block: a PreNormBlock.
        x: (B, L, D).
        rows: (R,) int64 in [0, B * L).

    Returns:
        (R, D).
    """
    assert isinstance(block, PreNormBlock)
    h = attention_before_projection(block.attn, block.norm1(x)).flatten(0, 1)[rows]
    x = x.flatten(0, 1)[rows] + block.attn.proj(h)
    return x + block.mlp(block.norm2(x))
