"""Names of what is measured, apart from the modules that measure it, which import torch."""

REPAIRED = "repaired"
"""Output of the model: a render that the prior has repaired. `repaired_*` are the figures that evaluation reads from it."""
FLICKER, RENDER_FLICKER = "frame_difference", "render_frame_difference"
"""Keys of a round's file and of the results: mean over the round's clips of `warping.frame_difference`, of its frames and of
their renders."""
