"""``python -m florence2_kserve.benchmark.transformer``: the transformer's work beside ``Florence2Processor``.

One process, one thread, the same files and the same tokens on all sides; the sides take turns, and medians of
all rounds are compared. What is counted is processor time, which others at work on the machine hardly change.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from PIL import __version__ as pillow_version

from florence2_kserve.answers import parse_answer
from florence2_kserve.benchmark.__main__ import natural_number
from florence2_kserve.benchmark.report import table
from florence2_kserve.images import decode_image
from florence2_kserve.model_files import locate_model
from florence2_kserve.processor import LOCATIONS, ImageSettings, Processor
from florence2_kserve.tasks import TASKS

Array = np.ndarray[Any, Any]
Size = tuple[int, int]
Side = Callable[[Any], Any]

PIL_SIDE, TORCHVISION_SIDE = "transformers, PIL", "transformers, torchvision"
OURS, EXACT = "ours", "ours, exact"
NORMALISED = ", normalised"
TRANSFORMERS = "transformers"

_SIDE, _IMAGE_TOKENS = 768, 577  # Florence-2's, whatever the embedded model has
_TASK = "<OD>"
_ANSWER_SIZE = (1280, 960)
_EXPLANATION = f"""\
pictures: a JPEG's bytes and {_TASK} → what goes to the model
  transformers   Pillow decodes, Florence2Processor (both image backends) → token ids, float32 [3,{_SIDE},{_SIDE}]
  ours           → token ids, uint8 [{_SIDE},{_SIDE},3]; the predictor's device rescales and normalises them
  {NORMALISED.strip()}: these rescaled and normalised on this CPU as well, so that both sides end with the same
  exact          --exact-images: large JPEGs decoded whole, resized by Pillow (docs/transformer.md)
answers: generated tokens → boxes, labels, text; post_process_generation beside parse_answer
ms of processor time, one thread; "× SIDE": how many times as fast as SIDE"""


@dataclass(frozen=True, slots=True)
class TransformerBenchmarkSettings:
    """What is run.

    Attributes:
        sizes: (width, height) of the JPEGs, in pixels.
        pictures: Pictures of each size.
        answers: Answers of each kind.
        rounds: Rounds, of which medians are taken.
        seed: Seed of pictures and answers.
        json: File for all figures.
    """

    sizes: tuple[Size, ...] = ((640, 480), (4000, 3000))
    pictures: int = 3
    answers: int = 8
    rounds: int = 15
    seed: int = 0
    json: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: Arguments; None takes the process's own.

    Returns:
        0; 1 if a side gave something else than transformers; 2 if it can't run here.
    """
    settings = parse(argv)
    try:
        return run_benchmark(settings)
    except ModuleNotFoundError as error:
        print(f"error: {error}; the benchmark needs the extra [predictor]", file=sys.stderr)
        return 2


def parse(argv: Sequence[str] | None = None) -> TransformerBenchmarkSettings:
    """Reads the command line; a wrong one ends the program with its usage."""
    defaults = TransformerBenchmarkSettings()
    parser = argparse.ArgumentParser(
        prog="python -m florence2_kserve.benchmark.transformer",
        description="Compare the transformer's work on a CPU with that of transformers' Florence2Processor.",
        epilog=_EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = ",".join(f"{width}x{height}" for width, height in defaults.sizes)
    parser.add_argument("--sizes", type=_sizes, default=defaults.sizes, help=f"WIDTHxHEIGHT,… of JPEGs ({sizes})")
    parser.add_argument(
        "--pictures", type=natural_number, default=defaults.pictures, help="of each size (%(default)s)"
    )
    parser.add_argument("--answers", type=natural_number, default=defaults.answers, help="of each kind (%(default)s)")
    parser.add_argument(
        "--rounds", type=natural_number, default=defaults.rounds, help="medians are taken of (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    return TransformerBenchmarkSettings(**vars(parser.parse_args(argv)))


def run_benchmark(settings: TransformerBenchmarkSettings) -> int:
    """Runs the benchmark and prints its tables; see `TransformerBenchmarkSettings` for what it writes.

    Returns:
        0, or 1 if a side gave something else than transformers, where it must not.

    Raises:
        ModuleNotFoundError: If torch, torchvision or transformers is missing.
    """
    import torch

    from florence2_kserve.benchmark.roofline import read_cpu

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cpu, _ = read_cpu()
        print(f"{_EXPLANATION}\n\n{cpu}, Pillow {pillow_version}, torch {torch.__version__}")
        bench = _Bench(settings)
        figures = {
            "cpu": cpu,
            "settings": asdict(settings) | {"json": str(settings.json)},
            "pictures": {f"{size[0]}x{size[1]}": bench.compare_pictures(size) for size in settings.sizes},
            "answers": {kind: bench.compare_answers(kind) for kind in _ANSWERS},
        }
    finally:
        torch.set_num_threads(threads)
    if settings.json is not None:
        settings.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if not bench.agrees:
        print("\nerror: sides that have to agree don't", file=sys.stderr)
    return 0 if bench.agrees else 1


def _sizes(text: str) -> tuple[Size, ...]:
    """Reads WIDTHxHEIGHT,…"""
    sizes = []
    for part in text.split(","):
        width, _, height = part.partition("x")
        sizes.append((natural_number(width), natural_number(height)))
    return tuple(sizes)


class _Bench:
    """Both sides, on the embedded model's tokenizer and with the image settings of the real model."""

    def __init__(self, settings: TransformerBenchmarkSettings) -> None:
        from transformers.models.clip.image_processing_clip import CLIPImageProcessor
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        from transformers.models.florence2.processing_florence2 import Florence2Processor

        self._settings = settings
        self.agrees = True
        files = locate_model()
        embedded = Processor.load(files)
        image = replace(embedded.image, height=_SIDE, width=_SIDE, image_seq_length=_IMAGE_TOKENS)
        self._ours = replace(embedded, image=image)
        theirs = Florence2Processor.from_pretrained(str(files.folder))
        self._theirs = {
            name: Florence2Processor(
                backend(**_their_settings(image)),
                theirs.tokenizer,
                post_processor_config=theirs.post_processor.parse_task_config,
            )
            for name, backend in ((PIL_SIDE, CLIPImageProcessorPil), (TORCHVISION_SIDE, CLIPImageProcessor))
        }

    def compare_pictures(self, size: Size) -> dict[str, Any]:
        """Compares the ways from JPEGs of one size to the model's input; returns seconds a picture, and ratios."""
        files = [encode(draw_photograph(size, self._settings.seed + i)) for i in range(self._settings.pictures)]
        sides: dict[str, Side] = {name: self._their_picture(name) for name in self._theirs}
        for name, exact in ((EXACT, True), (OURS, False)):
            sides[name] = self._our_picture(exact=exact, normalised=False)
            sides[name + NORMALISED] = self._our_picture(exact=exact, normalised=True)
        self.agrees &= all(_equal(sides[PIL_SIDE](file), sides[EXACT + NORMALISED](file)) for file in files)
        seconds = take_turns(sides, files, self._settings.rounds)
        kilobytes = statistics.mean(map(len, files)) / 1000
        drafts = [decode_image(file, max_pixels=2**30, draft_for=self._ours.image) for file in files]
        decoded = "×".join(map(str, drafts[0].image.size))
        print(f"\n== JPEG, {size[0]}×{size[1]}, {kilobytes:.0f} kB; a draft decodes {decoded}")
        return _report(seconds, (PIL_SIDE, TORCHVISION_SIDE), "pictures/s")

    def compare_answers(self, kind: str) -> dict[str, Any]:
        """Compares the ways from tokens to answers of one kind; returns seconds an answer, and ratios."""
        task, write = TASKS[_ANSWERS[kind][0]], _ANSWERS[kind][1]
        chance = np.random.default_rng(self._settings.seed)
        texts = [f"<s>{write(chance)}</s>" for _ in range(self._settings.answers)]
        answers = [self._ours.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        theirs = self._theirs[PIL_SIDE]
        sides: dict[str, Side] = {
            TRANSFORMERS: lambda ids: theirs.post_process_generation(
                sequence=ids, task=task.name, image_size=_ANSWER_SIZE
            )[task.name],
            OURS: lambda ids: parse_answer(task, ids, self._ours, _ANSWER_SIZE),
        }
        self.agrees &= all(sides[TRANSFORMERS](ids) == sides[OURS](ids) for ids in answers)
        seconds = take_turns(sides, answers, self._settings.rounds)
        print(f"\n== {task.name}, {kind}, {statistics.mean(map(len, answers)):.0f} tokens")
        return _report(seconds, (TRANSFORMERS,), "answers/s")

    def _their_picture(self, name: str) -> Side:
        processor = self._theirs[name]

        def read(data: bytes) -> tuple[Any, Any]:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            inputs = processor(text=_TASK, images=image, return_tensors="pt")
            return inputs["input_ids"].numpy()[0, _IMAGE_TOKENS:], inputs["pixel_values"].numpy()[0]

        return read

    def _our_picture(self, *, exact: bool, normalised: bool) -> Side:
        processor, task = self._ours, TASKS[_TASK]
        draft_for = None if exact else processor.image
        levels = _normalised_levels(processor.image)

        def read(data: bytes) -> tuple[Array, Array]:
            picture = decode_image(data, max_pixels=2**30, draft_for=draft_for)
            pixels = picture.resized(processor.image, exact=exact)
            return processor.input_ids(task.prompt()), _normalise(pixels, levels) if normalised else pixels

        return read


def take_turns(sides: Mapping[str, Side], items: Sequence[Any], rounds: int) -> dict[str, float]:
    """Times sides on the same items; within a round they follow one another, each round beginning with another.

    Returns:
        Seconds of processor time an item by side: the median of all rounds.
    """
    names = list(sides)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for name in names:  # caches, lazy imports
        sides[name](items[0])
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            for item in items:
                sides[name](item)
            taken[name].append((time.process_time() - start) / len(items))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def draw_photograph(size: Size, seed: int) -> Image.Image:
    """Draws what compresses as a photograph does: soft light, textures of four scales, shapes and sensor noise."""
    chance = np.random.default_rng(seed)
    width, height = size
    picture = np.zeros((height, width, 3), dtype=np.float32)
    for cell, weight in ((256, 0.55), (64, 0.25), (16, 0.13), (4, 0.05)):
        coarse = chance.integers(0, 256, (max(1, height // cell), max(1, width // cell), 3), dtype=np.uint8)
        picture += weight * np.asarray(
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.float32
        )
    picture += chance.normal(0, 2.5, (height, width, 1)).astype(np.float32)
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for index in range(40):
        x, y, reach = (int(chance.integers(0, bound)) for bound in (width, height, max(2, width // 8)))
        shape = pen.ellipse if index % 2 else pen.rectangle
        shape((x, y, x + reach, y + reach * 2 // 3), fill=tuple(chance.integers(0, 256, 3).tolist()))
    return image


def encode(image: Image.Image) -> bytes:
    """Returns a JPEG as cameras write them: quality 88, half the resolution for colours."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling="4:2:0")
    return buffer.getvalue()


_WORDS = "a red circle beside two small boats on the water under grey clouds near an old stone bridge".split()


def _sentence(chance: np.random.Generator, words: int) -> str:
    return " ".join(chance.choice(_WORDS, words))


def _locations(chance: np.random.Generator, count: int) -> str:
    return "".join(f"<loc_{location}>" for location in chance.integers(0, LOCATIONS, count))


def _written_boxes(chance: np.random.Generator) -> str:
    return "".join(f"{_sentence(chance, 2)}{_locations(chance, 4)}" for _ in range(30))


def _written_quads(chance: np.random.Generator) -> str:
    return "".join(f"{_sentence(chance, 2)}{_locations(chance, 8)}" for _ in range(20))


def _written_polygons(chance: np.random.Generator) -> str:
    return "<sep>".join(_locations(chance, 120) for _ in range(3))


# Task and writer of one answer, by what it is.
_ANSWERS: dict[str, tuple[str, Callable[[np.random.Generator], str]]] = {
    "a caption of 80 words": ("<MORE_DETAILED_CAPTION>", lambda chance: _sentence(chance, 80)),
    "30 boxes": ("<OD>", _written_boxes),
    "20 quads": ("<OCR_WITH_REGION>", _written_quads),
    "3 polygons of 60 points": ("<REFERRING_EXPRESSION_SEGMENTATION>", _written_polygons),
}


def _their_settings(image: ImageSettings) -> dict[str, Any]:
    return {
        "size": {"height": image.height, "width": image.width},
        "resample": image.resample,
        "do_center_crop": False,
        "rescale_factor": image.rescale_factor,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "image_seq_length": image.image_seq_length,
    }


def _normalised_levels(image: ImageSettings) -> Array:
    """Returns float32 [3,256]: each channel's levels, rescaled and normalised as transformers does."""
    rescaled = (np.arange(256) * image.rescale_factor).astype(np.float32)
    mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (image.mean, image.std))
    levels: Array = (rescaled - mean) / std
    return levels


def _normalise(pixels: Array, levels: Array) -> Array:
    """Returns float32 [3,H,W] of uint8 [H,W,3]; looking levels up is the fastest way on a CPU."""
    values = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for channel in range(3):
        np.take(levels[channel], pixels[..., channel], out=values[channel], mode="clip")
    return values


def _equal(first: Sequence[Array], second: Sequence[Array]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def _report(seconds: Mapping[str, float], baselines: Sequence[str], unit: str) -> dict[str, Any]:
    """Prints the table of one comparison; returns its figures."""
    speeds = {base: {name: seconds[base] / taken for name, taken in seconds.items()} for base in baselines}
    rows = [("", "ms", f"{unit} per core", *(f"× {base}" for base in baselines))]
    rows += [
        (name, f"{taken * 1e3:.2f}", f"{1 / taken:.1f}", *(f"{speeds[base][name]:.2f}" for base in baselines))
        for name, taken in seconds.items()
    ]
    print(table(rows), flush=True)
    return {"seconds": dict(seconds), "speed": speeds}


if __name__ == "__main__":
    sys.exit(main())
