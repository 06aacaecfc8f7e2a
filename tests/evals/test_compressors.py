"""The compressors' figures against the command line tools' sizes and against what must come back."""

import bz2
import gzip
import lzma
import math
import random
import shutil
import subprocess

import pytest

from nanolab.cli import UserError
from nanolab.evals.compressors import COMPRESSORS, compressor_bpb

WORDS = random.Random(0).choices(
    "the of and to in is that for it as was with be by on not he his but at".split(), k=30_000
)
TEXT = " ".join(WORDS)
UNPACK = {"gzip -9": gzip.decompress, "bz2 -9": bz2.decompress, "xz -9e": lzma.decompress}


@pytest.mark.parametrize("name", list(COMPRESSORS))
def test_what_is_counted_is_enough_to_get_the_text_back(name):
    data = TEXT.encode()
    packed = COMPRESSORS[name](data)
    assert UNPACK[name](packed) == data
    assert compressor_bpb([TEXT])[name] == 8 * len(packed) / len(data)


@pytest.mark.parametrize("name, tool", [("gzip -9", "gzip -9n"), ("bz2 -9", "bzip2 -9"), ("xz -9e", "xz -9e")])
def test_the_command_line_tool_needs_the_same(name, tool):
    if not shutil.which(tool.split()[0]):
        pytest.skip(f"{tool.split()[0]} is not installed")
    size = len(subprocess.run([*tool.split(), "-c"], input=TEXT.encode(), stdout=subprocess.PIPE, check=True).stdout)
    assert compressor_bpb([TEXT])[name] == pytest.approx(8 * size / len(TEXT), rel=2e-3)


def test_no_compressor_beats_the_entropy_of_random_words():
    entropy = math.log2(20) * len(WORDS) / len(TEXT)  # 20 words, drawn independently and evenly
    for bits in compressor_bpb([TEXT]).values():
        assert entropy < bits < 2 * entropy


def test_pieces_count_as_one_text_and_bytes_as_their_utf8():
    whole = compressor_bpb(["naïve " * 50 + "café"])
    assert compressor_bpb(["naïve " * 50, "caf", "é"]) == whole
    assert compressor_bpb(["naïve " * 50 + "caf", b"\xc3", b"\xa9"]) == whole
    accents = ("é" * 500).encode()
    assert compressor_bpb(["é" * 500]) == {
        name: 8 * len(compress(accents)) / 1000 for name, compress in COMPRESSORS.items()
    }


def test_no_text_is_an_error():
    with pytest.raises(UserError, match="no text to compress"):
        compressor_bpb(["", b""])
