"""Paired data for training the prior: renders of sparse splats beside the photographs taken at the same cameras."""
