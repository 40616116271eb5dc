"""The text side's batches and loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import Florence2ForConditionalGeneration

from florence2_kserve.tasks import TASKS
from florence2_kserve.tiny.architecture import EOS, PAD
from florence2_kserve.tiny.heads import soft_bin_loss
from florence2_kserve.tiny.scenes import BINS, Example, Scene

READING_TASKS = ("<OCR>", "<OCR_WITH_REGION>", "<REGION_TO_OCR>")
READING_SHARE = 2  # of these are asked of every scene with words; left to chance, no reading is learnt
# Learnt within minutes, so asked less often than the others (1).
WEIGHTS = {"<CAPTION>": 0.7, "<REGION_TO_CATEGORY>": 0.5, "<REGION_TO_DESCRIPTION>": 0.5}


def choose_examples(scene: Scene, count: int, rng: random.Random) -> list[Example]:
    """Asks up to `count` different tasks of a scene."""
    names = sorted(TASKS, key=lambda name: -(rng.random() ** (1 / WEIGHTS.get(name, 1.0))))
    if scene.words:
        first = rng.sample(READING_TASKS, READING_SHARE)
        names = first + [name for name in names if name not in first]
    examples = (scene.truth(name, rng) for name in names)
    return [example for example in examples if example][:count]


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Questions and answers as ids; N examples.

    Attributes:
        picture: int64 [N], each example's picture.
        prompt: int64 [N, P], padded.
        target: int64 [N, T], padded, with ``<s>`` and ``</s>``.
    """

    picture: Tensor
    prompt: Tensor
    target: Tensor


def text_batch(examples: Sequence[Sequence[Example]], tokenizer: Tokenizer) -> TextBatch:
    """Encodes each picture's examples."""
    flat = [example for group in examples for example in group]
    prompts = tokenizer.encode_batch([TASKS[example.task].prompt(example.text) for example in flat])
    targets = tokenizer.encode_batch([example.target for example in flat])
    return TextBatch(
        torch.tensor([index for index, group in enumerate(examples) for _ in group]),
        _padded([encoding.ids for encoding in prompts]),
        _padded([encoding.ids for encoding in targets]),
    )


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])


def text_loss(
    model: Florence2ForConditionalGeneration,
    image_tokens: Tensor,
    batch: TextBatch,
    *,
    first_location: int,
    sigma: float,
) -> tuple[Tensor, dict[str, float]]:
    """Scores the answers given their true beginnings.

    Args:
        model: The model; its tower is not used.
        image_tokens: float [B, I, WIDTH].
        batch: N questions about the B pictures.
        first_location: Id of ``<loc_0>``.
        sigma: How far beside the true bin a location may lie, in bins.

    Returns:
        The mean loss per token, the share of right other tokens (word) and the mean
        distance of location tokens in bins (loc).
    """
    language = model.model.language_model
    embed = language.shared
    inputs = torch.cat([image_tokens[batch.picture], embed(batch.prompt)], 1)
    visible = torch.ones(inputs.shape[:2], dtype=torch.long)
    visible[:, image_tokens.shape[1] :] = batch.prompt != PAD
    encoded = language.encoder(inputs_embeds=inputs, attention_mask=visible).last_hidden_state
    start = torch.full((len(batch.target), 1), EOS)
    hidden = language.decoder(
        input_ids=torch.cat([start, batch.target[:, :-1]], 1),
        encoder_hidden_states=encoded,
        encoder_attention_mask=visible,
        use_cache=False,
    ).last_hidden_state
    asked = batch.target != PAD
    asked[:, 0] = False  # <s> is forced
    wanted = batch.target[asked]
    scores = F.linear(hidden[asked], embed.weight).log_softmax(-1)
    is_location = (wanted >= first_location) & (wanted < first_location + BINS)
    loss = -scores[~is_location].gather(1, wanted[~is_location, None]).sum()
    metrics = {"word": (scores.argmax(1) == wanted)[~is_location].float().mean().item()}
    if is_location.any():
        locations = scores[is_location, first_location : first_location + BINS]
        bins = (wanted[is_location] - first_location).float()
        loss = loss + soft_bin_loss(locations, bins, sigma).sum()
        metrics["loc"] = (locations.argmax(1) - bins).abs().mean().item()
    return loss / len(wanted), metrics
