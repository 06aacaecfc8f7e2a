"""Compare the tokenizer with GPT-2's and GPT-4's: python -m scripts.tok_eval [--tokenizer DIR] [--json]

Bytes per token on several kinds of text (more is better), and whether each text comes back without loss. The two others
come with tiktoken, which downloads their files once; where it cannot, the table says so.
"""

from nanolab.cli import as_json, main, parse
from nanolab.data.config import TokEvalConfig


def run(cfg: TokEvalConfig) -> int:
    from nanolab.lab.compare_tokenizers import compare_tokenizers, print_comparison

    document = compare_tokenizers(cfg)
    print_comparison(document)
    if cfg.json:
        print(as_json(document, "the result"))
    return 0 if document["lossless"] else 1


if __name__ == "__main__":
    main(lambda: run(parse(TokEvalConfig)))
