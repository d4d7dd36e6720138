"""Live storage, against byte counts worked out by hand."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rfa_fast.metrics.live_storage import LiveStorage, live_storage


def test_a_view_adds_nothing_and_a_dead_tensor_leaves() -> None:
    with live_storage() as live:
        x = torch.ones(10, 100)  # 4,000
        views = [x.t(), x[2:5], x.reshape(1000), x.detach(), x.expand(3, 10, 100)]
        assert live.current == 4_000
        y = x * 2  # 4,000 more
        assert live.current == live.peak == 8_000
        del x
        assert live.current == 8_000  # its views are alive
        del views
        assert live.current == 4_000
        z = y.half()  # 2,000
        del y
        assert (live.current, live.peak) == (2_000, 8_000)
    del z
    assert live.current == 0


def test_what_is_written_in_place_is_no_second_tensor() -> None:
    with live_storage() as live:
        x = torch.zeros(50)
        x += 1
        torch.mul(x, 2, out=x)
        assert (live.current, live.peak) == (200, 200)
        x.resize_(100)
        assert live.current == 400


def test_saved_tensors_count_as_long_as_the_graph_lives() -> None:
    with live_storage() as live:
        x = torch.ones(1000, requires_grad=True)
        first = x.exp()  # saved by exp, which needs its result
        second = first.exp()
        assert live.current == 12_000
        del first
        assert live.current == 12_000
        second.sum().backward()
        # x, second and x.grad; the graph is freed, with it the first result. The sum has died.
        assert live.current == 12_000
        del second
        assert live.current == 8_000
        x.grad = None
        assert live.current == 4_000
        # At the worst moment: x, first, second, the gradients of first and of x; the sum and its gradient, 4 each.
        assert live.peak == 20_000 + 8


def test_without_a_graph_nothing_is_saved() -> None:
    with live_storage() as live, torch.no_grad():
        x = torch.ones(1000)
        y = x.exp()
        y = y.exp()
        assert (live.current, live.peak) == (8_000, 12_000)
    assert y.shape == (1000,)


def test_a_training_step_by_hand() -> None:
    layer = nn.Linear(100, 50, bias=False)  # 20,000
    optimizer = torch.optim.Adam(layer.parameters(), foreach=False)
    with live_storage(layer) as live:
        assert live.existing == 20_000
        layer(torch.ones(8, 100)).sum().backward()  # the gradient: 20,000
        gc.collect()
        assert live.current == 40_000
        optimizer.step()  # two moments, and a step count of 4 bytes
        assert live.current == 80_004
        optimizer.zero_grad()
        assert live.current == 60_004
    counted = live.by_operation()
    assert counted["parameter"] == 20_000
    assert counted["aten.zeros_like"] == 40_000
    with live_storage(layer, optimizer) as again:
        assert again.existing == again.current == 60_004
    assert again.by_operation() == {"optimizer state": 40_004, "parameter": 20_000}


def test_existing_tensors_are_counted_once_and_named() -> None:
    net = nn.ModuleDict({"a": nn.Linear(10, 10, bias=False), "b": nn.BatchNorm1d(10, affine=False)})
    net["tied"] = nn.Linear(10, 10, bias=False)
    net["tied"].weight = net["a"].weight
    net["a"].weight.grad = torch.ones(10, 10)
    with live_storage(net, [net["a"].weight.detach()], {"more": torch.ones(3)}, None) as live:
        # 400 weight, 400 gradient, 40 + 40 + 8 running statistics, 12
        assert live.existing == live.current == 900
    assert [(s.made_by, s.name) for s in live.at_peak[:2]] == [("parameter", "a.weight"), ("gradient", "a.weight")]
    assert live.largest is None
    with pytest.raises(TypeError, match="existing: got int, expected modules, optimizers, tensors"), live_storage(3):  # type: ignore[arg-type]
        pass


def test_what_was_alive_at_the_peak() -> None:
    with live_storage() as live:
        kept = torch.ones(100)
        for size in (300, 500, 200):
            torch.zeros(size, dtype=torch.int16)
        live_after = torch.ones(20)
    assert live.peak == 400 + 1000
    assert [str(storage) for storage in live.at_peak] == [
        "1,000 B  int16[500]  aten.zeros",
        "400 B  float32[100]  aten.ones",
    ]
    assert live.largest == live.at_peak[0]
    assert live.by_operation() == {"aten.zeros": 1000, "aten.ones": 400}
    live.reset_peak()
    assert (live.peak, live.largest, len(live.at_peak)) == (480, None, 2)
    del kept, live_after


def test_nothing_new_is_counted_after_the_block_and_the_count_holds_nothing_alive() -> None:
    with live_storage() as live:
        x = torch.ones(10)
    y = torch.ones(10)
    assert live.current == 40
    del x
    assert live.current == 0
    assert y.sum() == 10
    z = torch.ones(5)
    with live_storage(z) as live:
        pass
    del live
    gc.collect()
    del z  # its watcher finds that the count is gone


def test_fake_tensors_are_counted_like_real_ones() -> None:
    def step(count: LiveStorage) -> tuple[int, int]:
        layer = nn.Sequential(nn.Linear(30, 40), nn.GELU(), nn.Linear(40, 20))
        layer(torch.randn(16, 30)).square().sum().backward()
        gc.collect()
        return count.current, count.peak

    with live_storage() as live:
        real = step(live)
    with FakeTensorMode(), live_storage() as live:
        assert step(live) == real


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_are_their_parts() -> None:
    values = torch.ones(4)  # 16
    pointers, indices = torch.tensor([0, 1, 2, 4]), torch.tensor([0, 1, 0, 1])  # 32 each
    pairs = torch.stack([indices, indices])  # 64
    with torch.sparse.check_sparse_tensor_invariants(False):
        rows = torch.sparse_csr_tensor(pointers, indices, values, (3, 2))
        columns = torch.sparse_csc_tensor(pointers, indices, values, (2, 3))
        loose = torch.sparse_coo_tensor(pairs, values, (2, 2))
    for tensor, expected in ((rows, 80), (columns, 80), (loose, 80)):
        with live_storage(tensor) as live:
            assert live.existing == expected


def test_operators_written_in_python_are_looked_into() -> None:
    @torch.library.custom_op("rfa_fast_test::wasteful", mutates_args=())
    def wasteful(x: torch.Tensor) -> torch.Tensor:
        large = torch.ones(1000, dtype=x.dtype)
        return x * large.sum()

    x = torch.ones(10)
    with live_storage() as live:
        y = wasteful(x)
        assert live.peak == 4_000 + 4 + 40
        assert live.current == 40
    with live_storage(bodies={"rfa_fast_test::wasteful": lambda x: x * 2}) as live:
        z = wasteful(x)
        assert live.peak == 40
    assert y[0] == 1000
    assert z[0] == 2
