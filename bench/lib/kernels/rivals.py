"""What the kernels are compared with: upstream's formulas, and other libraries.

The formulas restate bytedance/1d-tokenizer, with as many passes over memory as it makes; each names
its file there. They take the arguments of our functions, but draw their own noise.
"""

import importlib.util
from collections.abc import Callable
from math import floor

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest_code_upstream(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """modeling/quantizer/quantizer.py: all distances in memory, then the smallest of each row."""
    if metric == "cosine":
        z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    squares = (z**2).sum(1, keepdim=True) + (codebook**2).sum(1)
    return torch.argmin(squares - 2 * torch.einsum("nc,ck->nk", z, codebook.T), dim=1)


def nearest_code_stats_upstream(
    z: Tensor, codebook: Tensor, metric: str, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """modeling/quantizer/quantizer.py: ids, codes with a straight-through gradient, two losses.

    Upstream counts no usage here, so this makes no histogram.
    """
    ids = nearest_code_upstream(z, codebook, metric)
    q, f = F.embedding(ids, codebook), z
    if metric == "cosine":
        q, f = F.normalize(q, dim=-1), F.normalize(z, dim=-1)
    commitment = beta * ((q.detach() - f) ** 2).mean()
    return ids, f + (q - f).detach(), commitment, ((q - f.detach()) ** 2).mean()


def gumbel_upstream(like: Tensor) -> Tensor:
    """modeling/maskgit.py: noise from the global generator, in the dtype of the logits."""

    def log(x: Tensor) -> Tensor:
        return torch.log(x.clamp(min=1e-20))

    return -log(-log(torch.zeros_like(like).uniform_(0, 1)))


def _sample_upstream(
    logits: Tensor, uncond_logits: Tensor, guidance: float, noise_temperature: float
) -> tuple[Tensor, Tensor]:
    """modeling/maskgit.py: mix, noise, argmax, gather."""
    logits = logits + (logits - uncond_logits) * guidance
    candidates = (logits + noise_temperature * gumbel_upstream(logits)).argmax(dim=-1)
    return candidates, logits.gather(-1, candidates[..., None]).squeeze(-1)


def guided_sample_upstream(
    logits: Tensor,
    uncond_logits: Tensor,
    mask: Tensor,
    ids: Tensor,
    guidance: float,
    noise_temperature: float,
) -> tuple[Tensor, Tensor]:
    """modeling/maskgit.py: sample, then restore the known tokens."""
    candidates, scores = _sample_upstream(logits, uncond_logits, guidance, noise_temperature)
    return torch.where(mask, candidates, ids), torch.where(mask, scores, float("inf")).float()


def lm_head_sample_upstream(
    hidden: Tensor,
    uncond_hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    guidance: float,
    noise_temperature: float,
) -> tuple[Tensor, Tensor]:
    """modeling/maskgit.py: two heads, then sampling from their logits; here every row is masked."""
    logits, uncond = F.linear(hidden, weight, bias), F.linear(uncond_hidden, weight, bias)
    candidates, scores = _sample_upstream(logits, uncond, guidance, noise_temperature)
    return candidates, scores.float()


def remask_upstream(
    candidates: Tensor,
    scores: Tensor,
    is_mask: Tensor,
    mask_id: int,
    mask_ratio: float,
    noise_temperature: float,
) -> Tensor:
    """modeling/maskgit.py: one count for the whole batch, read by the host as a slice bound."""
    n = torch.Tensor([floor(scores.shape[1] * mask_ratio)]).to(scores.device)
    n = torch.minimum(is_mask.sum(dim=-1, keepdim=True) - 1, n)
    n = torch.maximum(torch.Tensor([1]).to(scores.device), n)[0].squeeze().long()
    confidence = scores + noise_temperature * gumbel_upstream(scores)
    cutoff = confidence.sort(dim=-1).values[:, n - 1 : n]
    return torch.where(confidence <= cutoff, mask_id, candidates)


def soft_codes_upstream(logits: Tensor, codebook: Tensor) -> Tensor:
    """modeling/titok.py: (B, Kc, h, w) logits, softmax over channels -> (B, C, h, w)."""
    return torch.einsum("bkhw,kc->bchw", logits.softmax(dim=1), codebook)


def group_norm_silu_upstream(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """modeling/modules/maskgit_vqgan.py: normalisation and activation of a channels-first block."""
    return F.silu(F.group_norm(x, 32, weight, bias, 1e-6))


def masked_cross_entropy_upstream(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, K: int
) -> Tensor:
    """modeling/modules/losses.py: logits of all tokens, loss over (B, N, K), weighted mean."""
    logits = F.linear(hidden, weight, bias).unflatten(0, (-1, K))  # (B, K, N)
    targets, weights = targets.unflatten(0, (-1, K)), weights.unflatten(0, (-1, K))
    loss = F.cross_entropy(
        logits.transpose(1, 2), targets, label_smoothing=0.1, reduction="none"
    )  # (B, K)
    return (loss * weights).sum() / (weights.sum() + 1e-8)


def vq_library(codebook: Tensor, metric: str) -> Callable[[Tensor], Tensor] | str:
    """vector-quantize-pytorch's quantizer: latents (N, C) -> ids (N,), or why it is absent.

    It gathers the codes as well, which cannot be turned off.
    """
    if importlib.util.find_spec("vector_quantize_pytorch") is None:
        return "not installed"
    from vector_quantize_pytorch import VectorQuantize

    N, C = codebook.shape
    module = VectorQuantize(dim=C, codebook_size=N, use_cosine_sim=metric == "cosine")
    module = module.to(codebook.device).eval()
    # it expects a table of unit length
    module.codebook = F.normalize(codebook, dim=-1) if metric == "cosine" else codebook
    return lambda z: module(z[None])[1][0]


def liger_loss(device: torch.device) -> Callable[..., Tensor] | str:
    """Liger-Kernel's fused head and cross-entropy, weighted per token, or why it is absent.

    Token weights want its reduction "none", which recomputes the logits in the backward.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed"
    if device.type != "cuda":
        return "needs CUDA"
    from liger_kernel.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction as Fused,
    )

    def loss(
        hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor
    ) -> Tensor:
        # input, head, targets, bias, class weights, ignored id, z-loss, smoothing, reduction
        each = Fused.apply(hidden, weight, targets, bias, None, -100, 0.0, 0.1, "none")[0]
        return (each * weights).sum() / (weights.sum() + 1e-8)

    return loss
