"""Dataparser `sparse-views`: a few reference photographs of a capture to train on, the rest kept away from training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nerfstudio.cameras import camera_utils
from nerfstudio.cameras.cameras import CAMERA_MODEL_TO_TYPE, Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from nerfstudio_enhancer.initial_splats import SeedPointsConfig, SeedSource
from nerfstudio_enhancer.scene.capture import Capture, Frame, read_capture
from nerfstudio_enhancer.scene.photograph_folder import with_photographs_from
from nerfstudio_enhancer.scene.photographs import checked_photographs, read_rgb_and_usable
from nerfstudio_enhancer.scene.splits import SplitRule, ViewSplit, split_views

PHOTOGRAPH_NAMES = "photograph_names"
"""Metadata: the names by which the capture knows the photographs of a split, in its order, wherever they are read from."""
STEREO_DEPTH = "stereo_depth"
"""Key of the train split's metadata under which the references' stereo depth lies, a tuple that may be empty."""

NUM_SEEN_POINTS = "num_seen_points"
"""Key under which stands how many of the first seed points are placed where photographs agree."""

KEPT_PHOTOGRAPHS = 32
"""Up to so many references stay in memory while seed points are searched; more are read again when they are needed."""

HARDLY_DISTORTED = 1e-12
"""A coefficient that moves no pixel."""

RIGID_TOLERANCE = 1e-3
"""Largest deviation of R^T R from the identity: poses are written with at least four digits."""


@dataclass
class SparseViewsDataParserConfig(DataParserConfig):
    """Reference, test and unused views of a nerfstudio-data or COLMAP folder."""

    _target: type = field(default_factory=lambda: SparseViewsDataParser)
    """target class to instantiate"""
    data: Path = Path()
    """Folder of the capture (transforms.json, or a COLMAP model), or a transforms.json file."""
    num_views: int | None = None
    """Number of reference photographs to train on, spread evenly over the capture order. Without it every training
    photograph is a reference view and the capture's own point cloud is used, as in plain splatfacto."""
    reference_views: tuple[str, ...] | None = None
    """Names of the reference photographs, instead of `num_views`."""
    test_every: int = 8
    """Every how many of the other photographs one is a test view; the others stay unused. With a number or names of
    references 1 makes all the others test views, whatever the capture lists."""
    split_rule: SplitRule = "references-first"
    """references-first: references are chosen, then test views among the rest (3DGS-Enhancer). test-first: every
    `test_every`-th photograph is a test view, references are chosen among the others (Mip-NeRF 360, ReconFusion)."""
    split_file: Path | None = None
    """JSON file that names references and test views, such as ReconFusion's published `train_test_split_9.json`."""
    image_folder: str | None = None
    """Folder of photographs inside the capture, such as `images_4`; by default the one that the capture names, or its
    largest downscaled copies where those photographs are missing (DL3DV) or, as in nerfstudio, longer than 1,600 pixels."""
    seed_points: SeedSource = "auto"
    """Where the first splats lie. sfm: points of the capture's COLMAP model that reference views observe, placed anew
    from these observations. triangulated: SIFT points matched between the reference photographs. stereo: these, and
    dense points from multi-view stereo between the references. random: uniformly in the references' joint region,
    without looking at a photograph (the paper). auto: the best of these to be had. none: splatfacto's random cube."""
    initial: SeedPointsConfig = field(default_factory=SeedPointsConfig)
    """How seed points are found and how many random ones are added."""
    seed: int = 0
    """Seed of the random points."""
    orientation_method: Literal["pca", "up", "vertical", "none"] = "up"
    """How the world is turned; decided by the reference poses alone."""
    center_method: Literal["poses", "focus", "none"] = "poses"
    """What becomes the world's origin; decided by the reference poses alone."""
    auto_scale_poses: bool = True
    """Whether to scale the world so that the reference cameras lie within +/- 1."""
    scale_factor: float = 1.0
    """Further scale of the world; the cameras move apart when it grows."""
    scene_scale: float = 1.0
    """Half side of the scene box, in units of the scaled world."""


@dataclass(frozen=True)
class WorldNormalisation:
    """Similarity from the capture's world to the model's, decided by the reference poses alone."""

    transform: Tensor
    """[3, 4] rotation and translation, applied first."""
    scale: float
    """Factor of all positions, applied after it."""

    def apply_to_poses(self, camera_to_world: Tensor) -> Tensor:
        """OpenGL camera-to-world [n, 4, 4] of the capture to [n, 3, 4] of the model."""
        moved = self.transform @ camera_to_world
        return torch.cat([moved[..., :3], moved[..., 3:] * self.scale], dim=-1)

    def apply_to_points(self, points: Tensor) -> Tensor:
        """Positions [n, 3] of the capture to those of the model."""
        return (points @ self.transform[:, :3].T + self.transform[:, 3]) * self.scale


class SparseViewsDataParser(DataParser):
    """Reads a capture and gives out one split of it: train (references), val or test, unused.

    What the train split holds depends on the reference photographs and their poses alone, save when every training
    photograph is a reference and the capture's own point cloud is used.
    """

    config: SparseViewsDataParserConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    downscale_factor: int | None = None
    """Set by nerfstudio to 1 where a finished model is only looked at; photographs are not opened then."""

    def _generate_dataparser_outputs(self, split: str = "train", **kwargs: Any) -> DataparserOutputs:
        if split not in ("train", "val", "test", "unused"):
            raise ValueError(f"Unknown split {split!r}; there are train, val, test and unused.")
        capture = with_photographs_from(read_capture(self.config.data), self.config.image_folder)
        camera_type = _camera_type(capture)
        views = split_views(
            capture,
            self.config.num_views,
            self.config.reference_views,
            self.config.test_every,
            self.config.split_rule,
            self.config.split_file,
        )
        references = [capture.frames[index] for index in views.reference]
        check_poses(references)
        normalisation = self._normalisation(capture, references)
        frames = self._frames_of(split, capture, views)
        check_distortion(frames, camera_type)
        cameras = _cameras(frames, normalisation, camera_type, capture)
        masks = _mask_filenames(frames)
        metadata: dict[str, Any] = {PHOTOGRAPH_NAMES: [frame.name for frame in frames]}
        if split == "train" and not self._only_looks and self.config.seed_points != "none":
            metadata.update(self._seed_points(capture, frames, cameras, normalisation))
        return DataparserOutputs(
            image_filenames=[frame.image for frame in frames],
            cameras=cameras,
            scene_box=self._scene_box(),
            mask_filenames=masks,
            metadata=metadata,
            dataparser_scale=normalisation.scale * capture.applied_scale,
            dataparser_transform=_from_original_world(normalisation.transform, capture),
        )

    @property
    def _only_looks(self) -> bool:
        return self.downscale_factor is not None

    def _frames_of(self, split: str, capture: Capture, views: ViewSplit) -> list[Frame]:
        indices = {"train": views.reference, "unused": views.unused}.get(split, views.test)
        if not indices and split in ("val", "test"):
            CONSOLE.log(
                "[yellow]No photograph is left to test on: the reference views themselves are evaluated, which measures "
                "memory, not novel views."
            )
            indices = views.reference
        frames = [capture.frames[index] for index in indices]
        check_poses(frames)
        if self._only_looks:
            return frames
        as_named = self.config.image_folder is not None
        return checked_photographs(frames, capture.folder, needs_pixels=split == "train", as_named=as_named)

    def _normalisation(self, capture: Capture, references: list[Frame]) -> WorldNormalisation:
        poses = _poses(references)
        oriented, transform = camera_utils.auto_orient_and_center_poses(
            poses,
            method=capture.orientation_override or self.config.orientation_method,  # type: ignore[arg-type]
            center_method=self.config.center_method,
        )
        scale = self.config.scale_factor
        if self.config.auto_scale_poses:
            scale /= _extent(oriented, references)
        return WorldNormalisation(transform, float(scale))

    def _scene_box(self) -> SceneBox:
        half = self.config.scene_scale
        return SceneBox(aabb=torch.tensor([[-half, -half, -half], [half, half, half]], dtype=torch.float32))

    def _seed_points(
        self, capture: Capture, frames: list[Frame], cameras: Cameras, normalisation: WorldNormalisation
    ) -> dict[str, Any]:
        """Metadata from which splatfacto makes its first splats, and the references' stereo depth."""
        from nerfstudio_enhancer.initial_splats import ReferenceView, seed_points
        from nerfstudio_enhancer.scene.point_clouds import read_capture_points, reference_tracks

        sparse = any(
            choice is not None
            for choice in (self.config.num_views, self.config.reference_views, self.config.split_file)
        )
        if not sparse and self.config.seed_points in ("auto", "sfm"):
            points = read_capture_points(capture)
            if points is not None:
                xyz = normalisation.apply_to_points(torch.from_numpy(points[0].astype(np.float32)))
                CONSOLE.log(f"Seed points: all {len(xyz):,} points of the capture's own point cloud.")
                return {"points3D_xyz": xyz, "points3D_rgb": torch.from_numpy(points[1])}
        views = [
            ReferenceView.from_opengl(
                cameras.camera_to_worlds[index],
                frame,
                fisheye=int(cameras.camera_type[index]) == CameraType.FISHEYE.value,
                read_pixels=lambda frame=frame: read_rgb_and_usable(frame),
                keeps_pixels=len(frames) <= KEPT_PHOTOGRAPHS,
            )
            for index, frame in enumerate(frames)
        ]
        points = seed_points(
            views,
            source=self.config.seed_points,
            config=self.config.initial,
            generator=torch.Generator().manual_seed(self.config.seed),
            tracks=reference_tracks(capture, frames) if self.config.seed_points in ("auto", "sfm") else None,
        )
        return {
            "points3D_xyz": points.xyz,
            "points3D_rgb": points.rgb,
            NUM_SEEN_POINTS: points.num_seen,
            STEREO_DEPTH: points.depths,
        }


def check_poses(frames: list[Frame]) -> None:
    """Refuse poses that are no finite rotation and translation.

    Raises:
        ValueError: names the photograph and what is wrong with its pose.
    """
    for frame in frames:
        pose = frame.camera_to_world
        if not np.isfinite(pose).all():
            raise ValueError(
                f"The pose of {frame.name} has entries that are not finite numbers; remove this photograph from the "
                "capture, or pose it again."
            )
        rotation = pose[:3, :3]
        deviation = float(np.abs(rotation.T @ rotation - np.eye(3)).max())
        if deviation > RIGID_TOLERANCE:
            raise ValueError(
                f"The pose of {frame.name} is not rigid: its rotation R has |R^T R - 1| up to {deviation:.3g}, at most "
                f"{RIGID_TOLERANCE:g} is allowed. A scale or shear must not be part of a camera's pose."
            )
        if np.linalg.det(rotation) < 0:
            raise ValueError(
                f"The pose of {frame.name} mirrors the world (its rotation has determinant -1); flip one axis of the "
                "world or of the camera to get a rotation."
            )
        if not np.isfinite([frame.fx, frame.fy, frame.cx, frame.cy]).all() or min(frame.fx, frame.fy) <= 0:
            raise ValueError(f"The focal lengths of {frame.name} must be positive, got {frame.fx}, {frame.fy} pixels.")
        if min(frame.width, frame.height) < 1:
            raise ValueError(f"The size of {frame.name} must be positive, got {frame.width}x{frame.height} (w x h).")


def check_distortion(frames: list[Frame], camera_type: CameraType) -> None:
    """Refuse distortion that nerfstudio would fail on when it undistorts the photographs.

    Raises:
        ValueError: a perspective camera with k4.
    """
    if camera_type == CameraType.PERSPECTIVE and any(frame.distortion[3] != 0 for frame in frames):
        raise ValueError(
            "The distortion coefficient k4 must be 0 for perspective cameras (nerfstudio cannot undistort it); "
            "undistort the photographs first, for example by `colmap image_undistorter`."
        )


def _poses(frames: list[Frame]) -> Tensor:
    return torch.from_numpy(np.stack([frame.camera_to_world for frame in frames]).astype(np.float32))


def _extent(oriented: Tensor, references: list[Frame]) -> float:
    """Largest coordinate of a reference camera; refuses cameras that all stand at one point."""
    centres = np.stack([frame.camera_to_world[:3, 3] for frame in references])
    spread = float(np.abs(centres - centres.mean(axis=0)).max())
    if spread <= 1e-6 * max(1.0, float(np.abs(centres).max())):
        raise ValueError(
            f"All {len(references)} reference cameras stand at one point, so that no depth can be learnt from them; "
            "choose reference views from different places, for example by a larger `num_views`; if all poses of the capture are "
            "equal, pose the photographs again."
        )
    return float(oriented[:, :3, 3].abs().max())


def _camera_type(capture: Capture) -> CameraType:
    camera_type = CAMERA_MODEL_TO_TYPE.get(capture.camera_model)
    if camera_type not in (CameraType.PERSPECTIVE, CameraType.FISHEYE):
        raise ValueError(
            f"The camera model {capture.camera_model} cannot be undistorted for splats; supported are "
            "SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL, RADIAL, OPENCV and OPENCV_FISHEYE."
        )
    return camera_type


def _cameras(
    frames: list[Frame], normalisation: WorldNormalisation, camera_type: CameraType, capture: Capture
) -> Cameras:
    metadata = {}
    if camera_type == CameraType.FISHEYE and capture.fisheye_crop_radius is not None:
        metadata["fisheye_crop_radius"] = capture.fisheye_crop_radius
    if not frames:
        raise ValueError("This split holds no photograph: every posed photograph is a reference or test view.")

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    return Cameras(
        camera_to_worlds=normalisation.apply_to_poses(_poses(frames)),
        fx=column([frame.fx for frame in frames]),
        fy=column([frame.fy for frame in frames]),
        cx=column([frame.cx for frame in frames]),
        cy=column([frame.cy for frame in frames]),
        width=torch.tensor([frame.width for frame in frames], dtype=torch.int32),
        height=torch.tensor([frame.height for frame in frames], dtype=torch.int32),
        distortion_params=_distortions(frames, camera_type),
        camera_type=camera_type,
        metadata=metadata,
    )


def _distortions(frames: list[Frame], camera_type: CameraType) -> Tensor:
    """Coefficients [n, 6], with which nerfstudio undistorts the photographs; where all are 0 it leaves them as they are.

    That is right for perspective cameras alone: a fisheye camera bends lines by itself, so that its coefficients are not 0
    but hardly more.
    """
    distortion = torch.tensor([frame.distortion for frame in frames], dtype=torch.float32)
    if camera_type == CameraType.FISHEYE:
        distortion[(distortion == 0).all(dim=1), 0] = HARDLY_DISTORTED
    return distortion


def _mask_filenames(frames: list[Frame]) -> list[Path] | None:
    masks = [frame.mask for frame in frames if frame.mask is not None]
    if masks and len(masks) != len(frames):
        without = next(frame.name for frame in frames if frame.mask is None)
        raise ValueError(
            f"Either every photograph has a mask or none: {len(frames) - len(masks)} of {len(frames)} have none, {without} the first. "
            "Give them one that is white everywhere, or take `mask_path` from all."
        )
    return masks or None


def _from_original_world(transform: Tensor, capture: Capture) -> Tensor:
    """Transform from the world before `applied_transform` to the model's, as nerfstudio saves it with a model."""
    if capture.applied_transform is None:
        return transform
    applied = np.vstack([capture.applied_transform, [0.0, 0.0, 0.0, 1.0]])
    return transform @ torch.from_numpy(applied.astype(np.float32))
