"""lm-evaluation-harness with nanolab's models: python -m scripts.lm_eval --model nanolab --model_args path=NAME --tasks hellaswag.

Every flag is the harness's own; --model_args are explained in nanolab/interop/lm_eval.py.
"""

from nanolab.config import main


def run() -> None:
    import nanolab.interop.lm_eval  # noqa: F401  names the model
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main(run)
