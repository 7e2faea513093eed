"""What configs of the OpenMMLab packages hold inside their wrappers and lists."""

from mmengine.config import Config, ConfigDict


def plain_datasets(loader: ConfigDict | None) -> list[ConfigDict]:
    """The data sets in a loader that read files, in order: without RepeatDataset, ConcatDataset and other wrappers, of
    any depth."""

    def inside(dataset: ConfigDict) -> list[ConfigDict]:
        inner = dataset.get("dataset", dataset.get("datasets"))
        if inner is None:
            return [dataset]
        return [plain for each in _as_list(inner) for plain in inside(each)]

    return inside(loader.dataset) if loader else []


def evaluators(cfg: Config, split: str) -> list[ConfigDict]:
    """Those of "val" or "test": a config may have none, one, a list, or an Evaluator with one or a list."""
    found = cfg.get(f"{split}_evaluator") or []
    if isinstance(found, dict) and "metrics" in found:
        found = found.metrics
    return _as_list(found)


def add_evaluator(cfg: Config, split: str, evaluator: dict) -> None:
    """Add one to those of "val" or "test"."""
    added = [*evaluators(cfg, split), evaluator]
    found = cfg.get(f"{split}_evaluator")
    if isinstance(found, dict) and "metrics" in found:
        found.metrics = added
    else:
        cfg[f"{split}_evaluator"] = added


def type_name(node: ConfigDict) -> str:
    """The class that a dictionary builds. Configs hold it as text, also behind its registry's name, or itself."""
    kind = node.get("type", "")
    return (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def _as_list(found: object) -> list:
    return list(found) if isinstance(found, (list, tuple)) else [found]
