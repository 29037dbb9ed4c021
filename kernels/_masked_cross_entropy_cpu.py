"""`masked_cross_entropy` with its gradient on a CPU: the kernel's design in PyTorch operations.

Works on chunks of rows. The gradient of a chunk's logits overwrites them, block by block, and two
matmuls turn it into the gradients of hidden states and head; nothing of size R * N is saved for
backward, which only scales. Plain autograd saves the logits in two dtypes and allocates two more
tensors of their size in backward. The forward divides gradients by the sum of weights, at no cost:
most losses need no further factor then.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 23  # logits per matmul
_BLOCK_ELEMENTS = 1 << 18  # 1 MiB of float32: elementwise passes stay in the cache


class CpuLoss(torch.autograd.Function):
    """`masked_cross_entropy` of checked arguments, with gradients to hidden, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        weights: Tensor,
        label_smoothing: float,
        eps: float,
    ) -> Tensor:
        """Arguments as in `masked_cross_entropy`, autocast off; `eps` joins the sum of weights."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        (_, D), N = hidden.shape, weight.shape[0]
        head, offset, w = weight.to(hidden.dtype), bias.to(hidden.dtype), weights.to(wide)
        total, summed = w.sum() + eps, w.new_zeros(())
        # in float16 gradients so small underflow: there the backward divides
        if hidden.dtype != torch.float16:
            w, total = w / total, torch.ones_like(total)
        g_hidden, g_bias = torch.empty_like(hidden), hidden.new_zeros(N, dtype=wide)
        g_weight = None  # not zeros: most calls are one chunk
        step = max(1, _CHUNK_ELEMENTS // N)
        block = max(1, _BLOCK_ELEMENTS // N)
        for rows in (slice(r, r + step) for r in range(0, len(hidden), step)):
            grad = F.linear(hidden[rows], head, offset)  # logits, overwritten below
            blocks = (x.split(block) for x in (grad, targets[rows], w[rows]))
            for logits, ids, part in zip(*blocks, strict=True):
                loss, of_bias = _to_gradient(logits, ids, part, label_smoothing)
                summed += loss
                g_bias += of_bias
            torch.mm(grad, head, out=g_hidden[rows])
            partial = grad.T @ hidden[rows]
            if step < len(hidden) or hidden.dtype == torch.float16:
                partial = partial.to(wide)  # to sum or divide in; a single chunk needs neither
            g_weight = partial if g_weight is None else g_weight.add_(partial)
        if g_weight is None:
            g_weight = hidden.new_zeros((N, D), dtype=wide)
        ctx.save_for_backward(total, g_hidden, g_weight, g_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        return summed / total

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor) -> tuple:
        """See `scaled_gradients`; a gradient equal to `total` needs no scaling."""
        total, *grads = ctx.saved_tensors
        if torch.is_grad_enabled() or g_loss != total:
            return scaled_gradients(ctx, g_loss)
        cast = (g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return *cast, None, None, None, None


def _to_gradient(
    logits: Tensor, targets: Tensor, weights: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Overwrite logits by the gradient of their loss; return the loss and the bias gradient.

    Computes, and returns, in the dtype of the weights.
    """
    N, ids, part = logits.shape[1], targets[:, None], weights[:, None]
    logs = torch.log_softmax(logits, dim=1, dtype=weights.dtype)
    ce = (label_smoothing - 1) * logs.gather(1, ids)
    if label_smoothing > 0:  # a forbidden code has logit -inf: 0 * inf is NaN
        ce = ce - label_smoothing * logs.mean(dim=1, keepdim=True)
    grad = logs.exp_().sub_(label_smoothing / N)
    grad.scatter_add_(1, ids, grad.new_full(ids.shape, label_smoothing - 1)).mul_(part)
    logits.copy_(grad)
    return (part * ce).sum(), grad.sum(dim=0)


def scaled_gradients(ctx: Any, g_loss: Tensor) -> tuple:
    """Scale the gradients that the forward saved: the backward of this and of the kernel's op.

    Raises:
        RuntimeError: under create_graph, as the saved gradients have no graph. The decorator
            `once_differentiable` would let them pass as constants.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("masked_cross_entropy is once differentiable; got create_graph=True")
    total, *grads = ctx.saved_tensors
    scale = g_loss / total
    scaled = [
        (g.to(torch.promote_types(g.dtype, dtype)) * scale).to(dtype)
        for g, dtype in zip(grads, ctx.dtypes, strict=True)
    ]
    return *scaled, None, None, None, None
