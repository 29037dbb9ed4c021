"""Count the work of each stage of sampling, by kind: what the cost model multiplies by its rates.

Counted on the published networks (titok_fast/costs.py), without the passes that our sampler skips
because their guidance has weight 0.
"""

from titok_fast.costs import DTYPE_BYTES, Cost, attention, generator_cost, linear, tokenizer_costs
from titok_fast.presets import Preset
from titok_fast.sampling.schedules import masked_after, steps

DTYPES = {"bf16": "bfloat16", "tf32": "tf32", "fp32-ieee": "float32"}

# kind of work: unit of its rate, and how many of the counted make one of that unit
KINDS = {
    "gemm_flops": ("GFLOP/s", 1e9),
    "attention_flops": ("GFLOP/s", 1e9),
    "attention_rows": ("Mrow/s", 1e6),
    "conv_flops": ("GFLOP/s", 1e9),
    "weight_bytes": ("GB/s", 1e9),
    "activation_bytes": ("GB/s", 1e9),
    "draws": ("Mlogit/s", 1e6),
    "layer_calls": ("layer/s", 1.0),
}
Work = dict[str, float]


def _transformer(
    cost: Cost, L: int, size: tuple[int, int, int], runs: float, dtype: str, streams: int
) -> Work:
    """Work of `runs` sequences of L tokens, the weights being streamed `streams` times."""
    (D, layers, heads), each = size, DTYPE_BYTES[dtype]
    mixing = layers * attention(L, D).flops
    return {
        "gemm_flops": runs * (cost.flops - mixing),
        "attention_flops": runs * mixing,
        "attention_rows": runs * layers * heads * L,
        "weight_bytes": streams * (cost.weight_bytes(dtype) - cost.lookups * each),
        "activation_bytes": runs * cost.activations * each,
        "layer_calls": streams * layers,
    }


def work(system: Preset, batch: int, dtype: str) -> dict[str, Work]:
    """Work of each stage for a batch, by kind; "head" is head and draw of one step, all masked.

    The "vit_decoder" has the legacy head; the "pixel_decoder", where there is one, the codebook.
    """
    assert system.generator is not None
    assert system.sampling is not None
    g, t, sampling, dtype = system.generator, system.tokenizer, system.sampling, DTYPES[dtype]
    K, N, T, each = g.image_seq_len, g.codebook_size, sampling.num_sample_steps, DTYPE_BYTES[dtype]
    # U-ViT has one block more between its halves
    layers = g.num_hidden_layers if g.model_type == "ViT" else g.num_hidden_layers // 2 * 2 + 1
    size, stages = (g.hidden_size, layers, g.num_attention_heads), tokenizer_costs(t)
    runs = batch * sum(1 if step.guidance == 0 else 2 for step in steps(sampling))
    masked = [K, *masked_after(sampling, K)[:-1]]
    generator = _transformer(generator_cost(g), 1 + K, size, runs, dtype, T)
    generator["draws"] = batch * N * sum(masked)
    L = 1 + t.decoder_grid**2 + t.num_latent_tokens
    found = {
        "generator": generator,
        "vit_decoder": _transformer(stages["vit_decoder"], L, t.decoder_size, batch, dtype, 1),
    }
    if "pixel_decoder" in stages:
        pixels, codebook = stages["pixel_decoder"], stages["pixel_codebook"]
        found["pixel_decoder"] = {
            "gemm_flops": batch * codebook.flops,
            "conv_flops": batch * pixels.flops,
            "weight_bytes": pixels.weight_bytes(dtype),
            "activation_bytes": batch * (pixels.activations + codebook.activations) * each,
        }
    head = linear(K, g.hidden_size, N)
    found["head"] = {
        "gemm_flops": batch * head.flops,
        "weight_bytes": head.weight_bytes(dtype),
        "draws": batch * K * N,
    }
    return found
