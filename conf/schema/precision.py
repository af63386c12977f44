"""Number formats of weights, gradients and matrix products."""

from dataclasses import dataclass
from typing import Optional

from conf.schema.errors import ConfigError

RECIPES = ("tensorwise", "blockwise", "delayed")


@dataclass
class PrecisionConfig:
    """`params` is the compute dtype; FP8 applies to the language model only."""

    params: str = "fp32"  # fp32 | bf16
    fp8_recipe: Optional[str] = None  # tensorwise | blockwise | delayed
    # Decoder layers at either end whose matrix products stay in BF16.
    fp8_first_layers_bf16: int = 0
    fp8_last_layers_bf16: int = 0
    fp8_params: bool = False  # keep the compute weights in FP8, beside FP32 master weights
    grad_reduce_in_fp32: bool = True

    def check(self) -> None:
        if self.params not in ("fp32", "bf16"):
            raise ConfigError(f"precision.params={self.params!r} is neither fp32 nor bf16")
        first, last = self.fp8_first_layers_bf16, self.fp8_last_layers_bf16
        if min(first, last) < 0:
            raise ConfigError(
                f"precision.fp8_first_layers_bf16={first}, precision.fp8_last_layers_bf16={last}: "
                "they must not be negative"
            )
        if self.fp8_recipe is None:
            if first or last or self.fp8_params:
                raise ConfigError(
                    "precision.fp8_first_layers_bf16, fp8_last_layers_bf16 and fp8_params mean "
                    "nothing without precision.fp8_recipe; set it, or leave them at 0 and false"
                )
            return
        if self.fp8_recipe not in RECIPES:
            raise ConfigError(
                f"precision.fp8_recipe={self.fp8_recipe!r} is none of {', '.join(RECIPES)}"
            )
        if self.params != "bf16":
            raise ConfigError("precision.fp8_recipe needs precision.params=bf16")
        if self.fp8_recipe == "delayed" and (first or last):
            # One scope for the whole pass: its end reduces the maxima of all layers.
            raise ConfigError(
                "precision.fp8_recipe=delayed cannot keep single layers in BF16 "
                f"(fp8_first_layers_bf16={first}, fp8_last_layers_bf16={last}); set both to 0, or "
                "use tensorwise or blockwise"
            )
