"""Settings of stereo depth. Apart from it, so that nerfstudio reads them without loading anything."""

from dataclasses import dataclass, field


@dataclass
class SweepConfig:
    """Plane sweep of one reference view."""

    max_planes: int = 128
    """Most planes, evenly spaced in inverse depth; fewer where they would lie less than half a pixel apart."""
    min_planes: int = 32
    """Fewest planes."""
    windows_px: tuple[int, ...] = (5, 11)
    """Sides of the square windows whose correlations are averaged: small ones keep edges, large ones carry weak texture."""
    texture_floor: float = 0.02
    """Standard deviation of grey in [0, 1] below which a window tells nothing."""
    colour_share: float = 0.3
    """Share of the colour's difference in the cost; the rest is correlation."""
    colour_limit: float = 0.15
    """Mean absolute difference of colours in [0, 1] that costs 1; larger ones cost no more."""
    small_step_penalty: float = 0.01
    """Penalty of neighbours one plane apart (Hirschmueller's P1; costs lie in [0, 1])."""
    large_step_penalty: float = 0.15
    """Penalty of neighbours further apart (P2), where the picture is flat; less across edges."""
    edge: float = 0.03
    """Difference of grey between neighbours at which the large penalty is halved."""


@dataclass
class RefineConfig:
    """Slanted PatchMatch of one reference view."""

    iterations: int = 3
    """Rounds of candidates: neighbours' planes, then random changes."""
    patch_radius: int = 4
    """Half side of the patch in pixels."""
    patch_step: int = 2
    """Pixels between samples of the patch."""
    colour_sigma: float = 0.08
    """Difference of grey at which a sample of the patch loses most of its weight (adaptive support)."""
    texture_floor: float = 0.02
    """As in the sweep."""
    smoothness: float = 0.05
    """Cost of a plane that lies one step of the sweep's planes away from what its neighbours' planes say, at most that."""


@dataclass
class StereoConfig:
    """Multi-view stereo between the reference views."""

    sweep_px: int = 240
    """Long side of the pictures in the plane sweep."""
    refine_px: int = 320
    """Long side of the pictures in the refinement, and of the depth maps."""
    max_sources: int = 4
    """Most other views that a view is matched with."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """First depth."""
    refine: RefineConfig = field(default_factory=RefineConfig)
    """Slanted refinement; 0 iterations leave it out."""
    depth_network: bool = True
    """Whether a bundled network says what depth is likely where the photographs do not agree; else random points there are
    uniform in the logarithm of depth."""
    max_reprojection_px: float = 1.5
    """Two views agree on a pixel if it comes back within this distance through the other view's depth."""
    max_relative_depth: float = 0.02
    """Largest relative difference of the two depths that agree."""
    max_cost: float = 0.35
    """Matching cost ((1 - correlation) / 2) above which a pixel has no depth."""
    min_agreeing: int = 1
    """Other views that must agree."""
    nearer: float = 0.8
    """The sweep begins at this multiple of the nearest trusted triangulated depth."""
    farther: float = 1.5
    """And ends at this multiple of the farthest."""
