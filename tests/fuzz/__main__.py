"""Command line; the engine runs in a process of its own, so that its crash can be reported."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EPISODE = 150
"""Operations of an episode."""


def worker(args) -> int:
    """Draw and apply operations, or replay those of a file."""
    from fuzz.cache import Mismatch
    from fuzz.engine import load
    from fuzz.operations import World, draw, head_dim_of

    models = {int(path.stem[1:]): load(path) for path in sorted(args.models.glob("d*.gguf"))}
    with tempfile.TemporaryDirectory() as folder:
        world = World(models, Path(folder))
        done, start = 0, time.monotonic()
        try:
            if args.replay:
                for line in args.replay.read_text().splitlines():
                    world.apply(json.loads(line))
                    done += 1
            episode = 0
            while not args.replay and done < args.operations:
                rng = random.Random(f"{args.seed}/{episode}")
                world.reset()
                with open(args.log, "w") as log:
                    for _ in range(min(EPISODE, args.operations - done)):
                        operation = draw(rng, world, head_dim_of(episode))
                        # before it is done: it may be the last one
                        print(json.dumps(operation), file=log, flush=True)
                        world.apply(operation)
                        done += 1
                episode += 1
        except (Mismatch, AssertionError) as error:
            print(f"MISMATCH: {error}", flush=True)
            return 1
        world.close()
    totals = world.totals
    print(
        f"{done:,} operations without a mismatch in {time.monotonic() - start:.0f} s: "
        f"{totals['evictions']:,} evictions chose {totals['rows']:,} rows by their scores, of "
        f"which {totals['near_ties']:,} where rounding decides; {totals['rewinds']:,} rewinds and "
        f"{totals['recalls']:,} recalls filled the cells from the archive"
    )
    return 0


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-X", "faulthandler", "-m", "fuzz", "--worker", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def shrink(operations: list[str], models: Path, folder: Path) -> list[str]:
    """Leave out what the failure does not need."""
    path, size = folder / "shrunk.jsonl", max(1, len(operations) // 4)
    while True:
        i = 0
        while i < len(operations):
            shorter = operations[:i] + operations[i + size :]
            path.write_text("\n".join(shorter) + "\n")
            if shorter and run("--models", models, "--replay", path).returncode != 0:
                operations = shorter
            else:
                i += size
        if size == 1:
            return operations
        size = max(1, size // 3)


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--operations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--only-models", action="store_true", help="write the models and stop")
    parser.add_argument("--replay", type=Path, help="a file of operations instead of random ones")
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)

    args.models.mkdir(parents=True, exist_ok=True)
    write = "from fuzz.engine import write_models; import sys, pathlib as p; "
    write += "write_models(p.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", write, str(args.models)], check=True)
    if args.only_models:
        return 0

    log = args.replay or args.models / f"seed{args.seed}.jsonl"
    chosen = ["--replay", log] if args.replay else ["--seed", args.seed, "--log", log]
    done = run("--models", args.models, "--operations", args.operations, *chosen)
    print(done.stdout, end="")
    if done.returncode == 0:
        return 0
    print(f"seed {args.seed}, exit status {done.returncode}; the operations since it was reset:")
    operations = log.read_text().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        if not args.replay:
            operations = shrink(operations, args.models, Path(folder))
    failed = args.models / f"failed-seed{args.seed}.jsonl"
    failed.write_text("\n".join(operations) + "\n")
    print("\n".join(operations))
    print(f"again: PYTHONPATH=tests python -m fuzz --models {args.models} --replay {failed}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
