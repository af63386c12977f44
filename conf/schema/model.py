"""What the network is: SigLIP vision tower, two-layer connector, Llama decoder."""

from dataclasses import dataclass, field
from typing import Optional

from conf.schema.errors import ConfigError

ROPE_SCALINGS = ("none", "linear", "llama3")


@dataclass
class VisionConfig:
    """SigLIP encoder, as `SiglipVisionConfig` in transformers 4.57.6 (no pooling head)."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    image_size: int  # side of one tile, pixels
    patch_size: int  # pixels
    layer_norm_eps: float = 1e-6
    # Index into HF's `hidden_states`; -2 skips the last layer, whose weights (and the
    # final layer norm) are then carried unchanged and never trained.
    feature_layer: int = -2

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def layers_used(self) -> int:
        """Encoder layers that `feature_layer` needs."""
        if self.feature_layer < 0:
            return self.layers + 1 + self.feature_layer
        return self.feature_layer

    def check(self) -> None:
        # Not a multiple is allowed: SigLIP's patch14-384 leaves the last 6 pixels unused.
        if not 1 <= self.patch_size <= self.image_size:
            raise ConfigError(
                f"model.vision.patch_size={self.patch_size} is not between 1 and "
                f"model.vision.image_size={self.image_size}"
            )
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"model.vision.hidden_size={self.hidden_size} is not divisible by "
                f"model.vision.heads={self.heads}; change one of them"
            )
        if not 1 <= self.layers_used <= self.layers:
            raise ConfigError(
                f"model.vision.feature_layer={self.feature_layer} selects no layer of "
                f"{self.layers}; use a value between {-self.layers} and {self.layers}, not 0"
            )


@dataclass
class RopeScaling:
    """How RoPE's frequencies are stretched beyond the lengths of pre-training; the kinds and their
    numbers are those of transformers' `rope_scaling` (modeling_rope_utils.py)."""

    kind: str = "none"  # none, linear, llama3
    factor: float = 1.0
    # llama3 only:
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def check(self) -> None:
        if self.kind not in ROPE_SCALINGS:
            raise ConfigError(
                f"model.text.rope_scaling.kind={self.kind!r} is none of {', '.join(ROPE_SCALINGS)}"
            )
        if self.factor < 1 or self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"model.text.rope_scaling={self}: factor must be at least 1 and high_freq_factor "
                "larger than low_freq_factor"
            )


@dataclass
class TextConfig:
    """Llama-architecture decoder, as `LlamaConfig` in transformers 4.57.6."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int  # rows of the embedding table, padding included
    max_positions: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # never guessed: import refuses a checkpoint that differs
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)

    def check(self) -> None:
        self.rope_scaling.check()
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"model.text.heads={self.heads} is not divisible by "
                f"model.text.kv_heads={self.kv_heads}; change one of them"
            )


@dataclass
class ConnectorConfig:
    """linear_1, GELU, linear_2: `LlavaNextMultiModalProjector`."""

    bias: bool = True


@dataclass
class ModelConfig:
    """The whole network plus its tiling geometry."""

    name: str
    vision: VisionConfig
    text: TextConfig
    image_token_id: int  # id of `<image>` in the tokenizer
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    # Tile grids allowed: every (a, b) with a*b <= max_tiles, in HF's list order, unless
    # `pinpoints` lists (height, width) pairs in pixels explicitly.
    max_tiles: int = 12
    pinpoints: Optional[list[list[int]]] = None

    def check(self) -> None:
        self.vision.check()
        self.text.check()
        if not 0 <= self.image_token_id < self.text.vocab_size:
            raise ConfigError(
                f"model.image_token_id={self.image_token_id} is outside the embedding table of "
                f"model.text.vocab_size={self.text.vocab_size} rows; enlarge the vocabulary"
            )
        for pair in self.pinpoints or []:
            if len(pair) != 2 or any(side <= 0 or side % self.vision.image_size for side in pair):
                raise ConfigError(
                    f"model.pinpoints entry {pair} is not two positive multiples of the tile side "
                    f"model.vision.image_size={self.vision.image_size}"
                )
        if self.pinpoints is None and self.max_tiles < 1:
            raise ConfigError(f"model.max_tiles={self.max_tiles}: at least 1 is needed")
