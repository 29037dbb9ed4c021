"""Every technique that titok_fast uses, as a switch, and some that it does not use.

What is built in is taken out by a context manager that puts the plain code in its place while it is
open; nothing in titok_fast changes. What is not built in is put in the same way, so that a row of
waterfall.py tells whether it would pay.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from sys import maxsize
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from lib import variants
from lib.variants import Switches, pre_norm_rows
from torch import Tensor

from titok_fast.models import vqgan as maskgit_vqgan
from titok_fast.models.attention import attend
from titok_fast.models.blocks import Attention, PostNormBlock, PreNormBlock
from titok_fast.models.decoder import TiTokDecoder, unfold_tokens
from titok_fast.models.vqgan import NormSiLU, PixelDecoder, ResnetBlock
from titok_fast.sampling import unmask as sampling


@dataclass(frozen=True)
class Technique:
    """One technique.

    Attributes:
        name: its key.
        text: what it does, for a table.
        exact: the same result but for rounding.
        kind: "built in" (always on in titok_fast), "weights" (chosen by `to`), "fast" (chosen by
            `compile`), "experiment" (in this file only) or "setting" (of the sampler).
        devices: where it exists.
    """

    name: str
    text: str
    exact: bool = True
    kind: str = "built in"
    devices: tuple[str, ...] = ("cpu", "cuda")


_CPU = ("cpu",)
TECHNIQUES: dict[str, Technique] = {
    t.name: t
    for t in (
        Technique("bf16", "bfloat16 weights and activations", False, "weights"),
        Technique("skip-zero", "no unconditional pass where its weight is 0"),
        Technique("one-batch", "both passes of a guided step in one batch"),
        Technique("mixed-hidden", "guidance mixed before the head: one head, not two"),
        Technique("fused-qkv", "one product for q, k and v in the generator"),
        Technique("channels-last", "channels-last memory in the pixel decoder"),
        Technique("phases", "upsampling and convolution as four smaller convolutions"),
        Technique("folded-shortcut", "the shortcut folded into the second kernel of its block"),
        Technique("fused-norm", "GroupNorm and SiLU in one call, in place on a CPU"),
        Technique("one-image", "one image at a time in the pixel decoder", devices=_CPU),
        Technique("masked-rows", "head and draw for masked positions only", kind="experiment"),
        Technique("last-layer", "last blocks only for rows that are read", kind="experiment"),
        Technique("step0-once", "first step once per distinct class", kind="experiment"),
        Technique("first-layer", "first block once for what all images share", kind="experiment"),
        Technique("guidance-interval", "guidance in the second half only", False, "setting"),
        Technique("inductor", "torch.compile of each network", kind="fast"),
        Technique("packed", "oneDNN's weight layout, GELU in the product", True, "fast", _CPU),
        Technique("products", "attention as plain matrix products", True, "fast", _CPU),
        Technique("graph", "the whole call as one CUDA graph", True, "fast", ("cuda",)),
        Technique("int8", "8-bit weights and activations", False, "fast", _CPU),
    )
}
BUILT_IN = tuple(t.name for t in TECHNIQUES.values() if t.kind == "built in")
EXPERIMENTS = tuple(t.name for t in TECHNIQUES.values() if t.kind == "experiment")


@contextmanager
def applied(names: Collection[str]) -> Iterator[None]:
    """titok_fast with these techniques and no others, while the context is open.

    Args:
        names: of BUILT_IN, those that stay in; of EXPERIMENTS, those that come in. Other
            techniques are not code to replace, so their names have no effect here.

    Raises:
        ValueError: an unknown name, or one that wants another: "masked-rows" wants "mixed-hidden",
            "last-layer" wants "masked-rows".
    """
    unknown = sorted(set(names) - set(TECHNIQUES))
    if unknown:
        raise ValueError(f"unknown technique {', '.join(unknown)}; known: {', '.join(TECHNIQUES)}")
    switches = Switches(
        one_batch="one-batch" in names,
        mixed="mixed-hidden" in names,
        skips="skip-zero" in names,
        masked_rows="masked-rows" in names,
        once_per_class="step0-once" in names,
        read_rows="last-layer" in names,
    )
    with ExitStack() as stack:
        if switches != Switches():  # else the loop that titok_fast ships
            loop = partial(variants.unmask, switches=switches)
            stack.enter_context(_replaced(sampling, "unmask", loop))
        for name, (owner, attribute, plain) in _PLAIN.items():
            if name not in names:
                stack.enter_context(_replaced(owner, attribute, plain))
        once, read = "first-layer" in names, "last-layer" in names
        if once or read:
            forward = _decoder_forward(once, read)
            stack.enter_context(_replaced(TiTokDecoder, "forward", forward))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _three_linears(self: PostNormBlock, x: Tensor) -> Tensor:
    """PostNormBlock.forward with q, k and v from three products; elsewhere upstream fuses them."""
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


def _all_images(self: PixelDecoder, codes: Tensor) -> Tensor:
    return self._decode(codes)


# technique: where its code is, and what stands there without it
_PLAIN: dict[str, tuple[Any, str, Any]] = {
    "fused-qkv": (PostNormBlock, "forward", _three_linears),
    "folded-shortcut": (ResnetBlock, "forward", _shortcut_apart),
    "channels-last": (maskgit_vqgan, "_channels_last", Tensor.contiguous),
    "phases": (maskgit_vqgan, "PHASES_FROM_PIXELS", maxsize),
    "fused-norm": (NormSiLU, "forward", _norm_then_silu),
    "one-image": (PixelDecoder, "forward", _all_images),
}

# by decoder: rows that all images share, (1+P, D), and their q, k and v. Kept between calls, since
# nobody trains during a measurement: what a release would make a table of.
_shared_rows: WeakKeyDictionary[TiTokDecoder, tuple[Tensor, Tensor]] = WeakKeyDictionary()


def _decoder_forward(once: bool, read: bool) -> Callable[[TiTokDecoder, Tensor], Tensor]:
    """TiTokDecoder.forward with less work in its first block, its last, or both."""

    def forward(self: TiTokDecoder, z_quantized: Tensor) -> Tensor:
        P, blocks = self.num_patches, list(self.transformer)
        latents = self.decoder_embed(z_quantized.squeeze(2).transpose(1, 2))
        latents = self.ln_pre(latents + self.latent_token_positional_embedding)  # (B, K, D)
        if once:
            x = _first_block(self, latents)
            blocks = blocks[1:]
        else:
            x = torch.cat([_first_rows(self).expand(len(latents), -1, -1), latents], dim=1)
        for block in blocks[:-1] if read else blocks:
            x = block(x)
        if read:
            B, L, D = x.shape
            rows = torch.arange(B * L, device=x.device).view(B, L)[:, 1 : 1 + P].flatten()
            x = pre_norm_rows(blocks[-1], x, rows).view(B, P, D)
        else:
            x = x[:, 1 : 1 + P]
        x, cfg = self.ffn(self.ln_post(x)), self.config
        if cfg.is_legacy:
            return unfold_tokens(x, cfg.decoder_grid, cfg.proxy_block)
        return self.conv_out(unfold_tokens(x, cfg.decoder_grid, cfg.vit_dec_patch_size))

    return forward


def _first_rows(decoder: TiTokDecoder) -> Tensor:
    """(1+P, D): class and mask tokens with their positions, normalised."""
    masks = decoder.mask_token[0].expand(decoder.num_patches, -1)
    rows = torch.cat([decoder.class_embedding, masks]) + decoder.positional_embedding
    return decoder.ln_pre(rows)


def _first_block(decoder: TiTokDecoder, latents: Tensor) -> Tensor:
    """(B, K, D) normalised latents -> (B, 1+P+K, D) after the first block."""
    block = decoder.transformer[0]
    assert isinstance(block, PreNormBlock)
    if decoder not in _shared_rows:
        rows = _first_rows(decoder)
        _shared_rows[decoder] = rows, block.attn.qkv(block.norm1(rows))
    rows, of_rows = _shared_rows[decoder]
    B, heads = len(latents), block.attn.heads
    x = torch.cat([rows.expand(B, -1, -1), latents], dim=1)
    qkv = block.attn.qkv(block.norm1(latents))
    qkv = torch.cat([of_rows.expand(B, -1, -1), qkv], dim=1)
    L, D = x.shape[1:]
    mixed = attend(qkv.view(B, L, 3, heads, D // heads), block.attn.backend)
    x = x + block.attn.proj(mixed)
    return x + block.mlp(block.norm2(x))
