"""What one eviction costs at max_length 4,096 / 32 layers / 8 KV heads of 128: time and memory.

The model has random weights and exists only for its shape. An eviction depends on the shape of the
KV cache, not on the rest: with `--shape small` everything else is tiny, and only the milliseconds
of an eviction mean something. With `--shape 8b` the other matrices are those of an 8B model, too
(random Q4_0 blocks, 4.3 GB on disk while it runs), and the eviction is also given as a share of
the time that decoding one interval takes beside it.

    python benchmarks/eviction_cost.py --shape 8b --json docs/eviction_cost.json
    python benchmarks/eviction_cost.py --graph --json docs/eviction_cost_graph.json

`--graph` has the CPU do what devices do, with graphs of ggml: select_ms is then what the host does
for a device.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np

from qfllama import Llama, QFilterConfig, gguf_copy, llama
from qfllama.files import write_json
from qfllama.filters import Filters
from qfllama.machine import provenance
from qfllama.native import FLAG_GRAPH_GATHER

MIB = 1 << 20
PARTS = ("score_us", "select_us", "gather_us")
N_LAYER, N_HEAD_KV, HEAD_DIM = 32, 8, 128
N_VOCAB = 512
SHAPES = {"small": (256, 256, 8), "8b": (4096, 14336, 32)}
"""Name -> (width of the model, width of the feed-forward layers, query heads)."""


@dataclass
class Row:
    """One kind of cache and policy. Milliseconds of an eviction are medians; the shares of its
    parts are means. eviction_percent: of the time to decode one interval, evictions included."""

    type_kv: str
    policy: str
    threads: int
    evictions: int
    eviction_ms: float
    score_ms: float
    select_ms: float
    gather_ms: float
    scratch_mib: float
    two_layers_mib: float  # K and V of two layers
    decode_ms: float | None  # one token at 4k cells; with --shape 8b
    eviction_percent: float | None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=N_LAYER)
    parser.add_argument("--types", default="f16,q8_0,q4_0")
    parser.add_argument("--policies", default="qfilters")
    parser.add_argument("--rank", type=int, default=16, help="of the policy qfilters2")
    parser.add_argument(
        "--threads",
        default=f"1,{os.cpu_count()}",  # comma-separated
    )
    parser.add_argument("--graph", action="store_true", help="evict as on a device")
    parser.add_argument("--evictions", type=int, default=5)
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def random_q4_0(rng, n_out: int, n_in: int) -> np.ndarray:
    """uint8 [n_out, bytes]: blocks of a scale in f16 and 16 bytes of nibbles (ggml's Q4_0)."""
    blocks = rng.integers(0, 256, (n_out, n_in // 32, 18), dtype=np.uint8)
    scale = np.float16(0.2 / np.sqrt(n_in))
    blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(n_out, -1)


def write_model(path: Path, shape: str, n_layer: int) -> None:
    """A Llama GGUF of random Q4_0 matrices and a tokenizer of bytes."""
    n_embd, n_ff, n_head = SHAPES[shape]
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_block_count(n_layer)
    writer.add_context_length(131072)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [f"▁{i}" for i in range(N_VOCAB - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (N_VOCAB - 259))

    def matrix(name, n_out, n_in):
        writer.add_tensor(
            f"{name}.weight",
            random_q4_0(rng, n_out, n_in),
            raw_dtype=gguf.GGMLQuantizationType.Q4_0,
        )

    matrix("token_embd", N_VOCAB, n_embd)
    writer.add_tensor("output_norm.weight", np.ones(n_embd, np.float32))
    for il in range(n_layer):
        matrix(f"blk.{il}.attn_q", n_head * HEAD_DIM, n_embd)
        matrix(f"blk.{il}.attn_k", N_HEAD_KV * HEAD_DIM, n_embd)
        matrix(f"blk.{il}.attn_v", N_HEAD_KV * HEAD_DIM, n_embd)
        matrix(f"blk.{il}.attn_output", n_embd, n_head * HEAD_DIM)
        matrix(f"blk.{il}.ffn_gate", n_ff, n_embd)
        matrix(f"blk.{il}.ffn_up", n_ff, n_embd)
        matrix(f"blk.{il}.ffn_down", n_embd, n_ff)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{il}.{norm}.weight", np.ones(n_embd, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def random_model(shape: str, n_layer: int, rank: int):
    """The path of a model with filters, as long as the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        plain, path = Path(folder, "plain.gguf"), Path(folder, f"{shape}-shape.gguf")
        write_model(plain, shape, n_layer)
        add_filters(plain, path, n_layer, SHAPES[shape][2], rank)
        plain.unlink()
        yield path


def add_filters(plain: Path, path: Path, n_layer: int, n_head: int, rank: int) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((n_layer, N_HEAD_KV, HEAD_DIM))
    weight /= np.linalg.norm(weight, axis=-1, keepdims=True)
    moments = rng.standard_normal((n_layer, n_head, 1 + rank, HEAD_DIM)) / HEAD_DIM
    learned = rng.standard_normal((n_layer, N_HEAD_KV, 2 * N_HEAD_KV * HEAD_DIM))
    rows = dict(enumerate(weight.astype(np.float32)))
    vectors = {
        "filters": rows,
        "queries": rows,
        "moments": dict(enumerate(moments.astype(np.float16))),
        "learned": dict(enumerate(learned.astype(np.float16))),
    }
    gguf_copy.write(plain, path, Filters(vectors, layout="norm"))


class OnGraphs(Llama):
    """Its cache takes the CPU for a device."""

    def _make_context(self, **kwargs):
        made = llama.Context
        llama.Context = functools.partial(made, flags=FLAG_GRAPH_GATHER)
        try:
            return super()._make_context(**kwargs)
        finally:
            llama.Context = made


def measure(path: Path, args, type_kv: str, policy: str, threads: int) -> Row:
    config = QFilterConfig(max_length=args.max_length, policy=policy, archive=False)
    llm = (OnGraphs if args.graph else Llama)(
        str(path),
        n_ctx=args.max_length + (args.evictions + 2) * config.interval,
        qfilters=config,
        type_k=type_kv,
        type_v=type_kv,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    rng = np.random.default_rng(2)

    def read(n):
        llm.eval(rng.integers(259, N_VOCAB, n).tolist())

    while llm.n_tokens < args.max_length - args.decode_tokens:
        read(min(config.interval, args.max_length - args.decode_tokens - llm.n_tokens))
    start = time.perf_counter()
    for _ in range(args.decode_tokens):
        read(1)
    decode_ms = (time.perf_counter() - start) / args.decode_tokens * 1e3
    if args.shape != "8b":
        decode_ms = None  # of no model that exists
    seconds, before = [], llm.qfilter_stats()
    first = before
    for _ in range(args.evictions):
        read(config.interval)
        after = llm.qfilter_stats()
        assert after["evictions"] == before["evictions"] + 1
        seconds.append(sum(after[part] - before[part] for part in PARTS) / 1e6)
        before = after
    eviction_ms = statistics.median(seconds) * 1e3
    parts = {name: (after[name] - first[name]) / args.evictions / 1e3 for name in PARTS}
    total = decode_ms and decode_ms * config.interval + eviction_ms
    row = Row(
        type_kv=type_kv,
        policy=policy,
        threads=threads,
        evictions=args.evictions,
        eviction_ms=round(eviction_ms, 2),
        score_ms=round(parts["score_us"], 2),
        select_ms=round(parts["select_us"], 2),
        gather_ms=round(parts["gather_us"], 2),
        scratch_mib=round(after["scratch_bytes"] / MIB, 2),
        two_layers_mib=round(2 * after["kv_bytes"] / args.layers / MIB, 2),
        decode_ms=decode_ms and round(decode_ms, 2),
        eviction_percent=total and round(100 * eviction_ms / total, 3),
    )
    llm.close()
    return row


def main() -> None:
    args = parse()
    rows = []
    names = ("cache", "policy", "threads", "ms", "score", "select", "gather")
    print(" ".join(f"{name:>9}" for name in (*names, "scratch", "2 layers", "decode", "%")))
    with random_model(args.shape, args.layers, args.rank) as path:
        for type_kv in args.types.split(","):
            for policy in args.policies.split(","):
                for threads in sorted({int(n) for n in args.threads.split(",")}):
                    row = measure(path, args, type_kv, policy, threads)
                    rows.append(row)
                    cells = [v for k, v in asdict(row).items() if k != "evictions"]
                    print(" ".join(f"{'-' if v is None else v:>9}" for v in cells), flush=True)
    if args.json:
        n_embd, n_ff, n_head = SHAPES[args.shape]
        result = {
            **provenance(max(row.threads for row in rows)),
            "model": f"random Q4_0 weights, {args.layers} layers, {n_head} heads, {N_HEAD_KV} KV "
            f"heads of {HEAD_DIM}, width {n_embd}, feed-forward {n_ff}, vocabulary {N_VOCAB}",
            "max_length": args.max_length,
            "rows": [asdict(row) for row in rows],
        }
        write_json(args.json, result)


if __name__ == "__main__":
    main()
