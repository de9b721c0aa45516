"""What calibration costs beside the plain forward passes over the same tokens: time and memory.

Each measurement is a process of its own, in turns: plain passes, then calibration (with the
held-out sequences and their figures), by both backends. Loading the model is not counted as time;
memory is the peak of the process above what it has with the model loaded.

    python benchmarks/convert_cost.py models/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from qfllama.files import write_json
from qfllama.machine import provenance

MIB = 1 << 20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--num-sequences", type=int, default=20)
    parser.add_argument("--max-seq-len", type=int, default=2048)
    parser.add_argument("--num-samples", type=int, default=3000)
    parser.add_argument("--backends", default="llama,torch")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("BACKEND", "WHAT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def resident() -> int:
    """Bytes resident now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def plain_llama(args, sequences):
    """A stock llama_cpp.Llama reads the sequences."""
    import llama_cpp

    llm = llama_cpp.Llama(
        args.model,
        n_ctx=args.max_seq_len,
        n_batch=512,
        n_ubatch=512,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        flash_attn=True,
        verbose=False,
    )

    def run():
        for tokens in sequences:
            llm.reset()
            llm.eval(tokens)

    return run


def plain_torch(args, sequences):
    """transformers reads the sequences, without the output head."""
    import torch
    from qfllama.convert.capture_torch import load_gguf

    model = load_gguf(args.model)

    def run():
        with torch.inference_mode():
            for tokens in sequences:
                model(input_ids=torch.tensor([tokens]), use_cache=False)

    return run


def calibrate(args, sequences, backend):
    """What `qfllama convert` does between loading and writing."""
    from qfllama.convert import native_model, pipeline

    calibration = pipeline.Calibration(num_samples=args.num_samples)
    layers = native_model.evicting_layers(args.model)
    if backend == "llama":
        from qfllama.convert.capture_llama import LlamaModel

        model = LlamaModel(args.model, args.max_seq_len)
    else:
        from qfllama.convert.capture_torch import TorchModel

        model = TorchModel(args.model, args.model, args.max_seq_len)
    return lambda: pipeline._run(model, layers, sequences, calibration, lambda n: None)


def child(args) -> None:
    from qfllama.convert import text

    backend, what = args.child
    sequences = text.sequences(args.model, text.sources(), args.num_sequences, args.max_seq_len)
    if what == "calibrate":
        run = calibrate(args, sequences, backend)
    else:
        run = {"llama": plain_llama, "torch": plain_torch}[backend](args, sequences)
    loaded = resident()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "loaded_mib": loaded / MIB, "peak_mib": peak / MIB}))


def measure(backend: str, what: str) -> dict[str, float]:
    arguments = [sys.executable, *sys.argv, "--child", backend, what]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = parse()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.child:
        child(args)
        return
    rows = []
    model_mib = os.path.getsize(args.model) / MIB
    print(f"{'backend':8}{'plain s':>10}{'calibration s':>15}{'ratio':>8}"
          f"{'peak MiB':>10}{'above the model file':>22}")  # fmt: skip
    for backend in args.backends.split(","):
        runs = {"plain": [], "calibrate": []}
        for _ in range(args.repeat):
            for what, found in runs.items():
                found.append(measure(backend, what))
        plain, ours = (statistics.median(r["seconds"] for r in runs[what]) for what in runs)
        peak = max(r["peak_mib"] for r in runs["calibrate"])
        rows.append({"backend": backend, "plain_s": plain, "calibration_s": ours, "peak_mib": peak})
        print(f"{backend:8}{plain:>10.1f}{ours:>15.1f}{ours / plain:>7.2f}x"
              f"{peak:>10.0f}{peak - model_mib:>22.0f}")  # fmt: skip
    about = provenance(args.threads) | {
        "model": Path(args.model).name,
        "model_mib": round(model_mib, 1),
        "tokens": args.num_sequences * args.max_seq_len,
    }
    print(about["machine"])
    if args.json:
        write_json(args.json, {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
