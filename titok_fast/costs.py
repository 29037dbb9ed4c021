"""The cost of a model: parameters, FLOPs, bytes, and the least time on a device.

The counts are those of the published networks, without the work that models/vqgan.py saves by
rewriting, so that rates of different implementations compare. Matmuls, convolutions and attention
count, one multiply-add as 2 FLOPs; sampling, norms, activations and sums (about 1 %) do not. All
costs are of one image.

By formulas: torch's FlopCounterMode on meta modules finds the same FLOPs (tests/test_costs.py), but
takes seconds for all presets and counts no activations.
"""

from dataclasses import dataclass, replace

from titok_fast.config import GeneratorConfig, TokenizerConfig, VQGANConfig
from titok_fast.presets import Preset, preset
from titok_fast.sampling.schedules import steps
from titok_fast.sampling_config import SamplingConfig

DTYPE_BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Cost:
    """Cost of a stage for one image; stages add up with `+`, and repeat with `* count`."""

    flops: int = 0
    parameters: int = 0  # weights and biases
    float32_parameters: int = 0  # those that are float32 in a model of any dtype (codebooks)
    lookups: int = 0  # those in embedding tables, of which a pass reads single rows
    boundary: int = 0  # elements of inputs and outputs; no implementation moves fewer
    activations: int = 0  # elements moved if norms, activations and sums alone are fused
    weight_reads: int = 1  # per batch; the sampler streams its weights every step

    def __add__(self, other: "Cost") -> "Cost":
        reads = max(self.weight_reads, other.weight_reads)
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Cost(**sums | {"weight_reads": reads})

    def __mul__(self, count: int) -> "Cost":
        return sum([self] * count, Cost())

    def weight_bytes(self, dtype: str = "float32") -> int:
        """Bytes the weights take in a model of a dtype of DTYPE_BYTES; ValueError for another."""
        cast = self.parameters - self.float32_parameters
        return cast * dtype_size(dtype) + 4 * self.float32_parameters

    def minimal_bytes(self, dtype: str = "float32", batch: int = 1) -> int:
        """Least memory traffic of a batch: weights streamed, inputs read, outputs written."""
        return self._traffic(dtype, batch * self.boundary)

    def layerwise_bytes(self, dtype: str = "float32", batch: int = 1) -> int:
        """Memory traffic of a batch if every layer's activations go through memory."""
        return self._traffic(dtype, batch * self.activations)

    def _traffic(self, dtype: str, elements: int) -> int:
        streamed = self.weight_bytes(dtype) - self.lookups * dtype_size(dtype)
        return self.weight_reads * streamed + elements * dtype_size(dtype)


def dtype_size(dtype: str) -> int:
    """Bytes of an element; ValueError for a dtype that is not in DTYPE_BYTES."""
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype wants one of {', '.join(DTYPE_BYTES)}; got {dtype!r}")
    return DTYPE_BYTES[dtype]


def conv(
    pixels: int, c_in: int, c_out: int, k: int, *, bias: bool = True, pixels_in: int | None = None
) -> Cost:
    """A k x k convolution with `pixels` outputs per channel; as many inputs unless given."""
    return Cost(
        flops=2 * pixels * c_in * c_out * k * k,
        parameters=c_in * c_out * k * k + bias * c_out,
        activations=(pixels if pixels_in is None else pixels_in) * c_in + pixels * c_out,
    )


def linear(rows: int, d_in: int, d_out: int, *, bias: bool = True) -> Cost:
    """A Linear on `rows` vectors."""
    return conv(rows, d_in, d_out, 1, bias=bias)


def attention(L: int, D: int) -> Cost:
    """Scores and weighted sums of L tokens; any number of heads costs the same."""
    return Cost(flops=4 * L * L * D, activations=4 * L * D)


def _norm(D: int) -> Cost:
    return Cost(parameters=2 * D)  # scale and shift


def _block(L: int, D: int, hidden: int, *, qkv_bias: bool = True, skip: bool = False) -> Cost:
    """A transformer block on L tokens; with `skip` it first merges two inputs into one."""
    attn = linear(L, D, 3 * D, bias=qkv_bias) + attention(L, D) + linear(L, D, D)
    mlp = linear(L, D, hidden) + linear(L, hidden, D)
    block = _norm(D) * 2 + attn + mlp
    return block + linear(L, 2 * D, D) if skip else block


def _vit(cfg: TokenizerConfig, D: int, layers: int, P: int) -> Cost:
    """The transformer of an encoder or decoder of P patches, with its position tables."""
    tables = Cost(parameters=(1 + P + 1 + cfg.num_latent_tokens) * D)
    L = 1 + P if cfg.is_2d else 1 + P + cfg.num_latent_tokens
    return tables + _block(L, D, 4 * D) * layers + _norm(D) * 2


def _encoder(cfg: TokenizerConfig) -> Cost:
    (D, layers, _), K = cfg.encoder_size, cfg.num_latent_tokens
    P, pixels = cfg.encoder_grid**2, cfg.crop_size**2
    channels = cfg.token_size * (2 if cfg.quantize_mode == "vae" else 1)
    patches = conv(P, 3, D, cfg.vit_enc_patch_size, pixels_in=pixels)
    cost = patches + _vit(cfg, D, layers, P) + linear(K, D, channels)
    return replace(cost, boundary=3 * pixels + K * channels)


def _vit_decoder(cfg: TokenizerConfig) -> Cost:
    (D, layers, _), p, K = cfg.decoder_size, cfg.vit_dec_patch_size, cfg.num_latent_tokens
    P, pixels = cfg.decoder_grid**2, cfg.crop_size**2
    if cfg.is_legacy:
        logits = cfg.pixel.codebook_size * cfg.proxy_block**2
        head, out = linear(P, D, 2 * D) + linear(P, 2 * D, logits), P * logits
    else:
        head, out = linear(P, D, 3 * p * p) + conv(pixels, 3, 3, 3), 3 * pixels
    mask_token = Cost(parameters=D)
    cost = linear(K, cfg.token_size, D) + mask_token + _vit(cfg, D, layers, P) + head
    return replace(cost, boundary=K * cfg.token_size + out)


def _resnet_blocks(pixels: int, c_in: int, c_out: int, count: int) -> Cost:
    """`count` blocks of MaskGIT-VQGAN; where channels change, the first has a third convolution."""
    half = _norm(c_out) + conv(pixels, c_out, c_out, 3, bias=False)
    first = _norm(c_in) + conv(pixels, c_in, c_out, 3, bias=False) + half
    if c_in != c_out:
        first += conv(pixels, c_out, c_out, 1, bias=False)
    return first + half * (2 * (count - 1))


def pixel_encoder_cost(config: VQGANConfig, side: int = 256) -> Cost:
    """Cost of MaskGIT-VQGAN's encoder on an image of `side` pixels, without its code search."""
    widths, blocks, z = config.widths, config.num_res_blocks, config.z_channels
    entering, codes = (config.hidden_channels, *widths[:-1]), (side // config.downsampling) ** 2
    cost = conv(side**2, 3, config.hidden_channels, 3, bias=False)
    for i, (c_in, c_out) in enumerate(zip(entering, widths, strict=True)):
        cost += _resnet_blocks((side >> i) ** 2, c_in, c_out, blocks)
    cost += _resnet_blocks(codes, c_out, c_out, blocks) + _norm(c_out) + conv(codes, c_out, z, 1)
    return replace(cost, boundary=3 * side**2 + codes * z)


def pixel_decoder_cost(config: VQGANConfig, side: int = 256) -> Cost:
    """Cost of MaskGIT-VQGAN's decoder for an image of `side` pixels."""
    widths, blocks, z = config.widths, config.num_res_blocks, config.z_channels
    entering, codes = (*widths[1:], widths[-1]), (side // config.downsampling) ** 2
    cost = conv(codes, z, widths[-1], 3) + _resnet_blocks(codes, widths[-1], widths[-1], blocks)
    for i, (c_in, c_out) in enumerate(zip(entering, widths, strict=True)):
        pixels = (side >> i) ** 2
        cost += _resnet_blocks(pixels, c_in, c_out, blocks)
        if i > 0:  # nearest x2 before a 3x3 kernel: it reads the small image
            cost += conv(4 * pixels, c_out, c_out, 3, pixels_in=pixels)
    cost += _norm(widths[0]) + conv(side**2, widths[0], 3, 3)
    return replace(cost, boundary=3 * side**2 + codes * z)


def _codebook(rows: int, N: int, C: int, moved: int) -> Cost:
    """A matmul with a table of N codes of C channels; `moved` elements of input and output."""
    return Cost(2 * rows * N * C, N * C, N * C, boundary=moved, activations=moved)


def tokenizer_costs(config: TokenizerConfig) -> dict[str, Cost]:
    """Cost of each stage; a VAE has no "code_search", a stage-1 model no pixel stages."""
    cfg, K, C = config, config.num_latent_tokens, config.token_size
    costs = {"encoder": _encoder(cfg)}
    if cfg.quantize_mode == "vq":
        costs["code_search"] = _codebook(K, cfg.codebook_size, C, K * C + K)
    costs["vit_decoder"] = _vit_decoder(cfg)
    if cfg.finetune_decoder:
        rows = (cfg.decoder_grid * cfg.proxy_block) ** 2
        N, z = cfg.pixel.codebook_size, cfg.pixel.z_channels
        costs["pixel_codebook"] = _codebook(rows, N, z, rows * (N + z))
        costs["pixel_decoder"] = pixel_decoder_cost(cfg.pixel, cfg.crop_size)
    return costs


def decoding_costs(config: TokenizerConfig) -> dict[str, Cost]:
    """The stages of `tokenizer_costs` that turn codes into pixels."""
    costs = tokenizer_costs(config)
    return {name: c for name, c in costs.items() if name not in ("encoder", "code_search")}


def generator_cost(config: GeneratorConfig) -> Cost:
    """Cost of one forward of one sequence: ids to logits of the K image positions."""
    cfg, D, K, hidden = config, config.hidden_size, config.image_seq_len, config.intermediate_size
    table = Cost(parameters=cfg.vocab_size * D, lookups=cfg.vocab_size * D)
    head = Cost(parameters=(K + 1) * D) + _norm(D) + linear(K, D, cfg.codebook_size)
    if cfg.model_type == "ViT":
        blocks = _block(1 + K, D, hidden) * cfg.num_hidden_layers + Cost(parameters=2 * D)
    else:
        half = cfg.num_hidden_layers // 2  # and one block between the halves
        blocks = _block(1 + K, D, hidden, qkv_bias=False) * (half + 1)
        blocks += _block(1 + K, D, hidden, qkv_bias=False, skip=True) * half
    return replace(table + blocks + head, boundary=1 + K + K * cfg.codebook_size)


def generator_passes(sampling: SamplingConfig) -> int:
    """Forwards per image in upstream's sampler: one per step, two where guidance is not 0.

    In the first step of power-cosine it is 0, but upstream runs both, so both count.
    """
    (low, high), T = sampling.guidance_interval, sampling.num_sample_steps
    always = sampling.guidance_decay == "power-cosine"
    return sum(
        2 if step.guidance != 0 or (always and low <= step.index / T < high) else 1
        for step in steps(sampling)
    )


def generation_costs(
    tokenizer: TokenizerConfig, generator: GeneratorConfig, sampling: SamplingConfig
) -> dict[str, Cost]:
    """Cost of drawing one image: "generator", all passes of `sampling`, then `decoding_costs`."""
    once, passes = generator_cost(generator), generator_passes(sampling)
    whole = replace(
        once,
        flops=passes * once.flops,
        activations=passes * once.activations,
        boundary=1 + generator.image_seq_len,  # label in, ids out: logits need not leave the chip
        weight_reads=sampling.num_sample_steps,  # both passes of a guided step are one batch
    )
    return {"generator": whole, **decoding_costs(tokenizer)}


def parameters(config: TokenizerConfig) -> dict[str, int]:
    """Parameters of a tokenizer by the top-level names of its state dict."""
    names = {"vit_decoder": "decoder", "code_search": "quantize"}
    names["pixel_codebook"] = "pixel_quantize"
    costs = tokenizer_costs(config)
    counts = {names.get(stage, stage): cost.parameters for stage, cost in costs.items()}
    return {"latent_tokens": config.num_latent_tokens * config.encoder_size[0], **counts}


@dataclass(frozen=True)
class Device:
    """Peaks of a GPU: dense TFLOP/s by dtype; memory bandwidth in GB/s (1e9 bytes)."""

    tflops: dict[str, float]
    gbps: float


# NVIDIA's data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU" and
# the white paper "Ada GPU Architecture", appendix A; half precision with float32 accumulation.
# Sheets that print sparse rates are halved.
DEVICES = {
    name: Device({"bfloat16": half, "float16": half, "tf32": tf32, "float32": float32}, gbps)
    for name, half, tf32, float32, gbps in (
        ("a100-sxm-40gb", 312.0, 156.0, 19.5, 1555.0),
        ("a100-sxm-80gb", 312.0, 156.0, 19.5, 2039.0),
        ("h100-sxm", 989.0, 494.0, 67.0, 3350.0),
        ("h200-sxm", 989.0, 494.0, 67.0, 4800.0),
        ("rtx-4090", 165.2, 82.6, 82.6, 1008.0),
    )
}


def speed_of_light(
    preset_or_name: Preset | str, device: str, dtype: str = "bfloat16", batch: int = 1
) -> dict[str, float]:
    """Least seconds for a batch, by stage, of any implementation of the published arithmetic.

    max(FLOPs / peak, minimal bytes / bandwidth); the code search is always float32. An exact
    rewrite that saves matmuls can pass under the bound of its stage. Devices are the keys of
    DEVICES, dtypes those of DTYPE_BYTES, stages those of `preset_costs`.

    Raises:
        ValueError: unknown preset, device or dtype, or a batch below 1.
    """
    known = preset(preset_or_name) if isinstance(preset_or_name, str) else preset_or_name
    if device not in DEVICES:
        raise ValueError(f"device wants one of {', '.join(DEVICES)}; got {device!r}")
    if batch < 1:
        raise ValueError(f"batch wants at least 1; got {batch}")
    dtype_size(dtype)
    card, seconds = DEVICES[device], {}
    for stage, cost in preset_costs(known).items():
        kind = "float32" if stage == "code_search" else dtype
        compute = batch * cost.flops / (card.tflops[kind] * 1e12)
        seconds[stage] = max(compute, cost.minimal_bytes(kind, batch) / (card.gbps * 1e9))
    return seconds


def preset_costs(known: Preset) -> dict[str, Cost]:
    """The stages of the tokenizer, and of drawing an image where the preset has a generator."""
    costs = tokenizer_costs(known.tokenizer)
    if known.generator is not None and known.sampling is not None:
        costs |= generation_costs(known.tokenizer, known.generator, known.sampling)
    return costs
