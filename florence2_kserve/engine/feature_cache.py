"""Image features kept on the device, so that an image asked about again isn't encoded again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch

from florence2_kserve.engine.metrics import EngineMetrics
from florence2_kserve.processor import ImageSettings


def feature_key(image_key: bytes, image: ImageSettings, fingerprint: str) -> bytes:
    """Returns what image features depend on, as one hash.

    Args:
        image_key: Hash of the image's content, after resizing.
        image: Size and normalisation.
        fingerprint: Hash of weights and configuration.
    """
    settings = (image.height, image.width, image.rescale_factor, tuple(image.mean), tuple(image.std), fingerprint)
    # repr of floats is exact; the image's key comes last, so that its bytes can't be read as settings.
    return hashlib.sha256(repr(settings).encode() + b"\0" + image_key).digest()


class FeatureCache:
    """Features by key, least recently used out first.

    One thread uses it, the engine's.

    Args:
        max_bytes: Bound on the bytes of all features kept; 0 keeps none.
        metrics: Where hits, misses, evictions and the bytes kept are counted.
    """

    def __init__(self, max_bytes: int, metrics: EngineMetrics) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._bytes = 0
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # most recently used last

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key: bytes) -> torch.Tensor | None:
        """Returns the features kept under `key`, or None."""
        features = self._features.get(key)
        if features is None:
            self._metrics.feature_cache_misses.add()
            return None
        self._metrics.feature_cache_hits.add()
        self._features.move_to_end(key)
        return features

    def put(self, key: bytes, features: torch.Tensor) -> None:
        """Keeps a copy of `features`, in place of what was under `key`.

        Where the device has no memory for the copy, everything is forgotten: requests need the room more.

        Args:
            key: As returned by ``feature_key``.
            features: Of one image; larger than the whole bound, they are not kept.
        """
        self._forget(key)
        if 0 < features.nbytes <= self._max_bytes:
            while self._bytes + features.nbytes > self._max_bytes:
                self._evict()
            try:
                # A view would keep the whole batch alive that it was cut from.
                self._features[key] = features.detach().clone(memory_format=torch.contiguous_format)
                self._bytes += features.nbytes
            except torch.OutOfMemoryError:
                while self._features:
                    self._evict()
        self._set_gauges()

    def clear(self) -> None:
        """Forgets all features."""
        self._features.clear()
        self._bytes = 0
        self._set_gauges()

    def _evict(self) -> None:
        self._forget(next(iter(self._features)))
        self._metrics.feature_cache_evictions.add()

    def _forget(self, key: bytes) -> None:
        features = self._features.pop(key, None)
        if features is not None:
            self._bytes -= features.nbytes

    def _set_gauges(self) -> None:
        self._metrics.feature_cache_bytes.set(self._bytes)
        self._metrics.feature_cache_entries.set(len(self._features))
