"""Rows of conversations: each once an epoch, whatever the lengths; crops and targets by hand; the same rows on any
ranks.

One token per byte, so that lengths are known: a conversation of a one-letter question and an answer of n letters has n
+ 6 tokens."""

import contextlib
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolab.cli import UserError
from nanolab.data.chat import render
from nanolab.data.conversations import ConversationBatches, Staged, held_out_rows, pack
from nanolab.data.packing import PackedBatches
from nanolab.data.prefetch import Prefetch
from nanolab.data.survey import Reader, survey
from nanolab.data.tokenizer import Tokenizer
from nanolab.runtime import Runtime

TOKENIZER = Tokenizer.train([], 265)
BOS, USER, USER_END, REPLY, END = (
    TOKENIZER.special(f"<|{name}|>") for name in ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
)
PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = (
    TOKENIZER.special(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end")
)
ALONE = Runtime(torch.device("cpu"), torch.float32)
FRAME = 6  # bos, user_start, one letter, user_end, assistant_start, assistant_end


def turn(answer, question: str = "q") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Listed:
    """Conversations given as lists of messages."""

    def __init__(self, conversations: list[list[dict]]) -> None:
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def example(self, i: int) -> SimpleNamespace:
        return SimpleNamespace(messages=self.conversations[i])


def of_lengths(lengths: list[int]) -> Listed:
    """Conversations of these many tokens; the answer of number i repeats a letter of its own."""
    return Listed([turn(chr(97 + i % 26) * (n - FRAME)) for i, n in enumerate(lengths)])


class Fables:
    name, n_documents = "fables", 9

    def get(self, n: int) -> str:
        return f"fable {n % 9} " * (n % 9 + 2)


def batches(conversations: Listed, T: int = 24, long: str = "crop", **options) -> ConversationBatches:
    reader = Reader(conversations, TOKENIZER, T + 1, long)
    return ConversationBatches(reader, survey(reader, ALONE), **{"device_batch_size": 1, "rows_per_step": 1} | options)


def pretraining(T: int = 24) -> PackedBatches:
    return PackedBatches([(Fables(), 1.0)], TOKENIZER, seq_len=T, device_batch_size=1, rows_per_step=8)


def rows_of(source, n: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of n rows, batch by batch."""
    found = []
    while len(found) < n:
        found += rows_of_batch(source.next())
    return found


def rows_of_batch(batch) -> list[tuple[list[int], list[int]]]:
    assert batch.n_targets == int((batch.targets >= 0).sum())
    return [(x.tolist(), y.tolist()) for x, y in zip(batch.inputs, batch.targets)]


# --- packing ----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=120),
    room=st.integers(40, 60),
    places=st.sampled_from([1, 2, 16, 256]),
)
def test_every_conversation_is_in_exactly_one_row_and_fits(lengths, room, places):
    rows = list(pack(np.array(lengths, dtype=np.int32), range(len(lengths)), room, places))
    assert Counter(i for row in rows for i in row) == Counter(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= room for row in rows)


def slow_rows(lengths: list[int], room: int, places: int) -> list[list[int]]:
    """The rule of the packer, word for word."""
    coming, waiting, rows = list(range(len(lengths))), [], []
    while coming or waiting:
        row = []
        while True:
            while coming and len(waiting) < places:
                waiting.append(coming.pop(0))
            fitting = [i for i in waiting if lengths[i] <= room - sum(lengths[j] for j in row)] if row else waiting[:1]
            if not fitting:
                break
            longest = max(lengths[i] for i in fitting)
            chosen = [i for i in fitting if lengths[i] == longest][-1]
            waiting.remove(chosen)
            row.append(chosen)
        rows.append(row)
    return rows


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), places=st.sampled_from([1, 3, 256]))
def test_a_row_takes_the_oldest_then_the_longest_that_fits(lengths, places):
    assert list(pack(np.array(lengths), range(len(lengths)), 30, places)) == slow_rows(lengths, 30, places)


def test_padding_is_little_where_lengths_vary():
    lengths = np.random.RandomState(0).randint(10, 200, 3000)
    rows = list(pack(lengths, range(3000), 257))
    assert 1 - lengths.sum() / (len(rows) * 257) < 0.015
    half = np.full(100, 150)
    assert len(list(pack(half, range(100), 257))) == 100, "nothing fits beside one of more than half a row"


adversarial = st.lists(st.sampled_from([7, 8, 12, 13, 24, 25, 26, 50, 400]), min_size=1, max_size=60).filter(
    lambda ns: min(ns) <= 25
)


@settings(max_examples=60, deadline=None)
@given(lengths=adversarial, rows_per_step=st.sampled_from([1, 3, 4]), share=st.sampled_from([0.0, 0.2, 0.5]))
def test_each_conversation_once_an_epoch_and_the_length_of_the_run_is_known(lengths, rows_per_step, share):
    """Conversations longer than the row, in any number, neither stop the rest nor leave a row empty."""
    source = batches(
        of_lengths(lengths), rows_per_step=rows_per_step, epochs=2, replay=pretraining() if share else None, share=share
    )
    assert source.survey.n_dropped == sum(n > 25 for n in lengths) and source.survey.n_cropped == 0
    short = [i for i, n in enumerate(lengths) if n <= 25]
    for epoch in (1, 2):
        seen, texts = Counter(), 0
        while source.rows < source.rows_in(epoch):
            batch, labels = source.next(), source.position.labels
            assert batch.n_targets > 0, "a row in the middle of the run has something to learn"
            seen.update(i for row in labels for i in row)
            texts += sum(not row for row in labels)
        if epoch == 1:  # the rest is the second epoch's
            assert seen == Counter(short)
    assert seen == Counter(short)
    assert source.position.epoch == 2.0
    batch = source.next()
    while share and source.position.labels == [[]] and batch.n_targets:
        batch = source.next()
    assert batch.n_targets == 0 and (batch.inputs == BOS).all(), "after the last epoch only padding follows"


def test_the_order_is_another_one_in_each_epoch_and_of_each_seed():
    def order(source):
        return [i for _ in range(12) for row in [source.next(), source.position.labels][1] for i in row]

    conversations = of_lengths([25] * 12)
    source = batches(conversations)
    first, second = order(source), order(source)
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert order(batches(conversations)) == first
    assert order(batches(conversations, seed=7)) != first


def test_share_of_text_is_spread_evenly_and_exact():
    source = batches(of_lengths([20] * 40), T=24, replay=pretraining(), share=0.2)
    kinds = []
    for _ in range(50):
        source.next()
        kinds += [not row for row in source.position.labels]
    assert sum(kinds) == 10 and [i for i, text in enumerate(kinds) if text] == list(range(4, 50, 5))


def test_rows_of_text_are_those_of_pretraining_in_order():
    source, text = batches(of_lengths([20] * 40), replay=pretraining(), share=0.5), pretraining()
    found = [row for row, labels in ((source.next(), source.position.labels) for _ in range(12)) if labels == [[]]]
    for batch in found:
        expected = text.next()
        assert (
            torch.equal(batch.inputs, expected.inputs)
            and torch.equal(batch.targets, expected.targets)
            and batch.n_targets == 24
        )
    assert len(found) == 6


# --- rows by hand -----------------------------------------------------------------------------------------------------


def test_inputs_and_targets_of_a_row_by_hand():
    """Two conversations of 8 and 9 tokens in a row of 20, then padding. Asked for: answers and their ends only."""
    source = batches(Listed([turn("ab"), turn("cde")]), T=19, seed=1)
    ((inputs, targets),) = rows_of(source, 1)
    a, b, c, d, e, q = (ord(x) for x in "abcdeq")
    first = ([BOS, USER, q, USER_END, REPLY, a, b, END], [0, 0, 0, 0, 0, 1, 1, 1])
    second = ([BOS, USER, q, USER_END, REPLY, c, d, e, END], [0, 0, 0, 0, 0, 1, 1, 1, 1])
    if inputs[5] == c:
        first, second = second, first
    ids, mask = first[0] + second[0] + [BOS] * 3, first[1] + second[1] + [0] * 3
    assert inputs == ids[:19]
    assert targets == [i if m else -1 for i, m in zip(ids[1:], mask[1:])]
    assert sum(t >= 0 for t in targets) == 7


def test_tool_calls_are_asked_for_and_their_outputs_are_not():
    content = [
        {"type": "text", "text": "a"},
        {"type": "python", "text": "1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "b"},
    ]
    source = batches(Listed([[{"role": "system", "content": "s"}, *turn(content)]]), T=16)
    ((inputs, targets),) = rows_of(source, 1)
    a, b, one, two, q, s = (ord(x) for x in "ab12qs")
    assert inputs == [
        BOS,
        s,
        USER,
        q,
        USER_END,
        REPLY,
        a,
        PYTHON,
        one,
        PYTHON_END,
        OUTPUT,
        two,
        OUTPUT_END,
        b,
        END,
        BOS,
    ]
    assert targets == [-1, -1, -1, -1, -1, a, PYTHON, one, PYTHON_END, -1, -1, -1, b, END, -1, -1]


THREE_TURNS = turn("aaa") + turn("bbbb") + turn("ccccc")  # ends after 9, 9 + 9 = 18, 18 + 10 = 28 tokens


@pytest.mark.parametrize("room,kept", [(8, 0), (9, 1), (17, 1), (18, 2), (27, 2), (28, 3)])
def test_a_long_conversation_is_cropped_after_a_whole_turn(room, kept):
    reader = Reader(Listed([THREE_TURNS, turn("x")]), TOKENIZER, room)
    found, n = reader.read(0)
    assert n == 28 and (found == render(TOKENIZER, THREE_TURNS[: 2 * kept]) if kept else found.ids == [])
    about = survey(reader, ALONE)
    assert (about.n_cropped, about.n_dropped, about.longest) == (int(kept in (1, 2)), int(kept == 0), 28)
    assert about.lengths.tolist() == [[0, 9, 18, 28][kept], 7] and about.n_tokens == about.lengths.sum()
    assert about.n_supervised == [0, 4, 9, 15][kept] + 2


def test_long_conversations_are_left_out_or_refused_by_flag():
    conversations = Listed([THREE_TURNS, turn("x")])
    about = survey(Reader(conversations, TOKENIZER, 20, "drop"), ALONE)
    assert about.lengths.tolist() == [0, 7] and (about.n_cropped, about.n_dropped, about.n_kept) == (0, 1, 1)
    with pytest.raises(
        UserError,
        match=(
            r"1 of 2 conversations are longer than a row: number 0 has 28 tokens.*at most 20; try --max-seq-len 27"
            r" .*--long crop"
        ),
    ):
        survey(Reader(conversations, TOKENIZER, 20, "refuse"), ALONE)
    assert survey(Reader(conversations, TOKENIZER, 28, "refuse"), ALONE).n_kept == 2


def test_what_cannot_be_trained_on_is_said():
    with pytest.raises(UserError, match=r"all 1 conversations are longer than a row of 8 tokens.*--max-seq-len"):
        survey(Reader(Listed([THREE_TURNS]), TOKENIZER, 8), ALONE)
    with pytest.raises(UserError, match="there are no conversations.*--tasks"):
        survey(Reader(Listed([]), TOKENIZER, 8), ALONE)
    with pytest.raises(UserError, match="--long 'crob' is unknown.*--long crop"):
        Reader(Listed([]), TOKENIZER, 8, "crob")
    with pytest.raises(UserError, match="144 is not a multiple of 96 .*try --total-batch-size 192"):
        batches(of_lengths([9]), rows_per_step=6, device_batch_size=4)
    with pytest.raises(UserError, match="--replay is 1; expected a share"):
        batches(of_lengths([9]), share=1.0)


# --- state ------------------------------------------------------------------------------------------------------------

MIXED = [7 + 5 * i % 19 for i in range(61)]


def staged(world_size: int = 1, rank: int = 0, B: int = 2) -> Staged:
    """Two stages that share their text; the first ends inside an epoch."""
    text, options = pretraining(), {"device_batch_size": B, "rows_per_step": 8, "rank": rank, "world_size": world_size}
    first = batches(of_lengths(MIXED), replay=text, share=0.25, **options)
    second = batches(of_lengths(MIXED[:20]), replay=text, share=0.25, seed=3, epochs=3, **options)
    return Staged([(40, first), (second.rows_in(3), second)])


def global_rows(sources: list[Staged], n: int, B: int) -> list[tuple[list[int], list[int]]]:
    """n rows in the order of the run: row i of a micro-batch of W ranks is row i // W of rank i % W."""
    found = []
    while len(found) < n:
        parts = [rows_of(source, B) for source in sources]
        found += [parts[i % len(parts)][i // len(parts)] for i in range(B * len(parts))]
    return found


@pytest.mark.parametrize("world_size,B", [(2, 2), (4, 2), (4, 1), (8, 1)])
def test_any_number_of_ranks_sees_the_same_rows(world_size, B):
    alone = global_rows([staged()], 96, 2)
    assert global_rows([staged(world_size, rank, B) for rank in range(world_size)], 96, B) == alone
    assert len({json.dumps(row) for row in alone}) > 50


@pytest.mark.fault("F7")
@pytest.mark.parametrize("ranks", [3, 5, 7, 8])
def test_ranks_with_unequal_shares_see_the_same_global_batches(ranks):
    """8 rows a step: the places of rank r are r, r + W, ..., and at the end of each step all stand at the same
    place.
    """
    alone, sources = global_rows([staged()], 96, 2), [staged(ranks, rank) for rank in range(ranks)]
    for step in range(1, 13):
        places: dict[int, tuple] = {}
        for rank, source in enumerate(sources):
            mine = []
            while source.position.rows < 8 * step:
                mine += rows_of_batch(source.next())
            places |= dict(zip(range(rank, 8, ranks), mine, strict=True))
        assert [places[i] for i in range(8)] == alone[8 * step - 8 : 8 * step]
        assert len({json.dumps(source.position.json()) for source in sources}) == 1


@pytest.mark.parametrize("done", [0, 8, 24, 40, 48, 64])
def test_a_state_goes_on_exactly_on_any_number_of_ranks(done):
    whole = global_rows([staged()], 96, 2)
    source = staged()
    global_rows([source], done, 2)
    state = json.loads(json.dumps(source.position.json()))
    assert len(json.dumps(state)) < 5000
    for world_size in (1, 4):
        others = [staged(world_size, rank) for rank in range(world_size)]
        for other in others:
            other.load_state_dict(state)
        assert global_rows(others, 96 - done, 2) == whole[done:96]
        assert others[0].position.json() == others[-1].position.json()


def test_prefetched_they_are_the_same_and_the_state_is_of_the_batch_last_handed_out():
    plain, ahead = staged(), Prefetch(staged(), ALONE, depth=3)
    try:
        for _ in range(30):
            assert torch.equal(plain.next().targets, ahead.next().targets)
            at, other = plain.position, ahead.position
            assert other.json() == at.json()
            assert (other.rows, other.epoch, other.where()) == (at.rows, at.epoch, at.where())
    finally:
        ahead.close()
    assert plain.position.rows == 60 and plain.stage == 1 and "stage 2: conversations " in at.where()


def test_a_state_of_other_conversations_is_refused():
    """Of the same lengths, but one letter is another."""
    source = batches(Listed([turn("ab"), turn("cd")]))
    with pytest.raises(UserError, match="trained on other conversations"):
        batches(Listed([turn("ab"), turn("ce")])).load_state_dict(source.position.json())
    with pytest.raises(UserError, match="trained on other conversations"):
        batches(Listed([turn("ab"), turn("cd")]), T=23).load_state_dict(source.position.json())


def test_a_place_inside_a_micro_batch_is_refused():
    source = batches(of_lengths(MIXED), rows_per_step=12, device_batch_size=3)
    source.next()
    with pytest.raises(UserError, match="has read 3 rows, which 4 rows at a time"):
        batches(of_lengths(MIXED), rows_per_step=12, device_batch_size=4).load_state_dict(source.position.json())


def ranks_survey(runtime, lengths):
    about = survey(Reader(of_lengths(lengths), TOKENIZER, 25), runtime)
    return about.fingerprint, about.lengths.tolist(), about.n_supervised


def test_ranks_share_the_survey(run_ranks):
    lengths = [9, 30, 12, 8, 25]
    assert run_ranks(ranks_survey, 2, lengths) == [ranks_survey(ALONE, lengths)] * 2


def test_the_epoch_counts_rows_of_conversations():
    source = batches(of_lengths([25] * 10), replay=pretraining(), share=0.5)
    seen = []
    for _ in range(40):
        source.next()
        seen.append(source.position.epoch)
    assert seen[19] == 1.0 and seen[29] == 1.5 and seen == sorted(seen)


# --- held out ---------------------------------------------------------------------------------------------------------


def test_held_out_rows_hold_the_first_conversations_once():
    conversations = of_lengths([9, 30, 12, 8, 25, 14])
    inputs, targets = held_out_rows(Reader(conversations, TOKENIZER, 25))
    assert inputs.shape == targets.shape == (3, 24) and inputs.dtype == np.int64
    answers = [n - FRAME + 1 for n in (9, 12, 8, 25, 14)]  # the one of 30 has no turn that fits
    assert (targets >= 0).sum() == sum(answers) and (targets == END).sum() == 5
    few = held_out_rows(Reader(conversations, TOKENIZER, 25), max_tokens=20)[1]
    assert (few >= 0).sum() == answers[0] + answers[1], "9 tokens are too few, 9 + 12 are enough"
    with pytest.raises(UserError, match="no held-out conversation fits a row of 5 tokens"):
        held_out_rows(Reader(conversations, TOKENIZER, 5))


@pytest.mark.fault("outer D7")
def test_two_threads_that_ask_at_once_count_every_epoch_once(monkeypatch):
    """One makes batches, the other asks for the epoch: both are held where the rows of an epoch are counted, so that
    they meet there if they can.
    """
    alone, both = (batches(of_lengths([10, 15, 20, 8, 9, 13, 22])) for _ in range(2))
    expected = [alone.conversation_rows(n) for n in range(6)]
    meet, plain = threading.Barrier(2), both._layout

    def layout(epoch):
        with contextlib.suppress(threading.BrokenBarrierError):  # where only one may be here at a time
            meet.wait(0.2)
        return plain(epoch)

    monkeypatch.setattr(both, "_layout", layout)
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(lambda: [both.conversation_rows(n) for n in range(6)]) for _ in range(2)]
    assert [f.result() for f in found] == [expected] * 2 and both._ends == expected
    assert [both._epoch_of(row) for row in range(expected[-1])] == [
        n for n in range(5) for _ in range(expected[n + 1] - expected[n])
    ]
