"""--log-conversations: a file of JSON lines that conversations are appended to, as `read_conversations` reads them."""

import asyncio
import contextlib
import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from nanolab.cli import UserError
from nanolab.data.chat import check_messages
from nanolab.serving.metrics import Metrics
from nanolab.serving.reply import ResponseBuilder

log = logging.getLogger(__name__)

LOG_SECONDS = 2.0


class ConversationLog:
    """A line per choice. path: empty for none. Raises UserError for a file that cannot be written."""

    def __init__(self, path: str, metrics: Metrics):
        self.path, self.metrics = path, metrics
        self.writer = ThreadPoolExecutor(1)  # one thread: lines stay whole and in order
        self.works, self.lost = True, 0  # whether the last conversation could be written; how many were not
        if path:
            try:
                open(path, "a").close()
            except OSError as error:
                wanted = "expected a file, or a new name in a folder that is there"
                raise UserError(f"--log-conversations {path} cannot be written ({error.strerror}); {wanted}") from None

    async def add(self, builder: ResponseBuilder) -> None:
        """Append the conversation. A reply waits for its lines, but no longer than LOG_SECONDS. One that cannot be
        written is counted, and the first of several logged.
        """
        if self.path and builder.asked.chat:
            written = asyncio.get_running_loop().run_in_executor(self.writer, append, self.path, builder)
            written.add_done_callback(lambda done: self._written(builder.model, done.exception()))
            await asyncio.wait([written], timeout=LOG_SECONDS)

    def _written(self, model: str, error: BaseException | None) -> None:
        if error:
            self.lost += 1
            self.metrics.lost.labels(model).inc()
        if self.works and error:
            text = "--log-conversations %s cannot be written (%s); replies go on, and what is lost is counted"
            log.error(text, self.path, error)
        elif not self.works and not error:
            text = "--log-conversations %s is written again; %d conversations are missing"
            log.warning(text, self.path, self.lost)
        self.works = not error


def append(path: str, builder: ResponseBuilder) -> None:
    """The conversation's lines at the end of a file: all of them, or none and an OSError."""
    lines = []
    for said in (one for one in builder.replies if one.text.strip() or one.calls):
        messages = [*builder.asked.messages, {"role": "assistant", "content": said.parts}]
        try:
            check_messages(messages)  # a line that read_conversations refuses would cost the whole file
        except UserError as error:
            print(f"note: a conversation was not logged, since training does not read it: {error}", file=sys.stderr)
            continue
        lines.append({"messages": messages, "model": builder.model})
    data = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode())
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END) if file.seekable() else 0
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):  # not every file can be cut
                file.truncate(before)
            raise
