"""What differs between the Megatron-core releases we run on; the only file that knows.

Python 3.11 gets 0.16.1 (the newest that installs there), Python 3.12 gets 0.19.2. Everything else
in the project is written against what both share.
"""

import logging
from typing import Any

import megatron.core
from packaging.version import Version

SUPPORTED = ("0.16", "0.19")
MEGATRON = Version(megatron.core.__version__)

# Keywords of an asynchronous `dist_checkpointing.save`: 0.19 would take the writer of another
# package (nvidia-resiliency-ext) unless told otherwise.
ASYNC_SAVE: dict[str, Any] = {"async_strategy": "mcore"} if Version("0.19") <= MEGATRON else {}


def check_version() -> None:
    """Refuse a Megatron-core that nobody ran this network on.

    Raises:
        ValueError: neither a 0.16 nor a 0.19 release is installed.
    """
    if f"{MEGATRON.major}.{MEGATRON.minor}" not in SUPPORTED:
        raise ValueError(
            f"megatron-core {MEGATRON} is installed; install megatron-core==0.16.1 on Python 3.11 "
            "or megatron-core==0.19.2 on Python 3.12"
        )


def quiet_deprecations() -> None:
    """0.19 announces at every construction that GPTModel gets fixes only; say so here, once."""
    if Version("0.19") <= MEGATRON:
        logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
