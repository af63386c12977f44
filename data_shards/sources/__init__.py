"""Source files as rows, one reader per format: `open_source`."""

from data_shards.sources.blocks import Block, Piece
from data_shards.sources.rows import SourceError, SourceRow
from data_shards.sources.source import Source, open_source

__all__ = ["Block", "Piece", "Source", "SourceError", "SourceRow", "open_source"]
