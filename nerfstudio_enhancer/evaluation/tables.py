"""The benchmark's tables in Markdown; pure functions of the cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from nerfstudio_enhancer.evaluation.methods import METHODS
from nerfstudio_enhancer.names import FLICKER, RENDER_FLICKER, REPAIRED

BASELINES = ("splatfacto", "geometry")
"""Methods over which gains are reported."""
CEILING = "oracle"
FIGURES = ("psnr", "ssim", "lpips")
MISSING = "-"

Cell = dict[str, Any]


def benchmark_tables(cells: Sequence[Cell], settings: dict[str, Any]) -> str:
    """All tables: figures by scene and number of views, means, gains, share of the oracle's gain, time and memory."""
    if not cells:
        return "No cell is done yet.\n"
    methods = [method for method in METHODS if any(cell["method"] == method for cell in cells)]
    repaired = repaired_cells(cells)
    parts = [
        _head(cells, settings),
        "## PSNR / SSIM / LPIPS\n\n" + _figures(cells, methods),
        "## Gains in means over scenes\n\n" + _gains(cells, methods),
        *(["## Renders repaired by the prior\n\n" + _repaired(cells, repaired)] if repaired else []),
        "## What is seen, mean over scenes\n\n" + _shares(cells, methods),
        "## Seconds and memory, mean over cells\n\n" + _cost(cells, methods),
    ]
    return "\n".join(parts)


def repaired_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Cells whose renders were repaired, with the figures of the repaired renders as their own."""
    repaired = [cell for cell in cells if all(f"{REPAIRED}_{figure}" in cell for figure in FIGURES)]
    return [{**cell, **{figure: cell[f"{REPAIRED}_{figure}"] for figure in FIGURES}} for cell in repaired]


def mean_of(cells: Sequence[Cell], figure: str) -> float:
    """Mean over scenes of the mean over seeds."""
    scenes = sorted({cell["scene"] for cell in cells})
    return mean(mean(cell[figure] for cell in cells if cell["scene"] == scene) for scene in scenes)


def shared_cells(cells: Sequence[Cell], methods: Sequence[str]) -> list[Cell]:
    """Cells of those (scene, views, seed) that every one of the methods has, so that their means compare."""
    places = [{_place(cell) for cell in cells if cell["method"] == method} for method in methods]
    common = set.intersection(*places) if places else set()
    return [cell for cell in cells if cell["method"] in methods and _place(cell) in common]


def share_of_ceiling(value: float, baseline: float, ceiling: float) -> float | None:
    """Which part of the ceiling's gain a method has; None where the ceiling gains nothing."""
    return (value - baseline) / (ceiling - baseline) if ceiling > baseline else None


def _place(cell: Cell) -> tuple[Any, ...]:
    return cell["scene"], cell["views"], cell["seed"]


def _head(cells: Sequence[Cell], settings: dict[str, Any]) -> str:
    seeds = sorted({cell["seed"] for cell in cells})
    commits = sorted({cell[stage] for cell in cells for stage in ("commit", "first_stage_commit") if stage in cell})
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    lines = [
        "# Benchmark\n",
        f"{len(cells)} cells; seeds {_list(seeds)}; commit {_list(commits)}; {told}.",
        f"Figures are nerfstudio's own evaluation of the checkpoint on the test views: {_test_views(settings)}.\n",
        *(f"* `{name}`: {METHODS[name].title}" for name in METHODS if any(cell["method"] == name for cell in cells)),
        "",
    ]
    return "\n".join(lines)


def _test_views(settings: dict[str, Any]) -> str:
    if "split_files" in settings:
        return "those of the split files"
    if settings.get("split_rule") == "test-first":
        return "every 8th photograph"
    return "every 8th of the views that are no references, or those of them that a capture lists as its own"


def _figures(cells: Sequence[Cell], methods: Sequence[str]) -> str:
    rows = []
    for views in sorted({cell["views"] for cell in cells}):
        of_views = [cell for cell in cells if cell["views"] == views]
        for scene in sorted({cell["scene"] for cell in of_views}):
            of_scene = [cell for cell in of_views if cell["scene"] == scene]
            rows.append([scene, str(views), *(_scores(_of(of_scene, method)) for method in methods)])
        shared = shared_cells(of_views, methods)
        count = len({cell["scene"] for cell in shared})
        rows.append([f"**mean of {count}**", str(views), *(_mean_scores(_of(shared, method)) for method in methods)])
    return text_table(["scene", "views", *methods], rows)


def _gains(cells: Sequence[Cell], methods: Sequence[str]) -> str:
    """Gains over the baselines, of splats and of their repaired renders, each over the places that it has itself."""
    shared = shared_cells(cells, methods)
    baselines = [name for name in BASELINES if name in methods]
    if not shared or not baselines:
        return f"No gain to report: needs cells of {' or '.join(BASELINES)} and of another method at the same place.\n"
    repaired = [{**cell, "method": _name_repaired(cell["method"])} for cell in repaired_cells(shared)]
    names = [name for method in methods for name in (method, _name_repaired(method))]
    header = ["views", "method", *(f"over {name}: PSNR / SSIM / LPIPS" for name in baselines)]
    header.append(f"worst and best scene over {baselines[-1]}: PSNR")
    with_share = CEILING in methods and "geometry" in methods
    if with_share:
        header.append("share of the oracle's PSNR gain over geometry")
    rows = []
    for views in [*sorted({cell["views"] for cell in shared}), None]:
        group = [cell for cell in [*shared, *repaired] if views is None or cell["views"] == views]
        for method in names:
            own = _of(group, method)
            if not own:
                continue
            places = {_place(cell) for cell in own}
            same = [cell for cell in group if _place(cell) in places]
            gains = [_gain(own, _of(same, name)) if name != method else MISSING for name in baselines]
            extremes = _extremes(own, _of(same, baselines[-1])) if method != baselines[-1] else MISSING
            share = [_share(own, _of(same, "geometry"), _of(same, CEILING))] if with_share else []
            rows.append(["all" if views is None else str(views), method, *gains, extremes, *share])
    return text_table(header, rows)


def _name_repaired(method: str) -> str:
    return f"{method}, {REPAIRED}"


def _extremes(cells: Sequence[Cell], baseline: Sequence[Cell]) -> str:
    """Smallest and largest gain of a scene at one number of views, each the mean over its seeds."""
    before: dict[Any, list[float]] = {}
    after: dict[Any, list[float]] = {}
    for group, by_place in ((baseline, before), (cells, after)):
        for cell in group:
            by_place.setdefault((cell["scene"], cell["views"]), []).append(cell["psnr"])
    gains = sorted((mean(after[place]) - mean(before[place]), place) for place in after)
    return " to ".join(f"{gain:+.2f} ({scene} {views})" for gain, (scene, views) in (gains[0], gains[-1]))


def _repaired(cells: Sequence[Cell], repaired: Sequence[Cell]) -> str:
    """Repaired renders beside those of the same splats, by scene and number of views."""
    rows = []
    for method in sorted({cell["method"] for cell in repaired}):
        own = _of(repaired, method)
        places = {_place(cell) for cell in own}
        splats = [cell for cell in _of(cells, method) if _place(cell) in places]
        for views in sorted({cell["views"] for cell in own}):
            before, after = ([cell for cell in group if cell["views"] == views] for group in (splats, own))
            for scene in sorted({cell["scene"] for cell in after}):
                of_scene = ([cell for cell in group if cell["scene"] == scene] for group in (before, after))
                rows.append([method, scene, str(views), *map(_scores, of_scene), MISSING])
            means = _mean_scores(before), _mean_scores(after)
            rows.append([method, "**mean**", str(views), *means, _gain(after, before)])
    return text_table(["method", "scene", "views", "splats", "repaired", "gain"], rows)


def _shares(cells: Sequence[Cell], methods: Sequence[str]) -> str:
    """Share of the references' pixels with trusted depth, and of the test views' pixels that references see."""
    told = [cell for cell in cells if "seen_share" in cell]
    views = sorted({cell["views"] for cell in told})
    rows = []
    for method in methods:
        own = [[cell for cell in _of(told, method) if cell["views"] == k] for k in views]
        shares = [_percent(group, figure) for figure in ("depth_share", "seen_share") for group in own]
        rows.append([method, *shares, *(_flicker(_of(told, method), figure) for figure in (FLICKER, RENDER_FLICKER))])
    header = [f"{what}, {k} views" for what in ("trusted stereo depth", "seen by a reference") for k in views]
    header += ["frame to frame", "its renders"]
    note = (
        "\nTrusted stereo depth: share of the reference photographs' pixels. Seen by a reference: share of the test views' pixels "
        "that, put at the depth that the splats show there, at least one reference sees at the same depth. Frame to frame: mean "
        "absolute difference of colours in [0, 1] between what is fed back and the frame before, where both show the same "
        "surface; the same of the renders that it was made from.\n"
    )
    return text_table(["method", *header], rows) + note


def _flicker(cells: Sequence[Cell], figure: str) -> str:
    told = [cell for cell in cells if figure in cell]
    return f"{mean_of(told, figure):.4f}" if told else MISSING


def _percent(cells: Sequence[Cell], figure: str) -> str:
    return f"{100 * mean_of(cells, figure):.0f} %" if cells else MISSING


def _cost(cells: Sequence[Cell], methods: Sequence[str]) -> str:
    rows = []
    for method in methods:
        own = _of(cells, method)
        peak = max(cell["peak_rss_mb"] for cell in own)
        rows.append([method, f"{mean(cell['wall_s'] for cell in own):.0f}", f"{peak:.0f}"])
    note = (
        "\nSeconds are those of training: its own part and, for methods that continue `geometry` from before the first round, "
        "the shared first stage, which is trained once. Evaluation and imports are left out. Cells run side by side, each on "
        "its share of the cores.\n"
    )
    return text_table(["method", "seconds", "largest peak memory, MiB"], rows) + note


def _of(cells: Sequence[Cell], method: str) -> list[Cell]:
    return [cell for cell in cells if cell["method"] == method]


def _scores(cells: Sequence[Cell]) -> str:
    """Mean over the seeds of one scene, with the spread of PSNR where there are several."""
    if not cells:
        return MISSING
    spread = f" ± {stdev(cell['psnr'] for cell in cells):.2f}" if len(cells) > 1 else ""
    return as_scores((mean(cell[figure] for cell in cells) for figure in FIGURES), spread)


def _mean_scores(cells: Sequence[Cell]) -> str:
    if not cells:
        return MISSING
    return f"**{as_scores(mean_of(cells, figure) for figure in FIGURES)}**"


def _gain(cells: Sequence[Cell], baseline: Sequence[Cell]) -> str:
    psnr, ssim, lpips = (_mean_over_places(cells, figure) - _mean_over_places(baseline, figure) for figure in FIGURES)
    return f"{psnr:+.2f} / {ssim:+.3f} / {lpips:+.3f}"


def _share(cells: Sequence[Cell], baseline: Sequence[Cell], ceiling: Sequence[Cell]) -> str:
    share = share_of_ceiling(*(_mean_over_places(group, "psnr") for group in (cells, baseline, ceiling)))
    return MISSING if share is None else f"{100 * share:.0f} %"


def _mean_over_places(cells: Sequence[Cell], figure: str) -> float:
    views = sorted({cell["views"] for cell in cells})
    return mean(mean_of([cell for cell in cells if cell["views"] == k], figure) for k in views)


def as_scores(figures: Iterable[float], spread: str = "") -> str:
    """PSNR, SSIM and LPIPS as every table writes them; the spread is that of PSNR."""
    psnr, ssim, lpips = figures
    return f"{psnr:.2f}{spread} / {ssim:.3f} / {lpips:.3f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [_row(header), _row(["---"] * len(header)), *map(_row, rows)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
