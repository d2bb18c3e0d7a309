"""Serve many adapters with one model (:class:`AdapterPool`)."""

from efft.pool.adapter_pool import AdapterPool

__all__ = ["AdapterPool"]
