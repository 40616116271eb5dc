"""Making load: clients that wait for their answers (closed), or requests that come by a schedule (open)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from florence2_loadtest.health import Watch, quiet_collector
from florence2_loadtest.results import Generator, Record, Window
from florence2_loadtest.scenario import ClosedLoad
from florence2_loadtest.schedules import Schedule
from florence2_loadtest.sender import Sender
from florence2_loadtest.stability import fewest_answers, is_stable
from florence2_loadtest.transport import CONNECTION, Transport
from florence2_loadtest.workload import Workload

OnRecord = Callable[[Record], None]
Mark = Callable[[], Awaitable[None]]

MAX_IN_FLIGHT = 1000
_AFTER_NO_CONNECTION_S = 0.1  # a client that can't connect would else do nothing but try


@dataclass(slots=True)
class Measured:
    """What was measured of one load.

    Attributes:
        mode: Closed or open loop.
        records: The measured requests: none of the warm-up, nor those in flight when a closed loop ended, and of a
            stable one only those of the windows that agree.
        seconds: How long it took to get them answered.
        generator: How the generator fared.
        windows: Of a closed loop, all of them.
        first_window: Of a closed loop: the window with which `records` begin.
        stable: Of a closed loop: whether its last windows agree.
        concurrency: Of a closed loop.
        rate: Planned requests a second of an open loop.
        held_back: Requests of an open loop that fell due while as many as allowed were in flight.
    """

    mode: Literal["closed", "open"]
    records: list[Record]
    seconds: float
    generator: Generator
    windows: list[Window] = field(default_factory=list)
    first_window: int = 0
    stable: bool | None = None
    concurrency: int | None = None
    rate: float | None = None
    held_back: int = 0


async def run_closed(
    transport: Transport,
    workload: Workload,
    load: ClosedLoad,
    concurrency: int,
    timeout_s: float,
    retries: int,
    on_record: OnRecord | None = None,
    *,
    mark: Mark | None = None,
) -> Measured:
    """Keeps `concurrency` requests in flight until windows agree, or bounds are reached.

    A request belongs to the window in which its answer came. What is in flight at the end is waited for, and left out;
    so are the windows before those that agree, as the service was still settling in them.

    Args:
        transport: With as many connections.
        workload: What is sent, in order.
        load: Windows and bounds.
        concurrency: Clients.
        timeout_s: For one request, its retries included.
        retries: How often a request is sent again.
        on_record: Called with each request that is through, those of the warm-up included.
        mark: Awaited at the beginning of each window, and when measuring ends; clients go on meanwhile, if they may.
    """
    clients = _Clients(Sender(transport, timeout_s, retries), workload, on_record)
    with quiet_collector():
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(clients.work())
            await asyncio.sleep(load.warmup_s)
            await clients.wait_for_turns(concurrency)
            if mark is not None:
                await mark()
            watch = Watch()
            records, windows, first, stable = await _measure_windows(clients, load, concurrency, mark)
            generator = watch.stop(known(record.service_s for record in records))
            if mark is not None:
                await mark()
            clients.stop()
    seconds = sum(window.seconds for window in windows[first:])
    return Measured("closed", records, seconds, generator, windows, first, stable, concurrency)


async def run_open(
    transport: Transport,
    workload: Workload,
    schedule: Schedule,
    timeout_s: float,
    retries: int,
    grace_s: float = 10.0,
    on_record: OnRecord | None = None,
    *,
    max_in_flight: int = MAX_IN_FLIGHT,
    mark: Mark | None = None,
) -> Measured:
    """Sends requests when `schedule` says so, whatever was answered by then.

    Args:
        transport: With `max_in_flight` connections.
        workload: What is sent, in order.
        schedule: When.
        timeout_s: For one request from when it is sent, its retries included.
        retries: How often a request is sent again.
        grace_s: How long after the schedule's end what is late may still be sent; the rest stays unsent.
        on_record: Called with each request that is through, and with those that stay unsent.
        max_in_flight: Bound on unanswered requests. It is the only thing that sending waits for.
        mark: Awaited before and after.
    """
    sender = Sender(transport, timeout_s, retries)
    records = [
        Record(index, workload[index].task, float(start), request_bytes=workload[index].size)
        for index, start in enumerate(schedule.starts)
    ]
    if mark is not None:
        await mark()
    with quiet_collector():
        watch = Watch()
        sender.begin()
        held_back = await _dispatch(
            sender, workload, records, schedule.seconds + grace_s, max_in_flight, on_record or _ignore
        )
        # Until the last answer, not until what never came was given up: that would make all the others look slower.
        seconds = max([schedule.seconds, *known(record.done_s for record in records if record.is_ok)])
        generator = watch.stop(
            known(record.service_s for record in records),
            known(record.slip_s for record in records),
            known(0.0 if record.index in held_back else record.slip_s for record in records),
        )
    if mark is not None:
        await mark()
    for record in records:
        if record.sent_s is None and on_record is not None:
            on_record(record)
    return Measured("open", records, seconds, generator, rate=schedule.rate, held_back=len(held_back))


class _Clients:
    """The clients of a closed loop."""

    def __init__(self, sender: Sender, workload: Workload, on_record: OnRecord | None) -> None:
        self._sender, self._workload, self._on_record = sender, workload, on_record
        self._next = 0
        self._goes_on = True
        self._turns = asyncio.Semaphore(0)
        self._enough = asyncio.Event()
        self._wanted: int | None = None
        self.done: list[Record] = []
        self.now = sender.now

    def stop(self) -> None:
        """Has each client end after its request in flight."""
        self._goes_on = False

    async def wait_for_turns(self, count: int) -> None:
        """Waits until `count` clients have had their first request done."""
        for _ in range(count):
            await self._turns.acquire()

    def forget(self, wanted: int | None) -> None:
        """Forgets the requests until now; from now on `wanted` are enough."""
        self.done = []
        self._wanted = wanted

    async def wait(self, seconds: float) -> bool:
        """Waits for so long, or until enough requests are done; returns whether they are."""
        try:
            async with asyncio.timeout(seconds):
                await self._enough.wait()
        except TimeoutError:
            return False
        return True

    async def work(self) -> None:
        """Sends one request after the other."""
        is_first = True
        while self._goes_on and not self._enough.is_set():
            prepared = self._workload[self._next]
            record = Record(self._next, prepared.task, self.now(), request_bytes=prepared.size)
            self._next += 1
            await self._sender.send(prepared, record)
            record.planned_s = record.sent_s or record.planned_s
            self.done.append(record)
            if self._wanted is not None and len(self.done) >= self._wanted:
                self._enough.set()
            if self._on_record is not None:
                self._on_record(record)
            if is_first:
                self._turns.release()
                is_first = False
            if record.status == CONNECTION:
                await asyncio.sleep(_AFTER_NO_CONNECTION_S)


async def _measure_windows(
    clients: _Clients, load: ClosedLoad, concurrency: int, mark: Mark | None
) -> tuple[list[Record], list[Window], int, bool]:
    """Returns the requests that count, all windows, the first of them that counts, and whether the last ones agree."""
    fewest = fewest_answers(concurrency, load.tolerance)
    windows: list[Window] = []
    clients.forget(load.max_requests)
    began = clients.now()
    cuts = [(0, began)]  # between windows: requests done, and when
    stable = is_enough = False
    while len(windows) < load.max_windows and not stable and not is_enough:
        if windows and mark is not None:
            await mark()
        is_enough = await clients.wait(began + (len(windows) + 1) * load.window_s - clients.now())
        until, done = clients.now(), clients.done[: load.max_requests]
        if is_enough:
            until = done[-1].done_s or until
            if windows and until - cuts[-1][1] < load.window_s / 2:
                # A rest would be judged as if it were a window: it goes to the last one.
                windows.pop()
                cuts.pop()
        first, since = cuts[-1]
        windows.append(_window(done[first:], until - since))
        cuts.append((len(done), until))
        stable = is_stable(windows, stable_windows=load.stable_windows, tolerance=load.tolerance, fewest=fewest)
    kept = len(windows) - load.stable_windows if stable and not is_enough else 0
    return clients.done[cuts[kept][0] : cuts[-1][0]], windows, kept, stable


def _window(records: list[Record], seconds: float) -> Window:
    latencies = known(record.latency_s for record in records if record.is_ok)
    seconds = max(seconds, 1e-9)
    return Window(
        seconds=seconds,
        throughput=len(latencies) / seconds,
        latency_s=sum(latencies) / len(latencies) if latencies else 0.0,
    )


async def _dispatch(
    sender: Sender,
    workload: Workload,
    records: list[Record],
    deadline_s: float,
    max_in_flight: int,
    on_record: OnRecord,
) -> set[int]:
    """Sends what is planned when it is due, and waits for the answers; returns which had to wait for room."""
    room = asyncio.Semaphore(max_in_flight)
    held_back: set[int] = set()
    no_room_until = 0.0

    async def send(record: Record) -> None:
        try:
            await sender.send(workload[record.index], record)
        finally:
            room.release()
        on_record(record)

    async with asyncio.TaskGroup() as group:
        for record in records:
            # Also where it is late: what was begun before has to get its turn.
            await asyncio.sleep(max(0.0, record.planned_s - sender.now()))
            if room.locked():
                held_back.add(record.index)
                try:
                    async with asyncio.timeout(deadline_s - sender.now()):
                        await room.acquire()
                except TimeoutError:
                    break
                no_room_until = sender.now()
            else:
                await room.acquire()
                if record.planned_s < no_room_until:
                    held_back.add(record.index)
            if sender.now() > deadline_s:
                break
            group.create_task(send(record))
    return held_back


def known(values: Iterable[float | None]) -> list[float]:
    """Returns the times that there are."""
    return [value for value in values if value is not None]


def _ignore(record: Record) -> None: ...
