"""Random weights at a real size are served as any other checkpoint is."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from florence2_kserve.benchmark.checkpoint import main
from florence2_kserve.benchmark.models import find_shape
from florence2_kserve.client import Florence2Client
from florence2_kserve.local import LocalService
from florence2_kserve.model_files import locate_model
from florence2_kserve.processor import Processor


def test_a_small_one_has_the_embedded_models_tokenizer_and_its_own_image_size(tmp_path):
    assert main([str(tmp_path), "--size", "quick", "--profile", "decode-bound"]) == 0
    processor = Processor.load(locate_model(str(tmp_path)))
    shape = find_shape("quick", "decode-bound")
    assert (processor.image.height, processor.image.image_seq_length) == (shape.image_size, shape.image_tokens)
    tokens = {t["content"]: t["id"] for t in json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]}
    assert json.loads((tmp_path / "config.json").read_text())["image_token_id"] == tokens["<image>"]
    embedded = Processor.load(locate_model())
    assert processor.input_ids("a red circle").tolist() == embedded.input_ids("a red circle").tolist()


@pytest.mark.slow
def test_a_base_one_has_the_public_ids_and_answers_at_a_fixed_length(tmp_path):
    main([str(tmp_path)])
    tokens = {t["content"]: t["id"] for t in json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]}
    assert (tokens["<mask>"], tokens["<loc_0>"], tokens["<loc_999>"], tokens["<image>"]) == (
        50264,
        50269,
        51268,
        51289,
    )
    picture = io.BytesIO()
    Image.new("RGB", (640, 480), "red").save(picture, "PNG")
    with LocalService(model=tmp_path, timeout=300) as service, Florence2Client(service.rest_url) as client:
        answer = client.ask(picture.getvalue(), "<OD>", max_new_tokens=5)
    assert answer.finish_reason == "length"
