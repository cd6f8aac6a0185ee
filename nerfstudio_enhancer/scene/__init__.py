"""Step 1: photographs and poses of a capture, split into reference, test and unused views."""
