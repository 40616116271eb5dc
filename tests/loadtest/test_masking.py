"""Which variables are secrets."""

from __future__ import annotations

import pytest

from florence2_loadtest.masking import is_secret, masked


@pytest.mark.parametrize("name", ["env.HF_TOKEN", "env.AWS_SECRET_ACCESS_KEY", "env.apikey", "env.DB_PASSWORD"])
def test_names_that_say_so_are_masked(name: str) -> None:
    assert masked({name: "x", "dtype": "float16"}) == {name: "***", "dtype": "float16"}


@pytest.mark.parametrize("name", ["env.OMP_NUM_THREADS", "env.TOKENIZERS_PARALLELISM", "max_new_tokens"])
def test_others_are_not(name: str) -> None:
    assert not is_secret(name)
