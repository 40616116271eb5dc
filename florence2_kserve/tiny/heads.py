"""Dense helper heads that teach the tower to see before there is any language; dropped from the shipped model.

Each cell of the tower's grid is asked what it holds: is there an object, which
shape and colour, where are the edges of its box, which characters. Box edges are
classified into the 1000 location bins, with logits that compare a linear map of
the cell's token to fixed Fourier codes of the bins: plain regression leaves the
text side with location errors several times larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from florence2_kserve.tiny.architecture import GRID, WIDTH, bin_code
from florence2_kserve.tiny.scenes import BINS, CHARACTERS, COLORS, SHAPES, SIDE, Box, Scene

CODE = 80  # features of a bin's Fourier code
SLOTS = 2  # characters a cell may hold: one in its left half, one in its right
MIN_COVER = 0.35  # an object belongs to cells that its box covers at least this far along both axes


@dataclass(frozen=True, slots=True)
class CellTargets:
    """What each cell should say; B pictures, G = GRID.

    Attributes:
        shape: int64 [B, G, G], -1 where there is no object.
        color: int64 [B, G, G].
        box: float [B, G, G, 4], the object's box in [0, 1].
        characters: int64 [B, G, G, SLOTS], 0 for none.
        in_word: bool [B, G, G], on the middle row of a word.
        word_box: float [B, G, G, 4], the word's box in [0, 1].
    """

    shape: Tensor
    color: Tensor
    box: Tensor
    characters: Tensor
    in_word: Tensor
    word_box: Tensor


def cell_targets(scenes: Sequence[Scene]) -> CellTargets:
    """Works out what each cell of each scene holds."""
    grid = (len(scenes), GRID, GRID)
    shape, color = np.full(grid, -1, np.int64), np.zeros(grid, np.int64)
    box, word_box = np.zeros((*grid, 4), np.float32), np.zeros((*grid, 4), np.float32)
    characters, in_word = np.zeros((*grid, SLOTS), np.int64), np.zeros(grid, bool)
    cell = SIDE / GRID
    for index, scene in enumerate(scenes):
        for item in scene.objects:
            rows, columns = _covered(item.box[1], item.box[3]), _covered(item.box[0], item.box[2])
            shape[index, rows, columns] = SHAPES.index(item.shape)
            color[index, rows, columns] = list(COLORS).index(item.color)
            box[index, rows, columns] = _unit(item.box)
        for word in scene.words:
            row = min(GRID - 1, int((word.box[1] + word.box[3]) / 2 / cell))
            columns = slice(int(word.box[0] / cell), min(GRID - 1, int(word.box[2] / cell)) + 1)
            in_word[index, row, columns] = True
            word_box[index, row, columns] = _unit(word.box)
            for character, (left, right) in zip(word.text, word.spans, strict=True):
                half = min(SLOTS * GRID - 1, max(0, int((left + right) / 2 / cell * SLOTS)))
                characters[index, row, half // SLOTS, half % SLOTS] = 1 + CHARACTERS.index(character)
    return CellTargets(*map(torch.from_numpy, (shape, color, box, characters, in_word, word_box)))


def _covered(low: float, high: float) -> slice:
    """Gives the cells that [low, high], in pixels, covers far enough along one axis."""
    low, high = low * GRID / SIDE, high * GRID / SIDE
    first = int(low) + (int(low) + 1 - low <= MIN_COVER)
    last = int(high) - (high - int(high) <= MIN_COVER)
    return slice(first, min(GRID - 1, last) + 1)


def _unit(box: Box) -> list[float]:
    return [value / SIDE for value in box]


class CellHeads(nn.Module):
    """Linear heads on the cells' tokens."""

    bin_code: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.present = nn.Linear(WIDTH, 1)
        self.shape = nn.Linear(WIDTH, len(SHAPES))
        self.color = nn.Linear(WIDTH, len(COLORS))
        self.box = nn.Linear(WIDTH, 4)
        self.edges = nn.Linear(WIDTH, 4 * CODE)
        self.characters = nn.Linear(WIDTH, SLOTS * (1 + len(CHARACTERS)))
        self.word_box = nn.Linear(WIDTH, 4)
        self.word_edges = nn.Linear(WIDTH, 4 * CODE)
        self.register_buffer("bin_code", bin_code(CODE) / 6, persistent=False)

    def loss(self, image_tokens: Tensor, targets: CellTargets) -> tuple[Tensor, dict[str, float]]:
        """Scores the cells' answers.

        Args:
            image_tokens: float [B, 1 + G * G, WIDTH]; the first token, pooled, has no cell.
            targets: What the cells hold.

        Returns:
            The loss, and shares of right answers (shape, color, char), the mean box error as a
            share of the side (box) and the median error of object and word edges in bins.
        """
        cells = image_tokens[:, 1:].view(-1, GRID, GRID, WIDTH)
        occupied = targets.shape >= 0
        metrics: dict[str, float] = {}
        loss = F.binary_cross_entropy_with_logits(self.present(cells).squeeze(-1), occupied.float())

        held, box = cells[occupied], targets.box[occupied]
        shape, color, boxes = self.shape(held), self.color(held), self.box(held)
        loss = loss + 0.5 * F.cross_entropy(shape, targets.shape[occupied])
        loss = loss + 0.5 * F.cross_entropy(color, targets.color[occupied])
        loss = loss + 8 * F.smooth_l1_loss(boxes, box, beta=0.02)
        edge_loss, metrics["edge"] = self._edge_loss(self.edges(held), box)
        loss = loss + edge_loss
        metrics["shape"] = _accuracy(shape, targets.shape[occupied])
        metrics["color"] = _accuracy(color, targets.color[occupied])
        metrics["box"] = (boxes - box).abs().mean().item()

        characters = self.characters(cells).view(-1, 1 + len(CHARACTERS))
        wanted = targets.characters.view(-1)
        some = wanted > 0
        # Averaged apart: cells without characters outnumber the others so far that nothing would be read.
        loss = loss + F.cross_entropy(characters[~some], wanted[~some])
        if some.any():
            in_word = cells[targets.in_word]
            word_box = targets.word_box[targets.in_word]
            word_edge_loss, metrics["word_edge"] = self._edge_loss(self.word_edges(in_word), word_box)
            loss = loss + F.cross_entropy(characters[some], wanted[some]) + 0.5 * word_edge_loss
            loss = loss + 4 * F.smooth_l1_loss(self.word_box(in_word), word_box, beta=0.02)
            metrics["char"] = _accuracy(characters[some], wanted[some])
        return loss, metrics

    def _edge_loss(self, codes: Tensor, box: Tensor) -> tuple[Tensor, float]:
        """Classifies box edges (float [N, 4] in [0, 1]) into bins; also gives the median error in bins."""
        logits = codes.view(-1, CODE) @ self.bin_code.t()
        position = (box * BINS).clamp(0, BINS - 1).view(-1)
        error = (logits.argmax(1) - position).abs().median().item()
        return soft_bin_loss(logits.log_softmax(1), position, sigma=5.0).mean(), error


def soft_bin_loss(log_probabilities: Tensor, position: Tensor, sigma: float) -> Tensor:
    """Gives the divergence from a Gaussian over the bins, so that near misses cost little.

    Args:
        log_probabilities: float [N, BINS].
        position: float [N], in bins.
        sigma: The Gaussian's width in bins.

    Returns:
        float [N], 0 where the Gaussian is met.
    """
    distance = torch.arange(BINS)[None] - position[:, None]
    weight = torch.softmax(-0.5 * (distance / sigma) ** 2, 1)
    return (weight * (weight.clamp_min(1e-9).log() - log_probabilities)).sum(1)


def _accuracy(logits: Tensor, wanted: Tensor) -> float:
    return (logits.argmax(1) == wanted).float().mean().item()
