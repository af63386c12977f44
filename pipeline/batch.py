"""A micro-batch on the device: the loader's NumPy arrays as tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_shards.batch import PackedBatch


@dataclass(frozen=True)
class DeviceBatch:
    """Fields as in `PackedBatch`; shapes: T tokens, D documents, N tiles, P image tokens."""

    tokens_T: Tensor
    labels_T: Tensor
    loss_mask_T: Tensor  # float32
    position_ids_T: Tensor
    cu_seqlens: Tensor  # int32 [D+1]
    max_seqlen: int
    tiles_NCHW: Tensor  # uint8
    image_positions_P: Tensor
    image_rows_P: Tensor
    pairs: Tensor  # int64 [pairs, 2] document numbers (chosen, rejected)
    sample_ids: Tensor  # int64 [samples, 2]

    @classmethod
    def from_packed(cls, batch: PackedBatch, device: torch.device) -> "DeviceBatch":
        """Copy every array to `device`; uint8 tiles are normalised there, by the model."""

        def move(name: str) -> Tensor:
            return torch.from_numpy(getattr(batch, name)).to(device, non_blocking=True)

        return cls(
            tokens_T=move("tokens_T"),
            labels_T=move("labels_T"),
            loss_mask_T=move("loss_mask_T"),
            position_ids_T=move("position_ids_T"),
            cu_seqlens=move("cu_seqlens"),
            max_seqlen=int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max()),
            tiles_NCHW=move("tiles_NCHW"),
            image_positions_P=move("image_positions_P"),
            image_rows_P=move("image_rows_P"),
            pairs=move("pairs"),
            sample_ids=move("sample_ids"),
        )

    def model_inputs(self) -> dict[str, Tensor | int]:
        """Arguments of `LlavaNext.forward`, labels and mask included."""
        return {
            "tokens_T": self.tokens_T,
            "position_ids_T": self.position_ids_T,
            "tiles_NCHW": self.tiles_NCHW,
            "image_positions_P": self.image_positions_P,
            "image_rows_P": self.image_rows_P,
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
            "labels_T": self.labels_T,
            "loss_mask_T": self.loss_mask_T,
        }
