"""lm-evaluation-harness with nanolab's models: python -m scripts.lm_eval --model nanolab --model_args path=NAME --tasks
hellaswag.

Every flag is the harness's own; --model_args are explained in nanolab/interop/lm_eval.py.
"""

from nanolab.cli import main


def run() -> None:
    from lm_eval.__main__ import cli_evaluate

    import nanolab.interop.lm_eval  # noqa: F401  names the model

    cli_evaluate()


if __name__ == "__main__":
    main(run)
