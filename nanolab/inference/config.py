"""Flags of the talk in the terminal. Imports no torch."""

from dataclasses import dataclass

from nanolab.cli import Condition, Count, NonNegativeFloat, NonNegativeInt, Seed, Share

# read once the model is loaded
ANSWERING = [Condition("system tool", "model", lambda c: c.answers, "a model that answers, or --chat")]


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model in the terminal."""

    model: str = ""  # NAME[@STEP|best]; default: the newest finished run
    prompt: str = ""  # -p TEXT: print one reply to TEXT and leave
    system: str = ""  # what a chat model is told before the conversation
    chat: bool = False  # put the text into the chat template; default for models fine-tuned by chat_sft or chat_rl
    raw: bool = False  # continue the text as it stands; default for base models
    tool: str = "calculator"  # calculator | python: what answers the calls in a chat model's replies; empty: nothing
    # run code that a model writes even where the sandbox lacks landlock or seccomp: it can then do what you can
    allow_unsandboxed: bool = False
    temperature: NonNegativeFloat = 0.8  # sampling temperature; 0: the likeliest token each time
    top_k: NonNegativeInt = 50  # sample from the k likeliest tokens; 0: from all
    top_p: Share = 1.0  # sample from the likeliest tokens that have this probability together; 1: from all
    max_tokens: Count = 256  # tokens of a reply at most
    seed: Seed = 42  # seed of sampling
    device_type: str = ""  # cuda | mps | cpu; default: the best there is

    CONDITIONS = [
        Condition("system tool", "raw", lambda c: not c.raw, "--chat"),
        Condition(
            "top_k top_p seed", "temperature", lambda c: c.temperature > 0 or not c.prompt, "--temperature above 0"
        ),
    ]
