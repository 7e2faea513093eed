"""The card of a model on a hub: README.md with the front matter that the Hugging Face Hub reads.

Front matter: https://huggingface.co/docs/hub/model-cards, written by huggingface_hub.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from ssm_models import ModelCard
from ssm_models.weights.table import METRICS

_CITATIONS = Path(__file__).parents[2] / "CITATION.cff"
_TASK = "image-classification"
_FAMILIES = {"VSSM": "vmamba", "VisionMamba": "vim", "VSSD": "vssd"}


class Result(NamedTuple):
    """Accuracies in percent, `metrics` top1 and top5 or the first alone."""

    data: str
    data_id: str
    """The hub's name of the data set, or of its format where it is nobody else's."""
    metrics: Mapping[str, float]
    measured: str
    """By whom, on what."""
    source: str = ""
    """Address of what states them; "" for this run."""


class Card(NamedTuple):
    """What the model itself does not know."""

    title: str
    architecture: str
    repo: str
    """USER/NAME; "" for a folder that is read where it lies."""
    licence: str
    """The hub's identifier; "" where nobody stated one."""
    made: str = ""
    """How the weights came about."""
    result: Result | None = None
    """None: not measured."""

    @property
    def source(self) -> str:
        """How timm calls it, as a string of Python."""
        return json.dumps(f"hf-hub:{self.repo}" if self.repo else f"local-dir:{self.title}")


def front_matter(card: Card, family: str) -> str:
    """YAML, with the lines around it."""
    result = card.result
    measured = []
    if result is not None:
        stated = {"source_name": "the authors", "source_url": result.source} if result.source else {}
        measured = [
            EvalResult(
                task_type=_TASK,
                dataset_type=result.data_id,
                dataset_name=result.data,
                dataset_split="validation",
                metric_type="accuracy",
                metric_name=f"{METRICS[metric]} accuracy",
                metric_value=value,
                **stated,
            )
            for metric, value in result.metrics.items()
        ]
    data = ModelCardData(
        license=card.licence or "unknown",
        library_name="timm",
        pipeline_tag=_TASK,
        tags=[_TASK, "timm", "transformers", "state-space-model", family],
        datasets=[result.data_id] if result is not None and result.source else None,
        metrics=["accuracy"] if measured else None,
        model_name=card.title if measured else None,
        eval_results=measured or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def card_text(card: Card, family: type[nn.Module], cost: ModelCard, settings: Mapping[str, Any], classes: int) -> str:
    """The whole of README.md.

    Args:
        family: the class of the model; its file names the paper.
        settings: timm's description of the preprocessing.
    """
    paper = _paper(family)
    channels, height, width = settings["input_size"]
    licence = card.licence or "not stated; without one nobody else may use or spread the weights"
    details = {
        "Architecture": f"`{card.architecture}` ([{paper['title']}]({paper['url']}))",
        "Weights": card.made,
        "Licence of the weights": licence,
        "Parameters": f"{cost.parameters:,}",
        "Multiply-accumulates": f"{cost.macs:,} for one image of {height} x {width} pixels",
        "Classes": str(classes),
        "Images": _images(settings),
    }
    parts = [
        f"# {card.title}",
        f"An image classifier of state space models, `{card.architecture}` of vision-ssm.",
        "## Details",
        "\n".join(f"- **{name}:** {value}" for name, value in details.items()),
        "## Results",
        _results(card.result),
        "## Use",
        "`ssm_models` registers the architecture in timm; without its import timm and transformers do not know the "
        "name. In a checkout of vision-ssm: `pip install setuptools torch torchvision && pip install "
        "--no-build-isolation .`",
        _code(_TIMM.format(source=card.source, mode="RGB" if channels == 3 else "L")),
    ]
    if channels == 3:
        parts += ["With transformers:", _code(_TRANSFORMERS.format(model=json.dumps(card.repo or card.title)))]
    return front_matter(card, _FAMILIES[family.__name__]) + "\n\n".join([*parts, "## Citation", _bibtex(paper)]) + "\n"


_TIMM = """\
import ssm_models  # registers the architecture
import timm
import torch
from PIL import Image

model = timm.create_model({source}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("image.png").convert("{mode}")
with torch.inference_mode():
    probabilities, classes = model(transform(image)[None]).softmax(-1)[0].sort(descending=True)
labels = model.pretrained_cfg["label_names"]
for probability, index in list(zip(probabilities.tolist(), classes.tolist()))[:5]:
    print(f"{{probability:7.2%}} {{labels[index]}}")
"""
_TRANSFORMERS = """\
import ssm_models  # registers the architecture
from transformers import pipeline

print(pipeline("image-classification", model={model})("image.png"))
"""


def _code(text: str) -> str:
    return f"```python\n{text}```"


def _results(result: Result | None) -> str:
    if result is None:
        return "Not measured."
    numbers = " | ".join(f"{result.metrics[metric]:.2f}" for metric in result.metrics)
    names = " | ".join(f"{METRICS[metric]} (%)" for metric in result.metrics)
    rule = "|---" * (2 + len(result.metrics)) + "|"
    return f"| data | {names} | measured |\n{rule}\n| {result.data} | {numbers} | {result.measured} |"


def _images(settings: Mapping[str, Any]) -> str:
    channels, height, width = settings["input_size"]
    share = settings["crop_pct"]
    if settings["crop_mode"] == "squash":
        way = f"resized to {height} x {width} pixels"
    else:
        way = f"shorter side resized to {int(min(height, width) / share)} pixels, centre of {height} x {width} cut out"
    mean, std = (", ".join(f"{value:.4g}" for value in settings[name]) for name in ("mean", "std"))
    kind = "RGB" if channels == 3 else "grey"
    return f"{kind}, {way} ({settings['interpolation']}); values 0 to 1, less the mean {mean}, divided by {std}"


def _paper(family: type[nn.Module]) -> dict[str, Any]:
    """The reference of CITATION.cff whose address the family's file gives."""
    source = inspect.getmodule(family).__doc__
    references = yaml.safe_load(_CITATIONS.read_text())["references"]
    return next(reference for reference in references if reference["url"] in source)


def _bibtex(paper: Mapping[str, Any]) -> str:
    authors = " and ".join(author["name"].replace(", et al.", " and others") for author in paper["authors"])
    key = paper["title"].partition(":")[0].replace(" ", "").lower() + str(paper["year"])
    lines = {"title": f"{{{paper['title']}}}", "author": authors, "year": paper["year"], "url": paper["url"]}
    fields = "".join(f"  {name} = {{{value}}},\n" for name, value in lines.items())
    return f"```bibtex\n@misc{{{key},\n{fields}}}\n```"
