"""All plots of reports; each is a ``Plot`` that draws itself alone or as a part of a page."""

from florence2_loadtest.plots.autoscale import replica_timeline

__all__ = ["replica_timeline"]
