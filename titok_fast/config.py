"""What a model is: frozen configurations that read upstream's YAML.

Field names are upstream's (`model.vq_model.*`, `model.generator.*`), so an official config file, a
published `config.json` and a dataclass say the same thing. Presets are in presets.py. How a model
samples is in sampling_config.py.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from titok_fast.settings import (
    Official,
    Settings,
    among,
    known_fields,
    read_official,
    require,
    within,
)

# (width, layers, heads). "small" is not the usual ViT-S: upstream's is 512 wide and 8 deep.
VIT_SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
FLOAT_DTYPES = ("float32", "bfloat16", "float16")  # of weights, by torch's names

ViTSize = str | tuple[int, int, int]


@dataclass(frozen=True)
class VQGANConfig(Settings):
    """MaskGIT-VQGAN: the borrowed 2D tokenizer whose decoder is the tail of two-stage TiTok.

    Defaults are the published network: 16x down, 1024 codes of 256 channels.
    """

    hidden_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 1024

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        require(len(self.channel_mult) >= 1, "channel_mult", "at least one level", ())
        width = self.hidden_channels
        require(width % 32 == 0, "hidden_channels", "a multiple of 32 (norm groups)", width)

    @property
    def downsampling(self) -> int:
        """Image side over code grid side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.hidden_channels * m for m in self.channel_mult)


@dataclass(frozen=True)
class TokenizerConfig(Settings):
    """A TiTok tokenizer. Defaults are TiTok-L-32 after decoder fine-tuning.

    Attributes:
        num_latent_tokens: K, tokens per image.
        codebook_size: N, ignored for "vae".
        token_size: C, channels of a code.
        use_l2_norm: compare codes by direction, and hand unit vectors to the decoder.
        commitment_cost: beta of the encoder's term in the quantizer loss.
        vit_enc_model_size, vit_dec_model_size: "small", "base", "large" or (width, layers, heads).
        vit_enc_patch_size, vit_dec_patch_size: pixels; a token of the decoder covers this square.
        quantize_mode: "vq" or "vae".
        is_legacy: two-stage models: proxy-code head, and the encoder's re-read of its latents.
        finetune_decoder: the pixel codebook and pixel decoder are part of the model (stage 2).
        crop_size: image side in pixels.
        pixel: the MaskGIT-VQGAN whose codes a legacy head predicts.
        is_2d: the paper's "2D variant" (table 3c): no tokens beside the patches, each patch's own
            row is quantised and decoded. Wants K patches of one size, and is_legacy=False.
    """

    num_latent_tokens: int = within(32, 1)
    codebook_size: int = within(4096, 2)
    token_size: int = 12
    use_l2_norm: bool = True
    commitment_cost: float = 0.25
    vit_enc_model_size: ViTSize = "large"
    vit_dec_model_size: ViTSize = "large"
    vit_enc_patch_size: int = 16
    vit_dec_patch_size: int = 16
    quantize_mode: str = among("vq", "vq", "vae")
    is_legacy: bool = True
    finetune_decoder: bool = True
    crop_size: int = 256
    pixel: VQGANConfig = field(default_factory=VQGANConfig)
    is_2d: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vit_enc_model_size", "vit_dec_model_size"):
            size = getattr(self, name)
            if isinstance(size, str):
                require(size in VIT_SIZES, name, f"one of {sorted(VIT_SIZES)}", size)
            else:
                object.__setattr__(self, name, tuple(size))
                fits = len(size) == 3 and size[0] % size[2] == 0
                require(fits, name, "(width, layers, heads) with heads dividing width", size)
        for name in ("vit_enc_patch_size", "vit_dec_patch_size"):
            patch, side = getattr(self, name), self.crop_size
            require(patch >= 1 and side % patch == 0, name, f"a divisor of crop_size {side}", patch)
        if self.finetune_decoder:
            require(
                self.is_legacy and self.quantize_mode == "vq",
                "finetune_decoder=True",
                "is_legacy=True and quantize_mode='vq' (else no proxy head)",
                f"is_legacy={self.is_legacy}, quantize_mode={self.quantize_mode!r}",
            )
        if self.is_legacy:
            patch, factor = self.vit_dec_patch_size, self.pixel.downsampling
            wanted = f"a multiple of the pixel decoder's factor {factor}"
            require(patch % factor == 0, "vit_dec_patch_size", wanted, patch)
        if self.is_2d:
            fitting = (self.encoder_grid**2, self.vit_enc_patch_size, False)
            got = (self.num_latent_tokens, self.vit_dec_patch_size, self.is_legacy)
            wanted = f"(num_latent_tokens, vit_dec_patch_size, is_legacy) of {fitting}"
            require(got == fitting, "is_2d=True", wanted, got)

    @classmethod
    def from_official(cls, source: Official) -> "TokenizerConfig":
        """Read `model.vq_model` and `dataset.preprocessing.crop_size`; ignore other keys."""
        config = read_official(source)
        section = config["model"].get("vq_model")
        require(isinstance(section, dict), "model.vq_model", "a tokenizer's section", section)
        known = known_fields(cls, section)
        preprocessing = (config.get("dataset") or {}).get("preprocessing") or {}
        known["crop_size"] = preprocessing.get("crop_size", cls.crop_size)
        if "pixel" in known:
            known["pixel"] = VQGANConfig(**known["pixel"])
        if known.get("quantize_mode") == "vae":
            # upstream's VAE files leave these out, and a VAE has no use for them
            known.setdefault("finetune_decoder", False)
        return cls(**known)

    def to_official(self) -> dict[str, Any]:
        """The whole-file form that upstream's classes read."""
        section = asdict(self)
        crop_size = section.pop("crop_size")
        if self.pixel == VQGANConfig():
            section.pop("pixel")
        if not self.is_2d:  # not a key of upstream's files
            section.pop("is_2d")
        return {
            "experiment": {},
            "model": {"vq_model": section},
            "dataset": {"preprocessing": {"crop_size": crop_size}},
        }

    def check_has_ids(self) -> None:
        """Raise ValueError for a VAE: its tokens are continuous."""
        if self.quantize_mode != "vq":
            raise ValueError(
                "a VAE tokenizer has no token ids: use tokenizer.encode and decode, or reconstruct"
            )

    def check_has_pixels(self) -> None:
        """Raise ValueError for a stage-1 tokenizer: its decoder predicts proxy codes."""
        if self.is_legacy and not self.finetune_decoder:
            raise ValueError(
                "a stage-1 tokenizer predicts proxy codes, not pixels: use MaskGitVQGAN.decode"
            )

    @property
    def encoder_size(self) -> tuple[int, int, int]:
        """(width, layers, heads) of the encoder."""
        size = self.vit_enc_model_size
        return VIT_SIZES[size] if isinstance(size, str) else size

    @property
    def decoder_size(self) -> tuple[int, int, int]:
        """(width, layers, heads) of the ViT decoder."""
        size = self.vit_dec_model_size
        return VIT_SIZES[size] if isinstance(size, str) else size

    @property
    def encoder_grid(self) -> int:
        """Patches along a side of the image."""
        return self.crop_size // self.vit_enc_patch_size

    @property
    def decoder_grid(self) -> int:
        """Decoder tokens along a side of the image."""
        return self.crop_size // self.vit_dec_patch_size

    @property
    def proxy_block(self) -> int:
        """Proxy codes along a side of one decoder token: 1, or 2 where a token covers 32 pixels."""
        return self.vit_dec_patch_size // self.pixel.downsampling


@dataclass(frozen=True)
class GeneratorConfig(Settings):
    """A masked generator. Defaults are MaskGIT-ViT for TiTok-L-32.

    Attributes:
        model_type: "ViT" (post-norm BERT) or "UViT" (pre-norm with long skips; ignores dropout).
        image_seq_len: K, image tokens per sequence; the class takes one more position.
        codebook_size: N, image token ids 0..N-1; N is the mask, then come the classes.
        condition_num_classes: classes; one more id stands for "no class".
        class_label_dropout: share of samples trained without their class.
    """

    model_type: str = among("ViT", "ViT", "UViT")
    hidden_size: int = 768
    num_hidden_layers: int = within(24, 1)
    num_attention_heads: int = 16
    intermediate_size: int = 3072
    dropout: float = 0.1
    attn_drop: float = 0.1
    image_seq_len: int = within(32, 1)
    codebook_size: int = within(4096, 1)
    condition_num_classes: int = within(1000, 1)
    class_label_dropout: float = within(0.1, 0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        D, heads = self.hidden_size, self.num_attention_heads
        require(D % heads == 0, "num_attention_heads", f"a divisor of hidden_size {D}", heads)
        for name in ("dropout", "attn_drop"):
            require(0 <= getattr(self, name) < 1, name, "a share in [0, 1)", getattr(self, name))

    @classmethod
    def from_official(cls, source: Official) -> "GeneratorConfig":
        """Read `model.generator` and `model.vq_model.codebook_size`; ignore other keys."""
        config = read_official(source)
        section = config["model"].get("generator")
        require(isinstance(section, dict), "model.generator", "a generator's section", section)
        known = known_fields(cls, section)
        vq_model = config["model"].get("vq_model") or {}
        if "codebook_size" in vq_model:
            known["codebook_size"] = vq_model["codebook_size"]
        return cls(**known)

    def to_official(self) -> dict[str, Any]:
        """The whole-file form that upstream's classes read."""
        section = asdict(self)
        codebook_size = section.pop("codebook_size")
        vq_model = {"codebook_size": codebook_size, "num_latent_tokens": self.image_seq_len}
        return {"experiment": {}, "model": {"vq_model": vq_model, "generator": section}}

    @property
    def mask_token_id(self) -> int:
        """Id of a token yet to be drawn."""
        return self.codebook_size

    @property
    def no_class_id(self) -> int:
        """Id in the class position that stands for "no class"."""
        return self.codebook_size + 1 + self.condition_num_classes

    @property
    def vocab_size(self) -> int:
        """Image tokens, mask, classes, no class."""
        return self.codebook_size + self.condition_num_classes + 2
