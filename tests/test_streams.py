"""Forks and joins of a layer's side streams, with streams that only note what is asked of them."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import simba
from conftest import tiny_mamba, tokens
from simba import ops
from simba.models import mamba1, mixer, norms, streams
from simba.models.layer import LayerCall
from simba.models.streams import Pending, SideStreams
from simba.ops import Survivors
from test_families import mamba2

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels need real streams")


class Stream:
    device = CPU

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch):
    """What happens, in order: waits, tensors that are handed to a stream, work on a side stream."""
    log = []
    main, second, low = (Stream(name, log) for name in ("main", "second", "low"))
    current = [main]

    def fork(stream, work):
        stream.wait_stream(current[-1])
        current.append(stream)
        try:
            return work()
        finally:
            current.pop()

    def note(name, function):
        def noted(*args, **kwargs):
            log.append(f"{name} on {current[-1].name}")
            return function(*args, **kwargs)

        return noted

    monkeypatch.setattr(streams, "fork", fork)
    monkeypatch.setattr(streams, "second_stream", lambda device: second)
    monkeypatch.setattr(streams, "low_priority_stream", lambda device: low)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current[-1])
    for module in (streams, mixer, mamba1):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: log.append(f"record on {stream.name}")
    )
    for name in (
        "decay_rates", "pack", "selective_scan", "ssd_scan", "ssd_decays", "causal_conv1d", "gather"
    ):  # fmt: skip
        monkeypatch.setattr(ops, name, note(name, getattr(ops, name)))
    for name in ("scale", "put_add_scale"):
        monkeypatch.setattr(norms, name, note(name, getattr(norms, name)))
    monkeypatch.setattr(mixer, "select_survivors", note("select", mixer.select_survivors))
    return log


class TestPending:
    def test_one_wait_covers_all_that_was_forked(self, log):
        side = SideStreams()
        first = side.run_on_second_stream(lambda: torch.zeros(1), CPU)
        rest = Survivors(torch.zeros(1), None, torch.zeros(1)), torch.zeros(1)
        second = side.run_on_second_stream(lambda: rest, CPU)
        assert log == ["second waits for main"] * 2
        log.clear()
        assert torch.equal(first.join(), torch.zeros(1)) and second.join() is rest
        assert log == ["main waits for second", *["record on main"] * 4]
        log.clear()
        first.join(), second.join()
        assert log == []

    def test_a_later_fork_is_waited_for_again(self, log):
        side = SideStreams()
        side.run_on_second_stream(lambda: None, CPU).join()
        side.run_on_second_stream(lambda: None, CPU).join()
        assert log == ["second waits for main", "main waits for second"] * 2

    def test_what_the_work_reads_lives_until_it_is_joined(self, log):
        z = torch.ones(2)
        seen = weakref.ref(z)
        pending = SideStreams().run_on_second_stream(lambda z=z: z.mul(2), CPU)
        del z
        assert seen() is not None
        assert torch.equal(pending.join(), torch.full((2,), 2.0)) and seen() is None

    def test_low_priority(self, log):
        z = torch.ones(2)
        pending = SideStreams().run_at_low_priority(lambda: z.mul_(2), CPU)
        assert log == ["low waits for main"]
        assert pending.join() is z and log[1:] == ["main waits for low"]
        assert SideStreams(in_order=True).run_at_low_priority(lambda: z, CPU).join() is z
        assert len(log) == 2

    def test_without_streams_nothing_is_asked(self):
        pending = SideStreams().run_on_second_stream(lambda: 3, CPU)
        assert pending.join() == Pending(3).join() == 3


def late_gate(monkeypatch, log):
    """Let the gate be computed late, as in wide layers on a GPU."""
    stock = mixer.MixerForm.project_in

    def project_in(self, *args):
        x, z = stock(self, *args)

        def compute():
            log.append("gate on low")
            return z

        return x, compute

    monkeypatch.setattr(mixer.MixerForm, "project_in", project_in)


def prefill(model, keep, **options):
    simba.sparsify(model, keep, cuda_graph="never", dense_path="simba", **options)
    with torch.no_grad():
        return model.backbone(tokens(1, 40)).last_hidden_state


RATES = ["second waits for main", "decay_rates on second"]
SELECT = ["second waits for main", "select on second"]
JOIN = ["main waits for second", "record on main"]
GATE = ["causal_conv1d on main", "low waits for main", "gate on low"]
TAIL = ["record on main"] * 3  # rows and positions of the survivors, the convolution's last inputs


@pytest.mark.parametrize("keep", [0.1, 0.9])
def test_a_mamba_layer(log, monkeypatch, keep):
    """A CUDA graph holds these dependencies; survivors are waited for in front of the scan only
    where the scan leaves the others out."""
    late_gate(monkeypatch, log)
    prefill(tiny_mamba(), keep)
    pack = ["second waits for main", "pack on second"]
    scan = ["main waits for low", "selective_scan on main"]
    selected = ["main waits for second", *TAIL]
    start = [*RATES, *GATE, *pack, *JOIN, *SELECT]
    layer = [*start, *selected, *scan] if keep == 0.1 else [*start, *scan, *selected]
    assert log[: len(layer)] == layer


@pytest.mark.parametrize("keep", [0.1, 0.9])
def test_a_mamba2_layer(log, monkeypatch, keep):
    """Its scan gives all outputs; survivors and gate are needed behind it."""
    late_gate(monkeypatch, log)
    prefill(mamba2(), keep)
    start = [*RATES, *JOIN, *GATE, *SELECT]
    selected = ["main waits for second", *TAIL]
    scan = ["ssd_scan on main", "main waits for low"]
    layer = [*start, *selected, *scan] if keep == 0.1 else [*start, *scan, *selected]
    assert log[: len(layer)] == layer


@interpreted
@pytest.mark.parametrize("padded", [False, True])
def test_decays_beside_the_convolution(log, monkeypatch, padded):
    """Mamba-2's kernels need B and C first. The numbers are those of one convolution."""
    options = {"attention_mask": torch.ones(2, 40).long()}
    if padded:
        options["attention_mask"][0, :7] = 0
    monkeypatch.setattr(mixer, "CONVOLVE_APART", 0)
    model = mamba2()
    simba.sparsify(model, 0.5, cuda_graph="never", dense_path="simba", backend="triton")

    def run():
        with torch.no_grad():
            return model.backbone(tokens(2, 40), **options).last_hidden_state

    with monkeypatch.context() as changed:
        changed.setattr(mixer, "capturing", lambda device: False)
        here = run()
    layer = [
        "second waits for main", "causal_conv1d on second", "ssd_decays on second",
        "causal_conv1d on main", "low waits for main", "main waits for second",
    ]  # fmt: skip
    late_gate(monkeypatch, log)
    log.clear()
    assert torch.equal(run(), here)
    assert "record on second" not in log
    done = [what for what in log if what != "gate on low"]
    starts = [i - 1 for i, what in enumerate(done) if what == "causal_conv1d on second"]
    assert len(starts) == len(model.backbone.layers)
    assert all(done[i : i + len(layer)] == layer for i in starts)
    for name, value in (("CONVOLVE_APART", 10**9), ("capturing", lambda device: False)):
        with monkeypatch.context() as changed:
            changed.setattr(mixer, name, value)
            log.clear()
            assert torch.equal(run(), here) and "ssd_decays on second" not in log


@interpreted
@pytest.mark.parametrize("padded", [False, True])
def test_decays_of_a_few_beside_the_convolution(log, monkeypatch, padded):
    """They need the step sizes alone. The numbers are those without another stream."""
    options = {"attention_mask": torch.ones(2, 40).long()}
    if padded:
        options["attention_mask"][0, :7] = 0
    model = mamba2()
    simba.sparsify(model, 0.5, fate="write", cuda_graph="never", backend="triton")

    def run():
        log.clear()
        with torch.no_grad():
            return model.backbone(tokens(2, 40), **options).last_hidden_state

    with monkeypatch.context() as changed:
        changed.setattr(mixer, "capturing", lambda device: False)
        here = run()
        assert "ssd_decays on second" not in log
    assert torch.equal(run(), here)
    layer = ["second waits for main", "ssd_decays on second", "causal_conv1d on main"]
    starts = [i - 1 for i, what in enumerate(log) if what == "ssd_decays on second"]
    some_only_write = len(model.backbone.layers) - 1
    assert len(starts) == some_only_write == log.count("ssd_scan on main") - 1
    for i in starts:
        assert log[i : i + 3] == layer
        assert "main waits for second" in log[i : log.index("ssd_scan on main", i)]


@interpreted
def test_no_decays_beside_a_convolution_that_is_not_plain(log):
    """It may return another dtype than it gets, and decays depend on that."""
    model = mamba2().bfloat16()
    for block in model.backbone.layers:
        block.mixer.conv1d.register_forward_hook(lambda module, inputs, out: out.float())
    options = {"criterion": "recency", "cuda_graph": "never", "backend": "triton"}
    simba.sparsify(model, 0.5, fate="write", **options)
    ids, found = tokens(2, 40), []
    for graph in (False, True):
        log.clear()
        with pytest.MonkeyPatch.context() as changed, torch.no_grad():
            changed.setattr(mixer, "capturing", lambda device, yes=graph: yes)
            found.append(model.backbone(ids).last_hidden_state)
    assert torch.equal(*found) and found[0].isfinite().all()
    assert "decay_rates on second" in log and "ssd_decays on second" not in log


@pytest.mark.parametrize("make", [tiny_mamba, mamba2])
def test_the_gate_of_live_tokens(log, monkeypatch, make):
    """Its tokens are picked beside in_proj, and it is computed behind the convolution."""
    expected = prefill(make(), 0.5, fate="write")
    monkeypatch.setattr(mixer.MixerForm, "_may_project_apart", lambda *_: True)
    log.clear()
    hidden_states = prefill(make(), 0.5, fate="write")
    picks = ["low waits for main", "gather on low", "causal_conv1d on main", "low waits for main"]
    log = [what for what in log if what in picks or what == "gather on main"]
    starts = [i for i, what in enumerate(log) if what == "gather on low"]
    assert len(starts) == log.count("causal_conv1d on main") - 1 > 0
    assert all(log[i - 1 : i + 3] == picks for i in starts) and "gather on main" not in log
    assert torch.allclose(hidden_states, expected, rtol=1e-4, atol=1e-5)


def test_columns_of_live_tokens_live_until_they_are_picked(log, monkeypatch):
    """Nobody joins the picking itself, but the gate's product behind it."""
    live, gather, columns = LayerCall.live, ops.gather, []

    def noted(tokens, rows, **options):
        if "out" in options:
            columns.append(weakref.ref(rows))
        return gather(tokens, rows, **options)

    def wait(self, other):
        if (self.name, other.name) == ("main", "low"):
            assert columns.pop()() is not None

    def own(*args):
        columns = live(*args)
        return None if columns is None else columns.clone()

    monkeypatch.setattr(ops, "gather", noted)
    monkeypatch.setattr(Stream, "wait_stream", wait)
    monkeypatch.setattr(LayerCall, "live", own)
    monkeypatch.setattr(mixer.MixerForm, "_may_project_apart", lambda *_: True)
    prefill(tiny_mamba(), 0.5, fate="write")
    assert columns == [] and "gather on low" in log


@interpreted
@pytest.mark.parametrize("make", [tiny_mamba, mamba2])
def test_the_next_norm_of_tokens_that_only_write(log, monkeypatch, make):
    """It is computed beside the products, in a graph of ours, where the layer before left the
    units."""
    options = {"cuda_graph": "never", "fate": "write", "backend": "triton"}
    ids, found = tokens(1, 40), []
    for early in (False, True):
        model = make().bfloat16()
        model.config.residual_in_fp32 = True
        for block in model.backbone.layers:
            block.residual_in_fp32 = True
        monkeypatch.setattr(mixer.MixerForm, "_may_project_apart", lambda *_, yes=early: yes)
        simba.sparsify(model, schedule=[1, *[0.4] * (len(model.backbone.layers) - 1)], **options)
        log.clear()
        with torch.no_grad(), streams.making_graph():
            found.append(model.backbone(ids).last_hidden_state)
        layers = log.count("put_add_scale on main")
        assert layers > 1 and log.count("scale on main") == 0
        assert log.count("scale on low") == (2 * (layers - 1) if early else 0)
        if early:
            first, second = [i for i, what in enumerate(log) if what == "scale on low"][:2]
            gate = ["low waits for main", "gather on low", "low waits for main"]
            assert log[first - 3 : first] == gate
            assert log[second - 1] == "low waits for main"
            assert sum("scan on main" in what for what in log[first:second]) == 1
    assert torch.equal(*found)


def test_a_callers_graph_is_not_ours():
    """Ours are tried and captured inside of a context, which other threads do not see."""
    assert not streams.for_our_graph()
    with streams.making_graph():
        with streams.making_graph():
            assert streams.for_our_graph()
        assert streams.for_our_graph()
        with ThreadPoolExecutor(1) as other:
            assert not other.submit(streams.for_our_graph).result()
    assert not streams.for_our_graph()
    with pytest.raises(RuntimeError), streams.making_graph():
        raise RuntimeError
    assert not streams.for_our_graph()
