"""A scenario's requests as the transformer would hand them on: for a predictor that is measured alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from florence2_kserve.answers import region_text
from florence2_kserve.images import decode_image
from florence2_kserve.model_files import locate_model
from florence2_kserve.processor import Processor
from florence2_kserve.protocol import wire
from florence2_kserve.protocol.internal import GenerateCall
from florence2_kserve.protocol.public import INPUT_IMAGE, TASK_PROMPT, TEXT_PROMPT, GenerationOptions
from florence2_kserve.protocol.tensors import Tensor, unpack
from florence2_kserve.tasks import TASKS, TaskInput
from florence2_loadtest.scenario import Scenario
from florence2_loadtest.workload import Prepared, Workload, build_workload

_MOST_BYTES = 4 * 1024**3
_MOST_PIXELS = 2**30  # pictures are the scenario's own


def predictor_workload(
    scenario: Scenario, model_name: str, model: str = "embedded", revision: str | None = None
) -> Workload:
    """Returns the requests of `build_workload`, decoded, resized and tokenised beforehand.

    Args:
        scenario: What is asked about which pictures.
        model_name: Model's name on the predictor.
        model: Checkpoint whose processor prepares the requests.
        revision: Of a hub id.

    Raises:
        ValueError: If the scenario can't be prepared, or its requests don't fit into memory.
        ModelFilesError: If there is no such checkpoint.
    """
    public = build_workload(scenario.model_copy(update={"protocol": "grpc", "encoding": "binary"}), model_name)
    processor = Processor.load(locate_model(model, revision=revision, with_weights=False))
    count = public.variety
    if (size := count * processor.image.height * processor.image.width * 3) > _MOST_BYTES:
        raise ValueError(
            f"{count} requests make {size / 1024**3:.1f} GiB of pixels, more than {_MOST_BYTES / 1024**3:.0f}: "
            "take fewer pictures or tasks"
        )
    return public.mapped(partial(to_internal, processor=processor))


def to_internal(prepared: Prepared, processor: Processor) -> Prepared:
    """Turns a request to the transformer, over gRPC and of one row, into the one that it makes of it.

    Args:
        prepared: The request.
        processor: Of the predictor's checkpoint.
    """
    message = wire.MESSAGES["ModelInferRequest"].FromString(prepared.body)
    values = _values(message)
    picture = decode_image(values[INPUT_IMAGE], max_pixels=_MOST_PIXELS, draft_for=processor.image)
    task, text = TASKS[values[TASK_PROMPT].decode()], values.get(TEXT_PROMPT, b"").decode()
    if task.takes is TaskInput.REGION:
        text = region_text(text, picture.size)
    bound = min(task.max_new_tokens, processor.max_target_tokens)
    options = GenerationOptions.model_validate(wire.response_parameters(message))
    call = GenerateCall(
        pixel_values=picture.resized(processor.image, exact=False)[np.newaxis],
        image_keys=[b""],
        input_ids=[processor.input_ids(task.prompt(text))],
        image_index=[0],
        max_new_tokens=[min(options.max_new_tokens or bound, bound)],
        options=options.model_copy(update={"max_new_tokens": None}),
    )
    body = wire.infer_request(
        message.model_name, call.to_tensors(), request_id=message.id, parameters=call.to_parameters()
    ).SerializeToString()
    return Prepared(prepared.task, body, {}, len(body))


def _values(message: Any) -> dict[str, bytes]:
    tensors = [
        Tensor(tensor.name, unpack(tensor.name, tensor.datatype, tensor.shape, raw))
        for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True)
    ]
    return {tensor.name: tensor.data.item() for tensor in tensors}
