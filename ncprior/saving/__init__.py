"""Saving of trained tensors: safetensors and JSON, on disk or on the Hugging Face Hub."""

from ncprior.saving.heads import inspect
from ncprior.saving.tensors import load_tensors, read_metadata, save_tensors, write_atomically

__all__ = [
    "inspect",
    "load_tensors",
    "read_metadata",
    "save_tensors",
    "write_atomically",
]
