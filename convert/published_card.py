"""The model card of exported filters."""

from __future__ import annotations

import re

from .. import gguf_header

HUB_URL = re.compile(r"https://huggingface\.co/(?P<id>\w[\w.-]*/\w[\w.-]*)/?")


def card(filters, gguf, shape, n_layer, repo):
    """The model card: metadata for the hub, what the filters are, and how to use them."""
    header = gguf_header.scan(gguf)
    base = _base_model(header)
    front = ["tags:", "- q-filters", "- kv-cache", "- kvpress", "- qfllama"]
    front += ["library_name: qfllama"]
    front += [f"base_model: {base}"] if base else []
    name = " ".join(shape.name.split())
    rows = [f"| {key.replace('_', ' ')} | {_cell(v)} |" for key, v in filters.calibration.items()]
    missing = sorted(set(range(n_layer)) - set(filters.layers))
    gaps = (
        f"\nLayers {', '.join(map(str, missing))} have no filter (zeros): they have a sliding "
        "window or no cache of keys,\nwhich needs none. Leave them out when you compress.\n"
        if missing
        else ""
    )
    return CARD_TEXT.format(
        front="\n".join(front),
        name=name,
        base=base or "the model",
        shape=f"{n_layer} layers x {filters.n_head_kv[0]} KV heads x {filters.head_dim[0]}",
        rows="\n".join(rows) or "| | not recorded |",
        gaps=gaps,
        skip=CARD_SKIP if missing else "",
        where=repo or "THIS_FOLDER",
    )


def _cell(value):
    """A value as one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _base_model(header):
    """Hub id of the model that a GGUF file was made from; None if its metadata doesn't tell."""
    for key in ("general.base_model.0.repo_url", "general.source.repo_url", "general.repo_url"):
        if match := HUB_URL.fullmatch(str(header.get(key, ""))):
            return match["id"]
    return None


CARD_TEXT = """\
---
{front}
---

# Q-filters for {name}

Directions that tell which cached keys of {name} will hardly be looked at again
([Q-Filters](https://arxiv.org/abs/2503.02812)): one per layer and KV head, {shape},
after RoPE, in the head layout of transformers. As with the filters published by the authors the
keys with the *smallest* projection stay.
{gaps}
| made from | |
|---|---|
{rows}

## Use

With llama.cpp through qfllama:

```sh
qfllama convert MODEL.gguf -o MODEL-qf.gguf --filters {where}
qfllama chat MODEL-qf.gguf --max-length 4096
```

With [kvpress](https://github.com/NVIDIA/kvpress) and {base} in transformers:

```python
from kvpress import QFilterPress
from kvpress.presses.qfilter_press import QFilters


class Press(QFilterPress):
    def post_init_from_model(self, model):
        filters = QFilters.from_pretrained("{where}").q_filters
        self.q_filters = filters.to(model.device, model.dtype)
{skip}

with Press(compression_ratio=0.5)(model):
    model(input_ids, past_key_values=cache)
```
"""

CARD_SKIP = """
    def forward_hook(self, module, input, kwargs, output):
        if not self.q_filters[module.layer_idx].any():  # a layer without filter stays whole
            return output
        return super().forward_hook(module, input, kwargs, output)
"""
