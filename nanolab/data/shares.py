"""The rows of one optimizer step, shared by any number of ranks: some may have one more than others."""

from nanolab.cli import UserError


def share_rows(total_batch_size: int, seq_len: int, device_batch_size: int, ranks: int) -> list[int]:
    """Rows of one optimizer step for each rank, the larger shares first. The only judge of batches: plans, dry runs and
    loaders ask it.

    A batch that one rank takes, any number takes that has a row for each. Raises UserError with a total batch that is
    accepted."""
    B, T = device_batch_size, seq_len
    rows, least = total_batch_size // T, -(-ranks // B) * B * T
    if total_batch_size < 1 or total_batch_size % (B * T):
        fewer = (
            next((n for n in range(min(B, rows), 0, -1) if rows % n == 0), 0)
            if total_batch_size % T == 0 and rows >= ranks
            else 0
        )
        raise UserError(
            f"total batch size {total_batch_size} is not a multiple of {B * T} (device batch size {B} x row {T}); "
            "try --total-batch-size"
            f" {max(least, round(total_batch_size / (B * T)) * B * T)}"
            + f" or --device-batch-size {fewer}"
            * (fewer > 0),
            "batch-not-a-multiple",
            total_batch_size=total_batch_size,
            unit=B * T,
        )
    if rows < ranks:
        raise UserError(
            f"{ranks} ranks cannot share {rows} rows (total batch size {total_batch_size} / row {T}); expected at least"
            f" a row for each; try --total-batch-size {least}",
            "fewer-rows-than-ranks",
            rows=rows,
            ranks=ranks,
        )
    return [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]


def batch_text(total_batch_size: int, seq_len: int, device_batch_size: int, ranks: int) -> str:
    """The batch of one step and each rank's share of it, for the plan; and the time that ranks with smaller shares
    wait.
    """
    shares = share_rows(total_batch_size, seq_len, device_batch_size, ranks)
    most, rows, accumulation = shares[0], sum(shares), -(-shares[0] // device_batch_size)
    text = (
        f"{total_batch_size:,} tokens = {device_batch_size} rows x {seq_len} x {ranks} ranks x {accumulation}"
        " accumulation"
    )
    if device_batch_size * ranks * accumulation != rows:
        text = (
            f"{total_batch_size:,} tokens = {rows} rows x {seq_len} on {ranks} ranks, at most {device_batch_size} rows"
            " at a time"
        )
    if ranks == 1:
        return text
    counts = ", ".join(f"{n} on {shares.count(n)}" for n in dict.fromkeys(shares))
    idle = f" ({1 - rows / (ranks * most):.1%} of their time is waiting)" if rows < ranks * most else ""
    return f"{text}; rows per step {rows}: {' '.join(map(str, shares)) if ranks <= 8 else counts + ' ranks'}{idle}"


def deal(rows: int, ranks: int, rank: int, streams: int) -> list[int]:
    """The places in a step of the rows of `rank`: neighbours in the order of streams, so that a rank needs few of them.

    Streams are taken in the order r, r + W, ... for r = 0, 1, ...: where W divides their number, rank r has just those.
    """
    order = sorted(range(rows), key=lambda g: (g % streams % ranks, g % streams, g))
    share, more = divmod(rows, ranks)
    first = rank * share + min(rank, more)
    return sorted(order[first : first + share + (rank < more)])


class Turns:
    """Which rows of a step each micro-batch of one rank takes. A place in the run is the number of rows handed out by
    all ranks together.

    Every rank makes as many micro-batches in a step as the one with the largest share; its last ones may be smaller, or
    empty."""

    def __init__(self, rows_per_step: int, device_batch_size: int, rank: int, ranks: int, streams: int) -> None:
        self.rows_per_step, self.device_batch_size, self.unit = (
            rows_per_step,
            device_batch_size,
            device_batch_size * ranks,
        )
        self.mine = deal(rows_per_step, ranks, rank, streams)
        # whether what all ranks have handed out inside a step are its first rows, so that other ranks can go on there
        self.in_order = streams % ranks == 0 or streams == rows_per_step

    def after(self, done: int) -> tuple[list[int], int]:
        """(places in the step of the rows of the micro-batch after `done` rows, the rows done with it)."""
        inside = done % self.rows_per_step
        first = inside // self.unit * self.device_batch_size
        return self.mine[first : first + self.device_batch_size], done - inside + min(
            inside + self.unit, self.rows_per_step
        )

    def fits(self, done: int) -> bool:
        """Whether these ranks can go on after `done` rows."""
        inside = done % self.rows_per_step
        return inside == 0 or (self.in_order and inside % self.unit == 0)
