"""What a model costs on paper: parameters, FLOPs, bytes, and the time a device cannot go below.

The work counted is that of the published networks, nothing saved by rewriting (maskgit_vqgan.py
folds some of it away), so that rates of different implementations compare. The draw of tokens is
left out. All costs are of one image; Cost in layer_costs.py says what its numbers mean.
"""

from dataclasses import dataclass, replace

from titok_fast.config import GeneratorConfig, SamplingConfig, TokenizerConfig, VQGANConfig
from titok_fast.layer_costs import Cost, block, conv, dtype_size, linear, norm, resnet_blocks, total
from titok_fast.presets import Preset, preset
from titok_fast.sampling.schedules import steps


def _encoder(cfg: TokenizerConfig) -> Cost:
    (D, layers, _), p, K = cfg.encoder_size, cfg.vit_enc_patch_size, cfg.num_latent_tokens
    P, pixels = cfg.encoder_grid**2, cfg.crop_size**2
    channels = cfg.token_size * (2 if cfg.quantize_mode == "vae" else 1)
    tables = Cost(parameters=(1 + P + 1 + K) * D)  # class; positions; positions of latents
    vit = total([block(_rows(cfg, P), D, 4 * D)] * layers) + norm(D) + norm(D)
    patches = conv(P, 3, D, p, pixels_in=pixels)
    whole = patches + tables + vit + linear(K, D, channels)
    return replace(whole, boundary=3 * pixels + K * channels)


def _vit_decoder(cfg: TokenizerConfig) -> Cost:
    (D, layers, _), p, K = cfg.decoder_size, cfg.vit_dec_patch_size, cfg.num_latent_tokens
    P, pixels = cfg.decoder_grid**2, cfg.crop_size**2
    tables = Cost(parameters=(1 + P + 1 + 1 + K) * D)  # as the encoder's, and the mask token
    vit = total([block(_rows(cfg, P), D, 4 * D)] * layers) + norm(D) + norm(D)
    if cfg.is_legacy:
        logits = cfg.pixel.codebook_size * cfg.proxy_block**2
        head, out = linear(P, D, 2 * D) + linear(P, 2 * D, logits), P * logits
    else:
        head, out = linear(P, D, 3 * p * p) + conv(pixels, 3, 3, 3), 3 * pixels
    whole = linear(K, cfg.token_size, D) + tables + vit + head
    return replace(whole, boundary=K * cfg.token_size + out)


def _rows(cfg: TokenizerConfig, P: int) -> int:
    """Of a sequence: class token, patches, latent tokens; the 2D variant's are the patches."""
    return 1 + P if cfg.is_2d else 1 + P + cfg.num_latent_tokens


def pixel_encoder_cost(config: VQGANConfig, side: int = 256) -> Cost:
    """Cost of MaskGIT-VQGAN's encoder on an image of `side` pixels, without its code search."""
    widths, blocks = config.widths, config.num_res_blocks
    entering = (config.hidden_channels, *widths[:-1])
    cost = conv(side**2, 3, config.hidden_channels, 3, bias=False)
    for i, (c_in, c_out) in enumerate(zip(entering, widths, strict=True)):
        cost += resnet_blocks((side >> i) ** 2, c_in, c_out, blocks)
    codes, deepest = (side // config.downsampling) ** 2, widths[-1]
    cost += resnet_blocks(codes, deepest, deepest, blocks) + norm(deepest)
    cost += conv(codes, deepest, config.z_channels, 1)
    return replace(cost, boundary=3 * side**2 + codes * config.z_channels)


def pixel_decoder_cost(config: VQGANConfig, side: int = 256) -> Cost:
    """Cost of MaskGIT-VQGAN's decoder for an image of `side` pixels."""
    widths, blocks = config.widths, config.num_res_blocks
    entering, deepest = (*widths[1:], widths[-1]), widths[-1]
    codes = (side // config.downsampling) ** 2
    cost = conv(codes, config.z_channels, deepest, 3)
    cost += resnet_blocks(codes, deepest, deepest, blocks)
    for i in reversed(range(len(widths))):
        pixels = (side >> i) ** 2
        cost += resnet_blocks(pixels, entering[i], widths[i], blocks)
        if i > 0:  # nearest x2 before a 3x3 kernel: it reads the small picture
            cost += conv(4 * pixels, widths[i], widths[i], 3, pixels_in=pixels)
    cost += norm(widths[0]) + conv(side**2, widths[0], 3, 3)
    return replace(cost, boundary=3 * side**2 + codes * config.z_channels)


def _codebook(rows: int, N: int, C: int, moved: int) -> Cost:
    """A product with a table of N codes of C channels; `moved` elements enter and leave."""
    return Cost(2 * rows * N * C, N * C, N * C, boundary=moved, activations=moved)


def tokenizer_costs(config: TokenizerConfig) -> dict[str, Cost]:
    """Cost of each stage of a tokenizer, for one image.

    Args:
        config: any tokenizer.

    Returns:
        "encoder"; "code_search" (not for a VAE); "vit_decoder", with its head; and for a stage-2
        model "pixel_codebook" and "pixel_decoder".
    """
    cfg, K, C = config, config.num_latent_tokens, config.token_size
    costs = {"encoder": _encoder(cfg)}
    if cfg.quantize_mode == "vq":
        costs["code_search"] = _codebook(K, cfg.codebook_size, C, K * C + K)
    costs["vit_decoder"] = _vit_decoder(cfg)
    if cfg.finetune_decoder:
        places = (cfg.decoder_grid * cfg.proxy_block) ** 2
        N, z = cfg.pixel.codebook_size, cfg.pixel.z_channels
        costs["pixel_codebook"] = _codebook(places, N, z, places * (N + z))
        costs["pixel_decoder"] = pixel_decoder_cost(cfg.pixel, cfg.crop_size)
    return costs


def generator_cost(config: GeneratorConfig) -> Cost:
    """Cost of one forward of one sequence: ids to logits of the K image positions.

    Args:
        config: any generator.
    """
    cfg, D, K, hidden = config, config.hidden_size, config.image_seq_len, config.intermediate_size
    table = Cost(parameters=cfg.vocab_size * D, lookups=cfg.vocab_size * D)
    head = Cost(parameters=(K + 1) * D) + norm(D) + linear(K, D, cfg.codebook_size)
    if cfg.model_type == "ViT":
        types = Cost(parameters=2 * D)
        blocks = types + total([block(1 + K, D, hidden)] * cfg.num_hidden_layers)
    else:
        half = cfg.num_hidden_layers // 2  # and one block between the halves
        plain = block(1 + K, D, hidden, qkv_bias=False)
        merging = block(1 + K, D, hidden, qkv_bias=False, skip=True)
        blocks = total([plain] * (half + 1) + [merging] * half)
    return replace(table + blocks + head, boundary=1 + K + K * cfg.codebook_size)


def generator_passes(sampling: SamplingConfig) -> int:
    """Forwards per picture in upstream's sampler: one per step, two where it guides.

    A guided step of weight 0 needs no unconditional pass, and linear guidance starts with one. The
    first step of power-cosine has weight 0 too, but upstream runs both, so both count as work here.
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
    """Cost of drawing one picture, by stage.

    Args:
        tokenizer: what turns the tokens into pixels.
        generator: what draws the tokens.
        sampling: sets the number of passes.

    Returns:
        "generator" (all passes; weights streamed once a step, both passes being one batch), then
        the stages of `tokenizer_costs` from "vit_decoder" on.
    """
    once, passes = generator_cost(generator), generator_passes(sampling)
    whole = replace(
        once,
        flops=passes * once.flops,
        activations=passes * once.activations,
        boundary=1 + generator.image_seq_len,  # label in, ids out: logits need not leave the chip
        weight_reads=sampling.num_sample_steps,
    )
    return {"generator": whole, **decoding_costs(tokenizer)}


def decoding_costs(config: TokenizerConfig) -> dict[str, Cost]:
    """The stages of `tokenizer_costs` that turn codes into pixels."""
    costs = tokenizer_costs(config)
    return {name: c for name, c in costs.items() if name not in ("encoder", "code_search")}


def parameters(config: TokenizerConfig) -> dict[str, int]:
    """Parameters of a tokenizer by the top-level names of its state dict.

    Args:
        config: any tokenizer.

    Returns:
        "latent_tokens", "encoder", "decoder", and where the model has them "quantize",
        "pixel_quantize" and "pixel_decoder". Their sum is the model's count.
    """
    names = {
        "encoder": "encoder",
        "vit_decoder": "decoder",
        "code_search": "quantize",
        "pixel_codebook": "pixel_quantize",
        "pixel_decoder": "pixel_decoder",
    }
    counts = {names[stage]: cost.parameters for stage, cost in tokenizer_costs(config).items()}
    return {"latent_tokens": config.num_latent_tokens * config.encoder_size[0], **counts}


@dataclass(frozen=True)
class Device:
    """Peaks of a card: TFLOP/s dense, without sparsity, by dtype; memory in GB/s (1e9 bytes)."""

    tflops: dict[str, float]
    gbps: float


def _card(half: float, tf32: float, float32: float, gbps: float) -> Device:
    rates = {"bfloat16": half, "float16": half, "tf32": tf32, "float32": float32}
    return Device(rates, gbps)


# NVIDIA's data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU" and
# the white paper "Ada GPU Architecture", appendix A; half precision with float32 accumulation.
# The two A100 differ in memory only. Sheets that print sparse rates are halved.
DEVICES: dict[str, Device] = {
    "a100-sxm-40gb": _card(312.0, 156.0, 19.5, 1555.0),
    "a100-sxm-80gb": _card(312.0, 156.0, 19.5, 2039.0),
    "h100-sxm": _card(989.0, 494.0, 67.0, 3350.0),
    "h200-sxm": _card(989.0, 494.0, 67.0, 4800.0),
    "rtx-4090": _card(165.2, 82.6, 82.6, 1008.0),
}


def speed_of_light(
    preset_or_name: Preset | str, device: str, dtype: str = "bfloat16", batch: int = 1
) -> dict[str, float]:
    """Seconds below which no implementation of the published arithmetic can do a batch.

    max(FLOPs / peak, minimal bytes / bandwidth) of each stage. The code search is float32 in every
    model. An exact rewrite that saves products can pass under the bound of its stage.

    Args:
        preset_or_name: a published system, or its name.
        device: a key of DEVICES.
        dtype: a key of DTYPE_BYTES.
        batch: images, at least 1.

    Returns:
        Seconds by stage: those of `tokenizer_costs`, and "generator" (a whole generation) where
        the preset has one.

    Raises:
        ValueError: unknown preset, device or dtype, or a batch below 1.
    """
    known = preset(preset_or_name) if isinstance(preset_or_name, str) else preset_or_name
    if device not in DEVICES:
        raise ValueError(f"device wants one of {', '.join(DEVICES)}; got {device!r}")
    if batch < 1:
        raise ValueError(f"batch wants at least 1; got {batch}")
    dtype_size(dtype)
    costs = tokenizer_costs(known.tokenizer)
    if known.generator is not None and known.sampling is not None:
        costs |= generation_costs(known.tokenizer, known.generator, known.sampling)
    card, seconds = DEVICES[device], {}
    for stage, cost in costs.items():
        kind = "float32" if stage == "code_search" else dtype
        compute = batch * cost.flops / (card.tflops[kind] * 1e12)
        seconds[stage] = max(compute, cost.minimal_bytes(kind, batch) / (card.gbps * 1e9))
    return seconds
