"""The CPU's half: pictures and prompts become tensors, as the checkpoint's processor makes them."""
# ruff: noqa: E402 -- what is imported is on a path that is set first

from __future__ import annotations

import base64
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

# The interpreter inside Triton's stub heeds no PYTHONPATH.
sys.path[:0] = os.environ["FLORENCE2_TRITON_PATH"].split(os.pathsep)
os.environ["USE_TORCH"] = "0"  # transformers 4 would load it in each process, and a processor makes no use of it

import numpy as np
import triton_python_backend_utils as pb
from florence2_checkpoint import load_processor
from PIL import Image

DEFAULT_MAX_NEW_TOKENS = 1024


class TritonPythonModel:
    """Makes one batch of tensors of all requests that Triton hands over."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the processor."""
        given = json.loads(args["model_config"])["parameters"]
        parameters = {key: value["string_value"] for key, value in given.items()}
        self._processor = load_processor(Path(parameters["checkpoint"]))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers each request; a picture or prompt that can't be read fails its own request only."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            images = [
                Image.open(io.BytesIO(base64.b64decode(row))).convert("RGB") for row in _column(request, "INPUT_IMAGE")
            ]
            tasks = [row.decode() for row in _column(request, "TASK_PROMPT")]
            texts = [row.decode() for row in _column(request, "TEXT_PROMPT")] or [""] * len(tasks)
            prompts = [task + text for task, text in zip(tasks, texts, strict=True)]
            inputs = self._processor(images=images, text=prompts, padding=True, return_tensors="np")
        except Exception as error:
            return pb.InferenceResponse(error=pb.TritonError(f"{type(error).__name__}: {error}"))
        sizes = np.array([image.size for image in images], np.int32)
        limits = _column(request, "MAX_NEW_TOKENS") or [DEFAULT_MAX_NEW_TOKENS] * len(tasks)
        return pb.InferenceResponse(
            [
                pb.Tensor("PIXEL_VALUES", np.ascontiguousarray(inputs["pixel_values"], np.float32)),
                pb.Tensor("INPUT_IDS", inputs["input_ids"].astype(np.int64)),
                pb.Tensor("IMAGE_SIZE", sizes),
                pb.Tensor("LIMIT", np.array(limits, np.int32)[:, None]),
            ]
        )


def _column(request: Any, name: str) -> list[Any]:
    tensor = pb.get_input_tensor_by_name(request, name)
    return [] if tensor is None else list(tensor.as_numpy().reshape(-1))
