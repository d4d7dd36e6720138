"""The slice that the step is judged on: six layers of Qwen2.5-3B's geometry and its vocabulary, on a CPU.

Hidden 2048, intermediate 11008, 16 heads, 2 KV heads, vocabulary 151,936 tied, random weights, 8 × 256 tokens, half
of the samples to forget, the feed-forward linears of the last 3 layers adapted.
"""

from __future__ import annotations

from dataclasses import replace

from step_workloads import Workload

QWEN_3B = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2,
    "vocab_size": 151936, "max_position_embeddings": 32768,
}  # fmt: skip

# Timed together, in turns; what needs a copy of its own with the optimiser's state comes in a second group.
TOGETHER = (
    "floor", "ours", "ours-eager", "ours-teacher", "paper", "paper-compiled", "peft", "peft-compiled", "peft-bf16",
)  # fmt: skip
APART = ("floor", "ours", "finetune")
CONTENDERS = (*TOGETHER, "finetune")


def workload(dtype: str, *, samples: int = 8, length: int = 256) -> Workload:
    """The slice; smaller batches are for machines that would need a day."""
    geometry = QWEN_3B | {"num_hidden_layers": 6}
    return Workload("qwen", dtype, samples, samples // 2, length, geometry=geometry)


def tiny(dtype: str = "fp32") -> Workload:
    """The same program on a model of a few thousand parameters: for trying out the instruments."""
    geometry = {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 97, "max_position_embeddings": 64, "num_hidden_layers": 4,
    }  # fmt: skip
    return replace(workload(dtype, samples=4, length=8), geometry=geometry)
