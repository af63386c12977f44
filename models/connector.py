"""Two linear layers with a GELU between: `LlavaNextMultiModalProjector` of transformers 4.57.6."""

import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class Connector(MegatronModule):
    """Vision features [..., vision hidden] -> language features [..., text hidden].

    The hidden layer is as wide as the language model and is split over tensor-parallel ranks. The
    second bias is added once, after the ranks' products are summed.
    """

    def __init__(
        self, config: TransformerConfig, vision_hidden: int, text_hidden: int, bias: bool
    ) -> None:
        super().__init__(config=config)
        self.linear_fc1 = ColumnParallelLinear(
            vision_hidden,
            text_hidden,
            config=config,
            init_method=config.init_method,
            bias=bias,
            gather_output=False,
        )
        self.linear_fc2 = RowParallelLinear(
            text_hidden,
            text_hidden,
            config=config,
            init_method=config.init_method,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
        )

    def forward(self, features: Tensor) -> Tensor:
        hidden, _ = self.linear_fc1(features)
        output, _ = self.linear_fc2(F.gelu(hidden))
        return output
