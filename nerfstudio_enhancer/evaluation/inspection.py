"""`ns-enhancer inspect-prior`: what a prior's folder holds, in words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from diffusion_prior.checkpoints import (
    CONFIG_FILE,
    PART_CLASSES,
    PartReport,
    PriorFolders,
    inspect_part,
    missing_parts,
    read_config,
    read_prior,
    read_scheduler,
    resolve,
)

MIB = 1024**2
LAYOUTS = {
    "A": "A: a pose per frame through pose_embedding (the authors' pose-conditioned UNet)",
    "B": "B: Stable Video Diffusion's own UNet",
}


@dataclass(frozen=True)
class PriorReport:
    """What a prior's folder holds, and what is wrong with it."""

    text: str
    faults: tuple[str, ...]


def inspect_prior(name: str) -> PriorReport:
    """Describe a prior's parts: layout, parameters, precision, sizes, settings, and everything that is missing or broken.

    Weights are read only where every part is whole, and only to see whether the parts fit each other.

    Args:
        name: as in `checkpoints.load_prior`.

    Raises:
        ValueError: unknown name.
        FileNotFoundError: a hub repository that cannot be fetched.
    """
    folders = resolve(name)
    missing = missing_parts(folders)
    faults = [f"missing: {part}/ has no config" for part in missing]
    reports: dict[str, PartReport] = {}
    present = [part for part in PART_CLASSES if folders.part(part).is_dir()]
    for part in present:
        if part in missing:
            continue
        try:
            reports[part] = inspect_part(folders, part)
        except (ValueError, FileNotFoundError) as error:
            faults.append(f"{part}/: {error}")
    lines = [_where(folders), *_table(reports), *_settings(folders, faults)]
    if not folders.has_std:
        lines.append("std/ is missing, which is no fault: the untrained decoder is used, which equals the VAE's own")
    lines += [f"note: {note}" for report in reports.values() for note in report.notes]
    lines += [f"FAULT {fault}" for fault in faults]
    return PriorReport("\n".join(lines), tuple(faults))


def _where(folders: PriorFolders) -> str:
    own = folders.unet == folders.folder / "unet"
    return str(folders.folder) if own else f"UNet of {folders.unet}, all else of {folders.folder}"


def _table(reports: dict[str, PartReport]) -> list[str]:
    lines = [f"{'part':<16}{'parameters':>15}{'tensors':>9}  {'precision':<18}{'on disk, MiB':>12}"]
    for part, report in reports.items():
        size = report.bytes_on_disk / MIB
        lines.append(f"{part:<16}{report.parameters:>15,}{report.tensors:>9,}  {report.dtype:<18}{size:>12.1f}")
    total = sum(report.parameters for report in reports.values())
    size = sum(report.bytes_on_disk for report in reports.values()) / MIB
    lines.append(f"{'together':<16}{total:>15,}{'':>9}  {'':<18}{size:>12.1f}")
    if "unet" in reports and (layout := reports["unet"].layout) is not None:
        lines.append(f"layout {LAYOUTS[layout]}")
    return lines


def _settings(folders: PriorFolders, faults: list[str]) -> list[str]:
    """Frames, resolution and all other settings; what is wrong with them goes to the faults."""
    try:
        if faults:  # only whole priors are read: show what the folder itself says
            if not folders.ours:
                read_scheduler(folders.folder)
                return []
            config = read_config(folders.folder / CONFIG_FILE)
        else:
            config = read_prior(folders.folder, folders.unet).config
    except (ValueError, FileNotFoundError) as error:
        faults.append(str(error))
        return []
    size = f"{config.frame_width} x {config.frame_height} pixels" if config.frame_width else "any size"
    lines = [f"frames of a clip: {config.num_frames}, of {size}"]
    return lines + [f"{field.name} = {getattr(config, field.name)}" for field in dataclasses.fields(config)]
