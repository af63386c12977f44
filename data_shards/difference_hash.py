"""A 256-bit difference hash: pictures that look alike have hashes that differ in few bits.

After "dHash" (N. Krawetz, "Kind of like that", 2013): the picture in grey at 17 x 16 samples; a bit
says whether a sample is brighter than its right neighbour. Here brighter means by over `MARGIN`
levels, so that the noise of compression sets no bits where the picture is flat.
"""

import numpy as np
from PIL import Image

BITS = 256
MARGIN = 2  # grey levels of 255
_COLUMNS, _ROWS = 17, 16


def difference_hash(grey: Image.Image) -> bytes:
    """32 bytes: 16 rows of 16 bits, the leftmost in the highest bit; `grey` has mode L."""
    # A triangle as wide as the step: each sample hears all pixels about it, at any scale.
    small = grey.resize((_COLUMNS, _ROWS), Image.Resampling.BILINEAR)
    levels = np.asarray(small, np.int16)
    return np.packbits(levels[:, :-1] - levels[:, 1:] > MARGIN).tobytes()
