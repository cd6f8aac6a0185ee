"""Depth from the reference photographs alone: multi-view stereo with known poses, in PyTorch on any device."""
