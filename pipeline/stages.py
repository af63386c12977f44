"""What each stage trains, and at which learning rate."""

from conf.schema import LearningRates

# Configuration name -> parameter-name patterns (fnmatch, under any wrapper's prefix).
MODULE_PATTERNS: dict[str, tuple[str, ...]] = {
    "vision": ("*vision_tower.*",),
    "connector": ("*connector.*", "*image_newline"),
    "language": ("*language_model.*",),
}


def trainable_modules(lr: LearningRates) -> set[str]:
    """Names of the modules with a learning rate above zero."""
    return {name for name in MODULE_PATTERNS if getattr(lr, name) > 0}


def frozen_modules(lr: LearningRates) -> set[str]:
    """Names of the modules that keep their weights."""
    return set(MODULE_PATTERNS) - trainable_modules(lr)
