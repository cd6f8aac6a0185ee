"""Paired training data: what a run of sparse splats renders, beside the photographs of the same cameras."""
