"""Units computed in processes of their own: what they say, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rfa_fast.experiments.tables import processes, runner
from rfa_fast.experiments.tables.plan import Choice, Unit

# A parent that starts two processes, says which, and waits for them for ever.
PARENT = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from rfa_fast.experiments.tables.processes import _end_with_parent

if __name__ == "__main__":
    executor = ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_end_with_parent)
    waiting = [executor.submit(time.sleep, 600) for _ in range(2)]
    while not all(future.running() for future in waiting):
        time.sleep(0.05)
    print(*executor._processes, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_process_among_several_says_whose_its_lines_are(
    interrupted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def computed(shop: runner.Workshop, unit: Any) -> None:
        shop.say("a word")
        sys.stderr.write("10%\r20%\rhalf a line")
        assert not sys.stderr.isatty()
        assert shop.progress
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.Workshop, "compute", computed)
    unit = Unit("digits/digits-net", 3, {}, ())
    assert processes._work(unit, Choice(("table1",), ("digits/digits-net",)), 1, True) is not interrupted
    whose = "[digits/digits-net, seed 3]"
    lines = [f"{whose} {text}" for text in ("a word", "10%", "20%", "half a line")]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see which processes are there")
def test_processes_end_with_the_one_that_started_them_when_it_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        children = [int(word) for word in parent.stdout.readline().split()]
        assert len(children) == 2
        time.sleep(0.5)
        assert all(_runs(child) for child in children)
    finally:
        parent.kill()
        parent.wait()
    until = time.monotonic() + 60
    while any(_runs(child) for child in children) and time.monotonic() < until:
        time.sleep(0.1)
    left = [child for child in children if _runs(child)]
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert left == []


def test_a_process_that_is_killed_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_end_with_parent", partial(os._exit, 9))
    units = [Unit("digits/digits-net", seed, {}, ()) for seed in range(2)]
    with pytest.raises(OSError, match=r"one of 2 processes was killed, .* memory; take fewer --jobs.* goes on where"):
        processes.compute(units, Choice(("table1",), ("digits/digits-net",)), jobs=2, say=lambda text: None)


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
