"""YAML without surprises: a file is either read as plain values or refused."""

from __future__ import annotations

from typing import Any, ClassVar

import yaml

DEEPEST = 50  # levels of nesting; a recipe has four


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader without dates, which no field takes, and without aliases, with which a
    few lines make a tree of a billion values."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar = {
        tag: build
        for tag, build in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or not tag.endswith(":timestamp")
    }
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, unless it is an alias or nested too deeply."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{event.anchor}) are not supported")
        if self.depth >= DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: it cannot be read; the message says why, in one line.
    """
    try:
        return yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:  # brackets are parsed before any node is composed
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:  # an integer of too many digits, say
        raise ValueError(" ".join(str(error).split(";")[0].split())) from None
    except (AttributeError, IndexError, KeyError):  # PyYAML's own, of `!!int ''` or `!!bool x`
        raise ValueError("a value does not fit its tag (!!)") from None
