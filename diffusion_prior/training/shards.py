"""Paired data in shards: tar files of a few runs each, streamed from any disk, web server or bucket (webdataset's format).

A lane is one of the batches that a step averages. Every lane goes through shards of its own in an order that follows from the
seed, so that a training needs room for one shard per lane at a time (and the next, while some loader workers are ahead of
others), and that a resumed one reads what it would have read, with any number of processes.

Which batch a loader worker reads changes nothing in it: it follows from its number. The workers of a process share what is
unpacked: the first one that needs a shard streams it, the last one that needed it removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tarfile
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils.data import Dataset

from diffusion_prior.data.clips import ClipBatch, ClipConfig, ClipDataset, gaps_of, split_scenes, step_generator
from diffusion_prior.data.pairs import FRAMES_NAME, META_NAME, find_runs, read_header
from diffusion_prior.files import whole_file
from diffusion_prior.training.config import ScaleConfig

ORDER_SEED_OFFSET = 1 << 33
"""Keeps the order of the shards apart from the choice of their clips."""
INSTALL = "pip install 'nerfstudio-enhancer[train]'"


@dataclass
class PackShards:
    """Pack the scenes of paired data that train into shards."""

    pairs: Path
    """Root folder of paired data."""
    output: Path
    """Folder for `pairs-000000.tar` and so on."""
    runs_per_shard: int = 8
    """Runs of sparse splats in one shard; some 100 MB each at full size."""
    seed: int = 0
    """Of the order of the runs, so that a shard holds runs of several scenes."""
    validation_scenes: tuple[str, ...] = ()
    """Scenes that are left out, those that the training is told to validate on; if empty, one in twelve, as there."""


def pack(config: PackShards) -> list[Path]:
    """Write the shards; every run of the scenes that train is in exactly one of them.

    Raises:
        FileNotFoundError: no paired data.
        ValueError: validation scenes that are not there, or that leave nothing to train on.
        FileExistsError: shards are there already: those of another packing would be trained on beside the new ones.
    """
    old = sorted(config.output.glob("*.tar"))
    if old:
        raise FileExistsError(
            f"{config.output} holds {len(old)} shards already, {old[0].name} the first; delete them, or give another `--output`."
        )
    webdataset = _webdataset()
    training = set(split_scenes(config.pairs, config.validation_scenes)[0])
    runs = [run for run in find_runs(config.pairs) if run.parent.name in training]
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
    """Batches by number, `step * lanes + lane`, from shards; one of them lies unpacked for each lane that is read.

    Copies of it in the workers of a loader share what is unpacked.
    """

    def __init__(self, scale: ScaleConfig, clips: ClipConfig, seed: int, lanes: int) -> None:
        """Find out where the shards are; none is opened yet.

        Args:
            scale: `shards` and `steps_per_shard`.
            clips: shape and variation of clips.
            seed: another seed gives another order and other clips.
            lanes: batches that one step averages, over all processes.
        """
        assert scale.shards is not None
        self.addresses = list_shards(scale.shards)
        self._steps_per_shard, self._clips, self._seed = scale.steps_per_shard, clips, seed
        self._lanes = lanes
        self._folder = Path(tempfile.mkdtemp(prefix="pairs-"))
        self._open: dict[int, _Unpacked] = {}
        """By lane."""
        weakref.finalize(self, _remove, self._folder, os.getpid())

    def address(self, number: int) -> str:
        """Which shard a batch comes from."""
        step, lane = divmod(number, self._lanes)
        round_, index = divmod(step // self._steps_per_shard * self._lanes + lane, len(self.addresses))
        generator = step_generator(self._seed + ORDER_SEED_OFFSET, round_)
        return self.addresses[int(torch.randperm(len(self.addresses), generator=generator)[index])]

    def __getitem__(self, number: int) -> ClipBatch:
        """The batch of one lane of one step."""
        address, lane = self.address(number), number % self._lanes
        unpacked = self._open.get(lane)
        if unpacked is None or unpacked.address != address:
            if unpacked is not None:
                self._open.pop(lane).close()
            unpacked = _Unpacked(
                address, self._folder / f"{self.addresses.index(address):06d}", self._clips, self._seed
            )
            self._open[lane] = unpacked
        return unpacked.dataset[number]


class _Unpacked:
    """One shard on the local disk, held by any number of lanes and processes."""

    def __init__(self, address: str, folder: Path, clips: ClipConfig, seed: int) -> None:
        self.address = address
        self._folder = folder
        with _holders(folder) as count:
            if count[0] == 0:
                _unpack_whole(address, folder)
            count[0] += 1
        gaps = [gap for run in _runs_in(folder) for gap in gaps_of(read_header(run))]
        self.dataset = ClipDataset(gaps, clips, seed)

    def close(self) -> None:
        """Give the room back where nobody else holds it."""
        with _holders(self._folder) as count:
            count[0] -= 1
            if count[0] == 0:
                shutil.rmtree(self._folder)


@contextmanager
def _holders(folder: Path) -> Iterator[list[int]]:
    """Within, no other process changes a folder or the number of those who hold it, which is given and may be changed."""
    with folder.with_suffix(".holders").open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0)
        count = [int(file.read() or 0)]
        yield count
        file.truncate(0)
        file.write(str(count[0]))


def _unpack_whole(address: str, folder: Path) -> None:
    """Unpack a shard into a new folder, or leave none."""
    folder.mkdir()
    try:
        unpack(address, folder)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _remove(folder: Path, process: int) -> None:
    """Remove a folder where it was made: forked workers inherit the duty, but not the right."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


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
    return _runs_in(folder)


def _runs_in(folder: Path) -> list[Path]:
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
