"""The stages that train a tokenizer: MaskGIT-VQGAN, proxy codes, decoder, single stage."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from titok_fast.io.images import psnr, to_uint8
from titok_fast.models.quantizer import DiagonalGaussian
from titok_fast.models.tokenizer import TiTok
from titok_fast.models.vqgan import MaskGitVQGAN
from titok_fast.training.engine import Engine
from titok_fast.training.losses import ReconstructionLoss, proxy_code_loss
from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.tasks.base import Batch, Outcome, Task, new_model, required

_PIXELS = 256 * 256
_VQGAN_KEY = "model.vq_model.pretrained_tokenizer_weight"


class _PixelTask(Task):
    """A tokenizer that is trained on pixels, with a discriminator."""

    criterion: ReconstructionLoss

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.criterion = ReconstructionLoss(recipe.losses).to(device).train()

    @staticmethod
    def _reconstruct(model: Any, images: Tensor, noise: Tensor | None) -> dict[str, Any]:
        """`recon` (B, 3, S, S), `latents`, and the quantizer's losses and ids, if there is one."""
        raise NotImplementedError

    def loss(self, engine: Engine, batch: Batch, step: int, detailed: bool) -> Outcome:
        images = batch["images"]
        out = engine(self._reconstruct, images, batch.get("noise"))
        # built here: FSDP2 handles only tensors that leave the model, not a Gaussian
        bottleneck = out if "quantizer_loss" in out else DiagonalGaussian(out["latents"])
        decoder: Any = getattr(self.model, "pixel_decoder", None) or self.model.decoder
        loss, logs = self.criterion.generator_loss(
            images, out["recon"], step, bottleneck, decoder.conv_out.weight
        )
        ids = None if self.quantizer is None else out["min_encoding_indices"]
        return Outcome(loss, logs, out["recon"].detach(), out["latents"].detach(), ids)

    def evaluate(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        images = batch["images"]
        recon = engine(self._reconstruct, images, None)["recon"].float()
        pair = [to_uint8(x, rounding="round") for x in (images, recon)]
        error = (images - recon).square().mean(dim=(1, 2, 3))
        return {"mse": error, "psnr": psnr(*pair)}

    def example_images(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        recon = engine(self._reconstruct, batch["images"], None)["recon"]
        return {"reconstructions": _side_by_side(batch["images"], recon)}


class VqganTask(_PixelTask):
    """MaskGIT-VQGAN, the 2D tokenizer whose codes stage 1 predicts."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.model = new_model(MaskGitVQGAN, recipe.vqgan, recipe.experiment.init_weight).to(device)
        self.quantizer = self.model.quantize

    @staticmethod
    def _reconstruct(model: Any, images: Tensor, noise: Tensor | None) -> dict[str, Any]:
        latents = model.encoder(images)
        codes, result = model.quantize(latents)
        return {**result, "recon": model.decoder(codes), "latents": latents}


class SingleStageTask(_PixelTask):
    """TiTok trained on pixels from the start, with codes or as a VAE."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        model = new_model(TiTok, recipe.tokenizer, recipe.experiment.init_weight)
        self.model, self.config = model.to(device), model.config
        self.quantizer = model.quantize if model.config.quantize_mode == "vq" else None

    def random_inputs(self, B: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The noise of a VAE's bottleneck."""
        if self.quantizer is not None:
            return {}
        shape = (B, self.config.token_size, 1, self.config.num_latent_tokens)
        return {"noise": torch.randn(shape, generator=generator)}

    @staticmethod
    def _reconstruct(model: Any, images: Tensor, noise: Tensor | None) -> dict[str, Any]:
        """A VAE without noise reconstructs from the mean."""
        latents = model.encoder(images, model.latent_tokens)
        if model.config.quantize_mode == "vq":
            codes, result = model.quantize(latents)
            return {**result, "recon": model.decode(codes), "latents": latents}
        posterior = DiagonalGaussian(latents)
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return {"recon": model.decode(z), "latents": latents}


class DecoderTask(_PixelTask):
    """Stage 2: train the decoder on pixels; encoder and codebook are frozen."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        assert recipe.tokenizer is not None
        experiment, config = recipe.experiment, recipe.tokenizer
        first = TiTok.from_pretrained(
            required(experiment.init_weight, "experiment.init_weight", "stage 1's weights"),
            config=replace(config, finetune_decoder=False),
        )
        vqgan = _vqgan(recipe).state_dict()
        tail = {f"pixel_{k}": v for k, v in vqgan.items() if not k.startswith("encoder.")}
        model = TiTok(config)
        model.load_state_dict({**first.state_dict(), **tail})
        self.model = model.to(device).train()

    @staticmethod
    def _reconstruct(model: Any, images: Tensor, noise: Tensor | None) -> dict[str, Any]:
        recon, result = model(images)
        return {**result, "recon": recon, "latents": recon.new_empty(0)}


class ProxyTask(Task):
    """Stage 1: predict the codes that a frozen MaskGIT-VQGAN gives the same crop."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.vqgan = _vqgan(recipe).requires_grad_(False).to(device).eval()
        model = new_model(TiTok, recipe.tokenizer, recipe.experiment.init_weight)
        self.model, self.quantizer = model.to(device), model.quantize

    def _proxy_codes(self, images: Tensor) -> Tensor:
        """(B, G*G) int64 codes, in float32: bfloat16 would pick others."""
        if images.device.type == "cpu":  # activations of _PIXELS pixels fit the cache
            parts = images.split(max(1, _PIXELS // images[0, 0].numel()))
            return torch.cat([self.vqgan.encode(part) for part in parts])
        return self.vqgan.encode(images)

    @staticmethod
    def _logits(model: Any, images: Tensor) -> dict[str, Any]:
        latents = model.encoder(images, model.latent_tokens)
        codes, result = model.quantize(latents)
        return {"logits": model.decode(codes), "latents": latents, **result}

    def loss(self, engine: Engine, batch: Batch, step: int, detailed: bool) -> Outcome:
        """Cross-entropy with the proxy codes, and the quantizer's loss."""
        images = batch["images"]
        codes = self._proxy_codes(images)
        out = engine(self._logits, images)
        proxy = proxy_code_loss(out["logits"], codes)
        quantizer = self.recipe.losses.quantizer_weight * out["quantizer_loss"]
        loss = proxy + quantizer
        logs = {"total_loss": loss, "reconstruction_loss": proxy, "quantizer_loss": quantizer}
        logs |= {name: out[name] for name in ("commitment_loss", "codebook_loss")}
        if detailed:
            logs["proxy_accuracy"] = _hits(out["logits"], codes).mean()
        return Outcome(
            loss,
            {name: value.detach() for name, value in logs.items()},
            latents=out["latents"].detach(),
            ids=out["min_encoding_indices"],
        )

    def evaluate(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and accuracy of each image's proxy codes."""
        codes, out = self._proxy_codes(batch["images"]), engine(self._logits, batch["images"])
        each = [
            proxy_code_loss(logits[None], row[None])
            for logits, row in zip(out["logits"], codes, strict=True)
        ]
        return {"proxy_loss": torch.stack(each), "proxy_accuracy": _hits(out["logits"], codes)}

    def example_images(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """Images decoded from the likeliest proxy codes."""
        logits = engine(self._logits, batch["images"])["logits"]
        recon = self.vqgan.decode(logits.argmax(dim=1))
        return {"reconstructions": _side_by_side(batch["images"], recon)}


def _hits(logits: Tensor, codes: Tensor) -> Tensor:
    """(B, N, G, G), (B, G*G) -> (B,) share of positions whose likeliest code is right."""
    return (logits.argmax(dim=1).flatten(1) == codes).float().mean(dim=1)


def _side_by_side(images: Tensor, others: Tensor) -> Tensor:
    """Twice (B, 3, S, S) -> (B, 3, S, 2 S)."""
    return torch.cat([images, others.to(images.dtype)], dim=3)


def _vqgan(recipe: Recipe) -> MaskGitVQGAN:
    assert recipe.tokenizer is not None
    weights = recipe.experiment.pretrained_tokenizer_weight
    weights = required(weights, _VQGAN_KEY, "MaskGIT-VQGAN's weights")
    return MaskGitVQGAN.from_pretrained(weights, config=recipe.tokenizer.pixel)
