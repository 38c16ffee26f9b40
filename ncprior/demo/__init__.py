"""Demonstration: the prior hole of a small VAE, closed by `improve`."""

from ncprior.demo.arms import ARMS, Generation, draw_arms, in_batches
from ncprior.demo.datasets import Labelled, digits, read_images, split
from ncprior.demo.networks import VAE, Classifier
from ncprior.demo.pictures import discriminant_axes, plot_latents, plot_samples
from ncprior.demo.run import run_demo

__all__ = [
    "ARMS",
    "VAE",
    "Classifier",
    "Generation",
    "Labelled",
    "digits",
    "discriminant_axes",
    "draw_arms",
    "in_batches",
    "plot_latents",
    "plot_samples",
    "read_images",
    "run_demo",
    "split",
]
