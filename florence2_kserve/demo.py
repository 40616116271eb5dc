"""``florence2 demo`` and ``florence2 evaluate-embedded``: the running service against scenes whose truth is known."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from florence2_kserve.client import Florence2Client
from florence2_kserve.local import LocalService
from florence2_kserve.tasks import TASKS
from florence2_kserve.tiny.scenes import Scene, held_out_scene

DEMO_SCENES = (36, 30)  # four things and a word; four things
SCALE = 4  # the annotated picture's pixels per pixel of the scene
SWITCH = "florence2 serve --model florence-community/Florence-2-large-ft"
TOY = f"The embedded model is a toy that was trained on drawn scenes. The real one: {SWITCH}"
MODEL_CARD = Path(__file__).parent / "tiny" / "MODEL_CARD.md"


def run_demo(output: Path, model: str) -> int:
    """Asks the service about drawn scenes, prints answers beside the truth and saves an annotated picture.

    Args:
        output: Folder for the pictures.
        model: Checkpoint to serve.

    Returns:
        The exit code, 0 where every question got an answer.
    """
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    typer.echo("starting the service (florence2 serve) on free ports …")
    with LocalService(model=model) as service, httpx.Client(base_url=service.rest_url, timeout=120) as http:
        typer.echo(f"ready after {time.monotonic() - started:.1f} s at {service.rest_url}\n")
        panels = []
        for index in DEMO_SCENES:
            scene = held_out_scene(index)
            picture = _png(scene.image)
            (output / f"scene-{index}.png").write_bytes(picture)
            typer.echo(f"scene {index}: {_describe(scene)}")
            answers: dict[str, Any] = {}
            for task in TASKS.values():
                example = scene.truth(task.name)
                if example is None:
                    continue
                request = _request(picture, task.name, example.text)
                response = http.post("/v2/models/florence2/infer", json=request)
                if response.is_error:
                    typer.echo(f"  {task.name}: HTTP {response.status_code} {response.text}", err=True)
                    return 1
                answer = json.loads(response.json()["outputs"][0]["data"][0])
                answers[task.name] = answer[task.name]
                asked = f" {example.text!r}" if example.text else ""
                typer.echo(f"  {task.name}{asked}")
                typer.echo(f"    answer {json.dumps(answer, ensure_ascii=False)}")
                typer.echo(f"    truth  {json.dumps({task.name: _rounded(example.answer)}, ensure_ascii=False)}")
            panels.append(_annotate(scene, answers))
            typer.echo("")
    path = output / "annotated.png"
    _side_by_side(panels).save(path)
    typer.echo(f"annotated picture: {path}")
    typer.echo(TOY)
    return 0


def run_evaluation(scenes: int, url: str | None, write_card: bool) -> int:
    """Scores a service that runs the embedded model on held-out scenes and prints the table.

    Args:
        scenes: How many held-out scenes.
        url: The service, or None to start one.
        write_card: Whether to write the table into the model card.

    Returns:
        The exit code.
    """
    from florence2_kserve.tiny.evaluate import evaluate, scores_table, write_scores

    started = time.monotonic()
    with _service(url) as address, Florence2Client(address, timeout=600) as client:

        def infer(images: Sequence[np.ndarray[Any, Any]], tasks: Sequence[str], texts: Sequence[str]) -> list[Any]:
            replies = client.infer_batch([_png(image) for image in images], tasks, texts)
            return [reply[task] for reply, task in zip(replies, tasks, strict=True)]

        scores = evaluate(infer, scenes=scenes, progress=lambda task: typer.echo(f"{task} …", err=True))
    typer.echo(scores_table(scores))
    typer.echo(
        f"\n{scenes} held-out scenes, beam search of 3, through the service: {time.monotonic() - started:.0f} s"
    )
    if write_card:
        write_scores(MODEL_CARD, scores)
    return 0


@contextmanager
def _service(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
    else:
        with LocalService() as service:
            yield service.rest_url


def _request(picture: bytes, task: str, text: str) -> dict[str, Any]:
    """Returns the body that a user of a V2 server writes by hand."""
    tensors = {"INPUT_IMAGE": base64.b64encode(picture).decode(), "TASK_PROMPT": task}
    if text:
        tensors["TEXT_PROMPT"] = text
    return {
        "id": uuid4().hex,
        "inputs": [
            {"name": name, "shape": [1, 1], "datatype": "BYTES", "data": [value]} for name, value in tensors.items()
        ],
    }


def _png(image: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _describe(scene: Scene) -> str:
    words = " ".join(word.text for word in scene.words)
    return f"{scene.truth('<CAPTION>').target}, {f'the text {words}' if words else 'no text'}"  # type: ignore[union-attr]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return round(value) if isinstance(value, float) else value


def _annotate(scene: Scene, answers: dict[str, Any]) -> Image.Image:
    """Draws the service's boxes, polygons and words onto the scene; the truth lies beneath in white."""
    height, width = scene.image.shape[:2]
    canvas = Image.fromarray(scene.image).resize((width * SCALE, height * SCALE), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=4 * SCALE)

    def outline(points: Sequence[float], color: str, label: str = "", thickness: int = 3) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in zip(points[::2], points[1::2], strict=True)]
        draw.line([*scaled, scaled[0]], fill=color, width=thickness)
        if label:
            top, bottom = min(y for _, y in scaled), max(y for _, y in scaled)
            corner = (min(x for x, _ in scaled) + 4, top - 5 * SCALE if top > 6 * SCALE else bottom + SCALE)
            draw.rectangle(draw.textbbox(corner, label, font=font), fill="white")
            draw.text(corner, label, fill=color, font=font)

    for box in [item.box for item in scene.objects] + [word.box for word in scene.words]:
        outline(_corners(box), "white", thickness=6)
    dense = answers["<DENSE_REGION_CAPTION>"]
    for box, label in zip(dense["bboxes"], dense["labels"], strict=True):
        outline(_corners(box), "magenta", label)
    ocr = answers["<OCR_WITH_REGION>"]
    for quad, label in zip(ocr["quad_boxes"], ocr["labels"], strict=True):
        outline(quad, "blue", label)
    for polygons in answers["<REFERRING_EXPRESSION_SEGMENTATION>"]["polygons"]:
        for polygon in polygons:
            if len(polygon) >= 4:
                outline(polygon, "lime")
    return canvas


def _corners(box: Sequence[float]) -> list[float]:
    x1, y1, x2, y2 = box
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def _side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    gap = 4 * SCALE
    whole = Image.new("RGB", (sum(p.width + gap for p in panels) - gap, max(p.height for p in panels)), "black")
    left = 0
    for panel in panels:
        whole.paste(panel, (left, 0))
        left += panel.width + gap
    return whole
