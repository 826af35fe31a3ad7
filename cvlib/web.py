"""A chat page for browsers on this machine, on Gradio: streaming, stop, retry, undo, and before beside after.

* **Nobody else.** The server listens on loopback, `share=False` is said outright (left open, Gradio makes a public link
  on Colab), nothing is reported home and the page loads nothing from the network.
* **Nobody's words on another's page.** What was said lives in the session's own state, not in an object all share.
* **One model, one answer at a time.** All that makes it compute waits in one queue. The adapter is switched off for one
  token and on again before the next, so before and after stream side by side on one copy of the weights, and an answer
  that is stopped midway leaves the model as it was.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from cvlib import InputError, loading
from cvlib.chat import Chat
from cvlib.engines import Engine
from cvlib.messages import Conversation, Message
from cvlib.recipes import Decoding

#: Least, most and step of each number of `Decoding`.
DIALS = {
    "temperature": (0, 2, 0.05),
    "top_k": (0, 200, 1),
    "top_p": (0.05, 1, 0.05),
    "min_p": (0, 0.5, 0.01),
    "repetition_penalty": (1, 3, 0.05),
    "max_new_tokens": (1, 1024, 1),
    "seed": (0, 9999, 1),
}
#: The reader's own fonts; those for Chinese are named, or a browser may draw Japanese forms of the characters.
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
DOWNLOAD = """text => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "talk.jsonl";
    link.click();
}"""


class WithoutAdapter(Engine):
    """The model as it was before its adapter, without a second copy of the weights.

    The adapter is off only while a piece is computed; between two pieces the model is whole.
    """

    def __init__(self, engine: Engine):
        self.engine, self.model = engine, engine.model
        self.tokenizer, self.template, self.context = engine.tokenizer, engine.template, engine.context

    def stream(self, conversation: Conversation, decoding: Decoding, stop: Sequence[str] = ()) -> Iterator[str]:
        pieces = self.engine.stream(conversation, decoding, stop)
        while True:
            with self.model.disable_adapter():
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece


def columns(engine: Engine, adapter: str | Path | None = None) -> dict[str, Engine]:
    """The page's columns by their titles: the model, and beside it the model without its adapter if it has one.

    An adapter with rows for new pieces speaks in tokens that its base does not know, so it stands alone.
    """
    if not adapter:
        return {"model": engine}
    if loading.has_tokenizer(adapter):
        return {"with the adapter": engine}
    return {"with the adapter": engine, "before: without it": WithoutAdapter(engine)}


def serve(engines: dict[str, Engine], decoding: Decoding, system: str = "") -> None:
    """Show the page's address and serve it until Ctrl-C."""
    built = page(engines, decoding, system)
    _, address, _ = launch(built)
    print(f"the chat page: {address} (for this machine only; Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        built.close(verbose=False)


def launch(built):
    """Start serving a page in the background, to this machine and nobody else."""
    import gradio as gr

    alone = {"server_name": "127.0.0.1", "share": False, "enable_monitoring": False, "mcp_server": False}
    lean = {"run_history": False, "footer_links": [], "ssr_mode": False, "pwa": False, "inline": False}
    look = gr.themes.Default(font=FONTS)
    return built.launch(**alone, **lean, theme=look, quiet=True, prevent_thread_lock=True)


class Page:
    """What the page's buttons do. It holds no conversation: turns come from the session and go back to it."""

    def __init__(self, engines: Sequence[Engine], decoding: Decoding):
        self.engines, self.decoding = engines, decoding
        self.model = threading.Lock()  # a stopped answer may still compute one token when the next question comes

    def ask(self, text: str, columns: list[Conversation], system: str, *dials) -> Iterator[tuple]:
        """Every column's answer, a piece of each at a time."""
        chats = self._chats(columns, system, Decoding(*dials))
        pieces = zip_longest(*(chat.reply(text) for chat in chats), fillvalue="")
        said, question = [""] * len(chats), Message("user", text)
        if not text.strip():
            yield shown(columns)
            return
        yield shown([[*turns, question] for turns in columns], keep=True)  # nothing was answered yet
        try:
            while step := self._step(pieces):
                said = [begun + piece for begun, piece in zip(said, step, strict=True)]
                answers = [Message("assistant", answer) for answer in said]
                yield shown([[*turns, question, answer] for turns, answer in zip(columns, answers, strict=True)])
        except InputError as error:
            yield shown(columns, str(error), text)
            return
        yield shown([chat.history for chat in chats], remembered(chats[0]) if all(said) else "The model said nothing.")

    def _chats(self, columns: list[Conversation], system: str, decoding: Decoding) -> list[Chat]:
        pairs = zip(self.engines, columns, strict=True)
        return [Chat(engine, decoding, system.strip(), turns) for engine, turns in pairs]

    def _step(self, pieces: Iterator[tuple[str, ...]]) -> tuple[str, ...] | None:
        with self.model:
            return next(pieces, None)

    def again(self, columns: list[Conversation], *rest) -> Iterator[tuple]:
        """Answer the last question once more; the seed's dial has moved on by one."""
        columns, question = taken_back(columns)
        yield from self.ask(question, columns, *rest)

    def back(self, columns: list[Conversation]) -> tuple:
        """The last question returns into the text box, its answers go."""
        columns, question = taken_back(columns)
        return shown(columns, text=question)

    def transcript(self, columns: list[Conversation], system: str) -> str:
        """Each column as a row that `messages.read` reads."""
        chats = self._chats(columns, system, self.decoding)
        return "".join(json.dumps(chat.row(), ensure_ascii=False) + "\n" for chat in chats)


def shown(columns: list[Conversation], status: str = "", text: str = "", keep: bool = False) -> tuple:
    """Values for the session's turns (left alone if `keep`), the columns, the line below and the text box."""
    import gradio as gr

    rows = [[turn.row() for turn in turns] for turns in columns]
    return (gr.skip() if keep else columns, *rows, status, text)


def taken_back(columns: list[Conversation]) -> tuple[list[Conversation], str]:
    """The columns without their last exchange, and its question; a column that had no answer to it stays.

    >>> talk = [Message("user", "1"), Message("assistant", "2")]
    >>> taken_back([talk, []])
    ([[], []], '1')
    """
    last = max(columns, key=len)[-2:-1]
    return [turns[:-2] if turns[-2:-1] == last else turns for turns in columns], last[0].content if last else ""


def remembered(chat: Chat) -> str:
    """A line about what no longer fits into the model's context; empty if everything does."""
    if not chat.forgotten:
        return ""
    return f"The model no longer sees the oldest {chat.forgotten} of {len(chat.history) // 2} exchanges."


def page(engines: dict[str, Engine], decoding: Decoding, system: str = ""):
    """The page as Gradio blocks; a session's state is a list of turns for each column."""
    try:
        import gradio as gr
    except ImportError:
        raise InputError("the chat page needs Gradio; pip install 'gradio>=6'") from None

    does = Page(list(engines.values()), decoding)
    with gr.Blocks(analytics_enabled=False, title="Teach a Llama Chinese: chat") as built:
        turns = gr.State([[] for _ in engines])
        with gr.Row():
            look = {"height": 440, "render_markdown": False, "buttons": ["copy"], "elem_classes": "said"}
            boxes = [gr.Chatbot(label=name, **look) for name in engines]
        status = gr.Markdown(elem_id="status")
        with gr.Row():
            text = gr.Textbox(show_label=False, placeholder="问点什么 (ask something)", scale=6, elem_id="ask")
            send = gr.Button("Send", variant="primary", min_width=80)
            stop = gr.Button("Stop", variant="stop", min_width=80)
        with gr.Row():
            retry, undo, reset, download = (
                gr.Button(name, size="sm") for name in ("Retry", "Undo", "Reset", "Download")
            )
        with gr.Accordion("Decoding and system prompt", open=False):
            told = gr.Textbox(system, label="system prompt", info="empty: the template's own")
            dials = {item.name: _dial(item, decoding) for item in dataclasses.fields(Decoding)}
        written = gr.Textbox(visible="hidden")

        all_shown, seed = [turns, *boxes, status, text], dials["seed"]
        computing = {"concurrency_limit": 1, "concurrency_id": "model"}  # one answer at a time
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        at_once = {"queue": False, **quiet}
        inputs = [turns, told, *dials.values()]
        asked = gr.on([text.submit, send.click], does.ask, [text, *inputs], all_shown, **computing, **quiet)
        moved = retry.click(lambda number: number + 1, seed, seed, **at_once)
        again = moved.then(does.again, inputs, all_shown, **computing, **quiet)
        halt = {"cancels": [asked, again], **at_once}
        stop.click(None, **halt)
        undo.click(does.back, turns, all_shown, **halt)
        anew = [reset.click, *(box.clear for box in boxes)]
        gr.on(anew, lambda: shown([[] for _ in engines]), None, all_shown, **halt)
        download.click(does.transcript, [turns, told], written, **at_once).then(None, written, js=DOWNLOAD, **at_once)
    return built.queue(max_size=32, api_open=False)


def _dial(item: dataclasses.Field, decoding: Decoding):
    """A slider for a number of `Decoding`, a choice for a word, explained as `--help` explains it."""
    import gradio as gr

    value, words = getattr(decoding, item.name), {"label": item.name, "info": item.metadata["help"]}
    if item.metadata["choices"]:
        return gr.Radio(item.metadata["choices"], value=value, **words)
    least, most, step = DIALS[item.name]
    return gr.Slider(least, max(most, value), value, step=step, **words)
