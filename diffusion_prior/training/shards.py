"""Paired data in shards: tar files of a few runs each, streamed from any disk, web server or bucket (webdataset's format).

A lane is one of the batches that a step averages. Every lane goes through shards of its own in an order that follows from the
seed, so that a training needs room for one shard per lane at a time, and that a resumed one reads what it would have read,
with any number of processes.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils.data import Dataset

from diffusion_prior.data.clips import ClipBatch, ClipConfig, ClipDataset, gaps_of, step_generator
from diffusion_prior.data.pairs import FRAMES_NAME, META_NAME, find_runs, read_header
from diffusion_prior.files import whole_file
from diffusion_prior.training.config import ScaleConfig

ORDER_SEED_OFFSET = 1 << 33
"""Keeps the order of the shards apart from the choice of their clips."""
INSTALL = "pip install 'nerfstudio-enhancer[train]'"


@dataclass
class PackShards:
    """Pack paired data into shards."""

    pairs: Path
    """Root folder of paired data."""
    output: Path
    """Folder for `pairs-000000.tar` and so on."""
    runs_per_shard: int = 8
    """Runs of sparse splats in one shard; some 100 MB each at full size."""
    seed: int = 0
    """Of the order of the runs, so that a shard holds runs of several scenes."""


def pack(config: PackShards) -> list[Path]:
    """Write the shards; every run is in exactly one of them."""
    webdataset = _webdataset()
    runs = find_runs(config.pairs)
    order = torch.randperm(len(runs), generator=torch.Generator().manual_seed(config.seed)).tolist()
    shards = []
    for start in range(0, len(order), config.runs_per_shard):
        path = config.output / f"pairs-{start // config.runs_per_shard:06d}.tar"
        with whole_file(path) as partial, webdataset.TarWriter(str(partial)) as writer:
            for index in order[start : start + config.runs_per_shard]:
                files = {name: (runs[index] / name).read_bytes() for name in (META_NAME, FRAMES_NAME)}
                writer.write({"__key__": f"{index:08d}", **files})
        shards.append(path)
    return shards


def list_shards(where: str) -> list[str]:
    """Addresses of shards: those in a folder, or those that a pattern with braces stands for.

    Raises:
        FileNotFoundError: a folder without shards.
    """
    folder = Path(where)
    if folder.is_dir():
        found = sorted(str(path) for path in folder.glob("*.tar"))
        if not found:
            raise FileNotFoundError(
                f"no shards in {folder}: make some with `python -m diffusion_prior.training.shards --pairs PAIRS "
                f"--output {folder}`."
            )
        return found
    return _webdataset().shardlists.expand_urls(where)


class ShardedClips(Dataset[ClipBatch]):
    """Batches by number, `step * lanes + lane`, from shards; no more than `kept` of them lie unpacked at a time."""

    def __init__(self, scale: ScaleConfig, clips: ClipConfig, seed: int, lanes: int, kept: int) -> None:
        """Find out where the shards are; none is opened yet.

        Args:
            scale: `shards` and `steps_per_shard`.
            clips: shape and variation of clips.
            seed: another seed gives another order and other clips.
            lanes: batches that one step averages, over all processes.
            kept: how many lanes this process reads.
        """
        assert scale.shards is not None
        self.addresses = list_shards(scale.shards)
        self._steps_per_shard, self._clips, self._seed = scale.steps_per_shard, clips, seed
        self._lanes, self._kept = lanes, kept
        self._open: dict[str, _Unpacked] = {}

    def address(self, number: int) -> str:
        """Which shard a batch comes from."""
        step, lane = divmod(number, self._lanes)
        round_, index = divmod(step // self._steps_per_shard * self._lanes + lane, len(self.addresses))
        generator = step_generator(self._seed + ORDER_SEED_OFFSET, round_)
        return self.addresses[int(torch.randperm(len(self.addresses), generator=generator)[index])]

    def __getitem__(self, number: int) -> ClipBatch:
        """The batch of one lane of one step."""
        address = self.address(number)
        unpacked = self._open.pop(address, None) or _Unpacked(address, self._clips, self._seed)
        self._open[address] = unpacked  # the latest is the last
        while len(self._open) > self._kept:
            self._open.pop(next(iter(self._open))).close()
        return unpacked.dataset[number]


class _Unpacked:
    """One shard on the local disk."""

    def __init__(self, address: str, clips: ClipConfig, seed: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pairs-")
        folders = unpack(address, Path(self._folder.name))
        gaps = [gap for folder in folders for gap in gaps_of(read_header(folder))]
        self.dataset = ClipDataset(gaps, clips, seed)

    def close(self) -> None:
        """Give the room back."""
        self._folder.cleanup()


def unpack(address: str, folder: Path) -> list[Path]:
    """Stream a shard into one folder per run.

    Raises:
        ValueError: a shard that is broken, or holds something else.
    """
    gopen = _webdataset().gopen
    try:
        with gopen(address) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                key, _, name = member.name.partition(".")
                content = archive.extractfile(member)
                if content is None or name not in (META_NAME, FRAMES_NAME) or not key.isalnum():
                    raise ValueError(f"{member.name!r} does not belong into a shard of paired data")
                (folder / key).mkdir(exist_ok=True)
                with (folder / key / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"the shard {address} cannot be read ({error}); pack or copy it again.") from error
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _webdataset() -> Any:
    try:
        import webdataset
        import webdataset.shardlists
    except ImportError as error:
        raise ImportError(f"shards need webdataset: {INSTALL}.") from error
    return webdataset


if __name__ == "__main__":
    pack(tyro.cli(PackShards, description=__doc__))
