"""The experiments of trends.py: which there are, what each needs, and its training recipe.

An experiment trains one network and measures it, or only measures. Experiments share networks:
every two-stage run uses the one proxy tokenizer, and each stage-1 tokenizer is measured, probed and
generated with.
"""

from dataclasses import dataclass
from pathlib import Path

from titok_fast.sampling_config import SCHEDULES
from titok_fast.training.recipe.recipe import Recipe, read_recipe

RECIPES = Path(__file__).parent / "recipes"
CLASSES = 10
# patches of the recipes' images: the 2D variant has as many tokens, a quarter of the proxy codes,
# as has the paper's B-64
MIDDLE = 16
# learning rate of tokenizers times their width: one rate for all sizes would favour some of them
RATE = 0.32
TRAININGS = ("two-stage", "single-stage", "2d")
GROUPS = (
    "reconstruction-tokens",
    "generation-tokens",
    "probe-tokens",
    "proxy-codes",
    "schedules",
    "speed",
)


@dataclass(frozen=True)
class Settings:
    """Sizes and budgets of a whole run.

    Attributes:
        tokens: K of the curves; MIDDLE is among them.
        sizes: (width, layers, heads) of encoder and decoder by name; "B" is among them.
        budget: updates of each tokenizer and of the proxy tokenizer; a single-stage run, which
            replaces two, has twice as many.
        batch: images of an update.
        generator_budget, generator_batch: the same for generators.
        generator_size: (width, layers, heads).
        vqgan: channel_mult of the proxy tokenizer.
        judged: images of the evaluation set that are reconstructed.
        drawn: images sampled from a generator.
        probed, probe_epochs: training images and epochs of a linear probe.
        seeds: of the generators that compare masking schedules.
        speed_batch, repeats: samples at once and timed rounds.
    """

    tokens: tuple[int, ...] = (4, 8, 16, 32, 64)
    sizes: tuple[tuple[str, tuple[int, int, int]], ...] = (
        ("S", (48, 2, 2)),
        ("B", (64, 4, 2)),
        ("L", (96, 6, 3)),
    )
    budget: int = 1200
    batch: int = 32
    generator_budget: int = 1200
    generator_batch: int = 64
    generator_size: tuple[int, int, int] = (96, 4, 4)
    vqgan: tuple[int, ...] = (1, 1, 2)
    judged: int = 5000
    drawn: int = 2000
    probed: int = 20_000
    probe_epochs: int = 20
    seeds: tuple[int, ...] = (42, 43)
    speed_batch: int = 64
    repeats: int = 15


SMOKE = Settings(
    tokens=(4, 16),
    sizes=(("S", (32, 1, 2)), ("B", (32, 2, 2))),
    budget=2,
    batch=8,
    generator_budget=2,
    generator_batch=8,
    generator_size=(32, 1, 2),
    judged=24,
    drawn=24,
    probed=48,
    probe_epochs=1,
    seeds=(42,),
    speed_batch=2,
    repeats=1,
)


@dataclass(frozen=True)
class Experiment:
    """One network trained and measured, or one measurement.

    `kind`: "vqgan", "tokenizer" (stage 1), "training" (the others of table 3c), "generator",
    "probe" or "speed". `size` is that of the tokenizer; `variant` of "training" one of TRAININGS,
    of "generator" its masking schedule.
    """

    kind: str
    size: str = ""
    tokens: int = 0
    variant: str = ""
    seed: int = 42

    @property
    def name(self) -> str:
        """Unique; names its files."""
        parts = [self.kind, self.size, self.tokens or "", self.variant]
        parts += [self.seed] if self.kind == "generator" else []
        return "-".join(str(part) for part in parts if part)

    def needs(self) -> "tuple[Experiment, ...]":
        """Experiments whose networks this one uses."""
        if self.kind in ("vqgan", "speed") or self.variant in ("single-stage", "2d"):
            return ()
        if self.kind == "tokenizer":
            return (VQGAN,)
        return (VQGAN, Experiment("tokenizer", self.size, self.tokens))

    def trains(self) -> bool:
        """Whether it trains a network."""
        return self.kind not in ("probe", "speed")


VQGAN = Experiment("vqgan")


def generator(tokens: int, settings: Settings) -> Experiment:
    """The generator of the curves: B, arccos, the first seed."""
    return Experiment("generator", "B", tokens, "arccos", settings.seeds[0])


def by_schedule(schedule: str, settings: Settings) -> list[Experiment]:
    """The generators of a masking schedule, one per seed."""
    return [Experiment("generator", "B", MIDDLE, schedule, seed) for seed in settings.seeds]


def experiments_of(group: str, settings: Settings) -> list[Experiment]:
    """The experiments that one of GROUPS shows."""
    sizes, tokens = [name for name, _ in settings.sizes], settings.tokens
    groups = {
        "reconstruction-tokens": [
            VQGAN,
            *(Experiment("tokenizer", size, K) for size in sizes for K in tokens),
        ],
        "generation-tokens": [generator(K, settings) for K in tokens],
        "probe-tokens": [Experiment("probe", size, K) for size in sizes for K in tokens],
        "proxy-codes": [Experiment("training", "B", MIDDLE, variant) for variant in TRAININGS],
        "schedules": [e for schedule in SCHEDULES for e in by_schedule(schedule, settings)],
        "speed": [Experiment("speed")],
    }
    if group not in groups:
        raise ValueError(f"group wants one of {', '.join(GROUPS)}; got {group!r}")
    return groups[group]


def with_needs(experiments: list[Experiment]) -> list[Experiment]:
    """These experiments and all they need, each once and after what it needs."""
    return list(dict.fromkeys(one for e in experiments for one in (*e.needs(), e)))


def recipe(e: Experiment, settings: Settings, work: Path) -> Recipe:
    """The training recipe of an experiment that trains, its network in a folder of `work`."""
    S, single = settings, e.variant in ("single-stage", "2d")
    stage = {"tokenizer": "stage1", "training": "single_stage" if single else "stage2"}
    file = stage.get(e.kind, e.kind)
    budget, batch = S.budget, S.batch
    if e.kind == "generator":
        budget, batch = S.generator_budget, S.generator_batch
    keys: dict[str, object] = {
        "experiment.name": e.name,
        "experiment.output_dir": work / e.name,
        "training.seed": e.seed,
        "training.per_gpu_batch_size": batch,
        "training.max_train_steps": 2 * budget if single else budget,
        "lr_scheduler.params.warmup_steps": max(1, budget // 6),
    }
    if e.kind == "vqgan":
        keys["model.pixel.channel_mult"] = list(S.vqgan)
    elif e.kind == "generator":
        D, layers, heads = S.generator_size
        keys |= {
            "model.vq_model.num_latent_tokens": e.tokens,
            "model.generator.hidden_size": D,
            "model.generator.num_hidden_layers": layers,
            "model.generator.num_attention_heads": heads,
            "model.generator.intermediate_size": 4 * D,
            "losses.mask_schedule_strategy": e.variant,
        }
    else:
        size = list(dict(S.sizes)[e.size])
        keys |= {
            "model.vq_model.num_latent_tokens": e.tokens,
            "model.vq_model.vit_enc_model_size": size,
            "model.vq_model.vit_dec_model_size": size,
        }
        if file != "stage2":
            keys["optimizer.params.learning_rate"] = RATE / size[0]
        if single:
            keys["model.vq_model.is_2d"] = e.variant == "2d"
        else:
            keys["model.vq_model.pixel.channel_mult"] = list(S.vqgan)
            keys["model.vq_model.pretrained_tokenizer_weight"] = work / VQGAN.name / "final"
        if file == "stage2":
            first = Experiment("tokenizer", e.size, e.tokens)
            keys["experiment.init_weight"] = work / first.name / "final"
    return read_recipe(RECIPES / f"{file}.yaml", [f"{key}={value}" for key, value in keys.items()])
