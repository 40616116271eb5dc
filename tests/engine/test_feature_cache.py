from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch

from florence2_kserve.engine.feature_cache import FeatureCache, feature_key
from florence2_kserve.engine.metrics import EngineMetrics
from florence2_kserve.processor import ImageSettings

ROW = 4 * 8 * 2  # bytes of a tensor made by `features`


def features(value: float, rows: int = 1) -> torch.Tensor:
    return torch.full((4, 8 * rows), value, dtype=torch.float16)


def cache_of(rows: int) -> tuple[FeatureCache, EngineMetrics]:
    metrics = EngineMetrics()
    return FeatureCache(rows * ROW, metrics), metrics


def test_what_was_put_comes_back():
    cache, metrics = cache_of(2)
    assert cache.get(b"a") is None
    cache.put(b"a", features(1))
    found = cache.get(b"a")
    assert found is not None
    assert torch.equal(found, features(1))
    assert found.dtype == torch.float16
    assert (metrics.feature_cache_hits.value, metrics.feature_cache_misses.value) == (1, 1)
    assert (metrics.feature_cache_entries.value, metrics.feature_cache_bytes.value) == (1, ROW)


def test_the_least_recently_used_goes_first():
    cache, metrics = cache_of(3)
    for name in (b"a", b"b", b"c"):
        cache.put(name, features(1))
    cache.get(b"a")
    cache.put(b"d", features(2))  # b was used longest ago
    assert metrics.feature_cache_evictions.value == 1
    assert [name for name in (b"a", b"b", b"c", b"d") if cache.get(name) is not None] == [b"a", b"c", b"d"]
    cache.put(b"e", features(3, rows=2))  # needs the room of two: a and c go
    assert metrics.feature_cache_evictions.value == 3
    assert [name for name in (b"a", b"b", b"c", b"d", b"e") if cache.get(name) is not None] == [b"d", b"e"]


def test_putting_again_replaces_and_counts_no_eviction():
    cache, metrics = cache_of(2)
    cache.put(b"a", features(1))
    cache.put(b"a", features(2, rows=2))
    assert len(cache) == 1
    assert metrics.feature_cache_bytes.value == 2 * ROW
    assert metrics.feature_cache_evictions.value == 0
    found = cache.get(b"a")
    assert found is not None
    assert torch.equal(found, features(2, rows=2))


def test_features_larger_than_the_bound_are_not_kept_and_push_nothing_out():
    cache, metrics = cache_of(2)
    cache.put(b"a", features(1))
    cache.put(b"large", features(1, rows=3))
    assert cache.get(b"large") is None
    assert cache.get(b"a") is not None
    assert metrics.feature_cache_evictions.value == 0


def test_a_bound_of_zero_keeps_nothing():
    cache, metrics = cache_of(0)
    cache.put(b"a", features(1))
    cache.put(b"empty", torch.empty(0))
    assert (len(cache), cache.get(b"a"), cache.get(b"empty")) == (0, None, None)
    assert (metrics.feature_cache_bytes.value, metrics.feature_cache_evictions.value) == (0, 0)


@pytest.mark.parametrize("cut", [lambda batch: batch[1], lambda batch: batch[1].t()], ids=["row", "transposed row"])
def test_a_view_does_not_keep_its_batch(cut):
    cache, metrics = cache_of(1000)
    batch = torch.arange(8 * 4 * 8, dtype=torch.float16).view(8, 4, 8)
    row = cut(batch)
    expected = row.clone()
    cache.put(b"a", row)
    batch.zero_()
    found = cache.get(b"a")
    assert found is not None
    assert found.is_contiguous()
    assert torch.equal(found, expected)
    assert found.untyped_storage().nbytes() == metrics.feature_cache_bytes.value == ROW


def test_no_memory_for_a_copy_frees_what_is_kept(monkeypatch):
    cache, metrics = cache_of(5)
    cache.put(b"a", features(1))
    cache.put(b"b", features(2))

    def clone(self, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "clone", clone)
        cache.put(b"c", features(3))
    assert (len(cache), metrics.feature_cache_bytes.value, metrics.feature_cache_evictions.value) == (0, 0, 2)
    cache.put(b"c", features(3))
    assert cache.get(b"c") is not None


def test_clear_forgets_all():
    cache, metrics = cache_of(2)
    cache.put(b"a", features(1))
    cache.clear()
    assert (len(cache), cache.get(b"a")) == (0, None)
    assert (metrics.feature_cache_bytes.value, metrics.feature_cache_entries.value) == (0, 0)
    cache.put(b"a", features(1, rows=2))
    assert len(cache) == 1


def test_any_sequence_of_calls_agrees_with_a_plain_model_and_stays_within_bounds():
    """The model: an ordered list of (key, size), searched from its end."""
    rng = random.Random(7)
    cache, metrics = cache_of(5)
    model: OrderedDict[bytes, int] = OrderedDict()
    evictions = 0
    for step in range(3000):
        key = bytes([rng.randrange(9)])
        if rng.random() < 0.5:
            found = cache.get(key)
            assert (None if found is None else found.nbytes) == model.get(key)
            if key in model:
                model.move_to_end(key)
        else:
            rows = rng.choice([1, 1, 2, 3, 6])
            cache.put(key, features(step % 100, rows))
            model.pop(key, None)
            if rows <= 5:
                while sum(model.values()) + rows * ROW > 5 * ROW:
                    model.popitem(last=False)
                    evictions += 1
                model[key] = rows * ROW
        held = metrics.feature_cache_bytes.value
        assert held == sum(model.values()) <= 5 * ROW
        assert len(cache) == metrics.feature_cache_entries.value == len(model)
    assert metrics.feature_cache_evictions.value == evictions > 100


IMAGE = ImageSettings(
    height=64,
    width=48,
    resample=3,
    rescale_factor=1 / 255,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    image_seq_length=13,
)


def test_the_key_depends_on_all_that_features_depend_on():
    changed = [
        replace(IMAGE, height=48, width=64),
        replace(IMAGE, rescale_factor=1 / 256),
        replace(IMAGE, mean=(0.485, 0.456, 0.4061)),
        replace(IMAGE, std=(0.229, 0.225, 0.224)),
    ]
    keys = [feature_key(b"image", image, "weights") for image in (IMAGE, *changed)]
    keys += [feature_key(b"image2", IMAGE, "weights"), feature_key(b"image", IMAGE, "weights2")]
    keys += [feature_key(b"", IMAGE, "weights"), feature_key(b"\0image", IMAGE, "weights")]
    assert len(set(keys)) == len(keys)
    assert feature_key(b"image", replace(IMAGE), "weights") == keys[0]
    # How a picture was resized shows in its pixels, and so in the image's own key.
    assert feature_key(b"image", replace(IMAGE, resample=2), "weights") == keys[0]
