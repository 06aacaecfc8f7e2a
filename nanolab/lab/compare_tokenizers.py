"""The tokenizer beside GPT-2's and GPT-4's: bytes per token on several kinds of text, and whether each comes back."""

import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

from nanolab.data.config import TokEvalConfig
from nanolab.tables import print_rich, ruled_table

OTHERS = {"gpt2": "GPT-2", "cl100k_base": "GPT-4"}
PATIENCE = 20  # seconds that a download may take
CORPUS_CHARS = 1_000_000
SAMPLES = {
    "prose": (
        """The ferry left the island at a quarter past six, and nobody waved. Martha had meant to stand at the \
rail until the
lighthouse was out of sight, but it began to rain, so she went below and asked for tea. "You'll have been \
visiting?" said the
man behind the counter. She thought about that. She hadn't been visiting; she'd been saying goodbye to a house, \
which isn't
the same thing at all, although it takes about as long and costs as much. "Something like it," she said, and \
paid him."""
    ),
    "code": (
        '''def moving_average(values: list[float], window: int = 8) -> list[float]:
    """Mean of the last `window` values at each place; fewer at the start."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        out.append(total / min(i + 1, window))
    return out


if __name__ == "__main__":
    for line in open("prices.csv", encoding="utf-8"):
        name, *fields = line.rstrip("\\n").split(",")
        print(f"{name:>12s}", [round(x, 2) for x in moving_average([float(f) for f in fields])])
'''
    ),
    "mathematics": (
        r"""Let $f : [a, b] \to \mathbb{R}$ be continuous. Since $[a, b]$ is compact, $f$ attains its maximum $M$ and
its minimum $m$, and therefore $$ m (b - a) \le \int_a^b f(x) \, dx \le M (b - a). $$ By the intermediate
value theorem there is some $\xi \in [a, b]$ with $f(\xi) = \frac{1}{b - a} \int_a^b f(x) \, dx$. Taking
$g(x) = \sum_{k=0}^{n} \binom{n}{k} x^k$ instead gives $g(x) = (1 + x)^n$, so that $\int_0^1 g(x) \, dx =
\frac{2^{n+1} - 1}{n + 1}$."""
    ),
    "numbers": (
        ", ".join(str(7919 * i * i % 1_000_003) for i in range(40))
        + "\n"
        + "\n".join(
            f"2024-{i % 12 + 1:02}-{i * 7 % 28 + 1:02} {i * 37 % 24:02}:{i * 53 % 60:02}  {i * 1.37:.2f} "
            f" -{i * 0.061:.4f}"
            for i in range(12)
        )
    ),
    "German": (
        """Der Zug hielt mitten auf der Strecke, und niemand wusste, warum. Eine ältere Frau packte ihr \
Butterbrot aus, zwei Kinder
zählten die Kühe auf der Wiese, und der Schaffner ging mit seiner Taschenlampe am Gleis entlang. Nach zwanzig \
Minuten kam die
Durchsage: Wegen einer Störung an der Weiche verzögere sich die Weiterfahrt um unbestimmte Zeit."""
    ),
    "Russian": (
        """Утром выпал первый снег, и город сразу стал тише. Дворник у соседнего дома расчищал дорожку, дети \
шли в школу и
ловили снежинки варежками. На кухне пахло кофе. Бабушка смотрела в окно и говорила, что зима в этом году будет \
долгой."""
    ),
    "Chinese": (
        "清晨的市场已经很热闹了。卖菜的老人把青菜摆得整整齐齐,旁边的小店刚刚打开门,蒸笼里冒出白色的热气。"
        "我买了两个包子和一杯豆浆,坐在路边慢慢地吃,看着人们来来往往。"
    ),
    "Korean": (
        "어제는 오랜만에 비가 내렸다. 우산을 가져오지 않은 사람들이 지하철역 앞에서 비가 그치기를 기다리고 있었다. "
        "나는 편의점에서 따뜻한 커피를 사서 친구에게 전화를 걸었다."
    ),
    "Arabic": (
        "في الصباح الباكر يفتح الخباز دكانه، وتملأ رائحة الخبز الشارع كله. يقف الجيران في الصف ويتحدثون عن الطقس وعن"
        " أخبار الحي، ثم يعود كل واحد إلى بيته ومعه خبز ساخن."
    ),
    "Hindi": (
        "सुबह होते ही गाँव की गलियों में चहल-पहल शुरू हो जाती है। किसान अपने खेतों की ओर निकल पड़ते हैं और \
बच्चे स्कूल जाने की तैयारी करते हैं।"
    ),
    "emoji": (
        "Great news!!! 🎉🎉 The build is green ✅ — thanks @all 🙏🏽, see you at 5 ☕️ 👩‍💻👨‍👩‍👧‍👦 ¯\\_(ツ)_/¯ #ship-it"
    ),
}


def other(name: str) -> tuple[Callable[[str], list[int]], int] | str:
    """(encode, vocabulary size) of one of tiktoken's own tokenizers, or why it is not to be had."""
    found: list = []

    def fetch() -> None:
        import tiktoken

        try:
            encoding = tiktoken.get_encoding(name)
            found.append((encoding.encode_ordinary, encoding.n_vocab))
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
            found.append(type(error).__name__)

    thread = threading.Thread(target=fetch, daemon=True)  # a silent network must not hold up the table
    thread.start()
    thread.join(PATIENCE)
    return found[0] if found else f"no answer in {PATIENCE} s"


def first_chars(texts) -> str:
    return "\n".join(islice(texts, 2000))[:CORPUS_CHARS]


def compare_tokenizers(cfg: TokEvalConfig) -> dict[str, Any]:
    """What `print_comparison` prints, JSON-ready."""
    from nanolab.data.corpus import open_data
    from nanolab.data.tokenizer import Tokenizer
    from nanolab.runtime import base_dir

    path = cfg.tokenizer or base_dir() / "tokenizer"
    tokenizer = Tokenizer.load(path)
    data = open_data(cfg)
    texts = (
        SAMPLES
        | {f"{d.name} (train)": first_chars(d.iterate()) for d, _ in data.train}
        | {"validation": first_chars(data.val.iterate())}
    )
    reached = {label: other(name) for name, label in OTHERS.items()}
    encoders = {label: found[0] for label, found in reached.items() if not isinstance(found, str)}
    sizes = {"nanolab": tokenizer.vocab_size} | {
        label: found[1] for label, found in reached.items() if not isinstance(found, str)
    }

    rows, lossless = {}, True
    for name, text in texts.items():
        ids, n_bytes = tokenizer.encode(text), len(text.encode())
        exact = tokenizer.decode(ids) == text
        lossless &= exact
        counts = {"nanolab": len(ids)} | {label: len(encode(text)) for label, encode in encoders.items()}
        rows[name] = {
            "bytes": n_bytes,
            "lossless": exact,
            "bytes_per_token": {k: round(n_bytes / max(n, 1), 4) for k, n in counts.items()},
        }

    return {
        "tokenizer": str(path),
        "hash": tokenizer.hash,
        "lossless": lossless,
        "vocab_size": sizes,
        "texts": rows,
        "unreachable": {label: found for label, found in reached.items() if isinstance(found, str)},
    }


def print_comparison(document: dict[str, Any]) -> None:
    columns = {"text": "left"} | dict.fromkeys(("bytes", "nanolab", *OTHERS.values(), "lossless"), "right")
    title = f"{document['tokenizer']}\nbytes per token; in brackets how many more tokens the other one needs"
    table = ruled_table(title, columns)
    for name, row in document["texts"].items():
        ratios = row["bytes_per_token"]
        others = [
            f"{ratios[k]:.2f} ({ratios['nanolab'] / ratios[k] - 1:+.0%})" if k in ratios else "unreachable"
            for k in OTHERS.values()
        ]
        table.add_row(
            name, f"{row['bytes']:,}", f"{ratios['nanolab']:.2f}", *others, "yes" if row["lossless"] else "NO"
        )
    sizes = document["vocab_size"]
    table.add_section()
    table.add_row(
        "vocabulary", "", *(f"{sizes[k]:,}" if k in sizes else "unreachable" for k in ("nanolab", *OTHERS.values())), ""
    )
    print_rich(table)
    for label, reason in document["unreachable"].items():
        print(
            f"{label}'s tokenizer is unreachable ({reason}); tiktoken downloads it, or finds it in TIKTOKEN_CACHE_DIR"
        )
