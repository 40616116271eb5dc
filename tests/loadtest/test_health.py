"""Whether the generator notices that it, and not the server, sets the figures."""

from __future__ import annotations

import asyncio
import gc
import time

from florence2_loadtest.health import Watch, find_bottleneck, quiet_collector


def test_an_idle_generator_is_no_bottleneck() -> None:
    assert find_bottleneck(cpu_share=0.3, lag_p99_s=0.002, slip_p99_s=0.003, latency_p50_s=0.05) is None


def test_a_full_processor_is_named() -> None:
    assert "95% of a processor" in str(find_bottleneck(0.95, 0.001, 0.001, 1.0))


def test_a_late_loop_matters_in_comparison_with_the_latency() -> None:
    assert "30 ms late" in str(find_bottleneck(0.3, 0.030, 0.0, 0.1))
    assert find_bottleneck(0.3, 0.030, 0.0, 1.0) is None


def test_late_sending_is_named() -> None:
    assert "sent up to 300 ms late" in str(find_bottleneck(0.3, 0.001, 0.3, 0.1))


def test_a_loop_that_is_kept_busy_is_found_out() -> None:
    async def work() -> None:
        watch = Watch()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            busy_until = time.thread_time() + 0.05
            while time.thread_time() < busy_until:
                pass
            await asyncio.sleep(0)
        generator = watch.stop([0.01] * 100)
        assert generator.loop_lag_p99_s >= 0.03
        assert generator.bottleneck is not None
        assert "late" in generator.bottleneck

    asyncio.run(work())


def test_one_long_stall_is_found_out() -> None:
    """It meets every request that comes meanwhile, though the loop is late but once."""

    async def work() -> None:
        watch = Watch()
        await asyncio.sleep(1.0)
        time.sleep(0.5)
        await asyncio.sleep(0.5)
        generator = watch.stop([0.2] * 100)
        assert generator.loop_lag_p99_s >= 0.3
        assert "its event loop ran" in str(generator.bottleneck)

    asyncio.run(work())


def test_a_stall_that_lasts_until_the_end_is_found_out() -> None:
    async def work() -> None:
        watch = Watch()
        await asyncio.sleep(0.1)
        time.sleep(0.5)
        assert watch.stop([0.2] * 100).loop_lag_p99_s >= 0.4

    asyncio.run(work())


def test_slips_are_told_whole_and_judged_by_the_generators_own() -> None:
    async def work() -> None:
        others, own = Watch(), Watch()
        await asyncio.sleep(0.3)
        generator = others.stop([1.0] * 10, [5.0] * 10, [0.0] * 10)
        assert generator.slip_p99_s == 5.0
        assert "requests were sent" not in str(generator.bottleneck)
        assert "requests were sent" in str(own.stop([1.0] * 10, [5.0] * 10, [5.0] * 10).bottleneck)

    asyncio.run(work())


def test_the_collector_is_as_before_afterwards() -> None:
    before = gc.get_threshold()
    with quiet_collector():
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold()[0] > before[0]
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)
