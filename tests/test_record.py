"""The deletion record: hashes worked out again by other means, and what `verify_record` finds."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from rfa_fast import patch, unlearn
from rfa_fast.data import ImageDataset
from rfa_fast.methods import hash_model, read_record, verify_record
from rfa_fast.methods.record import hash_ids, write_json

NAMES = [f"customer/{i:03}" for i in range(24)]


def net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    images = torch.randn(24, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    data = ImageDataset(images, [i % 3 for i in range(24)], classes=("a", "b", "c"), ids=NAMES)
    return unlearn(
        net(),
        Subset(data, range(0, 24, 3)),
        Subset(data, [i for i in range(24) if i % 3]),
        targets=["1", "3"],
        rank=2,
        lr=1e-2,
        batch_size=6,
        progress=False,
        seed=9,
        evaluate=lambda model: {"accuracy": 0.25, "perplexity": float("inf")},
        output_dir=tmp_path_factory.mktemp("runs") / "a run of mine",
    )


class Odd(nn.Module):
    """Every kind of entry that a state dict may have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.5, -2.0, 0.25], [3.0, 0.0, 8.0]]))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("halves", torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def test_hash_by_hand() -> None:
    # bf16 1.0 is 0x3F80, 2.0 is 0x4000; everything is little-endian.
    entries = [
        (["count", "torch.int64", []], struct.pack("<q", 7)),
        (["empty", "torch.float32", [0, 3]], b""),
        (["flag", "torch.bool", [2]], b"\x01\x00"),
        (["halves", "torch.bfloat16", [2]], struct.pack("<2H", 0x3F80, 0x4000)),
        (["weight", "torch.float32", [2, 3]], struct.pack("<6f", 1.5, -2.0, 0.25, 3.0, 0.0, 8.0)),
    ]
    digest = hashlib.sha256(b"".join(json.dumps(name).encode() + b"\n" + content for name, content in entries))
    assert hash_model(Odd()) == digest.hexdigest()


def test_hash_does_not_depend_on_layout_or_chunks_or_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 7))
    expected = hash_model(model)
    assert hash_model(copy.deepcopy(model).to(memory_format=torch.channels_last)) == expected
    assert hash_model(torch.compile(model)) == expected
    monkeypatch.setattr("rfa_fast.methods.record._CHUNK", 13)
    assert hash_model(model) == expected
    model[1].weight.data[6, 4] += 1e-6
    assert hash_model(model) != expected


def test_hash_of_a_patched_model_is_that_of_the_original() -> None:
    model = net()
    before = hash_model(model)
    for adapter in ("lora", "pissa", "dora"):
        rfa = patch(model, ["1", "3"], rank=2, adapter=adapter)
        assert hash_model(model) == before
        live = hash_model(model, adapters=True)
        assert live != before
        with torch.no_grad():
            rfa.parameters()[-1].add_(1)
        assert hash_model(model, adapters=True) != live
        assert hash_model(model) == before
        rfa.remove()
    assert hash_model(model, adapters=True) == before


def test_extra_state_is_named_as_not_hashed() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"scale": 3}

        def set_extra_state(self, state: Any) -> None:
            return None

    images = torch.randn(9, 1, 4, 4)
    data = ImageDataset(images, [i % 3 for i in range(9)], classes=("a", "b", "c"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), Extra(6, 3))
    result = unlearn(
        model, Subset(data, [0, 1]), Subset(data, range(2, 9)), targets=["1"], rank=2, batch_size=9, progress=False
    )
    assert result.record["model"]["not_hashed"] == ["2._extra_state"]


def test_hash_of_ids_by_hand() -> None:
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"1", "zwei ü".encode()))
    hashes, digest = hash_ids(["zwei ü", 1])
    assert hashes == sorted([one, two])
    assert digest == hashlib.sha256("\n".join(sorted([one, two])).encode()).hexdigest()


def test_what_the_record_says(finished: Any) -> None:
    record = finished.record
    assert (record["schema"], record["schema_version"], record["method"]) == ("rfa-fast/deletion-record", 1, "rfa")
    assert record["forget"]["count"] == 8
    assert hashlib.sha256(b"customer/021").hexdigest() in record["forget"]["sha256"]
    assert record["retain"] == {"count": 16, "digest": hash_ids([n for i, n in enumerate(NAMES) if i % 3])[1]}
    assert record["model"]["before"] == hash_model(net())
    assert record["model"]["after"] == hash_model(finished.model)
    assert record["model"]["parameters"] == 16 * 6 + 6 + 6 * 3 + 3
    assert (record["seed"], record["settings"]["lr"], record["settings"]["options"]["rank"]) == (9, 1e-2, 2)
    assert record["layers"] == ["1", "3"]
    assert record["metrics"] == {side: {"accuracy": 0.25, "perplexity": None} for side in ("before", "after")}
    training = record["training"]
    assert (training["steps"], training["epochs"], training["stopped"]) == (len(finished.history), 1, "finished")
    assert training["seconds"] == pytest.approx(finished.history[-1]["seconds"], abs=1e-3)
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["versions"]["python"] == platform.python_version()
    assert record["created"].endswith("+00:00")
    assert set(record["merge_rounding"]) == {"1", "3"}


def test_the_record_tells_neither_ids_nor_host_nor_paths(finished: Any) -> None:
    text = json.dumps(finished.record)
    for secret in (
        "customer/",
        str(finished.output_dir),
        "a run of mine",
        str(Path.home()) + "/",
        socket.gethostname(),
    ):
        assert secret not in text


def test_files_of_the_run(finished: Any) -> None:
    folder = finished.output_dir
    assert json.loads((folder / "deletion_record.json").read_text()) == finished.record
    assert read_record(folder) == read_record(folder / "deletion_record.json") == finished.record
    files = finished.record["files"]
    assert "adapter/adapter_model.safetensors" in files
    for name, digest in files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_adapter_of_the_run_is_the_result(finished: Any) -> None:
    import rfa_fast

    model = net()
    rfa_fast.load(model, finished.output_dir / "adapter").merge()
    assert hash_model(model) == finished.record["model"]["after"]


def test_verify(finished: Any) -> None:
    record, gone = finished.record, NAMES[::3]
    assert verify_record(record, finished.model, reversed(gone)) == []
    assert verify_record(finished.output_dir, finished.model) == []
    assert verify_record(finished.output_dir / "deletion_record.json", forget_ids=gone) == []
    assert verify_record(record, net()) == [
        f"model: got the model from before unlearning, expected {record['model']['after']}"
    ]
    assert verify_record(record, forget_ids=[*gone[:-1], "someone"]) == [
        "forget ids: 1 of the 8 given are not in the record",
        "forget ids: 1 of the 8 in the record are not among those given",
    ]
    changed = copy.deepcopy(finished.model)
    changed[3].bias.data[0] += 1e-3
    assert "model: got SHA-256" in verify_record(record, changed)[0]
    for alter in (lambda f: f["sha256"].pop(), lambda f: f.update(count=7), lambda f: f.update(digest="0")):
        altered = copy.deepcopy(record)
        alter(altered["forget"])
        assert "the record was altered" in verify_record(altered, finished.model)[0]
    with pytest.raises(ValueError, match="got neither model nor forget_ids"):
        verify_record(record)


def test_verify_a_live_model() -> None:
    images = torch.randn(9, 1, 4, 4)
    data = ImageDataset(images, [i % 3 for i in range(9)], classes=("a", "b", "c"))
    result = unlearn(
        net(), Subset(data, [0, 4]), Subset(data, [1, 2, 3, 5]), targets=["1"], rank=2, batch_size=6, progress=False,
        merge=False,
    )  # fmt: skip
    assert verify_record(result.record, result.model, ["0", 4]) == []
    assert result.record["merge_rounding"] is None
    result.rfa.remove()
    assert verify_record(result.record, result.model) != []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema"', "got no JSON"),
        (b"\xff\xfe", "got no JSON"),
        (b"[]", "got JSON without schema"),
        (b'{"schema": "rfa-fast/deletion-record", "schema_version": 2}', "got schema version 2, expected 1; upgrade"),
    ],
)
def test_a_file_that_is_no_record(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "deletion_record.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        verify_record(tmp_path, net())


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
