"""Holds an engine against transformers' ``generate``: expectations, requests, and a way to submit them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from florence2_kserve.engine.interface import Engine, FinishReason, GenerationRequest, GenerationResult
from florence2_kserve.processor import ImageSettings
from florence2_kserve.weights import LoadedModel
from tests.engine.random_models import RandomModel, random_image, random_prompt

TOLERANCE = 1e-4

_ORACLE_ROWS = 32


@dataclass(frozen=True, slots=True)
class Expected:
    """What transformers answers.

    Attributes:
        tokens: From the start token to the end token, without padding.
        score: Summed log-probability / generated length ** length_penalty.
        token_logprobs: float32 [T], from one pass over `tokens`; 0 for the start token and forced ones.
        finish_reason: ``length`` where max_new_tokens was reached.
    """

    tokens: list[int]
    score: float
    token_logprobs: np.ndarray
    finish_reason: FinishReason


@torch.inference_mode()
def expect(loaded: LoadedModel, image: ImageSettings, requests: Sequence[GenerationRequest]) -> list[Expected]:
    """Answers `requests` by transformers' ``generate``, in batches of those that ask for the same search."""

    def kind(index: int) -> tuple[Any, ...]:
        request = requests[index]
        # None would not compare with numbers.
        asked = (request.num_beams or -1, -99.0 if request.length_penalty is None else request.length_penalty)
        return (len(request.input_ids), *asked, request.max_new_tokens)

    features: dict[bytes, torch.Tensor] = {}
    answers: dict[int, Expected] = {}
    for _, group in groupby(sorted(range(len(requests)), key=kind), key=kind):
        alike = list(group)
        for start in range(0, len(alike), _ORACLE_ROWS):
            rows = alike[start : start + _ORACLE_ROWS]
            batch = [requests[index] for index in rows]
            for request in batch:
                if request.image_key not in features:
                    features[request.image_key] = image_features(loaded, image, request.pixel_values)
            states = encoder_states(loaded, [features[request.image_key] for request in batch], batch)
            answers.update(zip(rows, _generate(loaded, states, batch), strict=True))
    return [answers[index] for index in range(len(requests))]


def image_features(loaded: LoadedModel, image: ImageSettings, pixels: np.ndarray) -> torch.Tensor:
    """Returns [S, d], of pixels that are normalised as transformers' image processor does it."""
    scaled = (pixels * np.float64(image.rescale_factor)).astype(np.float32)
    mean, std = (np.array(values, dtype=np.float32) for values in (image.mean, image.std))
    normalised = (scaled - mean) / std
    values = torch.from_numpy(normalised).permute(2, 0, 1)[None].to(loaded.device, loaded.dtype)
    return loaded.model.get_image_features(values).pooler_output[0]


def encoder_states(
    loaded: LoadedModel, features: Sequence[torch.Tensor], batch: Sequence[GenerationRequest]
) -> torch.Tensor:
    """Returns [B, S + L, d], of requests with prompts of one length."""
    input_ids = torch.from_numpy(np.stack([request.input_ids for request in batch])).to(loaded.device)
    embedded = torch.cat([torch.stack(list(features)), loaded.model.get_input_embeddings()(input_ids)], dim=1)
    return loaded.model.model.language_model.encoder(inputs_embeds=embedded).last_hidden_state


def _generate(loaded: LoadedModel, states: torch.Tensor, batch: Sequence[GenerationRequest]) -> list[Expected]:
    generation, request = loaded.generation, batch[0]
    num_beams = request.num_beams or generation.num_beams
    length_penalty = generation.length_penalty if request.length_penalty is None else request.length_penalty
    settings = replace(
        generation,
        num_beams=num_beams,
        # They say nothing of greedy search, and transformers warns of them there.
        length_penalty=length_penalty if num_beams > 1 else 1.0,
        early_stopping=generation.early_stopping if num_beams > 1 else False,
    )
    config = GenerationConfig(
        **settings.to_transformers(),
        max_new_tokens=request.max_new_tokens,
        return_dict_in_generate=True,
        output_scores=num_beams > 1,
    )
    output = loaded.model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
        generation_config=config,
    )
    answers = []
    sequences = [_without_padding(row, generation.eos_token_id) for row in output.sequences.tolist()]
    logprobs = _token_logprobs(loaded, states, sequences, request.max_new_tokens)
    for index, (tokens, token_logprobs) in enumerate(zip(sequences, logprobs, strict=True)):
        generated = len(tokens) - 1
        if num_beams > 1:
            score = output.sequences_scores[index].item()
        else:
            score = float(token_logprobs.sum()) / generated**length_penalty
        reason: FinishReason = "length" if generated == request.max_new_tokens else "stop"
        answers.append(Expected(tokens, score, token_logprobs, reason))
    return answers


def _without_padding(tokens: list[int], eos: int) -> list[int]:
    # The start token is the end token too.
    return tokens[: tokens.index(eos, 1) + 1] if eos in tokens[1:] else tokens


def _token_logprobs(
    loaded: LoadedModel, states: torch.Tensor, sequences: list[list[int]], max_new_tokens: int
) -> list[np.ndarray]:
    generation = loaded.generation
    longest = max(map(len, sequences))
    padded = torch.tensor(
        [tokens + [generation.pad_token_id] * (longest - len(tokens)) for tokens in sequences], device=states.device
    )
    output = loaded.model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=padded[:, :-1], use_cache=False
    )
    chosen = torch.log_softmax(output.logits.float(), dim=-1).gather(2, padded[:, 1:, None])[..., 0].cpu().numpy()
    logprobs = []
    for tokens, steps in zip(sequences, chosen, strict=True):
        of_row = np.concatenate([np.zeros(1, dtype=np.float32), steps[: len(tokens) - 1]])
        if generation.forced_bos_token_id is not None:
            of_row[1] = 0
        if len(tokens) - 1 == max_new_tokens and generation.forced_eos_token_id is not None:
            of_row[-1] = 0
        logprobs.append(of_row)
    return logprobs


def draw_requests(
    model: RandomModel,
    rng: np.random.Generator,
    count: int,
    *,
    limits: Sequence[int],
    num_beams: Sequence[int | None] = (1, 2, 3, 4, 5, 8, None),
    length_penalties: Sequence[float | None] = (0.5, 1.0, 2.0, None),
    prompt_lengths: Sequence[int] = (2, 5, 9),
    images: int = 24,
    prompts: int = 8,
) -> list[GenerationRequest]:
    """Draws requests of all kinds, the same images and prompts again and again among them.

    Args:
        model: What they are for.
        rng: Where they come from.
        count: How many.
        limits: max_new_tokens to choose from.
        num_beams: Each occurs with each of `length_penalties`.
        length_penalties: As above.
        prompt_lengths: Tokens of a prompt.
        images: Distinct images.
        prompts: Distinct prompts of each length.
    """
    pictures = [random_image(rng, model.image) for _ in range(images)]
    texts = {
        length: [random_prompt(rng, model.loaded, length) for _ in range(prompts)] for length in set(prompt_lengths)
    }
    # A limited number of kinds, so that the oracle can answer in batches.
    kinds = [
        (beams, penalty, int(rng.choice(limits)), int(rng.choice(prompt_lengths)))
        for beams in num_beams
        for penalty in length_penalties
    ]
    requests = []
    for index in range(count):
        beams, penalty, limit, length = kinds[index % len(kinds)]
        picture = int(rng.integers(images))
        requests.append(
            GenerationRequest(
                pixel_values=pictures[picture],
                image_key=f"image {picture}".encode(),
                input_ids=texts[length][int(rng.integers(prompts))],
                max_new_tokens=limit,
                num_beams=beams,
                length_penalty=penalty,
            )
        )
    rng.shuffle(requests)  # type: ignore[arg-type]
    return requests


@dataclass(frozen=True, slots=True)
class Run:
    """What came of some requests.

    Attributes:
        results: In the order of the requests.
        finished: Indices of the requests, in the order in which they finished.
    """

    results: list[GenerationResult]
    finished: list[int]

    @property
    def overtakings(self) -> int:
        """How often a request finished right before one that was submitted earlier."""
        return sum(later < earlier for earlier, later in pairwise(self.finished))


def submit_in_bursts(engine: Engine, requests: Sequence[GenerationRequest], seed: int, *, waiting: int = 96) -> Run:
    """Submits a few at a time while others run, `waiting` unfinished ones at the most."""
    rng = random.Random(seed)
    futures: list[Future[GenerationResult]] = []
    finished: list[int] = []
    while len(futures) < len(requests):
        burst = requests[len(futures) : len(futures) + rng.choice((1, 1, 2, 5, 12, 40))]
        for future in engine.submit(list(burst)):
            future.add_done_callback(partial(_note, finished, len(futures)))
            futures.append(future)
        while len(unfinished := [future for future in futures if not future.done()]) > waiting:
            wait(unfinished, timeout=300, return_when=FIRST_COMPLETED)
        if unfinished and rng.random() < 0.3:  # now and then the engine runs nearly empty
            wait(rng.sample(unfinished, rng.randint(1, len(unfinished))), timeout=300)
    return Run([future.result(300) for future in futures], finished)


def _note(finished: list[int], index: int, _: Future[GenerationResult]) -> None:
    finished.append(index)


def differences(
    expected: Iterable[Expected], results: Iterable[GenerationResult], requests: Iterable[GenerationRequest]
) -> list[str]:
    """Describes each result that isn't as expected."""
    found = []
    for index, (wanted, got, request) in enumerate(zip(expected, results, requests, strict=True)):
        if fault := _difference(wanted, got):
            found.append(
                f"request {index} (num_beams {request.num_beams}, length_penalty {request.length_penalty}, "
                f"max_new_tokens {request.max_new_tokens}, {len(request.input_ids)} prompt tokens): {fault}"
            )
    return found


def _difference(wanted: Expected, got: GenerationResult) -> str | None:
    if got.sequence.dtype != np.int64 or got.token_logprobs.dtype != np.float32:
        return f"dtypes are {got.sequence.dtype} and {got.token_logprobs.dtype}"
    if got.sequence.tolist() != wanted.tokens:
        return f"sequence {got.sequence.tolist()} ({got.score:.6f}), expected {wanted.tokens} ({wanted.score:.6f})"
    if not abs(got.score - wanted.score) <= TOLERANCE:
        return f"score {got.score}, expected {wanted.score}"
    if got.token_logprobs.shape != wanted.token_logprobs.shape:
        return f"token_logprobs of shape {got.token_logprobs.shape}, expected {wanted.token_logprobs.shape}"
    if not np.abs(got.token_logprobs - wanted.token_logprobs).max() <= TOLERANCE:
        return f"token_logprobs {got.token_logprobs.tolist()}, expected {wanted.token_logprobs.tolist()}"
    if (got.token_logprobs[wanted.token_logprobs == 0] != 0).any():
        return f"token_logprobs {got.token_logprobs.tolist()} of forced tokens aren't exactly 0"
    if got.finish_reason != wanted.finish_reason:
        return f"finish_reason {got.finish_reason}, expected {wanted.finish_reason}"
    return None


def report(found: Sequence[str]) -> str:
    """Returns the first few differences and their number."""
    return "\n".join([f"{len(found)} differ", *found[:5]])


def share_of_early_ends(answers: Sequence[Expected]) -> float:
    """Returns the share of answers that end before their max_new_tokens."""
    return sum(answer.finish_reason == "stop" for answer in answers) / len(answers)
