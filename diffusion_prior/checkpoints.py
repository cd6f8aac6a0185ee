"""Priors on disk: folders in diffusers' layout, safetensors only.

    model_index.json  prior_config.json  vae/  unet/  image_encoder/  std/  [coarse/]  scheduler/  feature_extractor/

A folder without `prior_config.json` is taken for a Stable Video Diffusion pipeline, or for one of 3DGS-Enhancer's authors
(layouts A and B of the UNet, told apart by their tensors). No folder needs `std/`: without it the STD is the untrained one, which
equals the stock decoder. A folder that holds a UNet alone (a training's `checkpoint-N/`, or its `unet/`) takes the other parts from
Stable Video Diffusion, or from the prior named behind an `@`: `runs/checkpoint-80000@/models/svd-xt`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusion_prior.coarse import CoarseRepair
from diffusion_prior.conditioning import CLIP_MEAN, CLIP_STD
from diffusion_prior.files import save_file
from diffusion_prior.prior import PriorConfig, VideoPrior, fast_dtype
from diffusion_prior.published import LAYOUT_A_FRAMES, LAYOUT_A_SIZE, LAYOUT_B_SIZE, SVD_REPOSITORY
from diffusion_prior.std import SpatialTemporalDecoder
from diffusion_prior.unet import SpatioTemporalUNet

BUNDLED = Path(__file__).parent / "bundled"
"""The compact prior that comes with the package."""
CONFIG_FILE = "prior_config.json"
INDEX_FILE = "model_index.json"
DIFFUSERS_STEM = "diffusion_pytorch_model"
DIFFUSERS_WEIGHTS = f"{DIFFUSERS_STEM}.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
POSE_TENSOR = "pose_embedding.linear_1.weight"
"""Only the pose-conditioned layout (A) of the UNet has it."""
BASE_SEPARATOR = "@"
"""Between the folder of a UNet and the prior that its other parts come from."""
SVD_HEADS = (5, 10, 20, 20)
SVD_HEADS_BEFORE_0_27 = (5, 10, 10, 20)
"""Attention heads that diffusers gives a UNet whose config.json names none, by the release that wrote the file."""
POSE_CONDITIONS = 22
"""Numbers per frame of the pose-conditioned layout, see `conditioning.pose_conditions`."""

Module = TypeVar("Module", bound=nn.Module)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PriorFolders:
    """Where the parts of a prior lie."""

    folder: Path
    """Of all parts but the UNet."""
    unet: Path

    def part(self, name: str) -> Path:
        """The folder of one part."""
        return self.unet if name == "unet" else self.folder / name

    @property
    def ours(self) -> bool:
        """Whether this package wrote the folder."""
        return (self.folder / CONFIG_FILE).is_file()

    @property
    def needed(self) -> list[str]:
        """Parts without which there is no prior."""
        parts = {
            "vae": True,
            "unet": True,
            "image_encoder": True,
            "std": self.has_std,
            "coarse": self.has_coarse,
            "scheduler": not self.ours,
        }
        return [part for part, needed in parts.items() if needed]

    @property
    def has_std(self) -> bool:
        """Whether there is a trained decoder; without one the VAE's own is used."""
        return (self.folder / "std").is_dir()

    @property
    def has_coarse(self) -> bool:
        """Whether there is a coarse repair; most priors have none."""
        return (self.folder / "coarse").is_dir()


def load_prior(name: str, device: torch.device | str, dtype: torch.dtype | None = None) -> VideoPrior:
    """Load a prior, ready to enhance.

    Args:
        name: `bundled`, a local folder, or the name of a hub repository (`owner/name`); a folder may hold a UNet alone,
            see this module's docstring.
        device: where it shall run.
        dtype: of its weights and arithmetic; the fastest that the device is good at by default.

    Raises:
        ValueError: unknown name, or a part that is broken or of another shape; every tensor at fault is named.
        FileNotFoundError: a folder that lacks a part, or a hub repository that cannot be reached.
    """
    folders = resolve(name)
    prior = read_prior(folders.folder, folders.unet)
    return prior.to(torch.device(device), dtype or fast_dtype(device)).eval()


def resolve(name: str) -> PriorFolders:
    """The local folders of a prior's parts; errors as in `resolve_folder`.

    Raises:
        ValueError: a base behind an `@` that is not needed, since the folder before it is complete.
    """
    own, separator, base = name.rpartition(BASE_SEPARATOR)
    if not separator or Path(name).expanduser().is_dir():
        own, base = name, ""
    folder = resolve_folder(own)
    unet = _lone_unet(folder)
    if unet is not None:
        return PriorFolders(resolve_folder(base or SVD_REPOSITORY), unet)
    if base:
        raise ValueError(
            f"{own!r} is no folder of a UNet alone, so that nothing is taken from {base!r}: leave out "
            f"{BASE_SEPARATOR + base!r}, or name the folder of the UNet."
        )
    return PriorFolders(folder, folder / "unet")


def _lone_unet(folder: Path) -> Path | None:
    """The UNet's folder if there is nothing else: `checkpoint-N/` with its `unet/`, or `unet/` itself."""
    if (folder / "vae").is_dir() or (folder / CONFIG_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return None
    for candidate in (folder, folder / "unet"):
        if (candidate / "config.json").is_file() and _weight_files(candidate / DIFFUSERS_WEIGHTS):
            return candidate
    return None


def resolve_folder(name: str) -> Path:
    """The local folder of a prior's name; hub repositories are fetched into the hub's cache.

    Raises:
        ValueError: a name that is neither `bundled`, nor an existing folder, nor `owner/name`.
        FileNotFoundError: a package without bundled weights, or a hub repository that cannot be fetched.
    """
    if name == "bundled":
        if not (BUNDLED / CONFIG_FILE).is_file():
            raise FileNotFoundError(
                f"this copy of the package has no bundled prior ({BUNDLED} lacks {CONFIG_FILE}): reinstall it, or name "
                "a folder with a prior of your own."
            )
        return BUNDLED
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if name and folder.exists():
        raise ValueError(f"a prior is a folder, but {name!r} is a file: name the folder that holds {INDEX_FILE}.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ValueError(
            f"unknown prior {name!r}: give `bundled`, an existing folder, or a hub repository as `owner/name`."
        )
    return _fetch(name)


def _fetch(repository: str) -> Path:
    """Download (or find in the cache) the parts of a hub repository that a prior needs, in half precision if it has that."""
    from huggingface_hub import snapshot_download

    try:
        halves = ["*.json", "*/*.json", "*/*.fp16.safetensors", f"{DIFFUSERS_STEM}*.fp16.safetensors"]
        path = Path(snapshot_download(repository, allow_patterns=halves))
        whole = [f"{config.parent.name}/*.safetensors" for config in path.glob("*/config.json")]
        if (path / "config.json").is_file():
            # Of a UNet alone. By its name, since the root of a whole prior may hold a second copy of everything.
            whole.append(f"{DIFFUSERS_STEM}*.safetensors")
        lacking = [pattern for pattern in whole if not any(path.glob(pattern))]
        if lacking:
            snapshot_download(repository, allow_patterns=lacking)
    except Exception as error:  # the hub client raises many unrelated types: no network, no access, no such name
        raise FileNotFoundError(
            f"prior {repository!r} is no local folder, and could not be fetched from the hub "
            f"({type(error).__name__}: {error}). Check the name, the network and `hf auth login`; or download "
            "it elsewhere and give its folder; or use `bundled`, which needs no network."
        ) from error
    return path


def read_prior(folder: Path, unet_folder: Path | None = None) -> VideoPrior:
    """Read a folder as it is, on the CPU and in the dtype of its files.

    Args:
        folder: of the prior.
        unet_folder: of another UNet to take instead of the folder's own.

    Raises:
        ValueError: a part that is broken or of another shape.
        FileNotFoundError: a missing part.
    """
    folders = PriorFolders(folder, unet_folder or folder / "unet")
    if missing := missing_parts(folders):
        raise FileNotFoundError(
            f"prior folder {str(folder)!r} lacks {', '.join(missing)}: it needs "
            f"{', '.join(f'{part}/' for part in folders.needed)}, each with its config and safetensors weights."
        )
    scheduler = read_scheduler(folder)
    vae = _read_diffusers(AutoencoderKLTemporalDecoder, folder / "vae")
    unet = read_unet(folders.unet)
    config = read_config(folder / CONFIG_FILE) if folders.ours else config_of_svd(scheduler, unet)
    if folders.has_std:
        std = _read_diffusers(SpatialTemporalDecoder, folder / "std")
    else:
        std = SpatialTemporalDecoder.from_vae(vae, config.patch_size)
        if folders.ours:
            logger.warning("prior folder %r has no std/: frames are decoded as the VAE alone would.", str(folder))
    image_encoder = _read_image_encoder(folder / "image_encoder")
    coarse = _read_diffusers(CoarseRepair, folder / "coarse") if folders.has_coarse else None
    try:
        return VideoPrior(
            vae=vae,
            unet=unet,
            image_encoder=image_encoder,
            std=std,
            config=config,
            scheduler_config=scheduler,
            coarse=coarse,
        )
    except ValueError as error:
        if folders.ours:
            raise
        raise ValueError(
            f"{error} {str(folder)!r} holds no {CONFIG_FILE}, so that it was read as Stable Video Diffusion; if it is a prior of this "
            "package, copy that file too."
        ) from error


def missing_parts(folders: PriorFolders) -> list[str]:
    """Parts that a prior needs and a folder has no config of; the config by its name where the part's folder is there."""
    names = {part: "scheduler_config.json" if part == "scheduler" else "config.json" for part in folders.needed}
    missing = {part: name for part, name in names.items() if not (folders.part(part) / name).is_file()}
    return [f"{part}/{name}" if folders.part(part).is_dir() else f"{part}/" for part, name in missing.items()]


def read_scheduler(folder: Path) -> dict[str, Any]:
    """Settings of the pipeline's scheduler, empty where it has none.

    Raises:
        ValueError: for weights that do not predict v, as SVD's do.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = _read_json(path) if path.is_file() else {}
    if (given := scheduler.get("prediction_type", "v_prediction")) != "v_prediction":
        raise ValueError(
            f"{str(path)!r} must have prediction_type 'v_prediction', as Stable Video Diffusion has, got {given!r}: "
            "weights that predict something else cannot be sampled here."
        )
    return scheduler


def read_config(path: Path) -> PriorConfig:
    """Our settings from JSON.

    Raises:
        ValueError: unknown entries or values that cannot work.
    """
    entries = _read_json(path)
    kinds = {field.name: type(field.default) for field in dataclasses.fields(PriorConfig)}
    if unknown := sorted(set(entries) - set(kinds)):
        raise ValueError(f"{str(path)!r} has unknown entries {unknown}; known are {sorted(kinds)}.")
    for name, given in entries.items():
        if type(given) is int and kinds[name] is float:
            entries[name] = float(given)
        elif type(given) is not kinds[name]:
            raise ValueError(f"{str(path)!r}: `{name}` must be of type {kinds[name].__name__}, got {given!r}.")
    return PriorConfig(**entries)


def read_unet(folder: Path) -> SpatioTemporalUNet:
    """A UNet of layout A or B, told apart by its tensors.

    Raises:
        ValueError: tensors missing, unexpected or of another shape; attention heads that nothing tells.
    """
    state = _read_tensors(folder / DIFFUSERS_WEIGHTS)
    return _fill(SpatioTemporalUNet, unet_config(folder, state), state, folder)


def unet_config(folder: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The UNet's config.json with what its tensors tell (the layout) and what older files leave out (attention heads)."""
    config = _read_json(folder / "config.json")
    if POSE_TENSOR in state:
        channels = state[POSE_TENSOR].shape[-1] // POSE_CONDITIONS
        config = {"pose_conditions": POSE_CONDITIONS, "pose_frequency_channels": channels, **config}
    heads = attention_heads(config, folder)
    if uneven := _uneven_heads(config, heads):
        logger.warning("%s: %s", folder / "config.json", uneven)
    return {**config, "num_attention_heads": heads}


def attention_heads(config: Mapping[str, Any], folder: Path) -> Any:
    """Heads of every block: those of config.json; where it names none, the default of the diffusers release that wrote it.

    No tensor's shape depends on the number of heads, so that a wrong one loads and only spoils the pictures.

    Raises:
        ValueError: where neither the heads nor the release are named.
    """
    if "num_attention_heads" in config:
        return config["num_attention_heads"]
    release = str(config.get("_diffusers_version", ""))
    numbers = [int(part) for part in release.split(".")[:2] if part.isdigit()]
    if len(numbers) < 2:
        raise ValueError(
            f"{str(folder / 'config.json')!r} names neither `num_attention_heads` nor the release of diffusers that wrote "
            f"it, and no tensor tells: add `num_attention_heads`, for Stable Video Diffusion {list(SVD_HEADS)}."
        )
    return SVD_HEADS if tuple(numbers) >= (0, 27) else SVD_HEADS_BEFORE_0_27


def _uneven_heads(config: Mapping[str, Any], heads: Any) -> str | None:
    """What is unusual about heads of different widths; None for the usual ones."""
    widths = config.get("block_out_channels", (320, 640, 1280, 1280))
    if isinstance(heads, int) or len(heads) != len(widths):
        return None
    sizes = [width // count for width, count in zip(widths, heads)]
    if len(set(sizes)) == 1:
        return None
    return (
        f"attention heads {list(heads)} are {sizes} channels wide. diffusers before 0.27 built a UNet without settings so "
        "(Stable Video Diffusion itself has heads of 64); they are taken as written, since weights trained with them "
        "need them."
    )


def config_of_svd(scheduler: Mapping[str, Any], unet: SpatioTemporalUNet) -> PriorConfig:
    """The paper's settings with the noise levels of the pipeline's own scheduler and what the UNet's layout needs."""
    defaults = PriorConfig()
    pose_conditioned = unet.layout == "A"
    frames = LAYOUT_A_FRAMES if pose_conditioned else unet.config["num_frames"]
    height, width = LAYOUT_A_SIZE if pose_conditioned else LAYOUT_B_SIZE
    return dataclasses.replace(
        defaults,
        sigma_min=scheduler.get("sigma_min") or defaults.sigma_min,
        sigma_max=scheduler.get("sigma_max") or defaults.sigma_max,
        num_frames=frames,
        window_overlap=min(defaults.window_overlap, frames // 4),
        frame_height=height,
        frame_width=width,
        subtract_one_from_fps=not pose_conditioned,
        unconditional_micro=not pose_conditioned,
        misread_quaternions=pose_conditioned,
    )


def save_prior(prior: VideoPrior, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """Write a prior as a folder; a folder that was there is replaced only once the new one is complete.

    Args:
        prior: what to write; it is not changed.
        folder: where.
        dtype: of the weights on disk; as they are by default.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        _write_parts(prior, partial, dtype)
        _replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_parts(prior: VideoPrior, folder: Path, dtype: torch.dtype | None) -> None:
    for name, module in prior.modules.items():
        if isinstance(module, CLIPVisionModelWithProjection):
            module.config.save_pretrained(folder / name)
            weights = TRANSFORMERS_WEIGHTS
        else:
            module.save_config(folder / name)
            weights = DIFFUSERS_WEIGHTS
        state = {key: tensor.to(dtype or tensor.dtype).contiguous() for key, tensor in module.state_dict().items()}
        save_file(state, folder / name / weights, metadata={"format": "pt"})
    _scheduler(prior).save_pretrained(folder / "scheduler")
    side: int = prior.image_encoder.config.image_size  # pyright: ignore[reportAssignmentType]  # one number in CLIP
    CLIPImageProcessor(
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    ).save_pretrained(folder / "feature_extractor")
    _write_json(folder / CONFIG_FILE, dataclasses.asdict(prior.config))
    _write_json(
        folder / INDEX_FILE,
        {
            "_class_name": "VideoPrior",
            "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
            "unet": ["diffusion_prior.unet", "SpatioTemporalUNet"],
            "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
            "std": ["diffusion_prior.std", "SpatialTemporalDecoder"],
            **({} if prior.coarse is None else {"coarse": ["diffusion_prior.coarse", "CoarseRepair"]}),
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
        },
    )


def _scheduler(prior: VideoPrior) -> EulerDiscreteScheduler:
    """SVD's scheduler with this prior's noise levels; it carries settings only, `sampler` does the steps."""
    settings = {
        "prediction_type": "v_prediction",
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
        **{name: value for name, value in prior.scheduler_config.items() if not name.startswith("_")},
        "sigma_min": prior.config.sigma_min,
        "sigma_max": prior.config.sigma_max,
    }
    # Published ones carry settings of other schedulers too, which the class itself would refuse.
    return cast(EulerDiscreteScheduler, EulerDiscreteScheduler.from_config(settings))


def _replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`, keeping the old one until the new one stands there."""
    if not folder.exists():
        new.rename(folder)
        return
    old = new.with_suffix(".old")
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _read_diffusers(module_class: type[Module], folder: Path) -> Module:
    state = _read_tensors(folder / DIFFUSERS_WEIGHTS)
    return _fill(module_class, _read_json(folder / "config.json"), state, folder)


def _fill(module_class: type[Module], config: Mapping[str, Any], state: dict[str, Tensor], folder: Path) -> Module:
    """Build a diffusers model from its config and put tensors into it, none missing, none left over."""
    module = _on_meta(module_class, config, folder)
    check_tensors(module.state_dict(), state, folder)
    module.load_state_dict(state, strict=True, assign=True)
    return module


STALE_BUFFER = "vision_model.embeddings.position_ids"
"""Stored by older releases of transformers; newer ones make it anew."""


def _read_image_encoder(folder: Path) -> CLIPVisionModelWithProjection:
    config = _read_json(folder / "config.json")
    state = _read_tensors(folder / TRANSFORMERS_WEIGHTS)
    state.pop(STALE_BUFFER, None)
    module = _build(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**config)), folder)
    check_tensors(module.state_dict(), state, folder)
    nn.Module.to(module, dtype=next(iter(state.values())).dtype)
    module.load_state_dict(state, strict=True)
    return module


@dataclasses.dataclass(frozen=True)
class PartReport:
    """What one part of a prior's folder holds, told from configs and the headers of its files."""

    parameters: int
    tensors: int
    dtype: str
    bytes_on_disk: int
    layout: str | None = None
    """Of the UNet: A or B."""
    notes: tuple[str, ...] = ()


def inspect_part(folders: PriorFolders, name: str) -> PartReport:
    """Look into one part without reading its weights.

    Raises:
        ValueError: a part that is broken, or whose tensors do not fit its config; every tensor at fault is named.
        FileNotFoundError: a part without config or weights.
    """
    folder = folders.part(name)
    weights = TRANSFORMERS_WEIGHTS if name == "image_encoder" else DIFFUSERS_WEIGHTS
    state = read_shapes(folder / weights)
    state.pop(STALE_BUFFER, None)
    notes: list[str] = []
    if name == "unet":
        config = unet_config(folder, state)
        notes += [note for note in [_uneven_heads(config, config["num_attention_heads"])] if note]
    else:
        config = _read_json(folder / "config.json")
    module = _on_meta(PART_CLASSES[name], config, folder)
    check_tensors(module.state_dict(), state, folder)
    return PartReport(
        parameters=sum(tensor.numel() for tensor in state.values()),
        tensors=len(state),
        dtype=", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})),
        bytes_on_disk=sum(file.stat().st_size for file in _weight_files(folder / weights)),
        layout=module.layout if isinstance(module, SpatioTemporalUNet) else None,
        notes=tuple(notes),
    )


PART_CLASSES: dict[str, type[nn.Module]] = {
    "vae": AutoencoderKLTemporalDecoder,
    "unet": SpatioTemporalUNet,
    "image_encoder": CLIPVisionModelWithProjection,
    "std": SpatialTemporalDecoder,
    "coarse": CoarseRepair,
}
"""The networks by the names of their folders."""


def _on_meta(module_class: type[Module], config: Mapping[str, Any], folder: Path) -> Module:
    """A network of random nothing: no time spent on weights, no memory for them."""

    def build() -> Module:
        with torch.device("meta"):
            if module_class is CLIPVisionModelWithProjection:
                return module_class(CLIPVisionConfig(**config))
            return module_class.from_config(dict(config))  # pyright: ignore[reportAttributeAccessIssue]

    return _build(build, folder)


def _build(build: Callable[[], Module], folder: Path) -> Module:
    try:
        return build()
    except (TypeError, ValueError, RuntimeError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{str(folder / 'config.json')!r} describes no network: {error}") from error


def check_tensors(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ValueError that names every tensor which is missing, unexpected or of another shape."""
    faults = [f"missing: {name} {tuple(wanted[name].shape)}" for name in wanted if name not in given]
    faults += [f"unexpected: {name} {tuple(given[name].shape)}" for name in given if name not in wanted]
    faults += [
        f"shape: {name} is {tuple(given[name].shape)}, config.json asks for {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if faults:
        raise ValueError(
            f"the weights in {str(folder)!r} do not fit their config.json ({len(faults)} of {len(wanted)} tensors at "
            "fault); nothing was loaded. Take config and weights from the same checkpoint.\n  " + "\n  ".join(faults)
        )


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of one part: `path` itself, its shards, or its half-precision variant."""
    if path.is_file():
        return [path]
    halves = path.with_suffix(".fp16.safetensors")
    return sorted(path.parent.glob(f"{path.stem}*-of-*.safetensors")) or ([halves] if halves.is_file() else [])


def _read_tensors(path: Path) -> dict[str, Tensor]:
    return _from_files(path, load_file)


def read_shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a part's files on the meta device: their names, shapes and precision, without reading a weight."""
    return _from_files(path, _shapes_of)


def _shapes_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        return {
            name: torch.empty(part.get_shape(), dtype=STORED_DTYPES.get(part.get_dtype(), torch.float32), device="meta")
            for name, part in slices.items()
        }


STORED_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}
"""By safetensors' names, where it is not float32."""


def _from_files(path: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    files = _weight_files(path)
    if not files:
        raise FileNotFoundError(
            f"prior folder {str(path.parent)!r} has no weights: expected {path.name}. Only safetensors are read; "
            "convert *.bin or *.ckpt files first."
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= read(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(file)!r} is broken or cut short ({error}): copy or download it again.") from error
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"prior folder lacks {str(path)!r}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no valid JSON ({error}): copy or download it again.") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(entries).__name__}.")
    return entries


def _write_json(path: Path, entries: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
