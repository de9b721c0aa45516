"""What llama.cpp hands out while it runs a GGUF, against transformers on the same model."""

import os
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from qfllama.convert import capture_llama, capture_torch, export, text
from qfllama.convert.capture_llama import LlamaModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def single_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.write_llama(folder / "checkpoint")
    export.checkpoint_to_gguf(folder / "checkpoint", folder / "tiny.gguf", "f32")
    return folder / "checkpoint", folder / "tiny.gguf"


@pytest.fixture
def model(tiny):
    model = LlamaModel(tiny[1], 512)
    yield model
    model.close()


def read_all(model, tokens):
    """layer -> (queries [n_head, n_tokens, head_dim], keys [n_head_kv, n_tokens, head_dim])."""
    queries, keys = {}, {}

    def take(call):
        queries.setdefault(call.layer, []).append(call.queries())
        keys[call.layer] = call.keys()
        assert call.start + call.n_tokens == keys[call.layer].shape[1]

    model.read(tokens, take)
    return {layer: (np.concatenate(queries[layer], 1), keys[layer]) for layer in keys}


def test_queries_and_keys_are_those_of_transformers(tiny, model, monkeypatch):
    """In several batches: what an earlier batch left in the cache is handed out as well."""
    monkeypatch.setattr(capture_llama, "N_BATCH", 100)
    tokens = text.sequences(tiny[1], text.sources(), 1, 256)[0]
    ours = read_all(model, tokens)
    with closing(capture_torch.TorchModel(*tiny, 512)) as reference:
        theirs = read_all(reference, tokens)
    assert sorted(ours) == sorted(theirs) == [0, 1, 2]
    for layer in ours:
        for mine, other in zip(ours[layer], theirs[layer], strict=True):
            other = reference.to_cached({layer: other})[layer]
            assert mine.shape == other.shape
            np.testing.assert_allclose(mine, other, atol=0.02 * other.std())


def test_some_tokens_are_handed_out_in_the_order_asked_for(tiny, model):
    tokens = text.sequences(tiny[1], text.sources(), 1, 256)[0]
    some = np.array([3, 17, 200])

    def take(call):
        np.testing.assert_array_equal(call.queries(some), call.queries()[:, some])

    model.read(tokens, take)


def test_sequences_do_not_see_each_other(tiny, model):
    a, b = text.sequences(tiny[1], text.sources(), 2, 256)
    alone = read_all(model, b)
    read_all(model, a)
    after = read_all(model, b)
    for layer in alone:
        for x, y in zip(alone[layer], after[layer], strict=True):
            np.testing.assert_array_equal(x, y)


def test_an_error_in_the_observer_stops_the_model_and_comes_out(tiny, model):
    layers = []

    def fail(call):
        layers.append(call.layer)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.read([1, 2, 3], fail)
    assert layers == [0]


def test_an_interrupt_stops_the_model(tiny, model, request):
    """Ctrl-C reaches the waiting thread only, wherever the other one is."""
    # a shell starts what runs in the background with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    layers = []

    def interrupt(call):
        layers.append(call.layer)
        if call.layer == 1:
            time.sleep(0.5)  # until it waits: a signal just before that is seen when the wait ends
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            until = time.monotonic() + 10
            while not model._stopped and time.monotonic() < until:
                time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        model.read([1, 2, 3], interrupt)
    assert layers == [0, 1]


def test_an_interrupt_while_the_work_is_handed_over_stops_the_model(tiny, model, monkeypatch):
    """Nothing computes any more when the interrupt comes out: what it works on is freed next."""
    submit, begun, ended = model._thread.submit, threading.Event(), []

    def interrupted(work, *args):
        monkeypatch.undo()
        submit(work, *args)
        assert begun.wait(10)
        raise KeyboardInterrupt

    def observe(call):
        begun.set()
        until = time.monotonic() + 1
        while not model._stopped and time.monotonic() < until:
            time.sleep(0.01)
        ended.append(model._stopped)

    monkeypatch.setattr(model._thread, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.read([1, 2, 3], observe)
    assert ended == [True]


@pytest.mark.skipif(sys.platform != "linux", reason="measures its memory in /proc")
def test_memory_does_not_grow_with_the_tokens(tiny, model):
    """Resident memory after many sequences is that after a few; what the process once had at its
    peak, in tests before this one, tells nothing."""
    tokens = text.sequences(tiny[1], text.sources(), 1, 512)[0]

    def resident():
        for _ in range(10):
            model.read(tokens, lambda call: (call.queries(), call.keys()))
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    first = resident()
    # the queries of these 30 sequences would take 17 MiB
    assert max(resident() for _ in range(3)) - first < 2 << 20
