"""Checks of a source, as one call for the tests of an adapter."""

from ncprior.testing.check import check_source

__all__ = ["check_source"]
