"""Names and sizes of published video priors. Light: no network library is imported."""

SVD_REPOSITORY = "stabilityai/stable-video-diffusion-img2vid-xt"
"""Hub name of Stable Video Diffusion, which the paper fine-tunes; also where the other parts of a lone UNet come from."""
LAYOUT_A_FRAMES = 26
"""Frames of a clip of the authors' pose-conditioned weights; their config.json repeats SVD's 25."""
LAYOUT_B_FRAMES = 25
"""Frames of a clip of Stable Video Diffusion and of the paper, references included."""
LAYOUT_A_SIZE = (512, 960)
LAYOUT_B_SIZE = (512, 512)
"""Height and width in pixels that the paper's layouts were trained on."""
