"""Rules of `swap`: which Config each layer gets, by its name in the model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate

from pyarch.nn.config import Config

REGEX_PREFIX = "re:"


@dataclass(frozen=True)
class Rule:
    """A pattern over whole layer names, and its Config, or None to leave the layer alone."""

    pattern: str
    regex: re.Pattern[str]
    config: Config | None

    def matches(self, names: Iterable[str]) -> bool:
        """Whether the pattern fits one of the names under which a layer is known."""
        return any(self.regex.fullmatch(name) for name in names)


def read_rules(rules: Mapping[str, Config | None] | None) -> tuple[Rule, ...]:
    """The rules in their order.

    Args:
        rules: pattern -> Config or None. A pattern is a glob ("encoder.*", where * also spans dots) or, after
            "re:", a regular expression; either must fit the whole name.

    Raises:
        TypeError: a pattern that is no string, a value that is neither Config nor None.
        ValueError: a regular expression that does not compile.
    """
    read = []
    for pattern, config in (rules or {}).items():
        if not isinstance(pattern, str):
            raise TypeError(f"rule pattern {pattern!r}: needs a glob or 're:' and a regular expression")
        if config is not None and not isinstance(config, Config):
            raise TypeError(f"rule {pattern!r}: got {config!r}, needs a pyarch.Config or None")
        read.append(Rule(pattern, _compiled(pattern), config))
    return tuple(read)


def first_match(rules: Iterable[Rule], names: Iterable[str]) -> Rule | None:
    """The first rule that fits one of the names."""
    names = tuple(names)
    return next((rule for rule in rules if rule.matches(names)), None)


def warn_of_idle_rules(rules: Iterable[Rule], candidates: Iterable[str]) -> None:
    """Warn of every pattern that fits no layer which pyarch could swap."""
    candidates = tuple(candidates)
    for rule in rules:
        if not rule.matches(candidates):
            warnings.warn(f"rule {rule.pattern!r} fits no layer that swap considers", stacklevel=4)


def _compiled(pattern: str) -> re.Pattern[str]:
    if not pattern.startswith(REGEX_PREFIX):
        return re.compile(translate(pattern))
    try:
        return re.compile(pattern.removeprefix(REGEX_PREFIX))
    except re.error as error:
        raise ValueError(f"rule {pattern!r}: not a regular expression: {error}") from error
