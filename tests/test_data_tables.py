"""Rows from JSON, Parquet and Arrow files: what is found, what is read, and what is said of a damaged one."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rfa_fast.data import load_eli5_category, load_imdb, load_wmdp
from rfa_fast.data.tables import find_tables, read_rows
from rfa_fast.hub import hub_folder

ROWS = [{"text": "a\u2028b", "label": 1, "extra": None}, {"text": "c", "label": 0, "extra": [1]}]


def arrow_files(folder: Path, name: str, rows: list[dict[str, Any]], shards: int = 1) -> None:
    """The rows as `datasets` saves them: `folder/name/data-….arrow`, each a stream."""
    pyarrow = pytest.importorskip("pyarrow")
    (folder / name).mkdir(parents=True)
    (folder / name / "state.json").write_text("{}")
    (folder / name / "cache-1.arrow").write_bytes(b"of an operation")
    for i in range(shards):
        table = pyarrow.Table.from_pylist(rows[i::shards])
        file = str(folder / name / f"data-{i:05d}-of-{shards:05d}.arrow")
        with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


def parquet_file(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows as the hub has them."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "list.json", "a.jsonl.gz", "list.json.gz", "a.parquet"])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name.endswith(".parquet"):
        parquet_file(file, [{**row, "extra": "x"} for row in ROWS])
    else:
        text = json.dumps(ROWS) if "list" in name else "".join(json.dumps(r, ensure_ascii=False) + "\n\n" for r in ROWS)
        file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    rows = read_rows(file, ("text", "label"))
    assert [(row.text("text"), row.index("label", 2)) for row in rows] == [("a\u2028b", 1), ("c", 0)]
    assert [row.file for row in rows] == [file, file]
    with pytest.raises(ValueError, match=rf"{name}, (line 3|row 2): label: got 0, expected a string"):
        rows[1].text("label")
    with pytest.raises(FileNotFoundError, match="gone.jsonl does not exist"):
        read_rows(tmp_path / "gone.jsonl", ("text",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"line 2: got list, expected a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"line 2: got .*expected a JSON object"),
        ("a.json", b'[{"text": "x"}, 3]', r"row 2: got int, expected a JSON object"),
        ("a.json", b'[{"text": "x"', r"got .*is the file cut short"),
        ("a.jsonl", b"\n", r"got no row, expected at least one with text"),
        ("a.jsonl", b"\xff", r"line 1: got the byte 0xff that is not UTF-8"),
        ("a.jsonl.gz", b"no gzip", r"got .*expected a whole gzip file"),
        ("a.txt", b"text", r"got '.txt', expected a file ending in .jsonl, .json"),
    ],
    ids=["no-object", "cut-line", "no-object-in-list", "cut-list", "empty", "no-utf-8", "no-gzip", "suffix"],
)
def test_a_damaged_file_is_named_with_the_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}[:,] {message}"):
        read_rows(tmp_path / name, ("text",))


def test_tables_are_found_by_name_shard_and_folder(tmp_path: Path) -> None:
    for name in (
        "plain_text/train-00001-of-00002.parquet", "plain_text/train-00000-of-00002.parquet", "trainer.jsonl",
        "train-extra.jsonl", "plain_text/test-00000-of-00001.parquet", "saved/valid/data-00000-of-00001.arrow",
        "saved/valid/cache-0f.arrow", "saved/valid/state.json", "both.json.gz", "both.jsonl", "train.txt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {name: [str(p.relative_to(tmp_path)) for p in find_tables(tmp_path, *name.split("|"))]
             for name in ("train", "test", "valid", "both", "none|test", "none")}  # fmt: skip
    assert found["train"] == [f"plain_text/train-0000{i}-of-00002.parquet" for i in (0, 1)]
    assert found["test"] == found["none|test"] == ["plain_text/test-00000-of-00001.parquet"]
    assert found["valid"] == ["saved/valid/data-00000-of-00001.arrow"]
    assert found["both"] == ["both.jsonl"]
    assert found["none"] == []


def test_without_pyarrow_parquet_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"train\.parquet: is a \.parquet file, which needs pyarrow: `pip install pyarrow`"
    ):
        load_imdb(tmp_path)


def test_imdb_as_the_hub_and_as_datasets_saves_it(tmp_path: Path) -> None:
    reviews = {"train": [{"text": f"review {i}<br />", "label": i % 2} for i in range(5)],
               "test": [{"text": f"other {i}", "label": 1} for i in range(2)]}  # fmt: skip
    for part, rows in reviews.items():
        parquet_file(tmp_path / "hub" / "plain_text" / f"{part}-00000-of-00001.parquet", rows)
        arrow_files(tmp_path / "saved", part, rows, shards=2 if part == "train" else 1)
    hub, saved = load_imdb(tmp_path / "hub"), load_imdb(tmp_path / "saved")
    assert hub.train.texts == [f"review {i}" for i in range(5)]
    assert hub.train.labels == [0, 1, 0, 1, 0]
    assert saved.train.texts == [f"review {i}" for i in (0, 2, 4, 1, 3)]
    assert saved.test.texts == hub.test.texts == ["other 0", "other 1"]


def test_nested_columns_of_parquet(tmp_path: Path) -> None:
    for topic in ("bio", "chem"):
        rows = [{"answer": i, "question": f"{topic} {i}?", "choices": ["w", "x"]} for i in range(2)]
        parquet_file(tmp_path / "wmdp" / f"wmdp-{topic}" / "test-00000-of-00001.parquet", rows)
    data = load_wmdp(tmp_path / "wmdp", topics=["chem"], test_fraction=0.5)
    assert sorted(data.train.answers + data.test.answers) == [["A. w"], ["B. x"]]
    question = {"q_id": "q", "title": "Why?", "selftext": "", "category": "Physics",
                "answers": {"text": ["low", "high"], "score": [1, 2]}}  # fmt: skip
    rows = [{**question, "q_id": f"q{i}"} for i in range(2)]
    parquet_file(tmp_path / "eli5" / "eli5-category-train.parquet", rows)
    data = load_eli5_category(tmp_path / "eli5", topics=["Physics"], test_fraction=0.5)
    assert data.train.answers == data.test.answers == [["high", "low"]]


def test_a_damaged_parquet_or_an_old_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_file(tmp_path / "a.parquet", [{"text": "x"}])
    with pytest.raises(ValueError, match=r"a\.parquet: got fields text, expected 'label' among them"):
        read_rows(tmp_path / "a.parquet", ("text", "label"))
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet: got .*expected a whole \.parquet file"):
        read_rows(tmp_path / "a.parquet", ("text",))
    (tmp_path / "a.arrow").write_bytes(b"no stream")
    with pytest.raises(ValueError, match=r"a\.arrow: got .*expected a whole \.arrow file"):
        read_rows(tmp_path / "a.arrow", ("text",))
    monkeypatch.setattr("pyarrow.__version__", "14.0.0")
    with pytest.raises(ValueError, match="pyarrow: got 14.0.0, which can be made to unpickle; expected 15 or later"):
        read_rows(tmp_path / "a.arrow", ("text",))


def test_the_hubs_cache_is_looked_at_and_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("reached for a network"))
    assert hub_folder("owner/name") is None
    for folder in ("models--owner--name", "datasets--owner--name"):
        snapshot = tmp_path / folder / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (tmp_path / folder / "refs").mkdir()
        (tmp_path / folder / "refs" / "main").write_text("a" * 40)
        kind = "datasets/" if folder.startswith("data") else ""
        assert hub_folder(f"{kind}owner/name") == snapshot
    for name in ("", ".", "..", "/etc", "../x", "a/b/c", "owner--name", "package:factory", "net.pt"):
        assert hub_folder(name) is None


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    for number in (0, 2):
        (tmp_path / f"train-0000{number}-of-00003.jsonl").write_text('{"text": "a", "label": 0}\n')
    with pytest.raises(ValueError, match="got 2 of 3 files like train-00000-of-00003.jsonl, expected number 00001"):
        find_tables(tmp_path, "train")
    (tmp_path / "train-00001-of-00003.jsonl").write_text('{"text": "a", "label": 0}\n')
    assert len(find_tables(tmp_path, "train")) == 3
