"""The model's half: ``generate`` on whatever the dynamic batcher has collected, and the reading of its answers."""
# ruff: noqa: E402 -- what is imported is on a path that is set first

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# The interpreter inside Triton's stub heeds no PYTHONPATH.
sys.path[:0] = os.environ["FLORENCE2_TRITON_PATH"].split(os.pathsep)

import numpy as np
import torch
import triton_python_backend_utils as pb
from florence2_checkpoint import load_processor
from florence2_lengths import EndRowsAtTheirLength
from transformers import Florence2ForConditionalGeneration

NUM_BEAMS = 3


class TritonPythonModel:
    """Runs one batch at a time; the next collects meanwhile."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the model on its device."""
        given = json.loads(args["model_config"])["parameters"]
        parameters = {key: value["string_value"] for key, value in given.items()}
        folder = Path(parameters["checkpoint"])
        if threads := int(parameters["threads"]):
            torch.set_num_threads(threads)
        dtype = getattr(torch, parameters["dtype"])
        model = Florence2ForConditionalGeneration.from_pretrained(folder).to(parameters["device"], dtype)
        self._model = model.eval()
        self._processor = load_processor(folder)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Generates for all requests together, up to the longest answer among them."""
        device, pad = self._model.device, self._model.generation_config.pad_token_id
        prompts = [torch.from_numpy(row) for request in requests for row in _array(request, "INPUT_IDS")]
        # Padded on the right, as the processor does it; [B,T].
        input_ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=pad).to(device)
        pixel_values = [torch.from_numpy(_array(request, "PIXEL_VALUES")) for request in requests]
        limits = [int(limit) for request in requests for limit in _array(request, "LIMIT").reshape(-1)]
        longest = max(limits)
        forced = [EndRowsAtTheirLength(limits, NUM_BEAMS, self._eos, device)] if min(limits) < longest else None
        with torch.inference_mode():
            generated = self._model.generate(
                input_ids=input_ids,
                attention_mask=(input_ids != pad).long(),
                pixel_values=torch.cat(pixel_values).to(device, self._model.dtype),
                num_beams=NUM_BEAMS,
                max_new_tokens=longest,
                logits_processor=forced,
            )
        # Location tokens are special ones, too, so the padding behind short answers is taken off by hand.
        decoded = self._processor.batch_decode(generated.cpu(), skip_special_tokens=False)
        texts = iter([text.replace(self._processor.tokenizer.pad_token, "") for text in decoded])
        return [self._response(request, texts) for request in requests]

    @property
    def _eos(self) -> int:
        return self._model.generation_config.eos_token_id

    def _response(self, request: Any, texts: Any) -> Any:
        tasks = [row.decode() for row in _array(request, "TASK_PROMPT").reshape(-1)]
        sizes = _array(request, "IMAGE_SIZE").tolist()
        answers = [
            json.dumps(self._processor.post_process_generation(next(texts), task=task, image_size=tuple(size)))
            for task, size in zip(tasks, sizes, strict=True)
        ]
        return pb.InferenceResponse([pb.Tensor("PARSED_JSON", np.array(answers, object)[:, None])])


def _array(request: Any, name: str) -> Any:
    return pb.get_input_tensor_by_name(request, name).as_numpy()
