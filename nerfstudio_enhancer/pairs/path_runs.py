"""Paired data along smooth paths, whose target are splats trained on all photographs (3DGS-Enhancer, section 4.1)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.trainer import Trainer
from torch import Tensor

from diffusion_prior.data.pairs import PairRun
from diffusion_prior.files import whole_file
from nerfstudio_enhancer.datamanager import EnhancerDataManager
from nerfstudio_enhancer.depth_training.whole_splats import WholeScene, train_on_all
from nerfstudio_enhancer.model import EnhancerModel
from nerfstudio_enhancer.pairs.make_pairs import SplatTraining
from nerfstudio_enhancer.pairs.sparse_splats import LeftOutViews, intrinsics_at, run_of, stored_colours
from nerfstudio_enhancer.random_state import step_generator
from nerfstudio_enhancer.rendering import RenderedClip, render_clip, trajectory_cameras
from nerfstudio_enhancer.trajectory import TrajectoryConfig, plan_trajectories

WHOLE_FOLDER = "whole_splats"
"""Folder of the splats trained on all photographs, below that of the pairs."""
LOOP_FRAMES = 3
"""Frames of the small loop around each reference."""


@dataclass(frozen=True)
class World:
    """Where nerfstudio puts a scene: x -> scale * (transform @ x)."""

    transform: Float[Tensor, "3 4"]
    scale: float

    @classmethod
    def of(cls, trainer: Trainer) -> World:
        """The world of a training, which depends on its reference views."""
        outputs = cast(EnhancerDataManager, trainer.pipeline.datamanager).train_dataparser_outputs
        return cls(outputs.dataparser_transform.double(), float(outputs.dataparser_scale))

    def poses_from(self, other: World, camera_to_world: Float[Tensor, "t 3 4"]) -> Float[Tensor, "t 3 4"]:
        """Poses of another world of the same scene in this one."""
        rotation, shift = self.transform.split([3, 1], dim=1)
        from_rotation, from_shift = other.transform.split([3, 1], dim=1)
        turn, place = camera_to_world.double().split([3, 1], dim=2)
        original = torch.linalg.solve(from_rotation, place / other.scale - from_shift)
        turned = rotation @ torch.linalg.solve(from_rotation, turn)
        return torch.cat([turned, self.scale * (rotation @ original + shift)], dim=2).to(camera_to_world)


@dataclass(frozen=True)
class WholeSplats:
    """Splats trained on all photographs of a scene, in a world of their own."""

    model: EnhancerModel
    world: World


def ensure_whole_splats(training: SplatTraining) -> Path:
    """The file of a scene's splats of all photographs; the first to ask trains them. It seeds the global generators."""
    path = training.output / WHOLE_FOLDER / f"{training.scene}.ckpt"
    if not path.is_file():
        scene = WholeScene(training.data, path, training.whole_views, training.whole_steps, training.size, seed=0)
        store_whole_splats(train_on_all(scene), path)
    return path


def read_whole_splats(path: Path, trainer: Trainer) -> WholeSplats:
    """Read splats of all photographs.

    Args:
        path: of `ensure_whole_splats`.
        trainer: of the sparse splats, whose model's settings render the others too.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    sparse = cast(EnhancerModel, trainer.pipeline.model)
    config = dataclasses.replace(sparse.config, fill_background="reference-mean")
    with torch.random.fork_rng():  # whoever trains the sparse splats on draws what he would have drawn without this
        model = cast(
            EnhancerModel,
            config.setup(
                scene_box=sparse.scene_box,
                num_train_data=sparse.num_train_data,
                metadata={},
                device=sparse.device,
                seed_points=(torch.randn(4, 3), torch.zeros(4, 3)),
            ),
        )
    model.load_state_dict(state["model"])
    model.step = state["steps"]
    return WholeSplats(model.to(sparse.device), World(state["transform"], state["scale"]))


def store_whole_splats(trainer: Trainer, path: Path) -> None:
    """Write what `read_whole_splats` reads, whole or not at all."""
    world = World.of(trainer)
    state = {
        "model": trainer.pipeline.model.state_dict(),
        "steps": trainer.config.max_num_iterations,
        "transform": world.transform,
        "scale": world.scale,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        torch.save(state, partial)


class PathRuns:
    """Makes runs along the paths of one training of sparse splats."""

    def __init__(self, training: SplatTraining, trainer: Trainer, views: LeftOutViews, whole: Path) -> None:
        self.training, self.views = training, views
        self.sparse = cast(EnhancerModel, trainer.pipeline.model)
        self.whole = read_whole_splats(whole, trainer)
        self.world = World.of(trainer)
        config = TrajectoryConfig(
            max_total_frames=training.max_frames, perturbations=1, perturbation_frames=LOOP_FRAMES
        )
        references = views.reference_cameras
        generator = step_generator(training.seed, 0, "path pairs")
        paths = plan_trajectories(references.camera_to_worlds.cpu(), config, generator)
        ends = [(path.first, path.last) for path in paths]
        self.before, self.after = (
            torch.tensor([end[side] for end, path in zip(ends, paths) for _ in path.camera_to_world[1:-1]])
            for side in (0, 1)
        )
        self.cameras = [
            camera
            for path in paths
            for camera in _single(
                trajectory_cameras(
                    path.camera_to_world,
                    references[path.first : path.first + 1],
                    references[path.last : path.last + 1],
                )[1:-1]
            )
        ]
        self._target: Tensor | None = None

    def paths(self, steps: int) -> PairRun:
        """What the sparse splats show now, after so many steps."""
        return self._run(lambda camera: render_clip(self.sparse, camera.to(self.sparse.device)), steps, "paths")

    def degraded(self, steps: int) -> PairRun:
        """What the splats of all photographs show when they are damaged."""
        generator = step_generator(self.training.seed, self.training.num_views, "degraded")
        model = copy.copy(self.whole.model)
        model._modules = {**self.whole.model._modules}
        centres = self._in_whole(self.views.reference_cameras).camera_to_worlds[:, :, 3]
        splats = {name: value.detach() for name, value in self.whole.model.gauss_params.items()}
        damaged = degrade(splats, centres.to(self.sparse.device), generator)
        model.gauss_params = torch.nn.ParameterDict({name: torch.nn.Parameter(v) for name, v in damaged.items()})
        # Depth in the units of the cameras that references are warped by.
        unit = self.world.scale / self.whole.world.scale

        def show(camera: Cameras) -> RenderedClip:
            clip = render_clip(model, self._in_whole(camera))
            return dataclasses.replace(clip, depth=clip.depth * unit)

        return self._run(show, steps, "degraded")

    def _run(self, show: Callable[[Cameras], RenderedClip], steps: int, kind: str) -> PairRun:
        size = tuple(self.views.references.shape[-2:])
        if self._target is None:
            shown = (render_clip(self.whole.model, self._in_whole(camera)) for camera in self.cameras)
            self._target = torch.cat([stored_colours(clip, size) for clip in shown])
        return run_of(
            self.training,
            self.views,
            show,
            self.cameras,
            (self.before, self.after),
            steps,
            target=self._target,
            intrinsics=torch.stack([intrinsics_at(camera, size) for camera in self.cameras]),
            settings={"kind": kind, "whole_steps": self.training.whole_steps},
        )

    def _in_whole(self, cameras: Cameras) -> Cameras:
        moved = copy.copy(cameras)
        moved.camera_to_worlds = self.whole.world.poses_from(self.world, cameras.camera_to_worlds)
        return moved.to(self.sparse.device)


def _single(cameras: Cameras) -> list[Cameras]:
    return [cameras[i : i + 1] for i in range(cameras.shape[0])]


@dataclass(frozen=True)
class Damage:
    """How strongly splats are damaged."""

    dropped: float
    """Share of the splats left out, wherever they are."""
    holes: int
    """Places around which nine in ten splats are left out."""
    hole_share: float
    """Share of all splats that lie around one such place."""
    jitter: float
    """Standard deviation of the shift of a splat, in its own sizes."""
    inflation: float
    """Largest factor by which splats grow; half of them do."""
    floaters: float
    """Share of the splats copied to somewhere between them and a camera."""

    @classmethod
    def drawn(cls, generator: torch.Generator) -> Damage:
        """Anything from hardly to badly damaged."""
        dropped, hole_share, jitter, inflation, floaters = torch.rand(5, generator=generator).tolist()
        return cls(
            dropped=0.5 * dropped**2,
            holes=int(torch.randint(6, (), generator=generator)),
            hole_share=0.01 + 0.05 * hole_share,
            jitter=0.8 * jitter**2,
            inflation=1 + 1.5 * inflation**2,
            floaters=0.01 * floaters**2,
        )


def degrade(
    splats: dict[str, Tensor], centres: Float[Tensor, "k 3"], generator: torch.Generator, damage: Damage | None = None
) -> dict[str, Tensor]:
    """Damage splats as few views do: drop, jitter and inflate them, and put floaters before the cameras.

    Args:
        splats: parameters under splatfacto's names, first axis the splats; scales are logarithms. Left as they are.
        centres: of the cameras before which floaters hang.
        generator: draws everything.
        damage: how strongly; drawn by default.

    Returns:
        Parameters of the damaged splats, at least one.
    """
    damage = damage or Damage.drawn(generator)
    device = splats["means"].device
    left = _kept(splats["means"], damage, generator)
    kept = {name: value[left].clone() for name, value in splats.items()}
    count = len(kept["means"])
    size = kept["scales"].exp().mean(-1, keepdim=True)
    kept["means"] += damage.jitter * size * torch.randn(count, 3, generator=generator).to(device)
    growth = 1 + (damage.inflation - 1) * torch.rand(count, 1, generator=generator)
    grows = torch.rand(count, 1, generator=generator) < 0.5
    kept["scales"] += torch.where(grows, growth, torch.ones_like(growth)).log().to(device)
    floating = torch.randint(count, (round(damage.floaters * count),), generator=generator).to(device)
    copies = {name: value[floating].clone() for name, value in kept.items()}
    before = centres[torch.randint(len(centres), (len(floating),), generator=generator).to(device)]
    nearness = (0.15 + 0.5 * torch.rand(len(floating), 1, generator=generator)).to(device)
    copies["means"] = before + nearness * (copies["means"] - before)
    copies["scales"] += nearness.log()  # as large in the picture as they were
    return {name: torch.cat([value, copies[name]]) for name, value in kept.items()}


def _kept(means: Float[Tensor, "n 3"], damage: Damage, generator: torch.Generator) -> Bool[Tensor, " n"]:
    count = len(means)
    kept = torch.rand(count, generator=generator) >= damage.dropped
    for _ in range(damage.holes):
        middle = means[int(torch.randint(count, (), generator=generator))]
        nearest = (means - middle).norm(dim=1).topk(max(1, round(damage.hole_share * count)), largest=False).indices
        lost = torch.rand(len(nearest), generator=generator) < 0.9
        kept[nearest.cpu()[lost]] = False
    if not kept.any():
        kept[int(torch.randint(count, (), generator=generator))] = True
    return kept.to(means.device)
