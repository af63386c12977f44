"""LLaVA-NeXT on Megatron-core: image features placed into the decoder's token stream."""

from collections.abc import Iterable

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from conf.schema import ModelConfig
from models.connector import Connector
from models.context_parallel import local_index
from models.layer_specs import block_spec
from models.rope_scaling import scaled_frequencies
from models.tile_sharing import gather_shares, own_share
from models.vision_tower import VisionTower
from models.vocabulary_loss import Decoder

MODULES = ("vision", "connector", "language")


class LlavaNext(MegatronModule):
    """Vision tower, connector, `image_newline` (first pipeline stage only) and decoder.

    A micro-batch is one row of T tokens, its documents laid end to end. Shapes: T tokens, P image
    tokens, N tiles, g patches along a tile's side, H text hidden size, V vocabulary.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        vision_config: TransformerConfig,
        decoder_layers: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
        loss_chunk: int = 0,
    ) -> None:
        """`loss_chunk`: tokens whose logits exist at one time, 0 for all that have a target."""
        super().__init__(config=config)
        # Megatron's schedules and gradient reductions read these from the wrapped model.
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.share_embeddings_and_output_weights = False
        self.cp_group = parallel_state.get_context_parallel_group()
        hidden = model.text.hidden_size
        if pre_process:
            self.vision_tower = VisionTower(vision_config, model.vision)
            self.connector = Connector(
                vision_config, model.vision.hidden_size, hidden, model.connector.bias
            )
            newline = torch.randn(hidden) * hidden**-0.5  # LlavaNextModel's initial value
            self.image_newline = nn.Parameter(
                newline.to(device=torch.cuda.current_device(), dtype=config.params_dtype)
            )
        self.language_model = Decoder(
            config=config,
            transformer_layer_spec=block_spec(config, decoder_layers, causal=True),
            vocab_size=model.text.vocab_size,
            max_sequence_length=model.text.max_positions,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="rope",
            rotary_base=model.text.rope_theta,  # type: ignore[arg-type]  # a float serves
            share_embeddings_and_output_weights=False,
            # Image features are put in before the tokens are shared out.
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
            loss_chunk=loss_chunk,
        )
        rotary = self.language_model.rotary_pos_emb
        rotary.inv_freq = scaled_frequencies(rotary.inv_freq, model.text.rope_scaling)
        self.position_embedding_type = self.language_model.position_embedding_type
        self.model_type = self.language_model.model_type

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hidden states received from the pipeline stage before."""
        self.language_model.set_input_tensor(input_tensor)

    def freeze(self, trainable: Iterable[str]) -> None:
        """Let exactly these modules train; `image_newline` belongs to the connector.

        Raises:
            ValueError: a name other than vision, connector, language.
        """
        names = set(trainable)
        unknown = sorted(names - set(MODULES))
        if unknown:
            raise ValueError(f"cannot train {', '.join(unknown)}; known: {', '.join(MODULES)}")
        self.requires_grad_(False)
        parameters: list[nn.Parameter] = []
        if "language" in names:
            parameters += self.language_model.parameters()
        if self.pre_process and "vision" in names:
            parameters += self.vision_tower.used_parameters()
        if self.pre_process and "connector" in names:
            parameters += [*self.connector.parameters(), self.image_newline]
        for parameter in parameters:
            parameter.requires_grad_(True)

    def feature_table(self, tiles_NCHW: Tensor) -> Tensor:
        """Connector output of every patch of every tile, then `image_newline`.

        Context-parallel ranks compute it together. uint8 [N, 3, side, side] -> [N*g*g + 1, H].
        """
        learns = torch.is_grad_enabled()
        own_NCHW = own_share(tiles_NCHW, self.cp_group)
        with torch.set_grad_enabled(learns and self.vision_tower.position_embedding.requires_grad):
            patches_PNH = self.vision_tower(own_NCHW)
        with torch.set_grad_enabled(learns and (patches_PNH.requires_grad or self._connects())):
            features_NPH = self.connector(patches_PNH).transpose(0, 1)
            features_NPH = gather_shares(features_NPH, len(tiles_NCHW), self.cp_group)
            return torch.cat([features_NPH.flatten(0, 1), self.image_newline[None]])

    def _connects(self) -> bool:
        return self.image_newline.requires_grad

    def _embed(
        self,
        tokens_T: Tensor,
        position_ids_T: Tensor,
        tiles_NCHW: Tensor,
        image_positions_P: Tensor,
        image_rows_P: Tensor,
        index_T: Tensor | None,
    ) -> Tensor:
        """Decoder input of this rank, [T / cp (/ tp with sequence parallelism), 1, H]."""
        if index_T is not None:
            held_T = torch.full_like(tokens_T, -1)
            held_T[index_T] = torch.arange(len(index_T), device=tokens_T.device)
            local_P = held_T[image_positions_P]
            image_positions_P = local_P[local_P >= 0]
            image_rows_P = image_rows_P[local_P >= 0]
            tokens_T, position_ids_T = tokens_T[index_T], position_ids_T[index_T]
        embedded_T1H = self.language_model.embedding(tokens_T[None], position_ids_T[None])
        # Run even when no token is an image's: an empty gather keeps the graph, hence the
        # collective calls of the backward pass, the same on every rank.
        features_PH = self.feature_table(tiles_NCHW)[image_rows_P]
        merged_TH = embedded_T1H.squeeze(1).index_copy(
            0, image_positions_P, features_PH.to(embedded_T1H.dtype)
        )
        merged_T1H = merged_TH[:, None]
        if self.config.sequence_parallel:
            merged_T1H = scatter_to_sequence_parallel_region(merged_T1H)
        return merged_T1H

    def forward(
        self,
        tokens_T: Tensor,
        position_ids_T: Tensor,
        tiles_NCHW: Tensor,
        image_positions_P: Tensor,
        image_rows_P: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        labels_T: Tensor | None = None,
        loss_mask_T: Tensor | None = None,
    ) -> Tensor:
        """One micro-batch; every tensor covers the whole row, on every rank.

        Args:
            tokens_T: int64 [T]; at image positions any id of the vocabulary.
            position_ids_T: int64 [T], from 0 in every document (the packed RoPE counts the same
                from `cu_seqlens`).
            tiles_NCHW: uint8 [N, 3, side, side], at least one tile.
            image_positions_P: int64 [P], where in the row an image feature stands.
            image_rows_P: int64 [P], which row of `feature_table` stands there.
            cu_seqlens: int32 [documents + 1]; lengths are multiples of 2 * context ranks.
            max_seqlen: length of the longest document.
            labels_T: int64 [T].
            loss_mask_T: [T], 0 where a token has no target; with it only the others' logits are
                computed.

        Returns:
            Last stage: float32 loss of each token of this context-parallel rank [T / cp], in
            `local_index` order (0 for tokens without a target), or without labels its logits
            [T / cp, V / tp]. Earlier stages: hidden states [T / cp (/ tp with sequence
            parallelism), 1, H].
        """
        cp_size = self.cp_group.size()
        index_T = None
        if cp_size > 1:
            index_T = local_index(cu_seqlens, cp_size, self.cp_group.rank())
        if len(tokens_T) == max_seqlen and len(cu_seqlens) > 2:
            # Megatron's packed RoPE takes a table as long as the row for one that counts through
            # all documents (rope_utils.py, "exact mapping mode").
            max_seqlen += 1
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
        )
        decoder_input = None
        if self.pre_process:
            decoder_input = self._embed(
                tokens_T, position_ids_T, tiles_NCHW, image_positions_P, image_rows_P, index_T
            )
        if labels_T is not None and index_T is not None:
            labels_T = labels_T[index_T]
        if loss_mask_T is not None and index_T is not None:
            loss_mask_T = loss_mask_T[index_T]
        output = self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=None if labels_T is None else labels_T[None],
            loss_mask=None if loss_mask_T is None else loss_mask_T[None],
            packed_seq_params=packed,
        )
        return output.squeeze(0) if self.post_process else output
