"""Runs the model for the requests in flight: image tower, text encoder, decoder steps.

Here is the bookkeeping that the pure functions of ``beam.py`` and ``decoder.py`` leave out: which lane a request
has, which pages of keys and values belong to it, and in which order the rows of a step are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from florence2_kserve.engine import beam
from florence2_kserve.engine.beam import BeamState
from florence2_kserve.engine.capture import Capture, capture_step
from florence2_kserve.engine.decoder import Decoder, KeyValueStore, StepInputs
from florence2_kserve.engine.metrics import EngineMetrics
from florence2_kserve.engine.scheduler import Job
from florence2_kserve.engine.vision import ImageEncoder, VisionBackend
from florence2_kserve.processor import ImageSettings
from florence2_kserve.weights import LoadedModel

PAGE_ENTRIES = 48  # E: 16 steps of 3 beams
MAX_PROMPT_TOKENS = 512  # room for a prompt beside the image; checkpoints with 4,096 positions would take all memory
_WIDTH_STEP = 64  # token buffers grow by this

Array = np.ndarray[Any, Any]


@dataclass(slots=True, eq=False)
class Lane:
    """A request that is being decoded."""

    job: Job
    slot: int
    pages: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Group:
    """Searches with equally many beams that are equally far begun, in the order of the state.

    Attributes:
        lanes: Their lanes.
        state: Their search.
        prompt: First tokens, which their next step feeds; empty once that has happened.
    """

    lanes: list[Lane]
    state: BeamState
    prompt: tuple[int, ...] = ()

    @property
    def num_beams(self) -> int:
        return self.state.num_beams


@dataclass(slots=True)
class _Layout:
    """Where the rows of a step are, as long as nobody comes or goes.

    The rows whose logits are wanted come first, group by group in the order of ``Runner._groups``: all beams of
    begun searches, the prompt's last token of new ones. What new ones feed before that comes last.
    """

    row_slots: Array  # [R]
    row_queries: Array  # [R]
    is_prompt: Array  # [R]
    query_rows: Array  # [C*Q]
    writes: Array  # [C], entries that a step adds to each lane
    num_logits: int
    num_queries: int
    cross_length: int
    cross_mask: torch.Tensor | None
    slots: list[torch.Tensor]  # for each group, int64 [Q]


@dataclass(slots=True, frozen=True, eq=False)
class Outcome:
    """How a search ended.

    Attributes:
        job: Whose it was.
        tokens: int64 [T], start token first.
        token_logprobs: float32 [T].
        score: Summed log-probabilities / generated length ** length_penalty.
        is_broken: The model gave NaN; the rest means nothing.
    """

    job: Job
    tokens: Array
    token_logprobs: Array
    score: float
    is_broken: bool


@dataclass(slots=True)
class _Ending:
    """What a step leaves of a group: `places` have ended with `outcomes`, the others' state is `left`."""

    places: list[int]
    left: BeamState
    outcomes: list[Outcome]


class Runner:
    """The model and everything on its device.

    Attributes:
        is_intact: False after a step that failed when part of it was already taken over: then only ``reset`` helps.

    Args:
        loaded: The model.
        image: Image settings.
        metrics: Where work is counted.
        max_batch_size: Lanes.
        max_num_beams: Largest number of beams.
        max_tokens: Bound on the beams times tokens of all lanes together.
        vision_backend: See ``ImageEncoder``.
        compile_vision: See ``ImageEncoder``.
        decode_capture: How decoder steps are run, see ``capture_step``.

    Raises:
        ValueError: If image settings, backend or capture don't fit the model or device.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        image: ImageSettings,
        metrics: EngineMetrics,
        *,
        max_batch_size: int,
        max_num_beams: int,
        max_tokens: int,
        vision_backend: VisionBackend = "auto",
        compile_vision: bool = False,
        decode_capture: Capture = "off",
    ) -> None:
        self.images = ImageEncoder(loaded, image, backend=vision_backend, compile=compile_vision)
        self._metrics = metrics
        self._loaded = loaded
        self._settings = loaded.generation
        self._device = loaded.device
        self._decoder = Decoder(loaded.model)
        self._step: Callable[[StepInputs, KeyValueStore], torch.Tensor] = capture_step(
            self._decoder.step,
            decode_capture,
            self._device,
            max_logits=_bucket(max_batch_size * max_num_beams, 4),
        )
        self._bucketed = decode_capture != "off"
        self.max_prompt_tokens = min(loaded.max_source_positions - self.images.image_seq_length, MAX_PROMPT_TOKENS)

        per_lane = -(-(max_num_beams * loaded.max_target_positions + 2) // PAGE_ENTRIES)
        # Page 0 belongs to nobody: padding rows write there. Each lane may leave a page partly empty.
        pages = 1 + -(-max_tokens // PAGE_ENTRIES) + 2 * max_batch_size
        lanes = max_batch_size
        if self._bucketed:
            lanes, pages = _bucket(lanes, 4), _power_of_two(pages)
        self._store = KeyValueStore(
            self._decoder,
            lanes=lanes,
            cross_length=self.images.image_seq_length + self.max_prompt_tokens,
            pages=pages,
            entries=PAGE_ENTRIES,
            dtype=loaded.dtype,
            device=self._device,
        )
        queries = max(max_num_beams, 2)
        self._visible = torch.zeros(
            (max_batch_size, queries, per_lane * PAGE_ENTRIES), dtype=torch.bool, device=self._device
        )
        # By slot; kept on the host, where every length is known without asking the device.
        self._entries, self._lengths, self._max_lengths, self._num_pages, self._cross_lengths = (
            np.zeros(max_batch_size, dtype=np.int64) for _ in range(5)
        )
        self._lane_pages = np.zeros((max_batch_size, per_lane), dtype=np.int64)
        self._page_lanes, self._page_numbers = (np.zeros(pages, dtype=np.int64) for _ in range(2))
        self._free_pages = list(range(1, pages))  # a heap: low pages first, so that few are passed over
        self._is_used = np.zeros(pages, dtype=bool)
        self._slots: list[Lane | None] = []
        self._groups: list[_Group] = []
        self.is_intact = True
        self._true = torch.ones((), dtype=torch.bool, device=self._device)
        self._layout: _Layout | None = None

    @property
    def num_lanes(self) -> int:
        """Requests being decoded."""
        return sum(len(group.lanes) for group in self._groups)

    @torch.inference_mode()
    def encode_images(self, pixel_values: Sequence[Array]) -> torch.Tensor:
        """Encodes images: uint8 [H,W,3] each -> features [I,S,d]."""
        return self.images.encode(self._moved(np.stack(pixel_values)))

    @torch.inference_mode()
    def prefill(self, features: Sequence[torch.Tensor], jobs: Sequence[Job]) -> None:
        """Encodes prompts of equal length, each with its image, and lets the jobs take part in decoding.

        Args:
            features: [S,d] for each job.
            jobs: Not more than there are free lanes.
        """
        language = self._loaded.model.model.language_model
        input_ids = self._moved(np.stack([job.request.input_ids.astype(np.int64) for job in jobs]))
        # The text encoder scales its embeddings itself, if the checkpoint wants that.
        embeddings = torch.cat([torch.stack(list(features)), language.encoder.embed_tokens(input_ids)], dim=1)
        states = language.encoder(inputs_embeds=embeddings).last_hidden_state  # [b,S+L,d]
        slots = self._free_slots(len(jobs))
        self._decoder.write_cross(self._store, states, self._moved(slots))
        self._metrics.cross_kv_bytes.add(2 * len(self._decoder.layers) * states.numel() * states.element_size())
        self._cross_lengths[slots] = states.shape[1]
        self._add_lanes(jobs, slots)

    def remove(self, job: Job, *, scrub: bool = False) -> bool:
        """Drops a job that is being decoded; returns False if it isn't.

        Args:
            job: Which.
            scrub: Whether to clear what it held, if nobody knows whether that is sound.
        """
        for group in self._groups:
            for place, lane in enumerate(group.lanes):
                if lane.job is job:
                    if scrub:
                        self._store.scrub(lane.slot, lane.pages)
                    kept = [i for i in range(len(group.lanes)) if i != place]
                    self._drop(group, [place], group.state.select(self._moved(kept)))
                    return True
        return False

    def reset(self) -> list[Job]:
        """Drops all jobs that are being decoded and returns them."""
        jobs = self.jobs()
        for lane in (lane for group in self._groups for lane in group.lanes):
            self._store.scrub(lane.slot, lane.pages)
        self._free_pages = list(range(1, len(self._is_used)))
        self._is_used[:] = False
        self._slots, self._groups, self._layout = [], [], None
        self.is_intact = True
        return jobs

    def jobs(self) -> list[Job]:
        """Returns the jobs that are being decoded, in the order in which they were admitted."""
        jobs = [lane.job for group in self._groups for lane in group.lanes]
        return sorted(jobs, key=lambda job: job.admitted_at)

    def synchronize(self) -> None:
        """Waits until the device has done what it was told."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    def decode(self) -> list[Outcome]:
        """Takes every lane one token further and returns those that have ended; their lanes are free.

        Where it fails, nothing has changed but keys and values, which the next step writes again, unless
        `is_intact` says otherwise.
        """
        self._close_gaps()
        layout = self._layout = self._layout or self._arrange()
        self._take_pages(layout)
        inputs = self._step_inputs(layout)
        logits = self._step(inputs, self._store)
        steps, first = [], 0
        for group in self._groups:
            rows = len(group.lanes) * (1 if group.prompt else group.num_beams)
            steps.append(self._advance(group, logits[first : first + rows]))
            first += rows
        flags = torch.stack([torch.cat([s.done for s in steps]), torch.cat([s.is_broken for s in steps])]).cpu()
        self._metrics.host_syncs.add()
        endings = self._endings(steps, flags.numpy())

        self.is_intact = False
        self._inherit(layout, steps)
        slots = [lane.slot for group in self._groups for lane in group.lanes]
        self._entries[slots] += layout.writes[slots]
        self._lengths[slots] += 1
        outcomes = self._take_over(steps, endings)
        self.is_intact = True
        self._count(layout, len(inputs.tokens))
        return outcomes

    def _moved(self, values: Array | Sequence[int]) -> torch.Tensor:
        """Returns values on the device, without waiting for what it is doing."""
        array = values if isinstance(values, np.ndarray) else np.array(values, dtype=np.int64)
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    # Lanes

    def _free_slots(self, count: int) -> list[int]:
        holes = [slot for slot, lane in enumerate(self._slots) if lane is None]
        return [*holes, *range(len(self._slots), len(self._slots) + count)][:count]

    def _add_lanes(self, jobs: Sequence[Job], slots: Sequence[int]) -> None:
        settings = self._settings
        by_kind: dict[tuple[int, tuple[int, ...]], list[Lane]] = {}
        for job, slot in zip(jobs, slots, strict=True):
            prompt: tuple[int, ...] = (settings.decoder_start_token_id,)
            forced = settings.forced_bos_token_id
            # A forced first token needs no search of its own, unless it is the last one too or ends the sequence.
            if forced is not None and forced != settings.eos_token_id and job.request.max_new_tokens > 1:
                prompt = (*prompt, forced)
            by_kind.setdefault((job.num_beams, prompt), []).append(Lane(job, slot))
        self._visible[self._moved(slots)] = ~self._true
        groups = [
            _Group(
                lanes,
                beam.start(
                    prompt,
                    num_beams,
                    [1 + lane.job.request.max_new_tokens for lane in lanes],
                    [lane.job.length_penalty for lane in lanes],
                    width=_WIDTH_STEP,
                    pad_token_id=settings.pad_token_id,
                    device=self._device,
                ),
                prompt,
            )
            for (num_beams, prompt), lanes in by_kind.items()
        ]
        # From here on nothing can fail: half the lanes would be nobody's.
        self._slots.extend([None] * (max(slots) + 1 - len(self._slots)))
        for group in groups:
            for lane in group.lanes:
                self._slots[lane.slot] = lane
                self._entries[lane.slot] = self._num_pages[lane.slot] = 0
                self._lengths[lane.slot] = len(group.prompt)
                self._max_lengths[lane.slot] = 1 + lane.job.request.max_new_tokens
        self._groups.extend(groups)
        self._layout = None

    def _drop(self, group: _Group, places: Sequence[int], left: BeamState) -> None:
        """Frees the lanes of `group` at `places`.

        Args:
            group: Whose.
            places: Which ones.
            left: State of the others.
        """
        gone = {group.lanes[place] for place in places}
        for lane in gone:
            for page in lane.pages:
                heapq.heappush(self._free_pages, page)
            self._is_used[lane.pages] = False
            self._slots[lane.slot] = None
        group.lanes = [lane for lane in group.lanes if lane not in gone]
        group.state = left
        if not group.lanes:
            self._groups.remove(group)
        self._layout = None

    def _close_gaps(self) -> None:
        """Moves the last lanes into free slots, so that those in use lie side by side."""
        while None in self._slots:
            lane = self._slots.pop()
            if lane is None:
                continue
            source, lane.slot = lane.slot, self._slots.index(None)
            self._slots[lane.slot] = lane
            self._store.move_lane(source, lane.slot, int(self._cross_lengths[source]))
            self._visible[lane.slot] = self._visible[source]
            for array in (
                self._entries,
                self._lengths,
                self._max_lengths,
                self._num_pages,
                self._cross_lengths,
                self._lane_pages,
            ):
                array[lane.slot] = array[source]
            self._page_lanes[lane.pages] = lane.slot
            self._layout = None

    # Rows of a step

    def _arrange(self) -> _Layout:
        """Orders rows: begun searches by number of beams, then new ones, then what new ones feed without asking."""
        self._merge_groups()
        last: list[tuple[int, int, bool]] = []
        before: list[tuple[int, int, bool]] = []
        writes = np.zeros(len(self._slots), dtype=np.int64)
        for group in self._groups:
            for lane in group.lanes:
                if group.prompt:
                    last.append((lane.slot, len(group.prompt) - 1, True))
                    before.extend((lane.slot, query, True) for query in range(len(group.prompt) - 1))
                    writes[lane.slot] = len(group.prompt)
                else:
                    last.extend((lane.slot, query, False) for query in range(group.num_beams))
                    writes[lane.slot] = group.num_beams
        row_slots, row_queries, is_prompt = (np.array(column) for column in zip(*last, *before, strict=True))
        num_queries = int(row_queries.max()) + 1
        if self._bucketed:
            num_queries = min(_power_of_two(num_queries), self._visible.shape[1])
        query_rows = np.full((len(self._slots), num_queries), -1, dtype=np.int64)
        query_rows[row_slots, row_queries] = np.arange(len(row_slots))
        # Queries that nobody asked read a row of the same lane: no lane ever computes with another's numbers.
        query_rows = np.where(query_rows < 0, query_rows.max(axis=1, keepdims=True), query_rows)
        lengths = self._cross_lengths[: len(self._slots)]
        cross_length = int(lengths.max())
        mask = None
        if self._bucketed or (lengths != cross_length).any():
            if self._bucketed:
                cross_length = min(_bucket(cross_length, 32), self._store.cross_keys.shape[3])
                lengths = _padded(lengths, _bucket(len(lengths), 4), cross_length)
            mask = self._moved(np.arange(cross_length) < lengths[:, None])[:, None, None]
        return _Layout(
            row_slots=row_slots,
            row_queries=row_queries,
            is_prompt=is_prompt,
            query_rows=query_rows.reshape(-1),
            writes=writes,
            num_logits=len(last),
            num_queries=num_queries,
            cross_length=cross_length,
            cross_mask=mask,
            slots=[self._moved([lane.slot for lane in group.lanes]) for group in self._groups],
        )

    def _merge_groups(self) -> None:
        """Joins groups that can step together and gives their token buffers one width."""
        by_kind: dict[tuple[bool, int, tuple[int, ...]], list[_Group]] = {}
        for group in self._groups:
            by_kind.setdefault((bool(group.prompt), group.num_beams, group.prompt), []).append(group)
        merged = []
        for _, groups in sorted(by_kind.items(), key=lambda item: item[0]):
            lanes = [lane for group in groups for lane in group.lanes]
            width = self._width(lanes)
            states = [group.state.resize(width, self._settings.pad_token_id) for group in groups]
            merged.append(_Group(lanes, beam.concat(states), groups[0].prompt))
        self._groups = merged

    def _width(self, lanes: Sequence[Lane]) -> int:
        longest = int(self._lengths[[lane.slot for lane in lanes]].max())
        return -(-(longest + 1) // _WIDTH_STEP) * _WIDTH_STEP

    def _take_pages(self, layout: _Layout) -> None:
        lanes = len(self._slots)
        wanted = -(-(self._entries[:lanes] + layout.writes) // PAGE_ENTRIES)
        for slot in np.flatnonzero(wanted > self._num_pages[:lanes]).tolist():
            lane = self._slots[slot]
            assert lane is not None
            while self._num_pages[slot] < wanted[slot]:
                page = heapq.heappop(self._free_pages)  # there always is one: the scheduler has reserved it
                number = len(lane.pages)
                lane.pages.append(page)
                self._is_used[page] = True
                self._page_lanes[page], self._page_numbers[page] = slot, number
                self._lane_pages[slot, number] = page
                self._num_pages[slot] += 1

    def _step_inputs(self, layout: _Layout) -> StepInputs:
        lanes, queries = len(self._slots), layout.num_queries
        entries = self._entries[layout.row_slots] + layout.row_queries
        positions = np.where(layout.is_prompt, layout.row_queries, self._lengths[layout.row_slots] - 1)
        row_pages = self._lane_pages[layout.row_slots, entries // PAGE_ENTRIES]
        most = int(self._num_pages[:lanes].max())
        pages = int(np.flatnonzero(self._is_used)[-1]) + 1
        num_pages = self._num_pages[:lanes]
        lane_pages = np.where(
            np.arange(most) < num_pages[:, None], self._lane_pages[:lanes, :most], self._lane_pages[:lanes, :1]
        )
        num_logits = layout.num_logits
        arrays = [
            positions,
            layout.row_slots * queries + layout.row_queries,
            layout.query_rows,
            row_pages,
            entries % PAGE_ENTRIES,
            np.minimum(self._page_lanes[:pages], lanes - 1),
            np.minimum(self._page_numbers[:pages], most - 1),
            lane_pages,
            num_pages,
            layout.row_slots,
            layout.row_queries,
            entries,
        ]
        moved = _to_device(arrays, self._device)
        row_positions, row_places, query_rows, to_pages, offsets, page_lanes, page_numbers = moved[:7]
        own_pages, page_counts, row_slots, row_queries, row_entries = moved[7:]

        # Each row sees its own entry; rows of one prompt also those before them.
        self._visible[row_slots, row_queries, row_entries] = self._true
        for group, slots in zip(self._groups, layout.slots, strict=True):
            for query in range(1, len(group.prompt)):
                self._visible[slots, query, :query] = self._true

        inputs = StepInputs(
            tokens=self._tokens(row_positions),
            positions=row_positions,
            row_queries=row_places,
            query_rows=query_rows,
            row_pages=to_pages,
            row_offsets=offsets,
            page_lanes=page_lanes,
            page_numbers=page_numbers,
            lane_pages=own_pages,
            lane_lacks_page=torch.arange(most, device=self._device) >= page_counts[:, None],
            is_hidden=~self._visible[:lanes, :queries, : most * PAGE_ENTRIES],
            cross_mask=layout.cross_mask,
            num_logits=num_logits,
            cross_length=layout.cross_length,
        )
        return _pad_to_buckets(inputs, queries) if self._bucketed else inputs

    def _tokens(self, positions: torch.Tensor) -> torch.Tensor:
        """Returns the tokens to feed, int64 [R], in the order of the rows."""
        last, before = [], []
        for group in self._groups:
            if group.prompt:
                count = len(group.lanes)
                last.append(torch.full((count,), group.prompt[-1], device=self._device))
                before.append(self._moved(np.array(group.prompt[:-1], dtype=np.int64)).repeat(count))
            else:
                place = (group.state.lengths - 1)[:, None, None].expand(-1, group.num_beams, 1)
                last.append(group.state.tokens.gather(2, place).reshape(-1))
        return torch.cat([*last, *before])

    # After the step

    def _advance(self, group: _Group, logits: torch.Tensor) -> beam.Step:
        slots = [lane.slot for lane in group.lanes]
        if group.state.tokens.shape[2] <= self._lengths[slots].max():
            group.state = group.state.resize(self._width(group.lanes), self._settings.pad_token_id)
        forces = bool((self._lengths[slots] + 1 >= self._max_lengths[slots]).any()) or len(group.prompt) == 1
        logits = logits.view(len(group.lanes), -1, logits.shape[-1])
        if group.prompt:
            logits = logits.repeat(1, group.num_beams, 1)  # all beams hold the same tokens yet
        return beam.advance(group.state, logits, self._settings, forces=forces)

    def _inherit(self, layout: _Layout, steps: Sequence[beam.Step]) -> None:
        """Lets each beam see the entries of the beam it continues."""
        used = int(self._num_pages[: len(self._slots)].max()) * PAGE_ENTRIES
        for group, slots, step in zip(self._groups, layout.slots, steps, strict=True):
            beams = group.num_beams
            # In the first step, all beams continue the one query that fed the prompt's last token.
            parents = torch.full_like(step.parents, len(group.prompt) - 1) if group.prompt else step.parents
            self._visible[slots, :beams, :used] = self._visible[slots[:, None], parents, :used]

    def _count(self, layout: _Layout, rows: int) -> None:
        self._metrics.decode_steps.add()
        self._metrics.row_steps.add(rows)
        self._metrics.useful_row_steps.add(len(layout.row_slots))
        self._metrics.batch_rows.observe(len(layout.row_slots))

    def _endings(self, steps: Sequence[beam.Step], flags: Array) -> list[_Ending]:
        """Reads what has ended from the device, and what is left of each group; changes nothing."""
        endings = []
        first = 0
        for group, step in zip(self._groups, steps, strict=True):
            done, is_broken = flags[:, first : first + len(group.lanes)]
            first += len(group.lanes)
            over = np.flatnonzero(done | is_broken)
            left, outcomes = step.state, []
            if len(over):
                left = step.state.select(self._moved(np.flatnonzero(~(done | is_broken))))
                outcomes = self._read(group, step.state, over.tolist(), is_broken)
            endings.append(_Ending(over.tolist(), left, outcomes))
        return endings

    def _take_over(self, steps: Sequence[beam.Step], endings: Sequence[_Ending]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for group, ending in zip(list(self._groups), endings, strict=True):
            if group.prompt:
                group.prompt = ()
                self._layout = None
            for place, outcome in zip(ending.places, ending.outcomes, strict=True):
                if outcome.is_broken:
                    lane = group.lanes[place]
                    self._store.scrub(lane.slot, lane.pages)
            group.state = ending.left
            if ending.places:
                self._drop(group, ending.places, ending.left)
            outcomes.extend(ending.outcomes)
        return outcomes

    def _read(self, group: _Group, state: BeamState, places: list[int], is_broken: Array) -> list[Outcome]:
        state = state.select(self._moved(places))
        # One transfer for all of it; float64 holds every token id and float32 exactly.
        packed = torch.cat(
            [
                state.finished_lengths[:, :1].double(),
                state.finished_scores[:, :1].double(),
                state.finished_tokens[:, 0].double(),
                state.finished_logprobs[:, 0].double(),
            ],
            dim=1,
        ).cpu()
        self._metrics.host_syncs.add()
        width = state.tokens.shape[2]
        return [
            Outcome(
                job=group.lanes[place].job,
                tokens=row[2 : 2 + int(row[0])].astype(np.int64),
                token_logprobs=row[2 + width : 2 + width + int(row[0])].astype(np.float32),
                score=float(row[1]),
                is_broken=bool(is_broken[place]),
            )
            for place, row in zip(places, packed.numpy(), strict=True)
        ]


def _to_device(arrays: Sequence[Array], device: torch.device) -> list[torch.Tensor]:
    """Moves int64 arrays in one transfer."""
    joined = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays])).to(device, non_blocking=True)
    parts = joined.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _bucket(count: int, step: int) -> int:
    """Returns `count` rounded up to a multiple of `step`, of twice that above 8 steps, and so on."""
    while count > 8 * step:
        step *= 2
    return -(-count // step) * step


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _padded(array: Array, length: int, value: int) -> Array:
    return np.concatenate([array, np.full(length - len(array), value, dtype=array.dtype)])


def _pad_to_buckets(inputs: StepInputs, queries: int) -> StepInputs:
    """Rounds every size up, so that few shapes occur; what is added computes with page 0 and is thrown away."""
    lanes, most = inputs.lane_pages.shape
    new_lanes, new_most = _bucket(lanes, 4), _power_of_two(most)
    num_logits = _bucket(inputs.num_logits, 4)
    rows = max(_bucket(len(inputs.tokens), 4), num_logits)
    pages = _power_of_two(len(inputs.page_lanes))

    def padded(tensor: torch.Tensor, *sizes: int) -> torch.Tensor:
        result = tensor.new_zeros(sizes)
        result[tuple(slice(size) for size in tensor.shape)] = tensor
        return result

    return replace(
        inputs,
        tokens=padded(inputs.tokens, rows),
        positions=padded(inputs.positions, rows),
        row_queries=padded(inputs.row_queries, rows),
        query_rows=padded(inputs.query_rows, new_lanes * queries),
        row_pages=padded(inputs.row_pages, rows),
        row_offsets=padded(inputs.row_offsets, rows),
        page_lanes=padded(inputs.page_lanes, pages),
        page_numbers=padded(inputs.page_numbers, pages),
        lane_pages=padded(inputs.lane_pages, new_lanes, new_most),
        lane_lacks_page=padded(inputs.lane_lacks_page, new_lanes, new_most),
        is_hidden=padded(inputs.is_hidden, new_lanes, queries, new_most * PAGE_ENTRIES),
        num_logits=num_logits,
    )
