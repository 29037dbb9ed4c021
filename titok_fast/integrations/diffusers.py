"""Hugging Face diffusers: the quantizer of `VQModel`, and a step of `AmusedScheduler`."""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from titok_fast.integrations._swap import Fast, Plan, check_codebook, refuse
from titok_fast.kernels.guided_sample import guided_sample
from titok_fast.kernels.nearest_code_stats import nearest_code_stats
from titok_fast.kernels.remask import remask

# the replaced step's logarithms of the probability of a known token, and of a probability of 0
_KNOWN_SCORE = math.log(torch.finfo(torch.float32).max)
_LEAST_SCORE = math.log(1e-20)


class FastVQ(Fast, nn.Module):
    """Nearest code without the matrix of distances; same losses and gradients."""

    embedding: nn.Embedding
    beta: float

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """(B, C, H, W) -> codes of the same shape, the loss, and (None, None, ids)."""
        table = self.embedding.weight
        if not z.dtype == table.dtype == torch.float32 or torch.is_autocast_enabled(z.device.type):
            # half-precision distances round many codes into ties
            return super().forward(z)
        found = nearest_code_stats(z.permute(0, 2, 3, 1).contiguous(), table, beta=1.0)
        to_codes, to_rows = found.commitment_loss, found.codebook_loss
        # legacy: beta weighs the codebook's term, a mistake that released weights were trained with
        loss = to_codes + self.beta * to_rows if self.legacy else self.beta * to_codes + to_rows
        ids = found.ids if self.sane_index_shape else found.ids.flatten()
        return found.quantized.permute(0, 3, 1, 2).contiguous(), loss, (None, None, ids)


class FastAmused(Fast):
    """One step of masked generation: draw, score, mask again. A NaN is an error on a CPU alone."""

    config: Any
    timesteps: Tensor
    temperatures: Tensor

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        starting_mask_ratio: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step; arguments and results as in the replaced method."""
        if model_output.dtype != torch.float32:
            # half-precision probabilities are rounded before they are drawn from
            return super().step(  # type: ignore[misc]
                model_output, timestep, sample, starting_mask_ratio, generator, return_dict
            )
        shape = sample.shape
        if sample.ndim == 3 and model_output.ndim == 4:  # (B, h, w) and (B, N, h, w)
            model_output, sample = model_output.flatten(2).transpose(1, 2), sample.flatten(1)
        mask = sample == self.config.mask_token_id
        drawn, scores = guided_sample(
            model_output,
            mask=mask,
            ids=sample,
            noise=_race(model_output, generator),
            noise_temperature=1.0,
            rule="probability",
        )
        ids = drawn
        if timestep != 0:
            index = (self.timesteps == timestep).nonzero()  # (1, 1)
            noise = self.temperatures[index] * _gumbel(scores, generator)
            ids = remask(
                drawn,
                scores.clamp(min=_LEAST_SCORE).masked_fill(~mask, _KNOWN_SCORE),
                self._num_masked(mask, index, starting_mask_ratio),
                mask_id=self.config.mask_token_id,
                noise=noise,
                noise_temperature=1.0,
                rule="probability",
            )
        ids, drawn = ids.view(shape), drawn.view(shape)
        if not return_dict:
            return ids, drawn
        module = sys.modules[type(self).accelerated_from.__module__]
        return module.AmusedSchedulerOutput(ids, drawn)

    def _num_masked(self, mask: Tensor, index: Tensor, starting_mask_ratio: float) -> Tensor:
        """(B,) int64; in float32, whose rounding decides a count here and there."""
        done = (index + 1) / len(self.timesteps)
        cosine = self.config.masking_schedule == "cosine"
        left = torch.cos(done * math.pi / 2) if cosine else 1 - done
        count = (mask.shape[1] * (starting_mask_ratio * left)).floor()
        return torch.min(mask.sum(dim=1) - 1, count.view(1)).clamp(min=1).long()


def _race(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B, K, N) Gumbel noise that makes an argmax of the logits what torch.multinomial draws.

    It divides the probabilities by exponential draws and takes the largest quotient; minus the
    logarithm of such a draw is Gumbel noise.
    """
    device = logits.device if generator is None else generator.device
    rows = (logits.shape[0] * logits.shape[1], logits.shape[2])
    draws = torch.empty(rows, device=device).exponential_(1, generator=generator)
    return draws.to(logits.device).log_().neg_().view(logits.shape)


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    u = torch.empty(like.shape, device=device).uniform_(0, 1, generator=generator).to(like.device)
    return u.clamp_(min=1e-20).log_().neg_().clamp_(min=1e-20).log_().neg_()


def plan_vq_model(obj: Any) -> Plan:
    """Parts of a `VQModel`: its quantizer; the convolutions do not change."""
    return plan_vq_quantizer(obj.quantize)


def plan_vq_quantizer(obj: Any) -> Plan:
    """Parts of a `VectorQuantizer`."""
    if obj.remap is not None:
        refuse(obj, "remap renames ids by a table; the kernel returns rows of the codebook")
    if obj.embedding.weight.dtype != torch.float32:
        refuse(
            obj,
            f"its codebook is {obj.embedding.weight.dtype}; there it rounds distances into ties, "
            "so ids would differ. Convert it to float32",
        )
    check_codebook(obj, obj.embedding.weight)
    return [(obj, FastVQ)]


def plan_amused(obj: Any) -> Plan:
    """Parts of an `AmusedScheduler`: itself."""
    schedule = obj.config.masking_schedule
    if schedule not in ("cosine", "linear"):
        refuse(obj, f"masking_schedule is {schedule!r}; known are 'cosine' and 'linear'")
    return [(obj, FastAmused)]
