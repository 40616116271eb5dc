"""The embedded model's tokenizer: a small byte-level BPE with Florence-2's special and location tokens.

Every word that the tasks' prompts and the scenes' answers use is one token, with
or without a space before it. Rendered words are left out of the training text, so
they are spelt letter by letter. Bytes cover every other text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from florence2_kserve.tasks import TASKS, TaskInput
from florence2_kserve.tiny.scenes import BACKGROUNDS, BINS, COLORS, SHAPES, draw_scene

BASE_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"  # unused; RoBERTa's tokenizers have it after the base vocabulary
IMAGE = "<image>"
_PAIRS_BEFORE = ("od", "ocr")
_PAIRS_AFTER = ("cap", "ncap", "dcap", "grounding", "seg")
_PAIRS_LAST = ("region_cap", "region_to_desciption", "proposal", "poly")  # "desciption" is Florence-2's own spelling


def added_tokens() -> list[str]:
    """Lists what follows the base vocabulary, in Florence-2's order; ``<image>`` is last."""

    def pairs(names: tuple[str, ...]) -> list[str]:
        return [token for name in names for token in (f"<{name}>", f"</{name}>")]

    locations = [f"<loc_{index}>" for index in range(BINS)]
    return [
        *pairs(_PAIRS_BEFORE),
        *locations,
        *pairs(_PAIRS_AFTER),
        "<sep>",
        *pairs(_PAIRS_LAST),
        "<and>",
        IMAGE,
    ]


def training_text() -> Iterator[str]:
    """Yields prompts, captions and single words, all without rendered words."""
    words: set[str] = {*COLORS, *SHAPES, *BACKGROUNDS, "the"}
    sentences: list[str] = [task.prompt("" if task.takes is TaskInput.NONE else ".") for task in TASKS.values()]
    chooser = random.Random(0)
    for seed in range(400):
        scene = draw_scene(seed, words=(0, 0))
        examples = [scene.truth(task, chooser) for task in TASKS]
        sentences += [example.target.split("<loc_")[0] for example in examples if example]
    sentences.append("the text reads")
    for sentence in sentences:
        words.update(sentence.replace(".", " ").replace(",", " ").replace("?", " ").replace(":", " ").split())
    # Often enough that no word stays in pieces, and in a fixed order.
    for word in sorted(words):
        yield from [word, f" {word}"] * 8
    yield from sentences


def build_tokenizer() -> Tokenizer:
    """Trains the tokenizer; the same code gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,  # more than there is to merge
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(BASE_SPECIAL),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (MASK, *added_tokens())])
    tokenizer.post_processor = processors.RobertaProcessing(
        sep=("</s>", token_id(tokenizer, "</s>")),
        cls_token=("<s>", token_id(tokenizer, "<s>")),
        trim_offsets=True,
        add_prefix_space=False,
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Looks up a token that must be there.

    Raises:
        KeyError: If it is not.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return int(found)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wraps the tokenizer as transformers' processors want it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token=MASK,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=1024,
    )
