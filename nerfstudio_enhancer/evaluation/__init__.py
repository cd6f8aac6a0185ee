"""The benchmark: which methods are compared on which cells, with nerfstudio's own training and evaluation."""
