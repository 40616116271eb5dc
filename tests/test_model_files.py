from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, Timer
from typing import Any

import pytest

from florence2_kserve import model_files
from florence2_kserve.model_files import Layout, ModelFilesError, locate_model
from tests import shadow

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shadow.write_native(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shadow.write_original(tmp_path_factory.mktemp("original"))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    def _copy(folder: Path, *, without: str = "") -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(*without.split())))

    return _copy


def test_finds_a_native_folder(native):
    files = locate_model(str(native))
    assert (files.layout, files.folder, files.revision) == (Layout.NATIVE, native, None)
    assert files.weight_files == (native / "model.safetensors",)
    assert files.config["vision_config"]["embed_dim"] == [16, 32, 48, 80]


def test_finds_a_folder_in_microsofts_layout(original):
    files = locate_model(str(original))
    assert (files.layout, files.weight_files) == (Layout.ORIGINAL, (original / "model.safetensors",))


def test_the_embedded_model_is_the_default(native, monkeypatch):
    monkeypatch.setattr(model_files, "_EMBEDDED_FOLDER", native)
    assert locate_model().folder == native
    monkeypatch.setattr(model_files, "_EMBEDDED_FOLDER", native / "nowhere")
    with pytest.raises(ModelFilesError, match="not part of this installation"):
        locate_model()


def test_a_home_folder_is_expanded(native, monkeypatch):
    monkeypatch.setenv("HOME", str(native.parent))
    assert locate_model(f"~/{native.name}").folder == native


def test_a_folder_that_another_container_fills_is_waited_for(native, tmp_path, monkeypatch):
    folder = tmp_path / "models"
    monkeypatch.setattr(model_files, "_AWAIT_S", 0.3)
    monkeypatch.setenv("MODEL_INIT_MODE", "async")
    with pytest.raises(ModelFilesError, match="is neither a folder here nor a hub id"):
        locate_model(str(folder))
    monkeypatch.setattr(model_files, "_AWAIT_S", 30)
    link = Timer(0.5, folder.symlink_to, (native,))
    link.start()
    assert locate_model(str(folder)).layout is Layout.NATIVE
    link.join()


@pytest.mark.parametrize(
    ("without", "named"),
    [
        ("config.json", "lacks config.json"),
        ("tokenizer.json", "lacks tokenizer.json"),
        ("p*processor_config.json processor_config.json", "processor_config.json or preprocessor_config.json"),
        ("generation_config.json", "lacks generation_config.json"),
        ("model.safetensors", "lacks model.safetensors"),
        ("tokenizer.json generation_config.json", "lacks tokenizer.json, generation_config.json"),
    ],
)
def test_missing_files_are_named(native, copy, without, named):
    folder = copy(native, without=without)
    with pytest.raises(ModelFilesError, match=named) as caught:
        locate_model(str(folder))
    assert f"{folder} holds " in str(caught.value)
    assert "merges.txt" in str(caught.value)


def test_the_original_layout_needs_no_generation_config(original, copy):
    assert locate_model(str(copy(original, without="generation_config.json"))).layout is Layout.ORIGINAL


def test_the_original_layout_does_with_the_older_tokenizer_files(original, native, copy):
    folder = copy(original, without="tokenizer.json")
    with pytest.raises(ModelFilesError, match=r"lacks tokenizer.json"):
        locate_model(str(folder))
    (folder / "merges.txt").write_bytes((native / "merges.txt").read_bytes())
    assert locate_model(str(folder)).layout is Layout.ORIGINAL


def test_without_weights_the_small_files_are_enough(native, copy):
    folder = copy(native, without="model.safetensors generation_config.json")
    assert locate_model(str(folder), with_weights=False).weight_files == ()


def test_a_model_one_folder_deeper_is_named_not_taken(native, copy, tmp_path):
    copy(native)
    with pytest.raises(ModelFilesError, match=r"holds copy/; did you mean its sub-folder copy\?"):
        locate_model(str(tmp_path))


def test_pickled_weights_are_refused_unopened(original, copy, tmp_path):
    folder, marker = copy(original, without="model.safetensors"), tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelFilesError, match=r"pickled form \(pytorch_model.bin\)") as caught:
        locate_model(str(folder))
    assert "florence-community/Florence-2-large-ft" in str(caught.value)
    assert not marker.exists()


def test_pickled_weights_beside_safetensors_do_not_matter(original, copy):
    folder = copy(original)
    (folder / "pytorch_model.bin").write_bytes(b"whatever")
    assert [path.name for path in locate_model(str(folder)).weight_files] == ["model.safetensors"]


@pytest.mark.parametrize("write", [shadow.write_native, shadow.write_original])
def test_sharded_weights_are_found(write, tmp_path):
    folder = write(tmp_path / "sharded", shards=3)
    files = locate_model(str(folder))
    assert [path.name for path in files.weight_files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelFilesError, match=r"lacks model-00002-of-00003\.safetensors, which its model\..*index"):
        locate_model(str(folder))


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, r"names files elsewhere: \.\./model\.safetensors"),
        ({"weight_map": {}}, "has no weight_map"),
        ([], "holds no JSON object"),
    ],
)
def test_a_bad_index_is_refused(native, copy, index, named):
    folder = copy(native, without="model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFilesError, match=named):
        locate_model(str(folder))


def layout_of(folder: Path, vision: dict[str, Any] | None, **fields: Any) -> Layout:
    (folder / "config.json").write_text(json.dumps({"model_type": "florence2", "vision_config": vision, **fields}))
    return locate_model(str(folder), with_weights=False).layout


@pytest.mark.parametrize(
    ("vision", "layout"),
    [
        ({"model_type": "florence_vision"}, Layout.NATIVE),
        ({"model_type": "florence_vision", "dim_embed": [1], "embed_dim": [1]}, Layout.NATIVE),
        ({"model_type": "davit"}, Layout.ORIGINAL),
        ({"model_type": "", "dim_embed": [1]}, Layout.ORIGINAL),
    ],
)
def test_the_layout_is_told_by_the_vision_config(native, copy, vision, layout):
    assert layout_of(copy(native), vision) is layout


@pytest.mark.parametrize(
    ("vision", "model_type"),
    [({"model_type": "davit"}, "bart"), ({"model_type": "clip_vision_model"}, "florence2"), (None, "florence2")],
)
def test_other_models_are_refused(native, copy, vision, model_type):
    with pytest.raises(ModelFilesError, match=f"is no Florence-2: its config.json has model_type '{model_type}'"):
        layout_of(copy(native), vision, model_type=model_type)


def test_a_broken_config_is_named(native, copy):
    folder = copy(native)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelFilesError, match=r"config\.json can't be read"):
        locate_model(str(folder))


@pytest.mark.parametrize("reference", ["/no/such/folder", "nowhere", "a/b/c", "../there"])
def test_what_is_neither_folder_nor_hub_id_is_refused(reference, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFilesError, match="neither a folder here nor a hub id"):
        locate_model(reference)


def test_an_empty_name_is_not_the_current_folder(native, monkeypatch):
    monkeypatch.chdir(native)
    with pytest.raises(ModelFilesError, match="no model is named"):
        locate_model(" ")


def test_a_file_is_refused(native):
    with pytest.raises(ModelFilesError, match="is a file; give the folder it is in"):
        locate_model(str(native / "model.safetensors"))


def test_only_hub_ids_have_revisions(native, monkeypatch):
    monkeypatch.setattr(model_files, "_EMBEDDED_FOLDER", native)
    for reference in (str(native), "embedded"):
        with pytest.raises(ModelFilesError, match="only hub ids have revisions"):
            locate_model(reference, revision="main")


def test_a_folder_of_the_hubs_cache_tells_its_commit(native, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / COMMIT
    shutil.copytree(native, snapshot)
    assert locate_model(str(snapshot)).revision == COMMIT


class Hub:
    """A hub on loopback, as far as downloads need one: two repositories, one of them gated."""

    def __init__(self, folder: Path) -> None:
        self.downloaded: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(with_body=True)

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def _answer(self, with_body: bool) -> None:
                path = self.path.split("?")[0]
                if path in (f"/api/models/own/florence/revision/{name}" for name in ("main", "v1")):
                    self._send(json.dumps({"id": "own/florence", "sha": COMMIT, "siblings": []}).encode(), with_body)
                elif path == f"/api/models/own/florence/tree/{COMMIT}":
                    tree = [
                        {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                        for file in folder.iterdir()
                    ]
                    self._send(json.dumps(tree).encode(), with_body)
                elif path.startswith(f"/own/florence/resolve/{COMMIT}/"):
                    name = path.rsplit("/", 1)[1]
                    if with_body:
                        hub.downloaded.append(name)
                    self._send((folder / name).read_bytes(), with_body, name)
                elif path.startswith("/api/models/own/florence/"):
                    self._refuse(404, "RevisionNotFound")
                elif path.startswith("/api/models/own/gated/"):
                    self._refuse(403, "GatedRepo")
                else:
                    self._refuse(404, "RepoNotFound")

            def _send(self, body: bytes, with_body: bool, etag: str = "none") -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{etag}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def _refuse(self, status: int, code: str) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub(native: Path, copy: Callable[..., Path]) -> Iterator[Hub]:
    folder = copy(native)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "modeling_florence2.py").write_text("raise SystemExit")
    running = Hub(folder)
    yield running
    running.close()


def locate_elsewhere(*calls: dict[str, Any], cache: Path, **environment: str) -> list[dict[str, Any]]:
    """Runs locate_model in a process of its own, as the hub's client reads the environment when it is imported."""
    code = (
        "import json, sys\n"
        "from florence2_kserve.model_files import ModelFilesError, locate_model\n"
        "for call in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        files = locate_model(**call)\n"
        "        names = sorted(path.name for path in files.folder.iterdir())\n"
        "        print(json.dumps({'revision': files.revision, 'layout': files.layout, 'names': names}))\n"
        "    except ModelFilesError as error:\n"
        "        print(json.dumps({'error': str(error)}))\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean |= {"HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls)],
        env=clean,
        cwd=Path(model_files.__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_only_what_is_needed_is_downloaded(hub, tmp_path):
    small, cache = {"reference": "own/florence", "with_weights": False}, tmp_path / "cache"
    (without,) = locate_elsewhere(small, cache=cache, HF_ENDPOINT=hub.url)
    assert without["revision"] == COMMIT
    assert "tokenizer.json" in without["names"]
    assert "model.safetensors" not in without["names"]

    whole = {"reference": "own/florence"}
    (offline_before,) = locate_elsewhere(whole, cache=cache, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert "model.safetensors" in offline_before["error"] or "not completely" in offline_before["error"]
    online = locate_elsewhere(whole, whole | {"revision": "v1"}, cache=cache, HF_ENDPOINT=hub.url)
    for answer in online:
        assert (answer["layout"], answer["revision"]) == ("native", COMMIT)
        assert "model.safetensors" in answer["names"]
    assert hub.downloaded.count("model.safetensors") == 1
    assert not {"pytorch_model.bin", "modeling_florence2.py"} & set(hub.downloaded)

    hub.close()
    (offline,) = locate_elsewhere(whole, cache=cache, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert offline == online[0]


def test_what_the_hub_does_not_give_is_explained(hub, tmp_path):
    answers = locate_elsewhere(
        {"reference": "own/florence", "revision": "v9"},
        {"reference": "own/gated"},
        {"reference": "own/nothing"},
        cache=tmp_path / "cache",
        HF_ENDPOINT=hub.url,
    )
    for answer, expected in zip(
        answers,
        [
            "model 'own/florence' at revision 'v9' is not on the hub, though the repository is",
            "is gated: accept its terms on the hub and set HF_TOKEN",
            "is neither a folder here nor on the hub, or it is private",
        ],
        strict=True,
    ):
        assert expected in answer["error"]


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_a_network_it_says_what_to_do(environment, tmp_path):
    (answer,) = locate_elsewhere({"reference": "florence-community/Florence-2-base"}, cache=tmp_path, **environment)
    for advice in ("HF_HUB_OFFLINE", "mount a folder", "check the network"):
        assert advice in answer["error"]
