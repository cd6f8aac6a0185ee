"""3DGS-Enhancer for nerfstudio: splats trained on few photographs, repaired by a video diffusion prior."""
