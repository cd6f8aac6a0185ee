"""How long a training is, by its number of reference views, and its schedule stretched or squeezed to a length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from nerfstudio.engine.trainer import Trainer, TrainerConfig

    from nerfstudio_enhancer.model import EnhancerModelConfig
    from nerfstudio_enhancer.trainer import EnhancerTrainerConfig


def own_length(config: TrainerConfig, references: int | None) -> int:
    """Steps of a training that nobody gave a number for.

    Few photographs are learnt by heart in more: see `EnhancerTrainerConfig.few_views_iterations`.

    Args:
        config: of the trainer.
        references: number of reference views; None where nobody knows it before the training.
    """
    settings = cast("EnhancerTrainerConfig", config)
    most, least = settings.schedule_iterations, settings.few_views_iterations
    if least is None or references is None:
        return most
    few_views = cast("EnhancerModelConfig", config.pipeline.model).few_views
    return min(most, max(least, round(least * references / max(few_views, 1))))


def whole_length(trainer: Trainer) -> int:
    """Steps of a whole training, also where it goes on from a checkpoint, from which nerfstudio counts those that it is given."""
    return trainer.config.max_num_iterations + getattr(trainer, "_start_step", 0)


def squeeze(config: TrainerConfig, steps: int) -> None:
    """Stretch or squeeze, in place, what the schedule states in steps to another length; it is not squeezed again after that.

    Densification, spherical harmonics and learning rates then come at the same share of the training. The distance of two
    densifications (`refine_every`) stays, since it is a number of gradients to average over, and so does what is left open
    (None), which `EnhancerModelConfig.fit_to` decides.

    Raises:
        ValueError: if there are fewer than 3 steps, too few for a round in between.
    """
    if steps < 3:
        raise ValueError(f"a training with a round needs at least 3 steps, got {steps}.")
    settings = cast("EnhancerTrainerConfig", config)
    scale = steps / settings.schedule_iterations
    settings.schedule_iterations, settings.few_views_iterations = steps, None
    model: Any = config.pipeline.model
    for name in ("warmup_length", "stop_split_at", "stop_screen_size_at", "sh_degree_interval", "resolution_schedule"):
        setattr(model, name, max(1, round(getattr(model, name) * scale)))
    for group in config.optimizers.values():
        scheduler = group["scheduler"]
        if scheduler is not None:
            scheduler.max_steps = max(1, round(scheduler.max_steps * scale))
            scheduler.warmup_steps = round(scheduler.warmup_steps * scale)


def fit_schedule(config: TrainerConfig, steps: int) -> None:
    """Make, in place, a training so many steps long, its rounds at the same share of it too.

    Raises:
        ValueError: see `squeeze`.
    """
    squeeze(config, steps)
    cast("EnhancerModelConfig", config.pipeline.model).fit_to(steps)
    config.max_num_iterations = steps
