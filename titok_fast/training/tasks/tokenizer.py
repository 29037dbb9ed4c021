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
from titok_fast.training.tasks.base import Batch, Draws, Outcome, Task, required

_PIXELS = 256 * 256
_VQGAN_KEY = "model.vq_model.pretrained_tokenizer_weight"


class _PixelTask(Task):
    """A tokenizer that is trained on pixels, with an adversary."""

    criterion: ReconstructionLoss

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.criterion = ReconstructionLoss(recipe.losses).to(device).train()

    @staticmethod
    def reconstruct(model: Any, images: Tensor, noise: Tensor | None) -> dict[str, Any]:
        """`recon` (B, 3, S, S), `bottleneck` as the criterion wants it, and `latents`."""
        raise NotImplementedError

    def learn(
        self, engine: Engine, batch: Batch, draws: Draws, step: int, detailed: bool
    ) -> Outcome:
        """See Task."""
        images = batch["images"]
        out = engine(self.reconstruct, images, draws.get("noise"))
        loss, logs = self.criterion.generator_loss(
            images, out["recon"], step, self._bottleneck(out), self.last_layer()
        )
        ids = None if self.quantizer is None else out["bottleneck"]["min_encoding_indices"]
        return Outcome(loss, logs, out["recon"].detach(), out["latents"].detach(), ids)

    def _bottleneck(self, out: dict[str, Any]) -> Any:
        return out["bottleneck"]

    def measure(self, engine: Engine, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """See Task."""
        images = batch["images"]
        recon = engine(self.reconstruct, images, None)["recon"].float()
        pair = [to_uint8(x, rounding="round") for x in (images, recon)]
        error = (images - recon).square().mean(dim=(1, 2, 3))
        return {"mse": error, "psnr": psnr(*pair)}

    def show(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """See Task."""
        out = engine(self.reconstruct, batch["images"], None)
        return {"reconstructions": side_by_side(batch["images"], out["recon"])}

    def last_layer(self) -> Tensor | None:
        """See Task."""
        decoder: Any = getattr(self.model, "pixel_decoder", None) or self.model.decoder
        return decoder.conv_out.weight


class VqganTask(_PixelTask):
    """MaskGIT-VQGAN, the 2D tokenizer whose codes stage 1 predicts."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        model = MaskGitVQGAN(recipe.vqgan)
        if recipe.experiment.init_weight:
            start = MaskGitVQGAN.from_pretrained(recipe.experiment.init_weight, config=recipe.vqgan)
            model.load_state_dict(start.state_dict())
        self.model = model.to(device).train()
        self.quantizer = model.quantize

    @staticmethod
    def reconstruct(model: Any, images: Tensor, noise: Tensor | None) -> dict[str, Any]:
        """See _PixelTask."""
        latents = model.encoder(images)
        codes, result = model.quantize(latents)
        return {"recon": model.decoder(codes), "bottleneck": result, "latents": latents}


class SingleStageTask(_PixelTask):
    """TiTok trained on pixels from the start, with codes or as a VAE."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        model = _new_titok(recipe)
        self.model, self.config = model.to(device).train(), model.config
        self.quantizer = model.quantize if model.config.quantize_mode == "vq" else None

    def draws(self, B: int, generator: torch.Generator) -> dict[str, Tensor]:
        """See Task: the noise of a VAE's bottleneck."""
        if self.quantizer is not None:
            return {}
        shape = (B, self.config.token_size, 1, self.config.num_latent_tokens)
        return {"noise": torch.randn(shape, generator=generator)}

    @staticmethod
    def reconstruct(model: Any, images: Tensor, noise: Tensor | None) -> dict[str, Any]:
        """See _PixelTask. Of a VAE without noise it is the reconstruction of the mean."""
        latents = model.encoder(images, model.latent_tokens)
        if model.config.quantize_mode == "vq":
            codes, result = model.quantize(latents)
            return {"recon": model.decode(codes), "bottleneck": result, "latents": latents}
        posterior = DiagonalGaussian(latents)
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return {"recon": model.decode(z), "bottleneck": {}, "latents": latents}

    def _bottleneck(self, out: dict[str, Any]) -> Any:
        # a Gaussian is no tensor, and sharding watches the tensors that leave the model
        return DiagonalGaussian(out["latents"]) if self.quantizer is None else out["bottleneck"]


class DecoderTask(_PixelTask):
    """Stage 2: the decoder learns on pixels, everything before the codes is frozen."""

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
    def reconstruct(model: Any, images: Tensor, noise: Tensor | None) -> dict[str, Any]:
        """See _PixelTask."""
        recon, result = model(images)
        return {"recon": recon, "bottleneck": result, "latents": recon.new_empty(0)}


class ProxyTask(Task):
    """Stage 1: predict the codes that a frozen MaskGIT-VQGAN gives the same crop."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.vqgan = _vqgan(recipe).requires_grad_(False).to(device).eval()
        model = _new_titok(recipe)
        self.model, self.quantizer = model.to(device).train(), model.quantize

    def _proxy_codes(self, images: Tensor) -> Tensor:
        """(B, G*G) int64 codes, in float32: bfloat16 would pick others."""
        if images.device.type == "cpu":  # the activations of so many pixels fit the cache
            parts = images.split(max(1, _PIXELS // images[0, 0].numel()))
            return torch.cat([self.vqgan.encode(part) for part in parts])
        return self.vqgan.encode(images)

    @staticmethod
    def _logits(model: Any, images: Tensor) -> dict[str, Any]:
        latents = model.encoder(images, model.latent_tokens)
        codes, result = model.quantize(latents)
        return {"logits": model.decode(codes), "latents": latents, **result}

    def learn(
        self, engine: Engine, batch: Batch, draws: Draws, step: int, detailed: bool
    ) -> Outcome:
        """See Task."""
        images = batch["images"]
        codes = self._proxy_codes(images)
        out = engine(self._logits, images)
        proxy = proxy_code_loss(out["logits"], codes)
        quantizer = self.recipe.losses.quantizer_weight * out["quantizer_loss"]
        loss = proxy + quantizer
        logs = {
            "total_loss": loss,
            "reconstruction_loss": proxy,
            "quantizer_loss": quantizer,
            "commitment_loss": out["commitment_loss"],
            "codebook_loss": out["codebook_loss"],
        }
        if detailed:
            logs["proxy_accuracy"] = _hits(out["logits"], codes).mean()
        return Outcome(
            loss,
            {name: value.detach() for name, value in logs.items()},
            latents=out["latents"].detach(),
            ids=out["min_encoding_indices"],
        )

    def measure(self, engine: Engine, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """See Task."""
        codes, out = self._proxy_codes(batch["images"]), engine(self._logits, batch["images"])
        each = [
            proxy_code_loss(logits[None], row[None])
            for logits, row in zip(out["logits"], codes, strict=True)
        ]
        return {"proxy_loss": torch.stack(each), "proxy_accuracy": _hits(out["logits"], codes)}

    def show(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """See Task: pictures of the likeliest proxy codes."""
        logits = engine(self._logits, batch["images"])["logits"]
        recon = self.vqgan.decode(logits.argmax(dim=1))
        return {"reconstructions": side_by_side(batch["images"], recon)}


def _hits(logits: Tensor, codes: Tensor) -> Tensor:
    """(B, N, G, G), (B, G*G) -> (B,) share of places whose likeliest code is the right one."""
    return (logits.argmax(dim=1).flatten(1) == codes).float().mean(dim=1)


def side_by_side(images: Tensor, others: Tensor) -> Tensor:
    """Twice (B, 3, S, S) -> (B, 3, S, 2 S)."""
    return torch.cat([images, others.to(images.dtype)], dim=3)


def _new_titok(recipe: Recipe) -> TiTok:
    assert recipe.tokenizer is not None
    model = TiTok(recipe.tokenizer)
    if recipe.experiment.init_weight:
        start = TiTok.from_pretrained(recipe.experiment.init_weight, config=recipe.tokenizer)
        model.load_state_dict(start.state_dict())
    return model


def _vqgan(recipe: Recipe) -> MaskGitVQGAN:
    assert recipe.tokenizer is not None
    weights = recipe.experiment.pretrained_tokenizer_weight
    weights = required(weights, _VQGAN_KEY, "MaskGIT-VQGAN's weights")
    return MaskGitVQGAN.from_pretrained(weights, config=recipe.tokenizer.pixel)
