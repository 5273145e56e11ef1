"""The store: the states and histories of people, on a disk or in an object store."""

from mta.store.store import Session, Store

__all__ = ["Session", "Store"]
