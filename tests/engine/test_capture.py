"""What a replayed step is given."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from florence2_kserve.engine.capture import _copy
from florence2_kserve.engine.decoder import StepInputs


def test_inputs_of_every_type_and_layout_are_copied():
    numbers = torch.arange(1, 9)
    inputs = StepInputs(
        tokens=numbers,
        positions=numbers * 2,
        row_queries=None,
        query_rows=None,
        row_pages=numbers * 3,
        row_offsets=numbers * 4,
        page_lanes=numbers * 5,
        page_places=numbers * 6,
        lane_pages=numbers.view(2, 4),
        lane_lacks_page=torch.tensor([[1, 0], [0, 1]]).view(torch.bool)[:, ::8],
        is_hidden=torch.tensor([[[True, False, True]]]),
        cross_mask=torch.tensor([0, -torch.inf]),
        num_logits=8,
        cross_length=2,
    )
    empty = {
        each.name: torch.zeros_like(getattr(inputs, each.name))
        for each in fields(inputs)
        if isinstance(getattr(inputs, each.name), torch.Tensor)
    }
    target = replace(inputs, **empty)
    _copy(inputs, target)
    for name, tensor in empty.items():
        assert getattr(target, name) is tensor
        assert torch.equal(tensor, getattr(inputs, name)), name
    assert target.lane_lacks_page.tolist() == [[True, False], [False, True]]
