"""Training of the depth network: depth of splats trained on all photographs, reference sets drawn from them, and the fit."""
