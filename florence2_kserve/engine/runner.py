"""Runs the model for the requests in flight: image tower, text encoder, decoder steps.

Here is the bookkeeping that the pure functions of ``beam.py`` and ``decoder.py`` leave out: which lane a request
has, which pages of keys and values belong to it, and in which order the rows of a step are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from florence2_kserve.engine import beam, beam_state
from florence2_kserve.engine.beam_state import BeamState
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
    prompt_tokens: Array  # what new searches feed, in the order of their rows, which are the last ones
    prompt_sees: Array  # [3,·], slots, queries and which entries these see beside their own: those before
    query_rows: Array  # [C*Q]
    is_in_order: bool  # whether each row has the next place among the queries
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
            max_logits=max(_bucket(max_batch_size * max_num_beams, 4), _bucket(max_batch_size, 4) * max_num_beams),
        )
        self._bucketed = decode_capture != "off"
        self._has_one_form = decode_capture == "compile"  # each set of inputs would be compiled by itself
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
        # Which entries of its lane each query does not attend to.
        self._hidden = torch.zeros(
            (max_batch_size, queries, per_lane, PAGE_ENTRIES), dtype=torch.bool, device=self._device
        )
        # By slot; kept on the host, where every length is known without asking the device.
        self._entries, self._lengths, self._num_pages, self._cross_lengths = (
            np.zeros(max_batch_size, dtype=np.int64) for _ in range(4)
        )
        self._lane_pages = np.zeros((max_batch_size, per_lane), dtype=np.int64)
        self._page_lanes, self._page_numbers = (np.zeros(pages, dtype=np.int64) for _ in range(2))
        self._free_pages = list(range(1, pages))  # a heap: low pages first, so that few are passed over
        self._is_used = np.zeros(pages, dtype=bool)
        self._slots: list[Lane | None] = []
        self._groups: list[_Group] = []
        self.is_intact = True
        self._false = torch.zeros((), dtype=torch.bool, device=self._device)
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
                    kept = np.delete(np.arange(len(group.lanes)), place)
                    self._drop(group, [place], group.state.select(kept))
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
        inputs, plans = self._step_inputs(layout)
        logits = self._step(inputs, self._store)
        steps, first = [], 0
        for group, planned in zip(self._groups, plans, strict=True):
            rows = len(group.lanes) * (1 if group.prompt else group.num_beams)
            steps.append(self._advance(group, logits[first : first + rows], planned))
            first += rows
        endings = self._endings(steps)

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
        self._hidden[self._moved(slots)] = ~self._false
        groups = [
            _Group(
                lanes,
                beam_state.start(
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
            self._hidden[lane.slot] = self._hidden[source]
            for array in (
                self._entries,
                self._lengths,
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
        last: list[tuple[int, int, int]] = []  # slot, query, token where it is known
        before: list[tuple[int, int, int]] = []
        sees: list[tuple[int, int, int]] = []
        writes = np.zeros(len(self._slots), dtype=np.int64)
        for group in self._groups:
            for lane in group.lanes:
                if group.prompt:
                    last.append((lane.slot, len(group.prompt) - 1, group.prompt[-1]))
                    before.extend((lane.slot, query, token) for query, token in enumerate(group.prompt[:-1]))
                    sees.extend(
                        (lane.slot, query, entry) for query in range(len(group.prompt)) for entry in range(query)
                    )
                    writes[lane.slot] = len(group.prompt)
                else:
                    last.extend((lane.slot, query, -1) for query in range(group.num_beams))
                    writes[lane.slot] = group.num_beams
        row_slots, row_queries, tokens = (np.array(column) for column in zip(*last, *before, strict=True))
        num_queries = int(row_queries.max()) + 1
        query_rows = np.full((len(self._slots), num_queries), -1, dtype=np.int64)
        query_rows[row_slots, row_queries] = rows = np.arange(len(row_slots))
        # Queries that nobody asked read a row of the same lane: no lane ever computes with another's numbers.
        query_rows = np.where(query_rows < 0, query_rows.max(axis=1, keepdims=True), query_rows)
        cross_length, mask = self._cross_mask()
        return _Layout(
            row_slots=row_slots,
            row_queries=row_queries,
            is_prompt=tokens >= 0,
            prompt_tokens=tokens[tokens >= 0],
            prompt_sees=np.array(sees, dtype=np.int64).reshape(-1, 3).T,
            query_rows=query_rows.reshape(-1),
            is_in_order=not self._has_one_form and np.array_equal(query_rows.reshape(-1), rows),
            writes=writes,
            num_logits=len(last),
            num_queries=num_queries,
            cross_length=cross_length,
            cross_mask=mask,
            slots=[self._moved([lane.slot for lane in group.lanes]) for group in self._groups],
        )

    def _cross_mask(self) -> tuple[int, torch.Tensor | None]:
        """Returns the number of encoder positions, and what is added to the scores of each lane's."""
        lengths = self._cross_lengths[: len(self._slots)]
        longest = int(lengths.max())
        if self._bucketed:
            longest = min(_bucket(longest, 32), self._store.cross_keys.shape[3])
            lengths = _padded(lengths, _bucket(len(lengths), 4), value=longest)
        elif (lengths == longest).all():
            return longest, None
        is_there = self._moved(np.arange(longest) < lengths[:, None])[:, None, None]
        mask = torch.zeros(is_there.shape, dtype=self._loaded.dtype, device=self._device)
        return longest, mask.masked_fill_(~is_there, -torch.inf)

    def _merge_groups(self) -> None:
        """Joins groups that can step together, their lanes in order, and gives their token buffers one width."""
        by_kind: dict[tuple[bool, int, tuple[int, ...]], list[_Group]] = {}
        for group in self._groups:
            by_kind.setdefault((bool(group.prompt), group.num_beams, group.prompt), []).append(group)
        merged = []
        for _, groups in sorted(by_kind.items(), key=lambda item: item[0]):
            lanes = [lane for group in groups for lane in group.lanes]
            width = self._width(lanes)
            state = beam_state.concat([group.state.resize(width, self._settings.pad_token_id) for group in groups])
            order = np.argsort([lane.slot for lane in lanes])
            if (np.diff(order) < 0).any():
                lanes, state = [lanes[place] for place in order], state.select(order)
            merged.append(_Group(lanes, state, groups[0].prompt))
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

    def _sizes(self, layout: _Layout) -> _Sizes:
        lanes = len(self._slots)
        sizes = _Sizes(
            rows=len(layout.row_slots),
            num_logits=layout.num_logits,
            lanes=lanes,
            most=int(self._num_pages[:lanes].max()),
            pages=int(np.flatnonzero(self._is_used)[-1]) + 1,
        )
        if not self._bucketed:
            return sizes
        sizes = sizes.rounded_up()
        rows = sizes.lanes * layout.num_queries
        return replace(sizes, rows=rows, num_logits=rows) if layout.is_in_order else sizes

    def _step_inputs(self, layout: _Layout) -> tuple[StepInputs, list[torch.Tensor]]:
        """Returns the rows of the step, and for each group what is planned for its searches."""
        sizes = self._sizes(layout)
        plans = [beam.plan(group.state, self._settings) for group in self._groups]
        numbers = self._row_numbers(layout, sizes) | self._page_numbers_of(sizes)
        moved = _to_device(numbers | {f"plan {index}": each for index, each in enumerate(plans)}, self._device)
        # Each row sees its own entry; rows of one prompt also those before them.
        self._hidden[tuple(moved["sees"])] = self._false
        begun = [group.state.newest.reshape(-1) for group in self._groups if not group.prompt]
        parts = [*begun, *([moved["prompt_tokens"]] if len(moved["prompt_tokens"]) else [])]
        lacks_page = moved.get("lane_lacks_page")
        inputs = StepInputs(
            tokens=parts[0] if len(parts) == 1 else torch.cat(parts),
            positions=moved["positions"],
            row_queries=moved.get("row_queries"),
            query_rows=moved.get("query_rows"),
            row_pages=moved["row_pages"],
            row_offsets=moved["row_offsets"],
            page_lanes=moved["page_lanes"],
            page_places=moved["page_places"],
            lane_pages=moved["lane_pages"],
            # Of the bytes of 1, the lowest comes first.
            lane_lacks_page=None if lacks_page is None else lacks_page.view(torch.bool)[:, ::8],
            is_hidden=self._hidden[:, : layout.num_queries][moved["page_lanes"], :, moved["page_numbers"]],
            cross_mask=layout.cross_mask,
            num_logits=sizes.num_logits,
            cross_length=layout.cross_length,
        )
        return inputs, [moved[f"plan {index}"] for index in range(len(plans))]

    def _row_numbers(self, layout: _Layout, sizes: _Sizes) -> dict[str, Array]:
        slots, queries = layout.row_slots, layout.row_queries
        entries = self._entries[slots] + queries
        pages, offsets = entries // PAGE_ENTRIES, entries % PAGE_ENTRIES
        prompt_slots, prompt_queries, before = layout.prompt_sees
        sees = [[slots, queries, pages, offsets], [prompt_slots, prompt_queries, 0 * before, before]]
        numbers = {
            # The rows of prompts are the last ones, before those that are added to come to the size.
            "prompt_tokens": _padded(layout.prompt_tokens, sizes.rows - len(slots) + len(layout.prompt_tokens)),
            "positions": _padded(np.where(layout.is_prompt, queries, self._lengths[slots] - 1), sizes.rows),
            "row_pages": _padded(self._lane_pages[slots, pages], sizes.rows),
            "row_offsets": _padded(offsets, sizes.rows),
            "sees": np.concatenate(sees, axis=1),
        }
        if not layout.is_in_order:
            numbers["query_rows"] = _padded(layout.query_rows, sizes.lanes * layout.num_queries)
            numbers["row_queries"] = _padded(slots * layout.num_queries + queries, sizes.rows)
        return numbers

    def _page_numbers_of(self, sizes: _Sizes) -> dict[str, Array]:
        lanes = len(self._slots)
        counts = self._num_pages[:lanes, None]
        most = int(counts.max())
        lacks_page = np.arange(most) >= counts
        # Of what is free, the numbers that it had may lie outside.
        page_lanes = np.minimum(self._page_lanes[: sizes.pages], lanes - 1)
        page_numbers = np.minimum(self._page_numbers[: sizes.pages], most - 1)
        own = np.where(lacks_page, self._lane_pages[:lanes, :1], self._lane_pages[:lanes, :most])
        numbers = {
            "page_lanes": page_lanes,
            "page_numbers": page_numbers,
            "page_places": page_lanes * sizes.most + page_numbers,
            "lane_pages": _padded(own, sizes.lanes, sizes.most),
        }
        if self._bucketed or lacks_page.any():
            numbers["lane_lacks_page"] = _padded(lacks_page.astype(np.int64), sizes.lanes, sizes.most)
        return numbers

    # After the step

    def _advance(self, group: _Group, logits: torch.Tensor, planned: torch.Tensor) -> beam.Step:
        if group.state.width <= group.state.lengths.max():
            group.state = group.state.resize(self._width(group.lanes), self._settings.pad_token_id)
        logits = logits.view(len(group.lanes), -1, logits.shape[-1])
        if group.prompt:
            logits = logits.repeat(1, group.num_beams, 1)  # all beams hold the same tokens yet
        return beam.advance(group.state, logits, planned, self._settings)

    def _inherit(self, layout: _Layout, steps: Sequence[beam.Step]) -> None:
        """Lets each beam see the entries of the beam it continues."""
        used = int(self._num_pages[: len(self._slots)].max())
        for group, slots, step in zip(self._groups, layout.slots, steps, strict=True):
            if group.prompt:  # all beams continue the one query that fed the prompt's last token
                inherited = self._hidden[slots, len(group.prompt) - 1, None, :used]
            else:
                inherited = self._hidden[slots[:, None], step.parents, :used]
            self._hidden[slots, : group.num_beams, :used] = inherited

    def _count(self, layout: _Layout, rows: int) -> None:
        self._metrics.decode_steps.add()
        self._metrics.row_steps.add(rows)
        self._metrics.useful_row_steps.add(len(layout.row_slots))
        self._metrics.batch_rows.observe(len(layout.row_slots))

    def _endings(self, steps: Sequence[beam.Step]) -> list[_Ending]:
        """Reads what has ended from the device, and what is left of each group; changes nothing."""
        reports = [step.report.view(-1) for step in steps]
        read = (reports[0] if len(reports) == 1 else torch.cat(reports)).cpu().numpy()
        self._metrics.host_syncs.add()
        endings = []
        first = 0
        for group, step in zip(self._groups, steps, strict=True):
            report = read[first : first + step.report.numel()].reshape(step.report.shape)
            first += step.report.numel()
            verdict = beam.judge(step.state, report, self._settings)
            is_over = verdict.done | verdict.is_broken
            over, left = np.flatnonzero(is_over), step.state
            if 0 < len(over) < len(is_over):
                left = step.state.select(np.flatnonzero(~is_over))
            endings.append(_Ending(over.tolist(), left, self._read(group, step.state, over, verdict)))
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

    def _read(self, group: _Group, state: BeamState, places: Array, verdict: beam.Verdict) -> list[Outcome]:
        if not len(places):
            return []
        self._metrics.host_syncs.add()
        return [
            Outcome(
                job=group.lanes[place].job,
                tokens=ended.tokens,
                token_logprobs=ended.token_logprobs,
                score=float(verdict.scores[place]),
                is_broken=bool(verdict.is_broken[place]),
            )
            for place, ended in zip(places.tolist(), beam_state.read_ended(state, places), strict=True)
        ]


@dataclass(slots=True, frozen=True)
class _Sizes:
    """Sizes of a step: rows R, lanes C, pages a lane M, pages N."""

    rows: int
    num_logits: int
    lanes: int
    most: int
    pages: int

    def rounded_up(self) -> _Sizes:
        """Returns sizes of which there are few; what is added computes with page 0 and is thrown away."""
        num_logits = _bucket(self.num_logits, 4)
        return _Sizes(
            rows=max(_bucket(self.rows, 4), num_logits),
            num_logits=num_logits,
            lanes=_bucket(self.lanes, 4),
            most=_power_of_two(self.most),
            pages=_power_of_two(self.pages),
        )


def _to_device(arrays: Mapping[str, Array], device: torch.device) -> dict[str, torch.Tensor]:
    """Moves int64 arrays in one transfer."""
    joined = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays.values()]))
    parts = joined.to(device, non_blocking=True).split([array.size for array in arrays.values()])
    return {name: part.view(array.shape) for part, (name, array) in zip(parts, arrays.items(), strict=True)}


def _bucket(count: int, step: int) -> int:
    """Returns `count` rounded up to a multiple of `step`, of twice that above 8 steps, and so on."""
    while count > 8 * step:
        step *= 2
    return -(-count // step) * step


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _padded(array: Array, *shape: int, value: int = 0) -> Array:
    """Returns `array` with `value` behind it in each dimension, up to a shape."""
    if array.shape == shape:
        return array
    result = np.full(shape, value, dtype=array.dtype)
    result[tuple(slice(size) for size in array.shape)] = array
    return result
