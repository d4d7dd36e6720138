"""Models from names and folders: what is opened, what is refused and why, and what is written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rfa_fast.models import open_model, save_model


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


def bert(folder: Path, **more: Any) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    settings = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**{**settings, "intermediate_size": 8, "max_position_embeddings": 16, "num_labels": 3, **more})
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder."""
    monkeypatch.chdir(tmp_path)
    name = f"factories_{abs(hash(tmp_path.name))}"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\n\nclass Nets:\n    wide = staticmethod(lambda: nn.Linear(2, 5).train())\n\n"
        "def small():\n    return nn.Linear(2, 3)\n\ndef text():\n    return 'no model'\n\nnumber = 3\n"
    )
    return name


def test_transformers_folder(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert", id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    opened = open_model(folder)
    assert (type(opened.model).__name__, opened.source, opened.task) == (
        "BertForSequenceClassification", "transformers", "text"
    )  # fmt: skip
    assert opened.labels == ("a", "b", "c")
    assert opened.tokenizer is None
    assert not opened.model.training
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(opened.model.state_dict()[key], value) for key, value in stored.items())
    assert open_model(bert(tmp_path / "plain")).labels == ()
    assert next(open_model(folder, dtype="bfloat16").model.parameters()).dtype == torch.bfloat16


def store(folder: Path, shards: int = 1, **dtypes: torch.dtype) -> None:
    """Write the weights again, those whose name ends like this in this dtype, in so many files."""
    tensors = load_file(folder / "model.safetensors")
    for ending, dtype in dtypes.items():
        tensors |= {name: value.to(dtype) for name, value in tensors.items() if name.endswith(ending)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    places = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("shards", [1, 2])
def test_auto_is_the_dtype_that_the_weights_are_stored_in(tmp_path: Path, shards: int) -> None:
    folder = bert(tmp_path / "bert")
    stored = load_file(folder / "model.safetensors")
    store(folder, shards)
    edit_config(folder, dtype="bfloat16")
    state = open_model(folder).model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in stored.items())
    assert next(open_model(folder, dtype="bfloat16").model.parameters()).dtype == torch.bfloat16
    again = save_model(open_model(folder).model, tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["dtype"] == "float32"


def test_auto_is_the_configuration_s_dtype_where_the_weights_have_several(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert")
    store(folder, weight=torch.bfloat16, bias=torch.bfloat16)
    edit_config(folder, dtype="float32")
    assert {p.dtype for p in open_model(folder).model.parameters()} == {torch.bfloat16}
    store(folder, bias=torch.float32)
    assert {p.dtype for p in open_model(folder).model.parameters()} == {torch.float32}
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ValueError, match="cannot be read as BertForSequenceClassification"):
        open_model(folder)


def test_language_and_image_models_by_their_architecture(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

    GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=16)).save_pretrained(
        tmp_path / "gpt2"
    )
    vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8,
                    patch_size=4)  # fmt: skip
    ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    gpt2 = open_model(tmp_path / "gpt2")
    assert gpt2.task == "language"
    assert gpt2.model.lm_head.weight is gpt2.model.transformer.wte.weight  # type: ignore[union-attr]
    assert open_model(tmp_path / "vit").task == "image"


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert")
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"its weights lack bert\.encoder\.layer\.1\..* and \d+ more"):
        open_model(folder)
    edit_config(folder, num_hidden_layers=1, hidden_size=16)
    with pytest.raises(ValueError, match="cannot be read as BertForSequenceClassification"):
        open_model(folder)
    edit_config(folder, hidden_size=8)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is a file cut short"):
        open_model(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle, which runs code when it is read"):
        open_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        open_model(folder)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        pytest.param(None, FileNotFoundError, "holds no config.json", id="none"),
        pytest.param("{", ValueError, "got no JSON", id="cut short"),
        pytest.param("[]", ValueError, "got list, expected a JSON object", id="a list"),
        pytest.param('{"architectures": ["BertForMaskedLM"]}', ValueError, "got .*BertForMaskedLM", id="other task"),
        pytest.param('{"model_type": "bert"}', ValueError, "architectures: got None", id="no architecture"),
    ],
)
def test_configuration_that_names_no_model(
    tmp_path: Path, config: str | None, kind: type[Exception], message: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(kind, match=message):
        open_model(tmp_path)


def test_unknown_architecture_asks_for_a_newer_transformers(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert")
    edit_config(folder, architectures=["NobodyForSequenceClassification"])
    with pytest.raises(ValueError, match="does not have; upgrade transformers"):
        open_model(folder)


def test_code_in_a_folder_is_run_only_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers keeps copies of such code: here, not in the user's cache.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "copies"))
    monkeypatch.syspath_prepend(tmp_path / "copies")
    folder = bert(tmp_path / "bert")
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'was run')!r}, 'w').close()\n"
        "from transformers import BertConfig, BertForSequenceClassification\n\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own-bert'\n\n"
        "class OwnForSequenceClassification(BertForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnForSequenceClassification"}
    edit_config(folder, architectures=["OwnForSequenceClassification"], model_type="own-bert", auto_map=auto)
    with pytest.raises(ValueError, match="--trust-remote-code"):
        open_model(folder)
    assert not (tmp_path / "was run").exists()
    opened = open_model(folder, trust_remote_code=True)
    assert (tmp_path / "was run").exists()
    assert (type(opened.model).__name__, opened.task) == ("OwnForSequenceClassification", "text")


def test_names_that_are_no_model(tmp_path: Path, nets: str) -> None:
    for name, kind, message in (
        ("bert-base-uncased", FileNotFoundError, "nothing is downloaded"),
        ("net.pt", ValueError, "a pickle"),
        (f"{nets}.py", ValueError, "got the file"),
        ("torchvision:fasterrcnn_resnet50_fpn", ValueError, "classification models"),
        ("nobody_has_this:build", ValueError, "cannot be imported"),
        (f"{nets}:large", ValueError, "has no 'large'"),
        (f"{nets}:number", TypeError, "got int, expected a callable"),
        (f"{nets}:text", TypeError, "returned str"),
    ):
        with pytest.raises(kind, match=message):
            open_model(name)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter, expected a model"):
        open_model(tmp_path / "adapter")


def test_factory_leaves_the_search_path_alone(nets: str) -> None:
    import sys

    before = list(sys.path)
    opened = open_model(f"{nets}:Nets.wide")
    assert isinstance(opened.model, nn.Linear)
    assert (opened.model.out_features, opened.task, opened.model.training) == (5, "unknown", False)
    assert sys.path == before


def test_a_module_in_place_of_a_factory_is_opened_as_a_copy(nets: str, tmp_path: Path) -> None:
    import sys

    (tmp_path / f"{nets}.py").write_text(
        "import torch\nfrom torch import nn\n\ntorch.manual_seed(0)\nnet = nn.Sequential(nn.Linear(2, 3))\n"
        "part = nn.Linear(2, 2)\npart.made = torch.ones(1, requires_grad=True) * 2\n"
    )
    one, other = open_model(f"{nets}:net").model, open_model(f"{nets}:net").model
    own = sys.modules[nets].net
    assert isinstance(one, nn.Sequential)
    assert torch.equal(one[0].weight, own[0].weight)
    assert not one.training
    assert own.training
    with torch.no_grad():
        one[0].weight.zero_()
    assert torch.equal(other[0].weight, own[0].weight)  # type: ignore[index]
    assert own[0].weight.abs().min() > 0
    with pytest.raises(TypeError, match="got a Linear that cannot be copied .*expected a callable that returns a new"):
        open_model(f"{nets}:part")


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path, nets: str) -> None:
    name, file = f"{nets}:small", tmp_path / "w.safetensors"
    right = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    for tensors, message in (
        ({**right, "weight": torch.ones(4, 2)}, r"has weight of shape \(4, 2\), expected \(3, 2\)"),
        ({**right, "scale": torch.ones(1)}, "has scale, which Linear has not"),
        ({"weight": right["weight"]}, "does not fill Linear .*bias"),
    ):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=message):
            open_model(name, weights=file)
    save_file(right, file)
    assert torch.equal(open_model(name, weights=file).model.weight, right["weight"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected none: the folder has its own"):
        open_model(bert(tmp_path / "bert"), weights=file)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_model(name, weights=tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match=r"expected a \.safetensors or \.pth file"):
        open_model(name, weights=tmp_path / f"{nets}.py")


def test_torchvision_draws_nothing_from_the_caller_s_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert open_model("torchvision:squeezenet1_1", classes=4).model.classifier[1].out_channels == 4  # type: ignore
    assert torch.equal(torch.rand(1), expected)


def test_saved_models_come_back_equal(tmp_path: Path) -> None:
    model = open_model(bert(tmp_path / "bert")).model
    inputs = torch.arange(6).reshape(2, 3)
    with torch.no_grad():
        model.classifier.bias.add_(1.0)  # type: ignore[union-attr, operator]
        again = open_model(save_model(model, tmp_path / "out")).model
        assert torch.equal(model(inputs).logits, again(inputs).logits)
        tied, other = Tied(), Tied()
        file = save_model(tied, tmp_path / "out") / "model.safetensors"
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    from safetensors.torch import load_model

    load_model(other, file)
    assert torch.equal(other.second.weight, tied.first.weight)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        save_model(tied, tmp_path / "file")


def test_a_model_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(nn.Linear(2, 2), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_model", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(nn.Linear(2, 2), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["module", "transformers"])
def test_a_full_disk_is_an_os_error_and_leaves_the_folder_before(kind, tmp_path, monkeypatch):
    from safetensors import SafetensorError
    from transformers import BertConfig, BertForSequenceClassification

    model = nn.Linear(2, 2)
    if kind == "transformers":
        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        model = BertForSequenceClassification(BertConfig(vocab_size=9, **size))
    save_model(model, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    for name in ("safetensors.torch.save_model", "transformers.modeling_utils.safe_save_file"):
        monkeypatch.setattr(name, full)
    with pytest.raises(OSError, match="out.*cannot be written .No space left on device"):
        save_model(model, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
