"""Masked generators: class and partly masked ids -> logits. Upstream: modeling/maskgit.py.

Token space, N = codebook_size: 0..N-1 image tokens, N the mask, N+1.. the classes, last "no class".
"""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from titok_fast.config import GeneratorConfig
from titok_fast.models.blocks import PostNormBlock, PreNormBlock, set_attention
from titok_fast.models.weights import PretrainedModel
from titok_fast.sampling.masking import Noise, mask_tokens
from titok_fast.sampling.reference import generate
from titok_fast.sampling.unmask import sample
from titok_fast.sampling_config import SamplingConfig

Config = GeneratorConfig | Mapping[str, Any] | DictConfig  # the last two in upstream's form


class MaskedGenerator(PretrainedModel):
    """Base of both generators: token space, upstream's `forward` and `generate`."""

    config_class = GeneratorConfig
    model_type: str
    lm_head: nn.Linear

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config: GeneratorConfig = self._as_config(config)
        if self.config.model_type != self.model_type:
            raise ValueError(
                f"{type(self).__name__} wants model_type {self.model_type!r}; the configuration "
                f"says {self.config.model_type!r}: use titok_fast.generator_class(config)"
            )
        self.image_seq_len = self.config.image_seq_len
        self.mask_token_id = self.config.mask_token_id
        self.target_codebook_size = self.config.codebook_size
        self.condition_num_classes = self.config.condition_num_classes

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return self.lm_head.weight.dtype

    def hidden(self, ids: Tensor, class_ids: Tensor) -> Tensor:
        """(B, K) ids with masks and (B,) class ids in token space -> (B, K, D) last hidden states.

        `lm_head` makes them logits (B, K, N).
        """
        return self.trunk(torch.cat([class_ids[:, None], ids], dim=1))[:, 1:]

    def trunk(self, tokens: Tensor) -> Tensor:
        """(B, 1 + K) token ids -> (B, 1 + K, D)."""
        raise NotImplementedError

    def compile(self, **options: Any) -> None:
        """Compile the transformer in place; the sampling loop around it is not compiled."""
        self.trunk = torch.compile(self.trunk, **options)  # type: ignore[method-assign]

    def class_ids(self, labels: Tensor) -> Tensor:
        """(B,) labels 0..classes-1 -> (B,) int64 ids in token space."""
        return labels.long() + self.config.codebook_size + 1

    def forward(
        self,
        input_ids: Tensor | None = None,
        condition: Tensor | None = None,
        cond_drop_prob: float = 0.1,
    ) -> Tensor:
        """(B, K) int64 ids with masks and (B,) int64 labels -> (B, K, N) logits.

        Drops each label with probability `cond_drop_prob`, for which it always draws a uniform.
        """
        if input_ids is None or condition is None:
            raise ValueError("forward wants input_ids (B, K) and condition (B,)")
        drop = torch.rand(condition.shape, device=condition.device) < cond_drop_prob
        class_ids = self.class_ids(condition).masked_fill(drop, self.config.no_class_id)
        ids = input_ids.flatten(1)
        return self.lm_head(self.hidden(ids, class_ids.view(-1)))

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
        *,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Upstream's `generate`: (B,) int64 labels -> (B, K) int64 ids in [0, N).

        Without `seeds`, (B,) int64, this is the reference sampler: after the same torch.manual_seed
        it gives upstream's ids on the same device. With `seeds` it is the fast sampler, whose
        result for a sample depends on its seed, label and settings only. The settings are those of
        SamplingConfig.

        Raises:
            ValueError: a label or setting out of range.
        """
        config = SamplingConfig(
            num_sample_steps=num_sample_steps,
            guidance_scale=guidance_scale,
            guidance_decay=guidance_decay,
            guidance_scale_pow=guidance_scale_pow,
            randomize_temperature=randomize_temperature,
            softmax_temperature_annealing=softmax_temperature_annealing,
        )
        if seeds is None:
            return generate(self, condition, config)
        return sample(self, condition, seeds, config)

    def masking_input_tokens(self, input_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mask a random share of each row of (B, K) int64 ids for training, by the arccos schedule.

        Returns:
            (B, K) ids with masks, (B, K) bool, True where masked (at least one per row).
        """
        B, device = len(input_tokens), input_tokens.device
        # drawn in upstream's order; `forward` draws for the labels
        ratio, order = torch.rand(B, device=device), torch.rand(input_tokens.shape, device=device)
        return mask_tokens(input_tokens, Noise(ratio, order, ratio[:0]), self.mask_token_id)


class ImageBert(MaskedGenerator):
    """MaskGIT-ViT: BERT with one more Linear, not tied to the embeddings, for image tokens only."""

    model_type = "ViT"

    def __init__(self, config: Config, *, attention: str | None = None) -> None:
        super().__init__(config)
        cfg, D = self.config, self.config.hidden_size
        self.embeddings = nn.Embedding(cfg.vocab_size, D)
        self.pos_embed = nn.Parameter(torch.empty(cfg.image_seq_len + 1, D))
        self.type_embed = nn.Parameter(torch.empty(2, D))  # BERT's sentence types: row 0 alone acts
        self.norm_in = nn.LayerNorm(D, eps=1e-12)
        self.dropout = nn.Dropout(cfg.dropout)
        size = D, cfg.num_attention_heads, cfg.intermediate_size
        rates: dict[str, Any] = {"dropout": cfg.dropout, "attention_dropout": cfg.attn_drop}
        self.blocks = nn.Sequential(
            *(PostNormBlock(*size, **rates) for _ in range(cfg.num_hidden_layers))
        )
        self.lm_head = nn.Linear(D, cfg.codebook_size)
        for table in (self.embeddings.weight, self.pos_embed, self.type_embed):
            nn.init.normal_(table, std=0.02)
        self.apply(_init_bert)
        set_attention(self, attention)

    def trunk(self, tokens: Tensor) -> Tensor:
        """(B, 1 + K) token ids -> (B, 1 + K, D)."""
        x = self.embeddings(tokens) + self.type_embed[0] + self.pos_embed[: tokens.shape[1]]
        return self.blocks(self.dropout(self.norm_in(x)))


class UViTBert(MaskedGenerator):
    """MaskGIT-UViT: pre-norm blocks, the second half merging the outputs of the first."""

    model_type = "UViT"

    def __init__(self, config: Config, *, attention: str | None = None) -> None:
        super().__init__(config)
        cfg, D = self.config, self.config.hidden_size
        half = cfg.num_hidden_layers // 2

        def block(skip: bool = False) -> PreNormBlock:
            heads, hidden = cfg.num_attention_heads, cfg.intermediate_size
            return PreNormBlock(D, heads, hidden, qkv_bias=False, skip=skip)

        self.embeddings = nn.Embedding(cfg.vocab_size, D)
        self.pos_embed = nn.Parameter(torch.empty(1, cfg.image_seq_len + 1, D))
        self.in_blocks = nn.ModuleList(block() for _ in range(half))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(D)
        self.lm_head = nn.Linear(D, cfg.codebook_size)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_uvit)
        set_attention(self, attention)

    def trunk(self, tokens: Tensor) -> Tensor:
        """(B, 1 + K) token ids -> (B, 1 + K, D)."""
        x = self.embeddings(tokens) + self.pos_embed[:, : tokens.shape[1]]
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.norm(x)


def generator_class(config: GeneratorConfig) -> type[ImageBert] | type[UViTBert]:
    """The class a configuration is for."""
    return ImageBert if config.model_type == "ViT" else UViTBert


def _init_bert(module: nn.Module) -> None:
    """Hugging Face's default: normal 0.02, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _init_uvit(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
