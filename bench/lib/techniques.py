"""Switch techniques of titok_fast off and on: the plain code stands in while a context is open.

With all switches off the sampling loop does upstream's arithmetic. The noise, which upstream does
not fix, is a function of the seed, so that every variant draws the same ids but for rounding.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from sys import maxsize
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from titok_fast.kernels.guided_sample import guided_sample
from titok_fast.kernels.lm_head_sample import lm_head_sample
from titok_fast.models import vqgan as maskgit_vqgan
from titok_fast.models.blocks import Attention, PostNormBlock
from titok_fast.models.generator import MaskedGenerator
from titok_fast.models.vqgan import NormSiLU, PixelDecoder, ResnetBlock
from titok_fast.sampling import unmask as sampling
from titok_fast.sampling.schedules import steps
from titok_fast.sampling_config import SamplingConfig


@dataclass(frozen=True)
class Technique:
    """One technique: its key, its text for a table, whether results stay the same but for rounding.

    `kind`: "built in" (always on), "weights" (chosen by `to`) or "fast" (chosen by `compile`).
    """

    name: str
    text: str
    exact: bool = True
    kind: str = "built in"
    devices: tuple[str, ...] = ("cpu", "cuda")


_CPU, _CUDA = ("cpu",), ("cuda",)
TECHNIQUES: dict[str, Technique] = {
    t.name: t
    for t in (
        Technique("bf16", "bfloat16 weights and activations", False, "weights"),
        Technique("skip-zero", "no unconditional pass where its weight is 0"),
        Technique("one-batch", "both passes of a guided step in one batch"),
        Technique("mixed-hidden", "guidance mixed before the head: one head, not two"),
        Technique("fused-qkv", "one matmul for q, k and v in the generator"),
        Technique("channels-last", "channels-last memory in the pixel decoder"),
        Technique("phases", "upsampling and convolution as four smaller convolutions"),
        Technique("folded-shortcut", "the shortcut folded into the second kernel of its block"),
        Technique("fused-norm", "GroupNorm and SiLU in one call, in place on a CPU"),
        Technique("one-image", "one image at a time in the pixel decoder", devices=_CPU),
        # on a CPU it would replace the packed layers, which are faster
        Technique("inductor", "torch.compile of each network", True, "fast", _CUDA),
        Technique("packed", "oneDNN's weight layout, GELU in the matmul", True, "fast", _CPU),
        Technique("products", "attention as plain matmuls", True, "fast", _CPU),
        Technique("graph", "the whole call as one CUDA graph", True, "fast", _CUDA),
        Technique("int8", "8-bit weights and activations", False, "fast", _CPU),
    )
}
BUILT_IN = tuple(t.name for t in TECHNIQUES.values() if t.kind == "built in")
_OF_THE_LOOP = {"one-batch", "mixed-hidden", "skip-zero"}


@contextmanager
def applied(names: Collection[str]) -> Iterator[None]:
    """titok_fast with these of its built-in techniques and no others, while the context is open.

    Raises:
        ValueError: an unknown name.
    """
    unknown = sorted(set(names) - set(TECHNIQUES))
    if unknown:
        raise ValueError(f"unknown technique {', '.join(unknown)}; known: {', '.join(TECHNIQUES)}")
    with ExitStack() as stack:
        if not set(names) >= _OF_THE_LOOP:  # else the loop that titok_fast ships
            loop = partial(_unmask, names=names)
            stack.enter_context(patch.object(sampling, "unmask", loop))
        for name, (owner, attribute, plain) in _PLAIN.items():
            if name not in names:
                stack.enter_context(patch.object(owner, attribute, plain))
        yield


def _unmask(
    generator: MaskedGenerator,
    ids: Tensor,
    class_ids: Tensor,
    seeds: Tensor,
    config: SamplingConfig,
    on_step: Callable[[], object] | None = None,
    *,
    names: Collection[str],
) -> Tensor:
    """In place of `titok_fast.sampling.unmask.unmask`: its arguments, and the techniques."""
    mask_id, K = generator.config.mask_token_id, generator.image_seq_len
    base = sampling.maskable(ids, config, mask_id)
    no_class = torch.full_like(class_ids, generator.config.no_class_id)
    # where the weight of the unconditional pass is 0, upstream has one in power-cosine alone
    always = "skip-zero" not in names and config.guidance_decay == "power-cosine"
    for step in steps(config):
        uncond = None
        if step.guidance == 0 and not always:
            cond = generator.hidden(ids, class_ids)
        elif "one-batch" in names:
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
        if "mixed-hidden" in names:
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


def _three_linears(self: PostNormBlock, x: Tensor) -> Tensor:
    """PostNormBlock.forward with q, k and v from three matmuls; elsewhere upstream fuses them."""
    attention: Attention = self.attn
    (B, L, D), heads = x.shape, attention.heads
    assert attention.qkv.bias is not None
    weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).view(B, L, heads, D // heads).transpose(1, 2)
        for w, b in zip(weights, biases, strict=True)
    )
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D)
    x = self.norm1(attention.proj(mixed) + x)
    return self.norm2(self.mlp(x) + x)


def _shortcut_apart(self: ResnetBlock, x: Tensor) -> Tensor:
    """ResnetBlock.forward with the shortcut as a convolution of its own."""
    h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
    return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


def _norm_then_silu(self: NormSiLU, x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


# technique: where its code is, and what stands there without it
_PLAIN: dict[str, tuple[Any, str, Any]] = {
    "fused-qkv": (PostNormBlock, "forward", _three_linears),
    "folded-shortcut": (ResnetBlock, "forward", _shortcut_apart),
    "channels-last": (maskgit_vqgan, "_channels_last", Tensor.contiguous),
    "phases": (maskgit_vqgan, "PHASES_FROM_PIXELS", maxsize),
    "fused-norm": (NormSiLU, "forward", _norm_then_silu),
    "one-image": (PixelDecoder, "forward", PixelDecoder._decode),
}
