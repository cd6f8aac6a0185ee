"""Procedural scenes to train on: arrangements of textured solids, seen by posed cameras, with exact depth."""
