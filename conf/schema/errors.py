"""The one exception for configurations that cannot run."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """A configuration that cannot run; the message says what to change."""


def refuse(reasons: Sequence[str]) -> None:
    """Raise ConfigError with every reason at once, in one line; nothing where there is none."""
    if len(reasons) == 1:
        raise ConfigError(reasons[0])
    if reasons:
        listed = " ".join(f"({number}) {reason}." for number, reason in enumerate(reasons, 1))
        raise ConfigError(f"{len(reasons)} things to change: {listed}")
