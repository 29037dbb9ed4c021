"""bytedance/1d-tokenizer: `TiTok`, its quantizer, and the two masked generators.

The convolutional tail of a two-stage TiTok has this package's layout, so its blocks simply take
the forward functions of `titok_fast.models.vqgan`. The generators keep their transformers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.integrations._swap import Fast, Plan, check_codebook, refuse
from titok_fast.kernels.guided_sample import guided_sample
from titok_fast.kernels.remask import MAX_TOKENS, remask
from titok_fast.models import vqgan
from titok_fast.models.generator import UViTBert
from titok_fast.models.quantizer import VectorQuantizer
from titok_fast.models.tokenizer import expected_codes
from titok_fast.sampling.schedules import Step, steps
from titok_fast.sampling_config import SamplingConfig


class FastQuantizer(Fast, nn.Module):
    """Nearest code without the matrix of distances; same losses and gradients."""

    metric = VectorQuantizer.metric
    forward = VectorQuantizer.forward


class FastTiTok(Fast, nn.Module):
    """Soft pixel codes in one pass."""

    decoder: nn.Module
    pixel_decoder: nn.Module
    pixel_quantize: Any

    def decode(self, z_quantized: Tensor) -> Tensor:
        """(B, C, 1, K) codes -> (B, 3, S, S) pixels, or proxy-code logits in stage 1."""
        logits = self.decoder(z_quantized)
        if not self.finetune_decoder:
            return logits
        return self.pixel_decoder(expected_codes(logits, self.pixel_quantize.embedding.weight))


class FastConv(Fast, nn.Conv2d):
    """Padding inside the convolution instead of a padded copy. Sizes 1 and 3, stride 1."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H, W)."""
        return F.conv2d(x, self.weight, self.bias, padding=self.kernel_size[0] // 2)


class FastNorm(Fast, nn.Module):
    """GroupNorm and the SiLU after it, which FastBlock and FastPixelDecoder leave to it."""

    forward = vqgan.NormSiLU.forward


class FastBlock(Fast, nn.Module):
    """A residual block that keeps its width."""

    nin_shortcut = None
    forward = vqgan.ResnetBlock.forward


class FastWideningBlock(Fast, nn.Module):
    """A residual block that changes its width; its shortcut folds into the second kernel."""

    forward = vqgan.ResnetBlock.forward


class FastLevel(Fast, nn.Module):
    """A resolution that upsamples at its end: four small convolutions replace a large one."""

    block: nn.ModuleList
    upsample_conv: Any

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, 2H, 2W)."""
        for block in self.block:
            x = block(x)
        return vqgan.upsample_conv(x, self.upsample_conv.weight, self.upsample_conv.bias)


class FastLastLevel(Fast, nn.Module):
    """The finest resolution."""

    upsample_conv = None
    forward = vqgan.Level.forward


class FastPixelDecoder(Fast, nn.Module):
    """Channels-last throughout, as upstream's is after its einsum."""

    forward = vqgan.PixelDecoder.forward
    _decode = vqgan.PixelDecoder._decode


class FastImageBert(Fast, nn.Module):
    """`generate` with conditional and unconditional pass in one batch, and no host wait inside."""

    image_seq_len: int
    mask_token_id: int
    target_codebook_size: int
    condition_num_classes: int
    model: Any
    lm_head: nn.Linear

    @torch.no_grad()
    def generate(
        self,
        condition: Tensor,
        guidance_scale: float = 3.0,
        guidance_decay: str = "constant",
        guidance_scale_pow: float = 3.0,
        randomize_temperature: float = 4.5,
        softmax_temperature_annealing: bool = False,
        num_sample_steps: int = 8,
    ) -> Tensor:
        """(B,) labels -> (B, K) int64 ids, by the random stream of the replaced method."""
        guidance = guidance_scale, guidance_decay, guidance_scale_pow
        settings = *guidance, randomize_temperature, softmax_temperature_annealing
        # in half precision the replaced code rounds its noise, and the rounding decides
        half = self._head().weight.dtype != torch.float32
        if self.training or half or torch.is_autocast_enabled(condition.device.type):
            return super().generate(condition, *settings, num_sample_steps)  # type: ignore[misc]
        config = SamplingConfig(num_sample_steps, *settings)  # in the same order
        B, K = condition.shape[0], self.image_seq_len
        ids = torch.full((B, K), self.mask_token_id, device=condition.device)
        for step in steps(config):
            ids = self._one_step(ids, condition, step, guidance_decay == "power-cosine")
        return ids

    def _one_step(self, ids: Tensor, condition: Tensor, step: Step, from_uncond: bool) -> Tensor:
        """(B, K) ids -> (B, K) ids with fewer masks."""
        mask = ids == self.mask_token_id
        logits, other = self._both_logits(ids, condition, from_uncond or step.guidance != 0)
        guidance = step.guidance
        if from_uncond:
            # upstream's uncond + s * (cond - uncond) with s = guidance + 1, in the same order
            assert other is not None
            logits, other, guidance = other, logits, -(guidance + 1)
        noise = _noise(logits, step.token_noise)
        candidates, scores = guided_sample(
            logits,
            other,
            mask=mask,
            ids=ids,
            guidance=guidance,
            softmax_temperature=step.softmax_temperature,
            noise_temperature=1.0 if step.token_noise else 0.0,
            noise=noise,
        )
        noise = _noise(scores, step.remask_noise)
        if step.last:
            return candidates
        wanted = int(ids.shape[1] * step.mask_ratio)
        # upstream applies the count of sample 0 to all
        count = (mask[:1].sum(dim=1) - 1).clamp(max=wanted).clamp(min=1).expand(ids.shape[0])
        return remask(
            candidates,
            scores,
            count,
            mask_id=self.mask_token_id,
            noise_temperature=1.0 if step.remask_noise else 0.0,
            noise=noise,
        )

    def _both_logits(
        self, ids: Tensor, condition: Tensor, guided: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(B, K) ids -> (B, K, N) conditional logits, and the unconditional ones if guided."""
        N = self.target_codebook_size
        classes = condition.long().view(-1, 1) + N + 1
        tokens = torch.cat([classes, ids], dim=1)
        # each replaced pass draws whether to drop labels, then does so never or always
        torch.rand_like(condition, dtype=torch.float)
        if guided:
            torch.rand_like(condition, dtype=torch.float)
            dropped = torch.full_like(classes, N + 1 + self.condition_num_classes)
            tokens = torch.cat([tokens, torch.cat([dropped, ids], dim=1)])
        logits = self._head()(self._trunk(tokens)[:, 1:])
        if not guided:
            return logits, None
        cond, uncond = logits.chunk(2)
        return cond, uncond

    def _trunk(self, tokens: Tensor) -> Tensor:
        """(R, 1 + K) token ids -> (R, 1 + K, D)."""
        return self.model(input_ids=tokens)[0]

    def _head(self) -> nn.Linear:
        """The Linear from D to N."""
        return self.model.lm_head


class FastUViTBert(FastImageBert):
    """As FastImageBert, for the other transformer."""

    _trunk = UViTBert.trunk

    def _head(self) -> nn.Linear:
        return self.lm_head


def _noise(like: Tensor, scale: float) -> Tensor:
    """Upstream's scaled Gumbel noise; drawn at scale 0 too, as upstream advances its generator."""
    u = torch.empty_like(like).uniform_(0, 1)
    if scale:
        u.clamp_(min=1e-20).log_().neg_().clamp_(min=1e-20).log_().neg_().mul_(scale)
    return u


def plan_quantizer(obj: Any) -> Plan:
    """Parts of a `VectorQuantizer`."""
    if obj.clustering_vq:
        refuse(
            obj,
            "clustering_vq=True moves codes by the whole matrix of distances, which the kernel "
            "never forms",
        )
    check_codebook(obj, obj.embedding.weight)
    return [(obj, FastQuantizer)]


def plan_titok(obj: Any) -> Plan:
    """Parts of a `TiTok`: itself, its quantizer, and its pixel decoder if it has one."""
    if obj.quantize_mode != "vq":
        refuse(
            obj,
            "quantize_mode='vae' has no codes and no pixel decoder; use titok_fast.TiTok, which "
            "loads the same weights",
        )
    plan: Plan = [(obj, FastTiTok), *plan_quantizer(obj.quantize)]
    return plan + _pixel_parts(obj.pixel_decoder) if obj.finetune_decoder else plan


# by name, so that a layer that was wrapped or replaced since is noticed
_PIXEL_PARTS: dict[str, Callable[[Any], type[Fast]]] = {
    "Decoder": lambda part: FastPixelDecoder,
    "Conv2dSame": lambda part: FastConv,
    "GroupNorm": lambda part: FastNorm,
    "ResnetBlock": lambda part: FastWideningBlock if hasattr(part, "nin_shortcut") else FastBlock,
    "UpsamplingBlock": lambda part: FastLevel if part.add_upsample else FastLastLevel,
}


def _pixel_parts(decoder: Any) -> Plan:
    plan: Plan = []
    for name, part in decoder.named_modules():
        kind = type(part).__name__
        if part._forward_hooks or part._forward_pre_hooks:
            refuse(decoder, f"{name} has hooks, which folded layers would not run: remove them")
        elif kind in _PIXEL_PARTS:
            plan.append((part, _PIXEL_PARTS[kind](part)))
        elif kind == "Dropout" and part.p > 0:
            refuse(decoder, f"{name} has dropout {part.p}, which the fused block leaves out")
        elif kind not in ("ModuleList", "Dropout"):
            refuse(decoder, f"{name} is a {kind}, which the released model does not have")
    return plan


def plan_imagebert(obj: Any) -> Plan:
    """Parts of an `ImageBert`."""
    return _generator(obj, obj.model.lm_head, FastImageBert)


def plan_uvit(obj: Any) -> Plan:
    """Parts of a `UViTBert`."""
    return _generator(obj, obj.lm_head, FastUViTBert)


def _generator(obj: Any, head: nn.Linear, overrides: type[Fast]) -> Plan:
    if head.weight.dtype != torch.float32:
        refuse(
            obj,
            f"its weights are {head.weight.dtype}; there its noise is rounded before it decides, "
            "so ids would differ. Convert it to float32, or use titok_fast.TiTokPipeline",
        )
    if obj.image_seq_len > MAX_TOKENS:
        refuse(obj, f"{obj.image_seq_len} tokens; remask takes {MAX_TOKENS} at most")
    return [(obj, overrides)]
