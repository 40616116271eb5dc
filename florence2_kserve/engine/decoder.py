"""One step of the BART decoder, for rows of many requests at once.

A row is one token to be fed: usually a beam's last one; a new request also feeds its start token. Each request
in flight has a lane.

Cross-attention. A lane's keys and values of image and prompt exist once. The queries of its beams are folded
into one query of several positions, so that they are read once a step, not once a beam.

Self-attention. Keys and values are written where there is room and never move: a lane owns pages of a pool and
fills them entry by entry, each beam of each step one entry. Which of its lane's entries a beam descends from is
a table of booleans; reordering beams permutes rows of that table. Every beam attends to all entries of its lane,
with the others masked, so again each key and value is read once a step. (vLLM's PagedAttention, Kwon et al.
2023, pages the cache by a table of pages for each sequence; here the pages themselves are the batch of the matrix
products, and scores are brought together for the softmax, which needs no kernel of its own.)

R rows · C lanes · Q queries a lane · N pages in use · M pages a lane · E entries a page
H heads · D width of a head · S encoder positions · V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import Florence2ForConditionalGeneration
from transformers.activations import ACT2FN

_POSITION_OFFSET = 2  # BART's position table begins with two unused rows
_FEW_ROWS = 8


@dataclass(slots=True)
class StepInputs:
    """Where the rows of a step are.

    Attributes:
        tokens: int64 [R], tokens to feed; rows whose logits are wanted come first.
        positions: int64 [R], their positions.
        row_queries: int64 [R], each row's place among the queries, lane * Q + query; None where row after row has
            the next place, as then `query_rows` is.
        query_rows: int64 [C*Q], the row at each place; any row of the same lane where there is none.
        row_pages: int64 [R], page that the row's key and value go to.
        row_offsets: int64 [R], entry in it.
        page_lanes: int64 [N], which lane owns a page; any for free ones.
        page_places: int64 [N], its place among the pages of all lanes, lane * M + number.
        lane_pages: int64 [C,M], each lane's pages; its first one where it has fewer.
        lane_lacks_page: bool [C,M], whether it has fewer; None where none has.
        is_hidden: bool [N,Q,E], which entries of a page its lane's queries do not attend to.
        cross_mask: [C,1,1,S] in the model's precision, 0 for encoder positions that exist, else minus infinity; None
            where all do.
        num_logits: Rows whose logits are wanted.
        cross_length: S.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    row_queries: torch.Tensor | None
    query_rows: torch.Tensor | None
    row_pages: torch.Tensor
    row_offsets: torch.Tensor
    page_lanes: torch.Tensor
    page_places: torch.Tensor
    lane_pages: torch.Tensor
    lane_lacks_page: torch.Tensor | None
    is_hidden: torch.Tensor
    cross_mask: torch.Tensor | None
    num_logits: int
    cross_length: int


class KeyValueStore:
    """Keys and values of all lanes, allocated once.

    Attributes:
        self_entries: [layers,2,pages,H,E,D], keys and values.
        cross_keys: [layers,lanes,H,S,D].
        cross_values: Likewise.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        lanes: int,
        cross_length: int,
        pages: int,
        entries: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        layers, heads, width = len(decoder.layers), decoder.num_heads, decoder.head_dim
        self.self_entries, self.cross_keys, self.cross_values = (
            _zeros((layers, *shape, width), dtype, device)
            for shape in [(2, pages, heads, entries), *[(lanes, heads, cross_length)] * 2]
        )

    def move_lane(self, source: int, target: int, length: int) -> None:
        """Copies the keys and values of a lane's `length` encoder positions."""
        for tensor in (self.cross_keys, self.cross_values):
            tensor[:, target, :, :length] = tensor[:, source, :, :length]

    def scrub(self, lane: int, pages: Sequence[int]) -> None:
        """Clears what a lane held: NaN in a value would outlive its mask, as 0 times NaN is NaN."""
        for tensor in (self.cross_keys, self.cross_values):
            tensor[:, lane] = 0
        for page in pages:
            self.self_entries[:, :, page] = 0


@dataclass(slots=True, frozen=True)
class _Layer:
    """Weights of one decoder layer; `qkv` are the three projections in one matrix."""

    qkv: nn.Linear
    self_out: nn.Linear
    self_norm: nn.LayerNorm
    cross_q: nn.Linear
    cross_out: nn.Linear
    cross_norm: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    final_norm: nn.LayerNorm


class Decoder:
    """The decoder of a Florence-2, sharing its weights.

    Where several projections run as one, the model's own parameters become views of the joined
    matrix, so that nothing is stored twice and the model itself works as before.

    Args:
        model: In evaluation mode.
    """

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        bart = model.model.language_model.decoder
        config = bart.config
        self.num_heads = int(config.decoder_attention_heads)
        self.head_dim = int(config.d_model) // self.num_heads
        self.vocab_size = int(config.vocab_size)
        self._scale = self.head_dim**-0.5
        self._activation = ACT2FN[config.activation_function]
        self._tokens = bart.embed_tokens
        self._positions = bart.embed_positions.weight[_POSITION_OFFSET:]
        self._embedding_norm = bart.layernorm_embedding
        self._head = model.lm_head
        self.layers = [
            _Layer(
                qkv=_joined(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                self_out=layer.self_attn.out_proj,
                self_norm=layer.self_attn_layer_norm,
                cross_q=layer.encoder_attn.q_proj,
                cross_out=layer.encoder_attn.out_proj,
                cross_norm=layer.encoder_attn_layer_norm,
                fc1=layer.fc1,
                fc2=layer.fc2,
                final_norm=layer.final_layer_norm,
            )
            for layer in bart.layers
        ]
        attentions = [layer.encoder_attn for layer in bart.layers]
        self._cross_kv = _joined(*(projection for each in attentions for projection in (each.k_proj, each.v_proj)))

    def write_cross(self, store: KeyValueStore, encoder_states: torch.Tensor, lanes: torch.Tensor) -> None:
        """Computes keys and values of all layers' cross-attention and puts them into their lanes.

        Args:
            store: Where they go.
            encoder_states: [b,S,d].
            lanes: int64 [b].
        """
        length = encoder_states.shape[1]
        joined = self._cross_kv(encoder_states)
        keys, values = rearrange(
            joined, "b s (layer kv h d) -> kv layer b h s d", layer=len(self.layers), kv=2, h=self.num_heads
        )
        store.cross_keys[:, lanes, :, :length] = keys
        store.cross_values[:, lanes, :, :length] = values

    def step(self, inputs: StepInputs, store: KeyValueStore) -> torch.Tensor:
        """Feeds one token for each row.

        Args:
            inputs: The rows.
            store: Keys and values; the rows' own are added.

        Returns:
            float32 [num_logits,V].
        """
        hidden = self._tokens(inputs.tokens) + self._positions[inputs.positions]  # [R,d]
        hidden = self._embedding_norm(hidden)
        mask = self._page_mask(inputs, hidden.dtype)
        for index, layer in enumerate(self.layers):
            attended = self._self_attention(hidden, layer, inputs, store.self_entries[index], mask)
            hidden = layer.self_norm(hidden + layer.self_out(attended))
            attended = self._cross_attention(hidden, layer, inputs, store.cross_keys[index], store.cross_values[index])
            hidden = layer.cross_norm(hidden + layer.cross_out(attended))
            hidden = layer.final_norm(hidden + layer.fc2(self._activation(layer.fc1(hidden))))
        return self._logits(hidden[: inputs.num_logits]).float()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.device.type == "cpu" and 1 < len(hidden) <= _FEW_ROWS:
            # The same product the other way round: MKL takes half the time for it then.
            return (self._head.weight @ hidden.T).T.contiguous()
        return self._head(hidden)

    def _page_mask(self, inputs: StepInputs, dtype: torch.dtype) -> torch.Tensor:
        """Returns what is added to the scores of each page, [N*H,Q,E]."""
        pages, queries, entries = inputs.is_hidden.shape
        shape = (pages, self.num_heads, queries, entries)
        mask = torch.zeros(shape, dtype=dtype, device=inputs.is_hidden.device)
        return mask.masked_fill_(inputs.is_hidden[:, None], torch.finfo(dtype).min).view(-1, queries, entries)

    def _self_attention(
        self, hidden: torch.Tensor, layer: _Layer, inputs: StepInputs, entries: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        # Dimensions are brought into order by the look-ups, which copy anyway: each operation is a launch on a GPU.
        pages = len(inputs.page_lanes)
        projected = layer.qkv(hidden).view(len(hidden), 3, self.num_heads, self.head_dim)
        entries[:, inputs.row_pages, :, inputs.row_offsets] = projected[:, 1:]
        keys, values = entries[:, :pages].flatten(1, 2)  # [N*H,E,D]

        queries = self._fold(projected[:, 0], inputs).index_select(0, inputs.page_lanes)  # [N,H,Q,D]
        scores = torch.baddbmm(mask, queries.flatten(0, 1), keys.transpose(1, 2), alpha=self._scale)
        scores = scores.view(pages, self.num_heads, *mask.shape[1:])  # [N,H,Q,E]
        weights = _softmax_over_pages(scores, inputs)
        mixed = (weights.flatten(0, 1) @ values).view(pages, self.num_heads, -1, self.head_dim)
        return self._unfold(_sum_of_pages(mixed, inputs), inputs)

    def _cross_attention(
        self, hidden: torch.Tensor, layer: _Layer, inputs: StepInputs, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        query = layer.cross_q(hidden).view(len(hidden), self.num_heads, self.head_dim)
        folded = self._fold(query, inputs)
        lanes, length = len(folded), inputs.cross_length
        mixed = F.scaled_dot_product_attention(
            folded,
            keys[:lanes, :, :length],
            values[:lanes, :, :length],
            attn_mask=inputs.cross_mask,
            scale=self._scale,
        )
        return self._unfold(mixed.transpose(1, 2), inputs)

    def _fold(self, rows: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        """[R,H,D] -> [C,H,Q,D]."""
        if inputs.query_rows is not None:
            rows = rows.index_select(0, inputs.query_rows)
        return rows.unflatten(0, (len(inputs.lane_pages), -1)).transpose(1, 2)

    def _unfold(self, lanes: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        """[C,Q,H,D] -> [R,H*D]."""
        rows = lanes.reshape(-1, self.num_heads * self.head_dim)
        return rows if inputs.row_queries is None else rows.index_select(0, inputs.row_queries)


def _softmax_over_pages(scores: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
    """Returns the weights of each page's entries, [N,H,Q,E], over all pages of its lane."""
    lanes, most = inputs.lane_pages.shape
    if most == 1:
        return scores.softmax(dim=-1)
    _, heads, queries, entries = scores.shape
    by_lane = scores.permute(1, 2, 0, 3).index_select(2, inputs.lane_pages.view(-1))  # [H,Q,C*M,E]
    if inputs.lane_lacks_page is not None:
        by_lane.masked_fill_(inputs.lane_lacks_page.reshape(-1, 1), torch.finfo(scores.dtype).min)
    weights = by_lane.view(heads, queries, lanes, most * entries).softmax(dim=-1)
    return weights.view(by_lane.shape).permute(2, 0, 1, 3).index_select(0, inputs.page_places)


def _sum_of_pages(mixed: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
    """Returns the sum over each lane's pages: [N,H,Q,D] -> [C,Q,H,D]."""
    by_lane = mixed.transpose(1, 2).index_select(0, inputs.lane_pages.view(-1))  # [C*M,Q,H,D]
    lanes, most = inputs.lane_pages.shape
    if most == 1:
        return by_lane
    if inputs.lane_lacks_page is not None:
        by_lane.masked_fill_(inputs.lane_lacks_page.reshape(-1, 1, 1, 1), 0)
    # Brought together and summed, not added up in place: on a GPU that would have no fixed order.
    return by_lane.unflatten(0, (lanes, most)).sum(dim=1)


def _joined(*parts: nn.Linear) -> nn.Linear:
    """Returns one layer that computes what `parts` compute, behind each other; they become views of it."""
    joined = nn.Linear(
        parts[0].in_features,
        sum(part.out_features for part in parts),
        bias=parts[0].bias is not None,
        device="meta",
        dtype=parts[0].weight.dtype,
    )
    joined.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if joined.bias is not None:
        joined.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    row = 0
    for part in parts:
        rows = slice(row, row + part.out_features)
        part.weight.data = joined.weight.data[rows]
        if joined.bias is not None:
            part.bias.data = joined.bias.data[rows]
        row = rows.stop
    return joined


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take memory on a CPU only where they are written: a pool's far end may never be."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(*shape)
