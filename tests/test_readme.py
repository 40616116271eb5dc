"""What README.md and docs/contract.md tell users to type is typed here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from florence2_kserve.tiny.scenes import held_out_scene

ROOT = Path(__file__).parents[1]
BLOCKS = {
    f"{page} {number}": block
    for page in ("README.md", "docs/contract.md")
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
}


def test_there_are_examples():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("code", BLOCKS.values(), ids=BLOCKS)
def test_python_examples_run(code, service, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(held_out_scene(1).image).save("picture.png")
    exec(compile(code.replace("localhost:8080", service.rest_url.removeprefix("http://")), "README.md", "exec"), {})
    assert "'<" in capsys.readouterr().out
