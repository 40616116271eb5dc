from __future__ import annotations

import pytest
from transformers.models.florence2.processing_florence2 import Florence2Processor

from florence2_kserve.tasks import TASKS, AnswerKind, TaskInput, find_task

# How transformers calls the parser that each of our kinds stands for.
THEIR_KIND = {
    AnswerKind.TEXT: "pure_text",
    AnswerKind.QUADS: "ocr",
    AnswerKind.LABELED_BOXES: "description_with_bboxes",
    AnswerKind.PHRASE_BOXES: "phrase_grounding",
    AnswerKind.BOXES: "bboxes",
    AnswerKind.POLYGONS: "polygons",
    AnswerKind.BOXES_OR_POLYGONS: "description_with_bboxes_or_polygons",
}


@pytest.fixture(scope="module")
def theirs() -> Florence2Processor:
    class _Tokenizer:
        image_token, image_token_id, all_special_tokens = "<image>", 1, ()

    class _ImageProcessor:
        image_seq_length = 577

    processor = Florence2Processor.__new__(Florence2Processor)
    with pytest.MonkeyPatch.context() as patch:
        # Only the tables that __init__ sets are wanted; the base class would ask for real files.
        patch.setattr(Florence2Processor.__mro__[1], "__init__", lambda self, *args, **kwargs: None)
        Florence2Processor.__init__(processor, _ImageProcessor(), _Tokenizer())
    return processor


def test_there_are_fifteen_tasks_and_transformers_knows_the_same(theirs):
    assert len(TASKS) == 15
    assert set(TASKS) == set(theirs.tasks_answer_post_processing_type)


def test_prompts_equal_those_of_transformers(theirs):
    for task in TASKS.values():
        text = "" if task.takes is TaskInput.NONE else " a red car "
        assert [task.prompt(text)] == theirs._construct_prompts([task.name + text]), task.name


def test_kinds_of_answer_equal_those_of_transformers(theirs):
    kinds = {name: THEIR_KIND[task.answer] for name, task in TASKS.items()}
    assert kinds == theirs.tasks_answer_post_processing_type


def test_tasks_with_input_are_those_of_transformers(theirs):
    takes = {name for name, task in TASKS.items() if task.takes is not TaskInput.NONE}
    assert takes == set(theirs.task_prompts_with_input)


def test_a_prompt_keeps_braces_of_the_users_text():
    assert find_task("<OPEN_VOCABULARY_DETECTION>").prompt("{input} {0}") == "Locate {input} {0} in the image."


@pytest.mark.parametrize("name", ["<OD>", "OD", "od", " <od> "])
def test_tasks_are_found_with_and_without_brackets(name):
    assert find_task(name).name == "<OD>"


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(KeyError, match=r"unknown task '<ODD>'.*<CAPTION>.*<REGION_TO_OCR>"):
        find_task("<ODD>")
