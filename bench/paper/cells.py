"""What paper_trends.py trains and measures: cells, what each needs, and the recipe behind each.

A cell is one network trained, or one network measured. Cells share: every two-stage run has the one
proxy tokenizer, and each stage-1 tokenizer is measured, probed and generated with.
"""

from dataclasses import dataclass
from pathlib import Path

from titok_fast.config import SCHEDULES
from titok_fast.training.recipe.recipe import Recipe, read_recipe

RECIPES = Path(__file__).resolve().parents[2] / "titok_fast" / "recipes" / "fashion" / "trends"
CLASSES = 10
# patches of the recipes' pictures: the 2D variant has as many tokens, a quarter of the proxy codes,
# as has the paper's B-64
MIDDLE = 16
# learning rate of tokenizers times their width: one rate for all sizes would suit some of them
RATE = 0.32
TRAININGS = ("two-stage", "single-stage", "2d")
GROUPS = (
    "reconstruction-tokens", "generation-tokens", "probe-tokens", "proxy-codes", "schedules",
    "speed",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a whole run is.

    Attributes:
        tokens: K of the curves; MIDDLE is among them.
        sizes: (width, layers, heads) of encoder and decoder by name; "B" is among them.
        budget: updates of each tokenizer and of the proxy tokenizer; a run that replaces two
            stages has twice as many.
        batch: pictures of an update.
        generator_budget, generator_batch: the same of generators.
        generator_size: (width, layers, heads).
        vqgan: channel_mult of the proxy tokenizer.
        judged: pictures of the evaluation set that are reconstructed.
        drawn: pictures drawn by a generator.
        probed, probe_epochs: training pictures and passes of a linear probe.
        seeds: of the generators that are compared by masking schedule.
        speed_batch, repeats: samples at once and timed rounds.
    """

    tokens: tuple[int, ...] = (4, 8, 16, 32, 64)
    sizes: tuple[tuple[str, tuple[int, int, int]], ...] = (
        ("S", (48, 2, 2)), ("B", (64, 4, 2)), ("L", (96, 6, 3))
    )  # fmt: skip
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
    tokens=(4, 16), sizes=(("S", (32, 1, 2)), ("B", (32, 2, 2))), budget=2, batch=8,
    generator_budget=2, generator_batch=8, generator_size=(32, 1, 2), judged=24, drawn=24,
    probed=48, probe_epochs=1, seeds=(42,), speed_batch=2, repeats=1,
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One network trained and measured, or one measurement.

    Attributes:
        kind: "vqgan", "tokenizer" (stage 1), "training" (the others of table 3c), "generator",
            "probe" or "speed".
        size: of the tokenizer.
        tokens: K.
        variant: of "training" one of TRAININGS, of "generator" its masking schedule.
        seed: of the training.
    """

    kind: str
    size: str = ""
    tokens: int = 0
    variant: str = ""
    seed: int = 42

    @property
    def name(self) -> str:
        """Of its files: unique."""
        parts = [self.kind, self.size, self.tokens or "", self.variant]
        parts += [self.seed] if self.kind == "generator" else []
        return "-".join(str(part) for part in parts if part)

    def needs(self) -> "tuple[Cell, ...]":
        """Cells whose networks this one uses."""
        if self.kind in ("vqgan", "speed") or self.variant in ("single-stage", "2d"):
            return ()
        if self.kind == "tokenizer":
            return (VQGAN,)
        return (VQGAN, Cell("tokenizer", self.size, self.tokens))

    def trains(self) -> bool:
        """Whether a network is trained for it."""
        return self.kind not in ("probe", "speed")


VQGAN = Cell("vqgan")


def cells_of(group: str, settings: Settings) -> list[Cell]:
    """The cells that a group shows.

    Raises:
        ValueError: an unknown group.
    """
    sizes, tokens = [name for name, _ in settings.sizes], settings.tokens
    if group == "reconstruction-tokens":
        return [VQGAN, *(Cell("tokenizer", size, K) for size in sizes for K in tokens)]
    if group == "generation-tokens":
        return [Cell("generator", "B", K, "arccos", settings.seeds[0]) for K in tokens]
    if group == "probe-tokens":
        return [Cell("probe", size, K) for size in sizes for K in tokens]
    if group == "proxy-codes":
        return [Cell("training", "B", MIDDLE, variant) for variant in TRAININGS]
    if group == "schedules":
        return [
            Cell("generator", "B", MIDDLE, schedule, seed)
            for schedule in SCHEDULES
            for seed in settings.seeds
        ]
    if group == "speed":
        return [Cell("speed")]
    raise ValueError(f"group wants one of {', '.join(GROUPS)}; got {group!r}")


def in_order(cells: list[Cell]) -> list[Cell]:
    """These cells and all they need, each once, none before what it needs."""
    done: dict[Cell, None] = {}
    for cell in cells:
        for one in (*cell.needs(), cell):
            done.setdefault(one)
    return list(done)


def recipe(cell: Cell, settings: Settings, work: Path) -> Recipe:
    """How the network of a cell is trained.

    Args:
        cell: one that trains.
        settings: of the run.
        work: folder whose sub-folders are the runs, by the names of cells.
    """
    S, stage = settings, cell.kind
    if cell.kind == "tokenizer":
        stage = "stage1"
    elif cell.kind == "training":
        stage = "stage2" if cell.variant == "two-stage" else "single_stage"
    budget, batch = S.budget, S.batch
    if cell.kind == "generator":
        budget, batch = S.generator_budget, S.generator_batch
    keys = {
        "experiment.name": cell.name,
        "experiment.output_dir": work / cell.name,
        "training.seed": cell.seed,
        "training.per_gpu_batch_size": batch,
        "training.max_train_steps": 2 * budget if stage == "single_stage" else budget,
        "lr_scheduler.params.warmup_steps": max(1, budget // 6),
    }
    if stage == "vqgan":
        keys["model.pixel.channel_mult"] = list(S.vqgan)
    elif stage == "generator":
        keys |= _generator_keys(cell, S)
    else:
        keys |= _tokenizer_keys(cell, S, work, stage)
    overrides = [f"{key}={value}" for key, value in keys.items()]
    return read_recipe(RECIPES / f"{stage}.yaml", overrides)


def _tokenizer_keys(cell: Cell, settings: Settings, work: Path, stage: str) -> dict[str, object]:
    size = list(dict(settings.sizes)[cell.size])
    keys: dict[str, object] = {
        "model.vq_model.num_latent_tokens": cell.tokens,
        "model.vq_model.vit_enc_model_size": size,
        "model.vq_model.vit_dec_model_size": size,
    }
    if stage != "stage2":
        keys["optimizer.params.learning_rate"] = RATE / size[0]
    if stage == "single_stage":
        return keys | {"model.vq_model.is_2d": cell.variant == "2d"}
    keys["model.vq_model.pixel.channel_mult"] = list(settings.vqgan)
    keys["model.vq_model.pretrained_tokenizer_weight"] = work / VQGAN.name / "final"
    if stage == "stage2":
        first = Cell("tokenizer", cell.size, cell.tokens)
        keys["experiment.init_weight"] = work / first.name / "final"
    return keys


def _generator_keys(cell: Cell, settings: Settings) -> dict[str, object]:
    D, layers, heads = settings.generator_size
    return {
        "model.vq_model.num_latent_tokens": cell.tokens,
        "model.generator.hidden_size": D,
        "model.generator.num_hidden_layers": layers,
        "model.generator.num_attention_heads": heads,
        "model.generator.intermediate_size": 4 * D,
        "losses.mask_schedule_strategy": cell.variant,
    }
