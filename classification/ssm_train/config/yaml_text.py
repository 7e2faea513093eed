"""YAML from files that anybody may have written: plain values, bounded before they are made.

YAML lets a few lines stand for any amount of data: a name (`&a`) is written once and repeated (`*a`), also inside of
what has a name itself. So the text is composed into nodes first, in which a repetition is one node, and what they would
unfold to is counted.
"""

from pathlib import Path
from typing import Any

import yaml

from ssm_train.common.errors import UserError
from ssm_train.common.fileio import open_regular

_MOST_BYTES = 1 << 16
_MOST_VALUES = 20_000
_DEEPEST = 30
_LONGEST_NUMBER = 100  # characters


def read_yaml(path: Path, what: str = "config") -> Any:
    """The content of a YAML file; `what` is what messages call it. UserError for what cannot be read."""
    try:
        with open_regular(path, follow=True) as file:
            data = file.read(_MOST_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}; give an existing YAML file (--cfg)") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not valid YAML: {error}") from error
    return parse_yaml(text, f"{what} {path}")


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text: mappings, lists, text, numbers. UserError, which begins with `what`, for anything else,
    and for more than a config needs."""
    if len(text) > _MOST_BYTES:
        raise UserError(f"{what} is no config: it has more than {_MOST_BYTES} bytes")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        fault = _fault(node)
        if fault:
            raise UserError(f"{what} is no config: it {fault}")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not valid YAML: {error}") from error
    except (ValueError, TypeError, OverflowError) as error:  # of dates and numbers that are none
        raise UserError(f"{what} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{what} is no config: it is nested too deeply") from error


def _fault(root: yaml.Node) -> str:
    """What is against constructing `root`; "" if nothing is. Linear in the number of nodes."""
    sizes: dict[int, int] = {}  # by id, repetitions counted; 0 while the parts of a node are looked at
    stack = [(root, iter(_parts(root)))]
    while stack:
        node, rest = stack[-1]
        if isinstance(node, yaml.ScalarNode) and len(node.value) > _LONGEST_NUMBER and not node.tag.endswith(":str"):
            return f"has a number of {len(node.value)} characters"
        part = next(rest, None)
        if part is None:
            sizes[id(node)] = 1 + sum(sizes[id(each)] for each in _parts(node))
            if sizes[id(node)] > _MOST_VALUES:
                return f"unfolds to more than {_MOST_VALUES} values"
            stack.pop()
        elif sizes.setdefault(id(part), 0) == 0:
            if any(part is each for each, _ in stack):
                return "holds a value that holds itself"
            if len(stack) == _DEEPEST:
                return f"is nested more than {_DEEPEST} deep"
            stack.append((part, iter(_parts(part))))
    return ""


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []
