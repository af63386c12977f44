"""Which tiles a context-parallel rank looks at: the loader and the model agree."""

import pytest
import torch

from data_shards.collate import own_tiles
from models.tile_sharing import own_share


class Group:
    """As much of a process group as `own_share` asks for."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize("tiles", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_the_loader_fills_the_tiles_that_the_model_reads(tiles: int, ranks: int) -> None:
    numbered = torch.arange(1, tiles + 1)[:, None, None, None]  # 0 is padding
    seen = []
    for rank in range(ranks):
        mine = own_share(numbered, Group(rank, ranks)).flatten().tolist()  # type: ignore[arg-type]
        expected = [tile + 1 for tile in own_tiles(tiles, (rank, ranks))]
        assert [tile for tile in mine if tile] == expected
        seen += expected
    assert seen == list(range(1, tiles + 1))
