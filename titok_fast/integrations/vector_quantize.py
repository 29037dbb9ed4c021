"""vector_quantize_pytorch: `VectorQuantize` in evaluation, Euclidean and cosine.

In training that class needs the matrix of distances, or updates its codebook while it searches, so
it runs its own code. The library's other quantizers (residual, grouped) contain this one:
accelerate their layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.integrations._swap import Fast, Plan, check_codebook, refuse
from titok_fast.kernels.nearest_code import find_codes

# arguments of forward that change nothing in evaluation
_TRAINING_ARGUMENTS = {
    "sample_codebook_temp",
    "freeze_codebook",
    "ema_update",
    "ema_update_weight",
    "accum_ema_update",
}


class FastVectorQuantize(Fast, nn.Module):
    """Search without the matrix of distances, and no copy of the codebook per image."""

    project_in: nn.Module
    project_out: nn.Module
    _codebook: Any

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Quantise; arguments and results as in the replaced method."""
        maps = bool(self.accept_image_fmap or self.accept_3d_fmap)
        rank = 4 if self.accept_image_fmap else 5 if self.accept_3d_fmap else 3
        asked = {
            name for name, value in options.items() if value is not None and value is not False
        }
        single = x.ndim == 2 and not maps
        # rounding to half precision changes the codes' lengths, and so their dot products
        rounded = self.use_cosine_sim and self._codebook.embed.dtype != torch.float32
        unusual = bool(args) or bool(asked - _TRAINING_ARGUMENTS) or not (single or x.ndim == rank)
        if self.training or rounded or unusual:
            return super().forward(x, *args, **options)

        dtype, spatial = x.dtype, x.shape[2:]
        swapped = maps or not (self.channel_last or single)
        if maps:
            x = x.flatten(2)
        if swapped:
            x = x.transpose(1, 2)
        codes, ids = self._quantise(x, dtype)
        if swapped:
            codes = codes.transpose(1, 2)
        if maps:
            codes, ids = codes.unflatten(2, spatial), ids.unflatten(1, spatial)
        return codes, ids, self.zero

    def _quantise(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(..., C) -> (..., C) codes in dtype, (...) int64 ids."""
        book = self._codebook
        table = book.embed[0] if book.learnable_codebook else book.embed[0].detach()
        x = book.transform_input(self.project_in(x))
        metric = "cosine" if self.use_cosine_sim else "euclidean"
        rows = x.reshape(-1, x.shape[-1]).float()
        ids = find_codes(rows, table.float(), metric, ids_only=False).view(x.shape[:-1])
        return self.project_out(F.embedding(ids, table.float()).to(dtype)), ids


def plan_vector_quantize(obj: Any) -> Plan:
    """Parts of a `VectorQuantize`."""
    book = obj._codebook
    sampler = getattr(book.gumbel_sample, "keywords", {})
    for found, reason in (
        (type(book).__name__ != "Codebook", f"its codebook is a {type(book).__name__}"),
        (obj.heads > 1, f"heads={obj.heads}; the kernel searches one codebook for one head"),
        (
            sampler.get("stochastic", True),
            "stochastic_sample_codes=True draws codes at a temperature; the kernel takes the "
            "nearest one",
        ),
        (book.affine_param, "affine_param=True moves the codebook with every batch"),
        (book.vq_bridge is not None, "vq_bridge computes the codebook anew in every call"),
        (
            obj.training,
            "in training it updates its codebook (EMA, dead codes) from the whole matrix of "
            "distances, which the kernel never forms: call .eval() first",
        ),
        (not book.initted, "kmeans_init is still to come: run one batch in training mode first"),
    ):
        if found:
            refuse(obj, reason)
    check_codebook(obj, book.embed[0])
    lengths = book.embed[0].detach().float().norm(dim=-1)
    if obj.use_cosine_sim and not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4):
        refuse(
            obj,
            "use_cosine_sim=True with codes that are not of unit length: it compares by dot "
            "product, which is then no cosine. Normalise its codebook",
        )
    return [(obj, FastVectorQuantize)]
