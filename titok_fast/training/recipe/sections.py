"""The sections of a recipe: frozen dataclasses of checked numbers and names.

Defaults are those of upstream's configs/training where its files agree.
"""

from dataclasses import dataclass

from titok_fast.sampling_config import SCHEDULES
from titok_fast.settings import Settings, among, within


@dataclass(frozen=True)
class Experiment(Settings):
    """Names, files and how often something is written; "every" counts optimizer updates.

    Attributes:
        name: of the run; `output_dir` defaults to it.
        output_dir: checkpoints, logs and images go here.
        project: W&B's project.
        max_train_examples: examples of one epoch in logs; None: the size of the data.
        save_every, eval_every, generate_every, log_every, log_grad_norm_every: updates; 0 is never.
        resume: continue from the newest valid checkpoint in output_dir, if there is one.
        init_weight: weights to start from (stage 2: of stage 1); file, directory or repository.
        tokenizer_checkpoint: generator: weights of the tokenizer that makes its tokens.
        pretrained_tokenizer_weight: stages 1 and 2: weights of MaskGIT-VQGAN.
        logging: "none" (JSONL alone), "tensorboard" or "wandb".
        keep: number of newest checkpoints to keep; 0 keeps all.
    """

    name: str = "titok"
    output_dir: str = ""
    project: str = "titok"
    max_train_examples: int | None = within(None, 1)
    save_every: int = within(50_000, 0)
    eval_every: int = within(50_000, 0)
    generate_every: int = within(5_000, 0)
    log_every: int = within(50, 0)
    log_grad_norm_every: int = within(1_000, 0)
    resume: bool = True
    init_weight: str = ""
    tokenizer_checkpoint: str = ""
    pretrained_tokenizer_weight: str = ""
    logging: str = among("none", "none", "tensorboard", "wandb")
    keep: int = within(3, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "output_dir", self.output_dir or self.name)


@dataclass(frozen=True)
class LossConfig(Settings):
    """Settings of all losses; each stage reads its own. Defaults: stage 2 and the generator.

    Attributes:
        reconstruction_loss: "l2" or "l1".
        quantizer_weight: of commitment + codebook loss.
        perceptual_loss: a name of models/perceptual.py, or "none".
        perceptual_weights_file: local weights of that network, see there.
        discriminator_start: update from which the discriminator acts and learns.
        discriminator_factor, discriminator_weight: their product scales the GAN term.
        adaptive_discriminator_weight: Taming's: scale it by the ratio of gradients as well.
        discriminator_channels: width of its first stage, a multiple of 32.
        discriminator_pool: largest side of its grid of logits.
        lecam_regularization_weight, lecam_ema_decay: regulariser of the discriminator.
        kl_weight, logvar_init: VAE bottleneck.
        label_smoothing, loss_weight_unmasked_token, mask_schedule_strategy: generator.
    """

    reconstruction_loss: str = among("l2", "l2", "l1")
    reconstruction_weight: float = within(1.0, 0)
    quantizer_weight: float = within(1.0, 0)
    perceptual_loss: str = "none"
    perceptual_weight: float = within(0.1, 0)
    perceptual_weights_file: str = ""
    discriminator_start: int = within(20_000, 0)
    discriminator_factor: float = within(1.0, 0)
    discriminator_weight: float = within(0.01, 0)
    adaptive_discriminator_weight: bool = False
    discriminator_channels: int = within(128, 32)
    discriminator_pool: int = within(16, 1)
    lecam_regularization_weight: float = within(0.001, 0)
    lecam_ema_decay: float = within(0.999, 0, 1)
    kl_weight: float = within(1e-6, 0)
    logvar_init: float = 0.0
    label_smoothing: float = within(0.1, 0, 1)
    loss_weight_unmasked_token: float = within(0.1, 0)
    mask_schedule_strategy: str = among("arccos", *SCHEDULES)


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW.

    Attributes:
        discriminator_learning_rate: None is `learning_rate`.
        epsilon: upstream's code does not read it from its files; ours does.
        fused: "torch" is torch's fused step, "apex" NVIDIA's, "auto" torch's where it can run.
    """

    name: str = among("adamw", "adamw")
    learning_rate: float = within(1e-4, 0)
    discriminator_learning_rate: float | None = within(None, 0)
    beta1: float = within(0.9, 0, 1)
    beta2: float = within(0.99, 0, 1)
    epsilon: float = within(1e-8, 0)
    weight_decay: float = within(1e-4, 0)
    fused: str = among("auto", "auto", "torch", "apex")


@dataclass(frozen=True)
class ScheduleConfig(Settings):
    """Linear warm-up from 0, then half a cosine down to `end_lr`, or constant; in updates."""

    scheduler: str = among("cosine", "cosine", "constant")
    warmup_steps: int = within(10_000, 0)
    end_lr: float = within(1e-5, 0)


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """The loop.

    Attributes:
        gradient_accumulation_steps: batches per optimizer update.
        per_gpu_batch_size: images (or token rows) per rank and batch.
        mixed_precision: "no" or "bf16" (autocast; weights stay float32).
        ema_decay: highest decay of the averaged weights.
        max_train_steps: optimizer updates.
        num_generated_images: images of one sheet.
        max_grad_norm: gradients are clipped to this global norm; 0 does not clip.
        parallel: how ranks share the work: "ddp" or "fsdp2".
        max_bad_steps: updates in a row with a NaN or Inf after which the run stops.
        clustering_vq: revive unused codes while training.
    """

    gradient_accumulation_steps: int = within(1, 1)
    per_gpu_batch_size: int = within(32, 1)
    mixed_precision: str = among("bf16", "no", "bf16")
    enable_tf32: bool = True
    use_ema: bool = True
    ema_decay: float = within(0.999, 0, 1)
    seed: int = within(42, 0)
    max_train_steps: int = within(1_000_000, 1)
    num_generated_images: int = within(2, 1)
    max_grad_norm: float = within(1.0, 0)
    compile: bool = False
    activation_checkpointing: bool = False
    parallel: str = among("ddp", "ddp", "fsdp2")
    max_bad_steps: int = within(10, 1)
    clustering_vq: bool = False
