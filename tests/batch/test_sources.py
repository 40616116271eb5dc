from __future__ import annotations

import http.server
import io
import os
import shutil
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from florence2_kserve.batch.sources import Picture, Shard, SourceError, Sources, check_named, read_one


def tree(root: Path) -> list[str]:
    """Makes a tree with five pictures and two other files; returns the pictures in their order."""
    names = ["a.png", "b/1.JPG", "b/2.webp", "b/deep/er/x.tiff", "c.gif"]
    for name in [*names, "b/notes.txt", "z.csv"]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return names


def addresses(sources: Sources) -> list[str]:
    return [picture.address for picture in sources]


def test_a_folder_is_walked_in_order_and_other_files_are_counted(tmp_path):
    names = tree(tmp_path)
    sources = Sources([str(tmp_path)])
    pictures = list(sources)
    assert [picture.address for picture in pictures] == [str(tmp_path / name) for name in names]
    assert [picture.read() for picture in pictures] == [name.encode() for name in names]
    assert sources.skipped == 2
    assert sources.count(Event()) == 5
    assert sources.skipped == 2, "counting changed what was enumerated"


@pytest.fixture
def too_deep(tmp_path: Path) -> Iterator[Path]:
    """A folder with pictures around one of a path longer than the kernel takes, so that nobody can list it."""
    deep, before = tmp_path / "set" / ("m" * 200), os.getcwd()
    deep.mkdir(parents=True)
    os.chdir(deep)
    for _ in range(20):
        os.mkdir("m" * 200)
        os.chdir("m" * 200)
    os.chdir(before)
    for name in ("a.png", "z.png"):
        (tmp_path / "set" / name).write_bytes(b"x")
    yield tmp_path / "set"
    shutil.rmtree(deep)


def test_a_folder_that_cant_be_listed_is_passed_over_and_said(too_deep):
    said: list[str] = []
    sources = Sources([str(too_deep)], say=said.append)
    assert [Path(address).name for address in addresses(sources)] == ["a.png", "z.png"]
    assert sources.unlisted == 1
    (line,) = said
    assert line.startswith(f"skipping {too_deep}/mmm")
    assert line.endswith("it can't be listed: File name too long")
    assert sources.count(Event()) == 2
    assert len(said) == 1, "counting said it again"


def test_a_folder_that_was_named_and_cant_be_listed_ends_it(tmp_path, monkeypatch):
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        list(Sources([str(tmp_path)]))


def test_a_relative_folder_gives_the_same_addresses(tmp_path, monkeypatch):
    tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert addresses(Sources(["."])) == addresses(Sources([str(tmp_path)]))


def test_links_are_followed_but_not_in_circles(tmp_path):
    tree(tmp_path)
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "d").symlink_to(tmp_path / "b" / "deep")
    found = [Path(address).relative_to(tmp_path).as_posix() for address in addresses(Sources([str(tmp_path)]))]
    assert found == ["a.png", "b/1.JPG", "b/2.webp", "b/deep/er/x.tiff", "c.gif", "d/er/x.tiff"]


def test_a_glob_takes_what_it_matches_whatever_its_suffix(tmp_path):
    tree(tmp_path)
    found = addresses(Sources([str(tmp_path / "**" / "*.[tg]*")]))
    assert [Path(address).name for address in found] == ["x.tiff", "notes.txt", "c.gif"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    path = tmp_path / "[1].png"
    path.write_bytes(b"x")
    assert [picture.read() for picture in Sources([str(path)])] == [b"x"]


def test_a_list_keeps_its_order_and_may_hold_anything(tmp_path):
    names = tree(tmp_path)
    with fsspec.open("memory://listed/one.png", "wb") as file:
        file.write(b"one")
    listed = tmp_path / "list.txt"
    listed.write_text(f"{tmp_path}/c.gif\n\n{tmp_path}/gone.png\r\nmemory://listed/one.png\n{tmp_path}/b\n")
    pictures = list(Sources([f"@{listed}"]))
    assert [picture.address for picture in pictures] == [
        str(tmp_path / "c.gif"),
        str(tmp_path / "gone.png"),
        "memory://listed/one.png",
        *(str(tmp_path / name) for name in names[1:4]),
    ]
    assert pictures[2].read() == b"one"
    with pytest.raises(FileNotFoundError):
        pictures[1].read()


def test_a_list_on_standard_input(tmp_path, monkeypatch):
    tree(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tmp_path}/a.png\n"))
    assert addresses(Sources(["@-"])) == [str(tmp_path / "a.png")]


def test_names_that_are_no_unicode_are_written_so_that_they_can_be_read(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xe4.png"
    with open(path, "wb") as file:
        file.write(b"x")
    (picture,) = Sources([str(tmp_path)])
    assert picture.address == f"{tmp_path}/\\xff\\xe4.png"
    assert picture.read() == b"x"


def test_nothing_is_read_or_listed_ahead(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "x.png").write_bytes(b"x")
    pictures = iter(Sources([str(tmp_path)]))
    next(pictures)
    (tmp_path / "2" / "y.png").write_bytes(b"y")
    assert [Path(picture.address).name for picture in pictures] == ["x.png", "x.png", "y.png"]


def test_a_files_state_changes_with_it(tmp_path):
    path = tmp_path / "a.png"
    states = set()
    for content, time in ((b"a", 1), (b"b", 2), (b"bb", 2)):
        path.write_bytes(content)
        os.utime(path, (time, time))
        (picture,) = Sources([str(path)])
        states.add(picture.state)
    assert len(states) == 3
    assert None not in states


@pytest.mark.parametrize("name", ["gone", "gone.png", "@gone.txt", "gone*.png"])
def test_what_isnt_there_is_refused_before_anything_begins(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="gone"):
        check_named([name])


# --- fsspec ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[str]:
    file_system = fsspec.filesystem("memory")
    for name in ("b/2.png", "a.jpg", "b/1.png", "b/notes.txt"):
        with file_system.open(f"/bucket/{name}", "wb") as file:
            file.write(name.encode())
    yield "memory://bucket"
    file_system.rm("/bucket", recursive=True)


def test_a_prefix_of_a_store_is_walked_in_order(memory):
    sources = Sources([memory])
    pictures = list(sources)
    names = ["a.jpg", "b/1.png", "b/2.png"]
    assert [picture.address for picture in pictures] == [f"{memory}/{name}" for name in names]
    assert [picture.read() for picture in pictures] == [name.encode() for name in names]
    assert all(picture.state for picture in pictures)
    assert sources.skipped == 1


def test_a_glob_in_a_store(memory):
    assert addresses(Sources([f"{memory}/b/*.png"])) == [f"{memory}/b/1.png", f"{memory}/b/2.png"]


def test_an_object_whose_name_looks_like_a_glob_is_that_object(memory):
    with fsspec.open(f"{memory}/b/[1].png", "wb") as file:
        file.write(b"odd")
    assert [picture.read() for picture in Sources([f"{memory}/b/[1].png"])] == [b"odd"]


def test_one_file_of_a_store_tells_its_state_only_when_asked(memory):
    (picture,) = Sources([f"{memory}/a.jpg"])
    assert picture.state is None
    assert picture.look is not None
    (listed,) = Sources([f"{memory}/*.jpg"])
    assert picture.look() == listed.state


def test_a_picture_in_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/x.png", b"x")
    (picture,) = Sources([f"zip://in/*.png::file://{tmp_path}/a.zip"])
    assert picture.read() == b"x"
    (again,) = Sources([picture.address])
    assert again.read() == b"x"


def test_an_unknown_scheme_is_said():
    with pytest.raises(SourceError, match="nosuch"):
        list(Sources(["nosuch://x/y.png"]))


def test_what_a_store_lacks_is_an_error_of_that_picture():
    (picture,) = Sources(["memory://bucket/gone.png"])
    with pytest.raises(FileNotFoundError):
        picture.read()


@contextmanager
def web(folder: Path) -> Iterator[str]:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_file_of_a_web_server(tmp_path):
    (tmp_path / "a.png").write_bytes(b"first")
    with web(tmp_path) as url:
        (picture,) = Sources([f"{url}/a.png"])
        assert picture.address == f"{url}/a.png"
        assert picture.read() == read_one(f"{url}/a.png") == b"first"
        assert [asked.read() for asked in Sources([f"{url}/a.png?size=[1]"])] == [b"first"]
        assert picture.look is not None
        before = picture.look()
        (tmp_path / "a.png").write_bytes(b"second")
        assert before != picture.look()


# --- Parquet ---------------------------------------------------------------------------------------------------------


def table(path: Path, values: list[object], texts: list[str | None] | None = None, group: int = 10) -> Path:
    columns = {"image": values, **({"region": texts} if texts else {})}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return path


def test_a_column_of_bytes(tmp_path):
    values: list[object] = [f"picture {number}".encode() for number in range(45)]
    path = table(tmp_path / "t.parquet", values)
    sources = Sources([str(path)], column="image")
    assert sources.count(Event()) == 45
    pictures = list(sources)
    assert [picture.address for picture in pictures] == [f"{path}#{number}" for number in range(45)]
    assert [picture.read() for picture in pictures] == values
    assert len({picture.state for picture in pictures}) == 1


def test_rows_are_read_in_any_order(tmp_path):
    values: list[object] = [f"picture {number}".encode() for number in range(500)]
    pictures = list(Sources([str(table(tmp_path / "t.parquet", values, group=300))], column="image"))
    for number in (499, 0, 299, 17, 16, 298, 300, 5):
        assert pictures[number].read() == values[number]


@pytest.mark.parametrize("taken", [1, 10], ids=["all", "a tenth"])
def test_what_was_decoded_is_kept_no_longer_than_somebody_may_read_it(tmp_path, taken):
    mib = 1 << 20
    path = table(tmp_path / "t.parquet", [bytes([number]) * mib for number in range(100)], group=100)
    tracemalloc.start()
    try:
        held = []
        for number, picture in enumerate(Sources([str(path)], column="image")):
            if number % taken == 0:
                held.append(picture)
            if len(held) == 2:
                for each in reversed(held):
                    assert len(each.read()) == mib
                held.clear()
        assert tracemalloc.get_traced_memory()[1] < 40 * mib
    finally:
        tracemalloc.stop()


def test_structs_as_hugging_face_writes_them_and_addresses(tmp_path):
    (tmp_path / "x.png").write_bytes(b"on disk")
    values: list[object] = [{"bytes": b"inside", "path": "x.png"}, {"bytes": None, "path": str(tmp_path / "x.png")}]
    pictures = list(Sources([str(table(tmp_path / "t.parquet", values))], column="image"))
    assert [picture.read() for picture in pictures] == [b"inside", b"on disk"]
    pictures = list(Sources([str(table(tmp_path / "u.parquet", [str(tmp_path / "x.png")]))], column="image"))
    assert pictures[0].read() == b"on disk"


def test_a_row_without_a_picture_is_an_error_of_that_picture(tmp_path):
    pictures = list(Sources([str(table(tmp_path / "t.parquet", [b"x", None]))], column="image"))
    assert pictures[0].read() == b"x"
    with pytest.raises(OSError, match="holds no picture"):
        pictures[1].read()


def test_texts_of_a_column(tmp_path):
    path = table(tmp_path / "t.parquet", [b"x", b"y", b"z"], ["a circle", None, "a star"], group=2)
    pictures = list(Sources([str(path)], column="image", text_column="region"))
    assert [picture.text for picture in pictures] == ["a circle", None, "a star"]


def test_a_folder_of_tables_and_one_in_a_store(tmp_path):
    table(tmp_path / "b.parquet", [b"2"])
    table(tmp_path / "a.parquet", [b"0", b"1"])
    (tmp_path / "x.png").write_bytes(b"x")
    sources = Sources([str(tmp_path)], column="image")
    assert [picture.read() for picture in sources] == [b"0", b"1", b"2"]
    assert sources.skipped == 1
    with fsspec.open("memory://tables/a.parquet", "wb") as file:
        file.write((tmp_path / "a.parquet").read_bytes())
    pictures = list(Sources(["memory://tables"], column="image"))
    assert [picture.read() for picture in pictures] == [b"0", b"1"]
    assert pictures[1].address == "memory://tables/a.parquet#1"


def test_wrong_columns_and_files_are_said(tmp_path):
    path = table(tmp_path / "t.parquet", [b"x"])
    with pytest.raises(SourceError, match="has no column 'picture'; it has image"):
        list(Sources([str(path)], column="picture"))
    with pytest.raises(SourceError, match="--column is needed too"):
        Sources([str(path)], text_column="region")
    (tmp_path / "u.parquet").write_bytes(b"no table")
    with pytest.raises(SourceError, match="can't be read as Parquet"):
        list(Sources([str(tmp_path / "u.parquet")], column="image"))


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_shards_are_disjoint_and_complete(tmp_path, count):
    for number in range(200):
        (tmp_path / f"{number}.png").write_bytes(b"x")
    whole = addresses(Sources([str(tmp_path)]))
    parts = [addresses(Sources([str(tmp_path)], shard=Shard(index, count))) for index in range(count)]
    assert sorted(address for part in parts for address in part) == sorted(whole)
    assert max(map(len, parts)) < 2 * 200 / count or count == 1


def test_a_shard_is_the_same_on_every_machine():
    held = [number for number in range(40) if Shard(1, 4).holds(f"s3://bucket/{number}.png")]
    assert held == [0, 3, 6, 9, 14, 20, 23, 26, 34, 35, 38]


def test_pictures_are_small_until_they_are_read(tmp_path):
    (tmp_path / "x.png").write_bytes(b"x" * 10_000_000)
    (picture,) = Sources([str(tmp_path)])
    assert isinstance(picture, Picture)
    (tmp_path / "x.png").write_bytes(b"later")
    assert picture.read() == b"later"
