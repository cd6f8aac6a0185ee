"""Nerfstudio's trainer with checkpoints that are written whole or not at all, and one line on what the device gets."""

import errno
from dataclasses import dataclass, field
from pathlib import Path

from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.rich_utils import CONSOLE


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
        super().setup(test_mode)

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
