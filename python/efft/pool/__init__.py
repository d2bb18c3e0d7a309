"""Serve many adapters with one model (:class:`AdapterPool`), or train several at once (:class:`SharedBackbone`)."""

from efft.pool.adapter_pool import AdapterPool
from efft.pool.shared_backbone import SharedBackbone

__all__ = ["AdapterPool", "SharedBackbone"]
