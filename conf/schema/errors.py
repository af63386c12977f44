"""The one exception for configurations that cannot run."""


class ConfigError(ValueError):
    """A configuration that cannot run; the message says what to change."""
