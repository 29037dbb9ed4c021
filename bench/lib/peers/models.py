"""How each kind of generator samples: by diffusion, by unmasking, one token after the other.

Schedulers, top-k and conditioning outside the network are left out: less than a thousandth of the
work. Encoders are dropped, since sampling does not run them. Sizes are in systems.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from titok_fast import GeneratorConfig, ImageBert, MaskGitVQGAN, SamplingConfig, VQGANConfig
from titok_fast.models.blocks import PreNormBlock
from titok_fast.models.generator import UViTBert
from titok_fast.sampling.unmask import sample, sample_seeds

CLASSES = 1000


@dataclass(frozen=True)
class Calls:
    """What to time for a batch: calls of `steps_per_call` steps by their first, and the decoder."""

    steps: Mapping[int, Callable[[], object]]
    decode: Callable[[], object]
    steps_per_call: int = 1


class Peer(nn.Module):
    """A generator and the decoder behind it."""

    generator: Any
    decoder: Any

    def calls(self, B: int, steps: int) -> Calls:
        """What to time, for B images in a published run of `steps` steps."""
        raise NotImplementedError

    @property
    def like(self) -> dict[str, Any]:
        """Device and float type of the weights."""
        weight = next(self.generator.parameters())
        return {"device": weight.device, "dtype": weight.dtype}

    def counts(self) -> dict[str, int]:
        """Parameters of the two parts."""
        parts = {"generator": self.generator, "decoder": self.decoder}
        return {name: sum(p.numel() for p in m.parameters()) for name, m in parts.items()}


class Diffusion(Peer):
    """A denoiser on latents of (channels, side), always guided: each step runs 2 B latents.

    `denoise` calls the generator on (latents, times, labels).
    """

    def __init__(
        self,
        generator: nn.Module,
        decoder: nn.Module,
        latent: tuple[int, int],
        denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.generator, self.decoder = generator, decoder
        self.latent, self.denoise = latent, denoise

    def calls(self, B: int, steps: int) -> Calls:
        """One step at the middle of the run: all steps cost the same."""
        C, side = self.latent
        z = torch.randn(B, C, side, side, **self.like)
        times = torch.full((2 * B,), 500, device=z.device)
        labels = torch.cat([torch.arange(B) % CLASSES, torch.full((B,), CLASSES)]).to(z.device)

        def step() -> Tensor:
            cond, uncond = self.denoise(z.repeat(2, 1, 1, 1), times, labels).chunk(2)
            return uncond + 1.5 * (cond - uncond)

        return Calls({steps // 2: step}, lambda: self.decoder.decode(z).sample)


class Masked(Peer):
    """MaskGIT: all K tokens at each step, then a convolutional decoder; our own classes."""

    def __init__(
        self, config: GeneratorConfig, pixel: VQGANConfig, sampling: SamplingConfig, steps: int
    ) -> None:
        super().__init__()
        self.generator = ImageBert(config)
        self.decoder = MaskGitVQGAN(pixel)
        self.decoder.encoder = nn.Identity()
        self.sampling, self.steps_per_call = sampling, steps

    def calls(self, B: int, steps: int) -> Calls:
        """A run of `steps_per_call` steps, sampling included."""
        generator, codebook = self.generator, self.decoder.config.codebook_size
        labels, seeds = torch.arange(B) % CLASSES, sample_seeds(0, B)
        codes = torch.randint(codebook, (B, generator.image_seq_len), device=self.like["device"])
        run = self.sampling.updated(num_sample_steps=self.steps_per_call)
        return Calls(
            {0: lambda: sample(generator, labels, seeds, run)},
            lambda: self.decoder.decode(codes),
            self.steps_per_call,
        )


class Autoregressive(Peer):
    """GPT-2 with a key-value cache: one token a step, no guidance."""

    def __init__(self, generator: nn.Module, decoder: nn.Module, latent: tuple[int, int]) -> None:
        super().__init__()
        self.generator, self.decoder, self.latent = generator, decoder, latent

    def calls(self, B: int, steps: int) -> Calls:
        """First, middle and last step: the cost grows with the cache."""
        C, side = self.latent
        z = torch.randn(B, C, side, side, **self.like)
        inputs = torch.randn(B, 1, self.body.config.n_embd, **self.like)

        def at(position: int) -> Callable[[], Tensor]:
            cache = _cache(self.body, B, position)
            return lambda: self.step(inputs, cache)

        return Calls({i: at(i) for i in (0, steps // 2, steps - 1)}, lambda: self._decode(z))

    @property
    def body(self) -> Any:
        """The transformer that has the cache."""
        return self.generator

    def step(self, x: Tensor, cache: Any) -> Tensor:
        """(B, 1, D) embedding of the last token -> (B, 1) next token; the cache does not grow."""
        logits = self.body(inputs_embeds=x, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return _next_token(logits[:, -1])

    def _decode(self, z: Tensor) -> Tensor:
        if isinstance(self.decoder, ViTDecoder):
            return self.decoder(z)
        return self.decoder.decode(z, force_not_quantize=True).sample  # z stands for known codes


class ResidualQuantized(Autoregressive):
    """RQ-Transformer: a body over positions, and per position a small head over `depth` codes."""

    def __init__(
        self, body: nn.Module, head: nn.Module, decoder: nn.Module, latent: tuple[int, int]
    ) -> None:
        super().__init__(nn.ModuleDict({"body": body, "head": head}), decoder, latent)
        self.depth = 4

    @property
    def body(self) -> Any:
        """The transformer over positions."""
        return self.generator["body"]

    def step(self, x: Tensor, cache: Any) -> Tensor:
        """(B, 1, D) sum of the last code embeddings -> (B, 1) last of the next `depth` codes."""
        from transformers import DynamicCache

        head = self.generator["head"]
        h = self.body(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state
        cache.crop(-1)
        within, inputs = DynamicCache(config=head.config), {"inputs_embeds": h}
        for _ in range(self.depth):
            out = head(**inputs, past_key_values=within, use_cache=True)
            inputs = {"input_ids": _next_token(out.logits[:, -1])}
        return inputs["input_ids"]


def _next_token(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.float().softmax(dim=-1), 1)


def _cache(model: nn.Module, B: int, length: int) -> Any:
    """A cache of `length` random keys and values in each layer."""
    from transformers import DynamicCache

    config: Any = model.config
    weight, heads = next(model.parameters()), config.n_head
    cache = DynamicCache(config=config)
    shape = (B, heads, length, config.n_embd // heads)
    for i in range(config.n_layer):
        cache.update(weight.new_empty(shape).normal_(), weight.new_empty(shape).normal_(), i)
    return cache


class UViT(nn.Module):
    """U-ViT: time, class and patches as tokens, the second half merging the first (Bao 2023)."""

    def __init__(self, D: int, depth: int, heads: int, side: int, patch: int) -> None:
        super().__init__()
        self.patch, self.grid, self.D = patch, side // patch, D
        self.embed = nn.Conv2d(4, D, patch, stride=patch)
        self.label = nn.Embedding(CLASSES + 1, D)
        shape = {"hidden_size": D, "num_hidden_layers": depth, "num_attention_heads": heads}
        tokens = {"image_seq_len": 1 + self.grid**2, "codebook_size": 4 * patch * patch}
        self.body = UViTBert(GeneratorConfig("UViT", intermediate_size=4 * D, **shape, **tokens))
        self.body.embeddings = nn.Identity()  # its trunk gets embedded tokens

    def forward(self, z: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """(B, 4, side, side), (B,), (B,) -> (B, 4, side, side)."""
        B, half = len(z), self.D // 2
        rates = torch.exp(torch.arange(half, device=z.device) * (-9.21 / half))  # to 1e-4
        angles = times[:, None].float() * rates
        time = torch.cat([angles.cos(), angles.sin()], dim=1).to(z.dtype)
        patches = self.embed(z).flatten(2).transpose(1, 2)
        x = torch.cat([time[:, None], self.label(labels)[:, None], patches], dim=1)
        x = self.body.lm_head(self.body.trunk(x))[:, 2:]
        x = x.view(B, self.grid, self.grid, self.patch, self.patch, 4)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, 4, *z.shape[2:])


class ViTDecoder(nn.Module):
    """ViT-VQGAN's decoder: codes to 8 x 8 pixels each."""

    def __init__(self, C: int, D: int, layers: int, heads: int, grid: int) -> None:
        super().__init__()
        self.embed, self.pos = nn.Linear(C, D), nn.Parameter(torch.empty(1, grid * grid, D))
        self.blocks = nn.ModuleList(PreNormBlock(D, heads, 4 * D) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * 8 * 8)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, grid, grid) -> (B, 3, 8 * grid, 8 * grid)."""
        B, _, grid, _ = z.shape
        x = self.embed(z.flatten(2).transpose(1, 2)) + self.pos
        for block in self.blocks:
            x = block(x)
        x = self.out(self.norm(x)).view(B, grid, grid, 8, 8, 3)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, 3, 8 * grid, 8 * grid)
