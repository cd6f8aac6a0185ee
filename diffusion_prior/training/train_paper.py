"""Train the latent diffusion model at full size by the paper's recipe: Stable Video Diffusion, 25 frames of 512 x 512.

The same training as `train_ldm` from other defaults, each of which a flag overrides.
"""

from __future__ import annotations

import logging
from pathlib import Path

import tyro

from diffusion_prior.data.clips import ClipConfig, gaps_of
from diffusion_prior.data.pairs import find_runs, read_header
from diffusion_prior.published import LAYOUT_B_FRAMES, LAYOUT_B_SIZE, SVD_REPOSITORY
from diffusion_prior.training.config import ScaleConfig
from diffusion_prior.training.setup import log_to_console
from diffusion_prior.training.train_ldm import LdmConfig, run

logger = logging.getLogger(__name__)


def paper_recipe() -> LdmConfig:
    """Settings of 3DGS-Enhancer's paper and, where that is silent, of its authors' code.

    From the paper: frames, picture size, learning rate, warm-up, steps and dropout of the condition. From the code: noise
    levels, weighted L1, the parts that train. Neither names a variation of the clips beside the crop, so that the others
    are off. Ours, for want of theirs: one clip a batch, the cosine after the warm-up, the averaged weights.

    Returns:
        Settings whose `pairs` and `output` are still to be given.
    """
    return LdmConfig(
        pairs=tyro.MISSING,
        output=tyro.MISSING,
        prior=Path(SVD_REPOSITORY),
        steps=80_000,
        learning_rate=1e-4,
        warmup_steps=500,
        # a checkpoint holds gigabytes, and a validation samples six clips: the steps between are to take longer than both
        save_every=1000,
        validate_every=2000,
        loss="authors",
        regression_share=0.0,
        highest_noise_share=0.0,
        log_sigma_mean=0.7,
        log_sigma_std=1.6,
        condition_dropout=0.1,
        clips=ClipConfig(
            num_frames=LAYOUT_B_FRAMES,
            batch_size=1,
            crop_px=LAYOUT_B_SIZE[0],
            flip=False,
            permute_channels=False,
            swap_references=False,
            good_render_probability=0.0,
        ),
        scale=ScaleConfig(trainable="temporal", gradient_checkpointing=True),
    )


def main(arguments: list[str] | None = None) -> None:
    """Read the flags, over the recipe, and train."""
    config = tyro.cli(LdmConfig, default=paper_recipe(), args=arguments, description=__doc__)
    for line in shortcomings(config.pairs, config.clips):
        logger.warning(line)
    run(config)


def shortcomings(pairs: Path, clips: ClipConfig) -> list[str]:
    """What of the paired data is too small or too short for such clips; the training takes it nevertheless.

    Raises:
        FileNotFoundError: if there is no paired data.
    """
    headers = [read_header(folder) for folder in find_runs(pairs)]
    gaps = [gap for header in headers for gap in gaps_of(header)]
    small = sum(min(header.height, header.width) < (clips.crop_px or 0) for header in headers)
    short = sum(len(gap.frames) < clips.num_frames - 2 for gap in gaps)
    lines = []
    if small:
        lines.append(
            f"{small} of {len(headers)} runs in {pairs} have a side below {clips.crop_px} pixels: their clips are smaller than "
            "asked for. `ns-enhancer make-pairs --size` is the longer side, 910 for 512 pixels of a 16:9 picture."
        )
    if short:
        lines.append(
            f"{short} of {len(gaps)} gaps between neighbouring references in {pairs} have fewer than {clips.num_frames - 2} frames: "
            "frames are repeated. `ns-enhancer make-pairs --max-frames` stores more of a capture, `--paths` smooth paths."
        )
    return lines


if __name__ == "__main__":
    log_to_console()
    main()
