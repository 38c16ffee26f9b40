"""Adapters: one file per family of pretrained models, seen as latent sources."""
