"""Nerfstudio's trainer with checkpoints that are written whole or not at all, and one line on what the device gets."""

import errno
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.rich_utils import CONSOLE

from nerfstudio_enhancer.rasterize.dispatch import check_cuda_kernels
from nerfstudio_enhancer.rounds import check_settings
from nerfstudio_enhancer.scene.sparse_views import SparseViewsDataParserConfig
from nerfstudio_enhancer.schedule import own_length, squeeze, whole_length

if TYPE_CHECKING:
    from nerfstudio_enhancer.model import EnhancerModelConfig

WORLD_FILE = "dataparser_transforms.json"
"""In which nerfstudio keeps, in a run's folder, how the capture's world became the run's."""
SAME_WORLD = 1e-3
"""Largest difference of a rotation's or a scaled position's entry at which two worlds are one."""


def read_references(config: TrainerConfig) -> DataparserOutputs | None:
    """The reference views that a training is about to read, without seed points; None with another dataparser than ours."""
    datamanager = config.pipeline.datamanager
    parser = getattr(datamanager, "dataparser", None)
    if not isinstance(parser, SparseViewsDataParserConfig):
        return None
    data = getattr(datamanager, "data", None) or parser.data
    return replace(parser, data=Path(data), seed_points="none").setup().get_dataparser_outputs(split="train")


def count_references(outputs: DataparserOutputs | None) -> int | None:
    """Number of the views of `read_references`; None where it does not know them."""
    return None if outputs is None else len(outputs.image_filenames)


def check_resumed_run(config: TrainerConfig, outputs: DataparserOutputs | None) -> None:
    """Refuse, before anything is computed, to go on from a folder without checkpoints or from splats of other references.

    Args:
        config: of the trainer.
        outputs: of `read_references`.

    Raises:
        FileNotFoundError: `load_dir` holds no checkpoint.
        ValueError: the world, which follows from the poses of the references, is not the one that the splats lie in.
    """
    folder = config.load_dir
    if folder is None:
        return
    if not any(folder.glob("step-*.ckpt")):
        below = folder / "nerfstudio_models"
        hint = f"; did you mean {below}?" if below.is_dir() else ": give the nerfstudio_models folder of a run."
        raise FileNotFoundError(f"`--load-dir` {folder} holds no checkpoint (step-*.ckpt){hint}")
    kept = folder.parent / WORLD_FILE
    if outputs is None or not kept.is_file():
        return
    before = json.loads(kept.read_text(encoding="utf-8"))
    there = torch.tensor([*before["transform"], [before["scale"], 0, 0, 0]])
    here = torch.cat([outputs.dataparser_transform, torch.tensor([[outputs.dataparser_scale, 0, 0, 0]])])
    if float((there - here).abs().max()) > SAME_WORLD:
        raise ValueError(
            f"The splats in {folder} were trained on other reference views (or on another capture) than this run asks for: the world "
            "that follows from their poses is another. Give the `sparse-views` options of the first run, or train anew."
        )


def named_start(config: TrainerConfig) -> int:
    """Step that a resumed training goes on from, by its checkpoint's name; 0 where there is none or its name does not say.

    Args:
        config: of the trainer, after `check_resumed_run`.
    """
    if config.load_dir is not None and config.load_step is not None:
        return config.load_step + 1
    path = config.load_checkpoint if config.load_dir is None else max(config.load_dir.glob("step-*.ckpt"))
    step = "" if path is None else path.stem.removeprefix("step-")
    return int(step) + 1 if step.isdecimal() else 0


def check_precision(config: TrainerConfig) -> None:
    """Refuse scaled gradients, which densification would take for large ones.

    Raises:
        ValueError: mixed precision or a gradient scaler is asked for.
    """
    for name in ("mixed_precision", "use_grad_scaler"):
        if getattr(config, name):
            option = name.replace("_", "-")
            raise ValueError(
                f"`--{option}` must be False, got True: splats are densified by the size of their gradients, which it scales. "
                "The prior chooses its own precision (`--pipeline.model.enhance.sampling.precision`)."
            )


@dataclass
class EnhancerTrainerConfig(TrainerConfig):
    """Settings of the trainer."""

    _target: type = field(default_factory=lambda: EnhancerTrainer)
    max_num_iterations: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  # a number once it is set up
    """Training steps; a resumed training counts them from its checkpoint, as nerfstudio does. None: by the number of reference
    views, see `few_views_iterations`, and a resumed training goes on to that end."""
    schedule_iterations: int = 30000
    """Steps for which densification, spherical harmonics and learning rates are stated, and the most that a training has by
    itself."""
    few_views_iterations: int | None = 3000
    """Steps of a training on up to `few-views` (12) reference views, which more steps learn by heart; with more of them the steps
    grow with their number up to `schedule-iterations`. What is stated in steps is squeezed with them. None: neither, whatever
    the number."""


class EnhancerTrainer(Trainer):
    """A disk that fills up during a save leaves the older checkpoint untouched."""

    config: EnhancerTrainerConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # as nerfstudio's trainers do

    def setup(self, test_mode="val") -> None:
        """Say in one line what fits device and references, then set up as nerfstudio does."""
        check_precision(self.config)
        outputs = read_references(self.config)
        check_resumed_run(self.config, outputs)
        count = count_references(outputs)
        if count is not None:  # before minutes of search for seed points, not after
            check_settings(cast("EnhancerModelConfig", self.config.pipeline.model).enhance, count)
        self._own_length = own_length(self.config, count)
        self._refuse_finished(named_start(self.config))
        if self._own_length != self.config.schedule_iterations:
            squeeze(self.config, self._own_length)
        given, size = self.config.max_num_iterations, getattr(self.config.pipeline.datamanager, "max_image_size", None)
        CONSOLE.log(
            f"Training on {self.device}: {self._own_length if given is None else given} steps, "
            + ("" if count is None else f"{count} reference views, ")
            + (f"images at most {size} px on the long side." if size else "images at full size.")
        )
        if torch.device(self.device).type == "cuda":
            check_cuda_kernels()
        super().setup(test_mode)

    def _refuse_finished(self, start: int) -> None:
        if self.config.max_num_iterations is None and start >= self._own_length:
            raise ValueError(
                f"The training that `--load-dir` or `--load-checkpoint` names is at its end, {self._own_length} steps. "
                "Give `--max-num-iterations` with the number of steps to train on."
            )

    def _load_checkpoint(self) -> None:
        """As nerfstudio does; then it is known how many steps are left, which the callbacks ask for.

        Raises:
            ValueError: the checkpoint is that of a training at its end, and no number of further steps is given.
        """
        super()._load_checkpoint()
        start = self._start_step
        self._refuse_finished(start)
        if self.config.max_num_iterations is None:
            self.config.max_num_iterations = self._own_length - start
        if start > 0:
            CONSOLE.log(
                f"Resumed at step {start}; the training ends with step {whole_length(self) - 1} "
                "(`--max-num-iterations` counts from the checkpoint)."
            )

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Write `step-NNNNNNNNN.ckpt` beside its final place and move it there; only then are older ones removed.

        Raises:
            OSError: at the end of training, when the last checkpoint cannot be written. During training a failed save is
                reported and training goes on with the older checkpoint in place.
        """
        final: Path = self.checkpoint_dir
        partial = self.base_dir / ".saving"
        name = f"step-{step:09d}.ckpt"
        self.checkpoint_dir = partial
        try:
            super().save_checkpoint(step)
            final.mkdir(parents=True, exist_ok=True)
            (partial / name).replace(final / name)
        except (OSError, RuntimeError) as error:
            message = (
                f"The checkpoint of step {step} could not be written to {final} ({error}). "
                "Free some space or check the permissions; the older checkpoint is untouched."
            )
            if self.training_state == "completed":
                raise OSError(getattr(error, "errno", None) or errno.EIO, message) from error
            CONSOLE.log(f"[bold red]{message} Training goes on.")
            return
        finally:
            self.checkpoint_dir = final
            (partial / name).unlink(missing_ok=True)
            if partial.is_dir() and not any(partial.iterdir()):
                partial.rmdir()
        if self.config.save_only_latest_checkpoint:
            for older in final.glob("*.ckpt"):
                if older.name != name:
                    older.unlink()
