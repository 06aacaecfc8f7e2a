"""Show a model as tables: python -m scripts.inspect [--preset gpt2]. Tensors, layers, parameters, FLOPs, cache; nothing
is allocated.
"""

from nanolab.cli import as_json, main, parse
from nanolab.model.config import InspectConfig


def run(cfg: InspectConfig) -> int:
    from nanolab.lab.model_table import describe_model, print_model

    document = describe_model(cfg)
    print_model(document)
    if cfg.json:
        print(as_json(document, "the result"))
    return 0


if __name__ == "__main__":
    main(lambda: run(parse(InspectConfig)))
