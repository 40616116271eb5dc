"""What docs/client.md tells users to type is typed here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from florence2_kserve.client import errors, results
from tests.client.pictures import png

PAGE = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
# What a block prints, or the file that it writes.
LEAVES = ["'<OD>'", "(", "captions.jsonl", "answer.png"]


@pytest.mark.parametrize(("code", "leaves"), list(zip(BLOCKS, LEAVES, strict=True)))
def test_python_examples_run(code, leaves, service, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("picture.png").write_bytes(png(1))
    Path("pictures").mkdir()
    for index in range(3):
        Path(f"pictures/{index}.png").write_bytes(png(index))
    code = code.replace("http://localhost:8080", service.rest_url).replace("localhost:8081", service.grpc_url)
    exec(compile(code, "client.md", "exec"), {})
    assert Path(leaves).exists() or leaves in capsys.readouterr().out
    if leaves == "captions.jsonl":
        lines = [json.loads(line) for line in Path(leaves).read_text().splitlines()]
        assert sorted(line["key"] for line in lines) == ["0", "1", "2"]
        assert all(line["value"] for line in lines)


def test_all_errors_and_classes_are_named():
    kinds = [
        kind.__name__
        for module, base in ((errors, errors.ClientError), (results, results.Answer))
        for kind in vars(module).values()
        if isinstance(kind, type)
        and issubclass(kind, base)
        and kind not in (base, results.Places)
        and kind.__module__ == module.__name__
    ]
    assert len(kinds) == 12
    assert [kind for kind in kinds if f"| `{kind}` |" not in PAGE] == []
