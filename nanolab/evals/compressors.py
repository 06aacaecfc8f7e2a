"""What the usual compressors need for a text, in bits per byte: the yardstick beside a language model's.

A compressor starts with no knowledge and its figure includes everything needed to get the text back; a model's figure
leaves out its weights. So the comparison says how much of the text's structure was found, not which file is smaller.
"""

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterable

from nanolab.cli import UserError

# bytes of a text that are compressed: seconds, while other ranks wait; xz -9e would need minutes for all that a GPU
# scores
AT_MOST = 8_000_000
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda data: gzip.compress(data, 9, mtime=0),
    "bz2 -9": lambda data: bz2.compress(data, 9),
    "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}


def compressor_bpb(texts: Iterable[str | bytes]) -> dict[str, float]:
    """Bits per byte of the concatenated UTF-8 of `texts`, by compressor. Raises UserError when there is no byte."""
    data = b"".join(text.encode() if isinstance(text, str) else text for text in texts)
    if not data:
        raise UserError(
            "no text to compress; expected at least one byte; give a corpus with text, e.g. --data-dir FOLDER"
        )
    return {name: 8 * len(compress(data)) / len(data) for name, compress in COMPRESSORS.items()}
