"""The model card of exported weights, in the form of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from utils.analysis.statistics import wilson
from utils.analysis.tables import markdown_table
from utils.facts import precision_in_words, split_in_words, training_in_words
from utils.networks import TITLES

__all__ = ["model_card"]

_PAPER = (
    "Shan, Zhang, Zhu, Qiu, Eshraghian, Qu: Advancing Spiking Neural Networks Towards Multiscale Spatiotemporal "
    "Interaction Learning. AAAI 2025, 39(2), 1501-1509, https://doi.org/10.1609/aaai.v39i2.32141"
)
_LOADING = """```python
import models  # of a clone of the project

net = models.load("FOLDER")
```

Or from another program: `torch.hub.load("CLONE", "{entry}", source="local", weights="FOLDER")`. Call
`models.neurons.reset_net(net)` after every batch.
"""


def model_card(facts: Mapping[str, Any], licence: str | None, curves: bool) -> str:
    """The text of README.md.

    Args:
        facts: what is known of the weights, as ``tools/export.py weights`` stores it.
        licence: of the weights; None: none is named.
        curves: curves.png lies next to it.
    """
    network, about = facts["network"], facts.get("facts", {})
    on_events = network["name"] == "VGG8"
    title = TITLES[network["name"]]
    data = about.get("data", {}).get("title", "")
    head = [
        "---", "library_name: pytorch", *([f"license: {licence}"] if licence else []), "tags:",
        "- spiking-neural-network", *(["- event-camera"] if on_events else ["- image-classification"]), "---", "",
    ]  # fmt: skip
    inputs = "event frames `[T, B, 2, H, W]` to `[T, B, K]`" if on_events else "images `[B, 3, H, W]` to `[B, K]`"
    keywords = markdown_table([["keyword", "value"], *([name, _plain(value)] for name, value in network.items())])
    entry = "sma_vgg8_dvs128" if on_events else network["name"]
    parts = [
        f"# {title}{f' on {data}' if data else ''}", "",
        f"A spiking network with Spiking Multiscale Attention (SMA), {inputs}. Paper: {_PAPER}.", "",
        "## Load it", "", _LOADING.format(entry=entry),
        "## Network", "", keywords, "", "## Result", "", _result(facts), "",
    ]  # fmt: skip
    if curves:
        parts += ["![Accuracy and loss over the epochs](curves.png)", ""]
    parts += ["## Data", "", f"{data or 'Unknown: complete this.'}"]
    if "split" in about:
        split = about["split"]
        held = f", {split['val']} held-out" if split.get("val") else ""
        counts = f"{split['train']} training{held} and {split['test']} test samples"
        parts[-1] += f", {counts} of {split['classes']} classes. Split: {split_in_words(split)}."
    if recipe := facts.get("recipe"):
        rows = [[name, _plain(value)] for name, value in recipe.items() if value is not None]
        parts += ["", "## Recipe", "", markdown_table([["setting", "value"], *rows])]
    limits = "T is part of the weights: the network takes no other number of time steps." if "T" in network else ""
    parts += ["", "## Limits", "", f"{limits} It was tested on the samples above only.".strip(), ""]
    return "\n".join([*head, *parts])


def _result(facts: Mapping[str, Any]) -> str:
    accuracy = facts.get("accuracy")
    if not accuracy:
        return "Not evaluated: complete this."
    words = f"Accuracy {accuracy['acc1']:.2f} %"
    if {"correct", "count"} <= accuracy.keys():
        low, high = (100 * end for end in wilson(accuracy["correct"], accuracy["count"]))
        words += f" ({accuracy['correct']} of {accuracy['count']}; 95 % interval {low:.1f} to {high:.1f} %, Wilson)"
    trained = training_in_words(facts)
    if "precision" in (about := facts.get("facts", {})):
        words += f", {precision_in_words(about['precision'])}"
    return f"{words}. Epoch {trained['epoch']}; seed {trained['seed']}."


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict | bool) else str(value)
