"""Many adapters on one model: :class:`AdapterPool` serves them, one or a different one per sample."""

from efft.pool.adapter_pool import AdapterPool

__all__ = ["AdapterPool"]
