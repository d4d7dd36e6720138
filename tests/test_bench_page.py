"""The benchmark's page, figures and check, from made-up measurements; nothing here looks at a clock."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
MODULES = ("bench", "check", "child", "figures", "page", "parts", "run", "slice", "workloads")


@pytest.fixture(scope="module")
def step():
    """The benchmark modules, which find each other in their own folder only."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"step_{name}") for name in MODULES})
    finally:
        sys.path.remove(str(BENCHMARKS))


def row(step, name, seconds, *, above=None, before=2**29, workload=None, **more):
    workload = workload or step.slice.workload("bf16")
    memory = None if above is None else {"weights": 2**30, "peak": 2**30 + above, "above": above, "before": before}
    return {
        "contender": name, "seconds": step.run.quartiles(seconds), "memory": memory, "facts": step.run.facts(workload),
        "to_floor": sorted(seconds)[len(seconds) // 2] / 2.0, "to_ours": sorted(seconds)[len(seconds) // 2] / 2.2,
        "trainable": 7, "gradient_norm": None if name == "floor" else 0.5, "graph_breaks": None, **more,
    }  # fmt: skip


@pytest.fixture
def slice_part(step):
    """Every bound of the slice holds, barely."""
    gib = 2**30
    return {
        "part": "slice",
        "settings": {"workload": step.slice.workload("bf16").to_dict(), "rounds": 3, "warmup": 2},
        "checks": [],
        "rows": [
            row(step, "floor", [2.0, 1.9, 2.1], features={"a": [8, 256, 11008], "b": [8, 256, 2048]}, flops=9),
            row(step, "ours", [2.2, 2.3, 2.1], above=gib),
            row(step, "ours-teacher", [2.8, 2.8, 2.8], above=gib + 26 * 2**20),
            row(step, "paper", [10.0, 10.1, 9.9], above=9 * gib),
            row(step, "peft", [3.3, 3.2, 3.4], above=6 * gib),
        ],
    }


def full3b(step):
    rows = [
        {"kind": "live storage, fake tensors", "contender": name, "weights": 100, "peak": peak, "above_weights": 1}
        for name, peak in (("ours-eager", 110), ("paper", 260))
    ]
    rows.append({"kind": "resident, measured", "contender": "ours", "weights": 100, "peak": 140, "seconds": [7.0]})
    facts = step.run.facts(step.slice.tiny())
    return {"part": "full3b", "settings": {}, "rows": [{**each, "facts": facts} for each in rows]}


def growth(step):
    facts = step.run.facts(step.slice.tiny())
    points = [("tokens", n, 0.01 * n, 1e6 * n, 1e9 * n) for n in (256, 1024)]
    points += [("rank", r, 1.0, 1e8, 1e9 + r) for r in (1, 128)]
    rows = [
        {"varied": v, "value": n, "seconds": [s, s, s], "above": int(m) + 5, "before": 5, "flops": work,
         "low_rank_flops": 0, "facts": facts}
        for v, n, s, m, work in points
    ]  # fmt: skip
    return {"part": "growth", "settings": {"compiled": True}, "rows": rows}


def table12(step):
    rows = [
        row(step, name, [seconds] * 3, model="ResNet18")
        for name, seconds in (
            ("finetune", 1.0), ("finetune-compiled", 0.8), ("ours", 0.9), ("ours-deep", 0.5), ("retain-term", 0.01),
        )
    ]  # fmt: skip
    return {"part": "table12", "settings": {}, "rows": rows}


def test_figures_of_the_slice_and_their_bounds(step, slice_part):
    figures = {f.name: f for f in step.figures.figures_of(slice_part)}
    assert figures["step / floor"].value == pytest.approx(1.1)
    assert figures["paper's arrangement eager / ours"].value == pytest.approx(10 / 2.2)
    assert figures["ours / plain PEFT LoRA step (no RFA) eager"].value == pytest.approx(2.2 / 3.3)
    assert figures["memory above one copy of the weights, ours / paper's arrangement"].value == pytest.approx(1 / 9)
    assert figures["without the interpreter's share, ours / plain PEFT LoRA"].value == pytest.approx(0.5 / 5.5)
    teacher = figures["teacher mode: memory above the weights, more than residual mode's"]
    assert teacher.bound * 2**30 == 1024 * (11008 + 2048) * 2  # half of 2,048 tokens, 2 bytes
    assert sum(f.bound is not None for f in figures.values()) == 7
    assert {f.verdict() for f in figures.values()} == {"held", "", "**not held**"}
    assert [f.name for f in figures.values() if f.verdict() == "**not held**"] == [teacher.name]


def test_what_was_not_measured_is_not_held(step, slice_part):
    slice_part["rows"] = [r for r in slice_part["rows"] if r["contender"] != "paper"]
    for each in slice_part["rows"]:
        each.pop("memory")
    found = [f for f in step.figures.figures_of(slice_part) if f.bound is not None]
    assert [f.verdict() for f in found].count("not measured") == 4
    assert not any(f.held for f in found if math.isnan(f.value))


def test_table_twelve_takes_the_faster_finetune(step):
    values = {f.name: f for f in step.figures.figures_of(table12(step))}
    assert values["ResNet18: ours / Finetune, all"].value == pytest.approx(0.9 / 0.8)
    assert values["ResNet18: ours / Finetune, all"].beside == "1.50"
    assert values["ResNet18: ours / Finetune, deep"].held
    assert values["ResNet18: retain loss's share of the step, all"].value == pytest.approx(0.01 / 0.9)


def test_slopes_are_those_of_the_data(step):
    series = step.figures.growth_series(growth(step))
    assert series["tokens"]["slope"] == pytest.approx(1.0)
    assert series["tokens"]["memory_slope"] == pytest.approx(1.0)
    assert series["tokens"]["expected"] == pytest.approx(1.0)
    assert series["rank"]["slope"] == pytest.approx(0.0)
    assert math.isnan(step.figures.slope([(1, 2)]))


def test_the_page_is_made_of_whatever_parts_there_are(step, slice_part, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "slice.md").write_text("Tried: nothing yet.\n", encoding="utf-8")
    profile = {
        "part": "profile", "settings": {}, "rows": [{
            "contender": "ours-eager", "seconds": 2.0, "facts": step.run.facts(step.slice.tiny()),
            "operations": [{"name": "aten::mm", "calls": 3, "seconds": 1.5, "share": 0.75}],
        }],
    }  # fmt: skip
    every = {
        "slice": slice_part, "table12": table12(step), "full3b": full3b(step), "growth": growth(step),
        "profile": profile,
    }  # fmt: skip
    for chosen in ((), ("slice",), tuple(every)):
        page = tmp_path / f"{len(chosen)}.md"
        written = step.page.write({name: every[name] for name in chosen}, page, notes)
        text = page.read_text(encoding="utf-8")
        assert len(text) > 500
        assert "NaN" not in text
        assert "nan" not in text
        assert all(0 < path.stat().st_size < 300_000 for path in written)
        assert len(re.findall(r"^## ", text, re.MULTILINE)) == len(chosen)
        for picture in re.findall(r"\]\(([^)]+\.png)\)", text):
            assert (tmp_path / picture).is_file()
    assert "| 1.10 |" in text or "| 1.1 |" in text
    assert "**not held**" in text
    assert "Tried: nothing yet." in text
    assert "peak resident / weights |  | ≤ 1.35 | 1.4 | **not held**" in text
    assert "live-storage peak / weights, ours |  | ≤ 1.15 | 1.1 | held" in text
    assert "`aten::mm` | 3 | 1.5 | 75.0%" in text
    assert str(ROOT) not in text
    assert str(tmp_path) not in text


def test_a_slice_of_another_size_says_so(step, slice_part):
    assert step.page.deviations(slice_part) == ""
    slice_part["settings"]["workload"] |= {"dtype": "fp32", "length": 64}
    said = step.page.deviations(slice_part)
    assert "dtype fp32 in place of bf16" in said
    assert "length 64 in place of 256" in said
    assert "hidden_size" not in said


def test_facts_name_the_machine_and_not_its_owner(step):
    facts = step.run.facts(step.slice.workload("bf16"))
    wanted = {"cpu", "cores", "threads", "torch", "transformers", "peft", "dtype", "shapes", "date"}
    assert wanted <= set(facts)
    import platform

    assert platform.node() not in json.dumps(facts) or len(platform.node()) < 4


def test_check_fails_on_a_worse_ratio_and_names_the_row(step, slice_part):
    again = json.loads(json.dumps(slice_part["rows"]))
    assert step.check.worse(slice_part["rows"], again) == []
    by_name = {r["contender"]: r for r in again}
    by_name["ours"]["to_floor"] *= 1.09
    by_name["paper"]["to_floor"] *= 3  # a rival that got slower is no fault of ours
    assert step.check.worse(slice_part["rows"], again) == []
    by_name["ours"]["to_floor"] = 1.3
    (fault,) = step.check.worse(slice_part["rows"], again)
    assert fault == "ours: committed 1.100 × floor, now 1.300, +18% (at most +10%)"
    (fault,) = step.check.worse(slice_part["rows"], [r for r in slice_part["rows"] if r["contender"] != "ours"])
    assert "ours: committed 1.100" in fault
    assert "not measured" in fault


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.2, 1)])
def test_bench_check_as_a_program(step, slice_part, tmp_path, monkeypatch, factor, code):
    import typer

    step.parts.save(tmp_path, slice_part)
    again = json.loads(json.dumps(slice_part["rows"]))
    again[1]["to_floor"] *= factor
    seen = []

    def time_slice(workload, options, say):
        seen.append((workload, options.contenders))
        return again

    monkeypatch.setattr(step.check, "time_slice", time_slice)
    app = typer.Typer()
    app.command()(step.check.main)
    done = CliRunner().invoke(app, ["--results", str(tmp_path)])
    assert done.exit_code == code, done.output
    assert seen == [(step.slice.workload("bf16"), ("floor", "ours", "ours-teacher"))]
    assert ("ours: committed 1.100 × floor, now 1.320" in done.output) == bool(code)
    assert CliRunner().invoke(app, ["--results", str(tmp_path / "none")]).exit_code == 2


def fake_child(task, **spec):
    """What a child process answers, without one."""
    from step_run import facts
    from step_workloads import Workload

    common = {"contender": spec["contender"], "weights": 100, "peak": 150}
    if task == "memory":
        work = {"flops": 1000 * spec["workload"]["length"], "low_rank_flops": 1} if spec.get("flops") else {}
        seconds = [1.0 * spec["workload"]["length"]] * spec["steps"]
        machine = facts(Workload(**spec["workload"]))
        return {**common, "above": 50, "before": 10, "source": "made up", "seconds": seconds, "facts": machine, **work}
    if task == "forecast":
        return {**common, "above_weights": 50, "state": 1}
    return {"contender": spec["contender"], "operations": [], "seconds": 1.0, "facts": facts(), "total": 1.0}


def test_every_part_runs_and_is_kept_as_json(step, tmp_path, monkeypatch):
    monkeypatch.setattr(step.slice, "TOGETHER", ("floor", "ours-eager", "paper", "peft"))
    monkeypatch.setattr(step.slice, "APART", ("floor", "finetune"))
    real = step.parts.make

    def uncompiled(workload, names):
        return real(workload, [n for n in names if n != "ours" and "compiled" not in n])

    monkeypatch.setattr(step.parts, "make", uncompiled)
    options = step.parts.Options(rounds=2, warmup=1, tiny=True, dtype="fp32")
    for name in ("slice", "full3b", "growth", "profile"):
        said = []
        part = step.parts.PARTS[name](options, tmp_path, said.append, fake_child)
        step.parts.save(tmp_path, part)
        assert part["rows"]
        assert said
        assert all({"cpu", "torch", "date"} <= set(each["facts"]) for each in part["rows"])
    parts = step.parts.load(tmp_path)
    assert list(parts) == ["slice", "full3b", "growth", "profile"]
    rows = {r["contender"]: r for r in parts["slice"]["rows"]}
    assert list(rows) == ["floor", "ours-eager", "paper", "peft", "finetune"]
    assert rows["paper"]["memory"]["above"] == 50
    assert rows["floor"].get("memory") is None
    assert all(len(r["seconds"]["all"]) == 2 and r["to_floor"] > 0 for r in rows.values())
    assert all(r["gradient_norm"] > 0 for name, r in rows.items() if name != "floor")
    step.page.write(parts, tmp_path / "page.md", tmp_path)


def test_rounds_are_interleaved_and_tokens_fresh(step):
    order, seen = [], []
    workload = step.slice.tiny()
    contenders = step.run.make(workload, ("peft", "finetune"))

    def batch(index):
        seen.append(workload.batch(index).inputs["input_ids"])
        return workload.batch(index)

    times = step.run.interleaved(contenders, batch, warmup=1, rounds=2, advance=order.append)
    assert order == ["peft", "finetune"] * 3
    assert {name: len(values) for name, values in times.items()} == {"peft": 2, "finetune": 2}
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0], seen[1])


def test_a_contender_that_does_not_learn_is_no_row(step):
    workload = step.slice.tiny()
    contenders = step.run.make(workload, ("peft",))
    loss = contenders["peft"].loss
    contenders["peft"].loss = lambda batch: loss(batch) * 0
    with pytest.raises(ArithmeticError, match="peft: got a gradient of norm 0"):
        step.run.interleaved(contenders, workload.batch, warmup=1, rounds=1)


@pytest.mark.parametrize("name", ["ours-eager", "ours-teacher-eager"])
def test_the_check_compares_ours_with_float64(step, name):
    for dtype in ("fp32", "bf16"):
        found = step.child.check({"workload": step.slice.tiny(dtype).to_dict(), "contender": name})
        assert abs(found["total"] - found["float64"]) <= found["bound"]
        assert found["float64"] != pytest.approx(math.log(97), abs=1e-6)


def test_the_check_sees_a_wrong_loss(step, monkeypatch):
    from rfa_fast.experiments.rivals import OurContender

    right = OurContender._step
    monkeypatch.setattr(OurContender, "_step", lambda self, batch: right(self, batch) * 1.001)
    with pytest.raises(ArithmeticError, match="ours-eager: got a total of"):
        step.child.check({"workload": step.slice.tiny().to_dict(), "contender": "ours-eager"})


def test_a_child_that_fails_says_why(step):
    with pytest.raises(RuntimeError, match="(?s)nothing of theirs: got exit code 1.*KeyError: 'nothing'"):
        step.child.in_child("nothing", contender="theirs")


def test_memory_is_the_peak_after_the_warm_up(step):
    spec = {"workload": step.slice.tiny().to_dict(), "contender": "peft", "warmup": 1, "steps": 1, "flops": True}
    found = step.child.memory(spec)
    assert found["gradient_norm"] > 0
    assert found["flops"] > 0
    assert found["weights"] == 137504
    assert found["peak"] is None or found["peak"] - found["weights"] == found["above"] > 0
    # 6 · rows · rank · (K + N): three linears of 32 and 48 in each of two layers, 32 rows, rank 8
    assert found["low_rank_flops"] == 6 * 32 * 8 * (32 + 48) * 6


def test_workloads_are_the_real_geometries(step):
    whole = step.workloads.table_twelve("fp32")
    sizes = {"ResNet18": 11_181_642, "ViT-B/16": 85_806_346, "DistilBERT": 66_955_010, "DistilGPT2": 81_912_576}
    for name, workload in whole.items():
        with torch.device("meta"):
            model = workload.build()
        assert sum(p.numel() for p in model.parameters()) == sizes[name], name
    assert [w.samples for w in whole.values()] == [128, 128, 32, 32]
    assert all(int(w.batch(0).forget.sum()) == w.forget == w.samples // 8 for w in whole.values())
    with torch.device("meta"):
        full = step.workloads.full_3b("bf16").build()
    assert sum(p.numel() for p in full.parameters()) == 3_085_938_688
    assert step.workloads.narrow("fp32", tokens=8192).tokens == 8192
    tiny = step.slice.tiny()
    assert replace(tiny, length=64).reduced().length == 32


def test_a_wrong_part_or_contender_is_named(step):
    with pytest.raises(ValueError, match="parts: got 'slices', expected some of slice"):
        step.parts.known("slices", ())
    with pytest.raises(ValueError, match="contenders: got 'theirs', expected some of floor"):
        step.parts.known("slice", ("theirs",))
    with pytest.raises(ValueError, match="models: got 'resnet18', expected some of ResNet18, ViT-B/16"):
        step.parts.known("table12", (), ("resnet18",))
    step.parts.known("table12", (), ("ResNet18",))
    step.parts.known("table12", (), ("tiny",), tiny=True)


def test_table_twelve_keeps_the_rows_of_models_not_measured_again(step, tmp_path, monkeypatch):
    names = ("A", "B", "C")
    workloads = dict.fromkeys(names, step.slice.tiny())
    monkeypatch.setattr(step.parts, "table_twelve", lambda dtype: workloads)
    monkeypatch.setattr(step.parts, "make", lambda workload, names: {"floor": None})
    monkeypatch.setattr(step.parts, "contender", lambda *args: None)
    monkeypatch.setattr(step.parts, "interleaved", lambda *args, **options: {})
    monkeypatch.setattr(step.parts, "rows_of", lambda *args, model: [{"model": model, "run": "second"}])
    first = [{"model": name, "run": "first"} for name in names]
    step.parts.save(tmp_path, {"part": "table12", "settings": {}, "rows": first, "checks": first})
    checked = []

    def child(task, **spec):
        checked.append(task)
        if len(checked) == 3:
            raise RuntimeError("out of luck")
        return {"run": "second"}

    with pytest.raises(RuntimeError, match="out of luck"):
        step.parts.measure_table12(step.parts.Options(models=("A", "B")), tmp_path, lambda text: None, child)
    part = step.parts.load(tmp_path)["table12"]
    assert [(each["model"], each["run"]) for each in part["rows"]] == [("A", "second"), ("B", "first"), ("C", "first")]
    assert [each["run"] for each in part["checks"]] == ["second", "second", "first", "first"]


def test_other_results_do_not_go_onto_the_real_page(step, tmp_path, monkeypatch):
    import typer

    monkeypatch.setattr(step.page, "write", lambda *args: pytest.fail("nothing is to be written"))
    monkeypatch.setattr(step.bench, "_measure", lambda *args: pytest.fail("nothing is to be measured"))
    app = typer.Typer()
    app.command()(step.bench.main)
    for more in (("--tiny",), ("--only-page",), ()):
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*more, "--parts", "slice", "--results", str(tmp_path)])
        assert done.exit_code == 2, done.output
        assert "got the page of the real results" in done.output
