"""Nerfstudio's trainer with checkpoints that are written whole or not at all, and one line on what the device gets."""

import errno
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.rich_utils import CONSOLE

from nerfstudio_enhancer.rasterize.dispatch import check_cuda_kernels
from nerfstudio_enhancer.scene.sparse_views import SparseViewsDataParserConfig

WORLD_FILE = "dataparser_transforms.json"
"""In which nerfstudio keeps, in a run's folder, how the capture's world became the run's."""
SAME_WORLD = 1e-3
"""Largest difference of a rotation's or a scaled position's entry at which two worlds are one."""


def check_resumed_run(config: TrainerConfig) -> None:
    """Refuse, before anything is computed, to go on from a folder without checkpoints or from splats of other references.

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
    datamanager = config.pipeline.datamanager
    parser = getattr(datamanager, "dataparser", None)
    if not kept.is_file() or not isinstance(parser, SparseViewsDataParserConfig):
        return
    data = getattr(datamanager, "data", None) or parser.data
    outputs = replace(parser, data=Path(data), seed_points="none").setup().get_dataparser_outputs(split="train")
    before = json.loads(kept.read_text(encoding="utf-8"))
    there = torch.tensor([*before["transform"], [before["scale"], 0, 0, 0]])
    here = torch.cat([outputs.dataparser_transform, torch.tensor([[outputs.dataparser_scale, 0, 0, 0]])])
    if float((there - here).abs().max()) > SAME_WORLD:
        raise ValueError(
            f"The splats in {folder} were trained on other reference views (or on another capture) than this run asks for: the world "
            "that follows from their poses is another. Give the `sparse-views` options of the first run, or train anew."
        )


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


class EnhancerTrainer(Trainer):
    """A disk that fills up during a save leaves the older checkpoint untouched."""

    def setup(self, test_mode="val") -> None:
        """Say in one line what fits the device, then set up as nerfstudio does."""
        size = getattr(self.config.pipeline.datamanager, "max_image_size", None)
        CONSOLE.log(
            f"Training on {self.device}: {self.config.max_num_iterations} steps, "
            + (f"images at most {size} px on the long side." if size else "images at full size.")
        )
        check_precision(self.config)
        check_resumed_run(self.config)
        if torch.device(self.device).type == "cuda":
            check_cuda_kernels()
        super().setup(test_mode)
        start = self._start_step
        if start > 0:
            CONSOLE.log(
                f"Resumed at step {start}: `--max-num-iterations` counts from there, so that the training ends with step "
                f"{start + self.config.max_num_iterations - 1}."
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
