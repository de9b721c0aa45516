"""Tasks of lm-evaluation-harness on a bounded cache, here of 1,024 cells.

    pip install lm_eval
    python lm_harness.py model-qf.gguf 1024 lambada_openai --limit 100

Prints a table of scores, and what the cache did. Most tasks download data. RULER's make their own
with a tokenizer of the hub (`pip install nltk wonderwords`):

    python lm_harness.py model-qf.gguf 1024 niah_single_1 --limit 20 \\
        --metadata '{"tokenizer": "HuggingFaceTB/SmolLM2-135M-Instruct", "max_seq_lengths": [4096]}'
"""

import argparse
import json

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from qfllama import QFilterConfig
from qfllama.evaluation.harness import BoundedLM

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("max_length", type=int)
    parser.add_argument("tasks", help="names, with commas between them")
    parser.add_argument("--limit", type=int, help="requests of each task, at most")
    parser.add_argument("--include", help="a folder with tasks of your own")
    parser.add_argument("--metadata", type=json.loads, default={}, help="what tasks ask for")
    args = parser.parse_args()
    lm = BoundedLM(args.model, QFilterConfig(args.max_length))
    tasks = TaskManager(include_path=args.include, metadata=args.metadata)
    names = args.tasks.split(",")
    found = lm_eval.simple_evaluate(lm, tasks=names, limit=args.limit, task_manager=tasks)
    print(make_table(found))
    stats = lm.context.stats()
    print(f"{stats.n_evictions} evictions, {stats.n_recalls} recalls")
    lm.close()
