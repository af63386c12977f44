"""What Transformer Engine keeps beside the weights (`_extra_state`), in checkpoints.

Every linear layer, local ones too, has such an entry. It holds something in one case only: the
`delayed` FP8 recipe's maxima and scales, without which a resumed run would go on with other
numbers. Everywhere else it is left out when saving and when loading, so that a checkpoint loads in
local and in Transformer Engine's layers alike. That also keeps pickles from being executed:
`set_extra_state` unpickles what it is given, which a run may do with its own checkpoint, never
with a predecessor's.
"""

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

SUFFIX = "_extra_state"


def is_needed(config: TransformerConfig) -> bool:
    """Whether a run of this configuration must find its extra state again."""
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def leave_out(state: dict[str, Any]) -> None:
    """Take the extra state out of a module's (sharded) state dictionary."""
    for key in [key for key in state if key.endswith(SUFFIX)]:
        del state[key]


def fill_in(module: nn.Module, state: dict[str, Any]) -> None:
    """Give `module.load_state_dict` the empty entries that it would miss."""
    for name, part in module.named_modules():
        if type(part).set_extra_state is not nn.Module.set_extra_state:
            state.setdefault(f"{name}.{SUFFIX}" if name else SUFFIX, None)
