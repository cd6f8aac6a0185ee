"""Priors on disk: folders in diffusers' layout, safetensors only.

    model_index.json  prior_config.json  vae/  unet/  image_encoder/  std/  scheduler/  feature_extractor/

A folder without `prior_config.json` is taken for a Stable Video Diffusion pipeline: it needs no `std/`, and its STD is
the untrained one, which equals the stock decoder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusion_prior.conditioning import CLIP_MEAN, CLIP_STD
from diffusion_prior.prior import PriorConfig, VideoPrior, fast_dtype
from diffusion_prior.std import SpatialTemporalDecoder
from diffusion_prior.unet import SpatioTemporalUNet

BUNDLED = Path(__file__).parent / "bundled"
"""The compact prior that comes with the package."""
CONFIG_FILE = "prior_config.json"
INDEX_FILE = "model_index.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
POSE_TENSOR = "pose_embedding.linear_1.weight"
"""Only the pose-conditioned layout (A) of the UNet has it."""
POSE_CONDITIONS = 22
"""Numbers per frame of the pose-conditioned layout, see `conditioning.pose_conditions`."""

Module = TypeVar("Module", bound=nn.Module)


def load_prior(name: str, device: torch.device | str, dtype: torch.dtype | None = None) -> VideoPrior:
    """Load a prior, ready to enhance.

    Args:
        name: `bundled`, a local folder, or the name of a hub repository (`owner/name`).
        device: where it shall run.
        dtype: of its weights and arithmetic; the fastest that the device is good at by default.

    Raises:
        ValueError: unknown name, or a part that is broken or of another shape; every tensor at fault is named.
        FileNotFoundError: a folder that lacks a part, or a hub repository that cannot be reached.
    """
    prior = read_prior(resolve_folder(name))
    return prior.to(torch.device(device), dtype or fast_dtype(device)).eval()


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
    """Download (or find in the cache) the parts of a hub repository that a prior needs."""
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(repository, allow_patterns=["*.json", "*/*.json", "*/*.safetensors"])
    except Exception as error:  # the hub client raises many unrelated types: no network, no access, no such name
        raise FileNotFoundError(
            f"prior {repository!r} is no local folder, and could not be fetched from the hub "
            f"({type(error).__name__}: {error}). Check the name, the network and `huggingface-cli login`; or download "
            "it elsewhere and give its folder; or use `bundled`, which needs no network."
        ) from error
    return Path(path)


def read_prior(folder: Path) -> VideoPrior:
    """Read a folder as it is, on the CPU and in the dtype of its files.

    Raises:
        ValueError: a part that is broken or of another shape.
        FileNotFoundError: a missing part.
    """
    ours = (folder / CONFIG_FILE).is_file()
    needed = ["vae", "unet", "image_encoder", *(["std"] if ours else ["scheduler"])]
    missing = [part for part in needed if not (folder / part / "config.json").is_file() and part != "scheduler"]
    if "scheduler" in needed and not (folder / "scheduler" / "scheduler_config.json").is_file():
        missing.append("scheduler")
    if missing:
        raise FileNotFoundError(
            f"prior folder {str(folder)!r} lacks {', '.join(f'{part}/' for part in missing)}: it needs "
            f"{', '.join(f'{part}/' for part in needed)}, each with its config and safetensors weights."
        )
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    scheduler = _read_json(scheduler_file) if scheduler_file.is_file() else {}
    vae = _read_diffusers(AutoencoderKLTemporalDecoder, folder / "vae")
    config = read_config(folder / CONFIG_FILE) if ours else _config_of_svd(scheduler)
    std = (
        _read_diffusers(SpatialTemporalDecoder, folder / "std")
        if (folder / "std").is_dir()
        else SpatialTemporalDecoder.from_vae(vae, config.patch_size)
    )
    return VideoPrior(
        vae=vae,
        unet=read_unet(folder / "unet"),
        image_encoder=_read_image_encoder(folder / "image_encoder"),
        std=std,
        config=config,
        scheduler_config=scheduler,
    )


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
        ValueError: tensors missing, unexpected or of another shape.
    """
    state = _read_tensors(folder / DIFFUSERS_WEIGHTS)
    config = _read_json(folder / "config.json")
    if POSE_TENSOR in state:
        config = {"pose_conditions": POSE_CONDITIONS, **config}
    return _fill(SpatioTemporalUNet, config, state, folder)


def _config_of_svd(scheduler: Mapping[str, Any]) -> PriorConfig:
    """The paper's settings with the noise levels of the pipeline's own scheduler."""
    defaults = PriorConfig()
    return dataclasses.replace(
        defaults,
        sigma_min=scheduler.get("sigma_min") or defaults.sigma_min,
        sigma_max=scheduler.get("sigma_max") or defaults.sigma_max,
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
    return EulerDiscreteScheduler(**settings)


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

    def build() -> Module:
        with torch.device("meta"):  # no time spent on random weights, no memory for them
            return module_class.from_config(dict(config))  # pyright: ignore[reportAttributeAccessIssue]

    module = _build(build, folder)
    check_tensors(module.state_dict(), state, folder)
    module.load_state_dict(state, strict=True, assign=True)
    return module


def _read_image_encoder(folder: Path) -> CLIPVisionModelWithProjection:
    config = _read_json(folder / "config.json")
    state = _read_tensors(folder / TRANSFORMERS_WEIGHTS)
    state.pop("vision_model.embeddings.position_ids", None)  # a buffer that older transformers stored
    module = _build(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**config)), folder)
    check_tensors(module.state_dict(), state, folder)
    nn.Module.to(module, dtype=next(iter(state.values())).dtype)
    module.load_state_dict(state, strict=True)
    return module


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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        shards = sorted(path.parent.glob("*-of-*.safetensors"))
        if shards:
            return {name: tensor for shard in shards for name, tensor in _read_tensors(shard).items()}
        halves = path.with_suffix(".fp16.safetensors")
        if halves.is_file():
            return _read_tensors(halves)
        raise FileNotFoundError(
            f"prior folder {str(path.parent)!r} has no weights: expected {path.name}. Only safetensors are read; "
            "convert *.bin or *.ckpt files first."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is broken or cut short ({error}): copy or download it again.") from error


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
