"""The chat page in a real browser: type, stream, stop, reload, two users, and nothing asked of the network."""

import json
import shutil
import threading
import time

import pytest
import torch

from cvlib import InputError, loading, web
from cvlib.engines import Transformers
from cvlib.messages import Message
from cvlib.recipes import Decoding

DECODING = Decoding(temperature=1.0, max_new_tokens=20)


class Echo:
    """An engine that answers `<what it was asked><letter>` for each letter of a long alphabet, slowly."""

    template, context = "chatml", 4000

    def __init__(self, name="", pause=0.05, length=100):
        self.name, self.pause, self.length = name, pause, length
        self.busy, self.overlapped, self.asked = 0, False, []

    def count(self, conversation):
        return sum(len(turn.content) for turn in conversation)

    def stream(self, conversation, decoding, stop=()):
        self.asked.append(([turn.content for turn in conversation], decoding))
        yield f"{self.name}答「{conversation[-1].content}」："
        for number in range(self.length):
            self.busy += 1
            self.overlapped |= self.busy > 1
            time.sleep(self.pause)
            self.busy -= 1
            yield f"{number}，"


# before and after on one model


@pytest.fixture(scope="module")
def adapted(tiny):
    """A tiny model under an adapter that changes what it says, in an engine."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loading.load(str(tiny), dtype="float32")
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return Transformers(model.eval(), tokenizer, "chatml")


def test_without_adapter_is_the_base_model_and_needs_no_copy(adapted, tiny, talk):
    base = Transformers(*loading.load(str(tiny), dtype="float32"), "chatml")
    before = web.WithoutAdapter(adapted)
    said = {name: "".join(e.stream(talk("你好"), DECODING)) for name, e in (("base", base), ("before", before))}
    assert said["before"] == said["base"] != "".join(adapted.stream(talk("你好"), DECODING))
    assert before.model is adapted.model


def test_both_stream_side_by_side_and_stopping_leaves_the_adapter_on(adapted, talk):
    whole = list(adapted.stream(talk("你好"), DECODING))
    pieces = web.WithoutAdapter(adapted).stream(talk("你好"), DECODING)
    mixed = []
    for piece in adapted.stream(talk("你好"), DECODING):
        mixed.append(piece)
        next(pieces, None)  # a piece from before, in between
    assert mixed == whole
    stopped = web.WithoutAdapter(adapted).stream(talk("你好"), DECODING)
    next(stopped)  # abandoned, not even closed
    assert list(adapted.stream(talk("你好"), DECODING)) == whole


def test_columns(adapted, tmp_path):
    assert list(web.columns(adapted)) == ["model"]
    assert list(web.columns(adapted, tmp_path)) == ["with the adapter", "before: without it"]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert list(web.columns(adapted, tmp_path)) == ["with the adapter"]


def test_an_undone_exchange_leaves_only_the_columns_that_had_it():
    one, two = [Message("user", "1"), Message("assistant", "a")], [Message("user", "2"), Message("assistant", "b")]
    assert web.taken_back([one + two, one]) == ([one, one], "2")
    assert web.taken_back([[], []]) == ([[], []], "")


def test_without_gradio_there_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(InputError, match="pip install 'gradio>=6'"):
        web.page({"model": Echo()}, DECODING)


# nobody else


def test_only_this_machine_and_never_a_public_link(monkeypatch):
    """Also on Colab, where Gradio shares unless it is told not to; nothing is reported home."""
    import gradio

    asked = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: asked.update(options))
    built = web.page({"model": Echo()}, DECODING)
    web.launch(built)
    assert asked["server_name"] == "127.0.0.1"
    assert asked["share"] is False
    assert built.analytics_enabled is False


@pytest.fixture(scope="module")
def served():
    """A page with two columns on a free port: its engines and its address."""
    pytest.importorskip("gradio")
    engines = {"after": Echo("后"), "before": Echo("前")}
    built = web.page(engines, DECODING, "你是老师。")
    _, address, share = web.launch(built)
    assert not share
    yield list(engines.values()), address
    built.close(verbose=False)


def test_no_other_address_of_this_machine_answers(served):
    import socket

    port = int(served[1].rstrip("/").rsplit(":", 1)[1])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: asks the system which of its addresses it would use
        outside = probe.getsockname()[0]
    with pytest.raises(OSError):  # noqa: PT011
        socket.create_connection((outside, port), timeout=5)


# in a browser


class User:
    """A browser of one's own, with the network off: only this machine is reachable."""

    def __init__(self, address, downloads):
        selenium = pytest.importorskip("selenium.webdriver")
        if not shutil.which("chromedriver"):
            pytest.skip("no chromedriver: apt-get install chromium chromium-driver")
        options = selenium.ChromeOptions()
        for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "window-size=1200,900"):
            options.add_argument(f"--{flag}")
        options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = selenium.Chrome(options=options, service=selenium.ChromeService(shutil.which("chromedriver")))
        self.driver.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)}
        )
        self.address, self.downloads = address, downloads
        self.open()

    def open(self):
        self.driver.get(self.address)
        self.until(lambda: self.box.is_displayed())

    @property
    def box(self):
        return self.driver.find_element("css selector", "#ask textarea, #ask input")

    def press(self, name):
        self.driver.find_element("xpath", f"//button[normalize-space()='{name}']").click()

    def ask(self, text):
        self.box.send_keys(text + "\ue007")  # Enter

    def said(self):
        """Texts of the columns: their bubbles, in order."""
        columns = self.driver.find_elements("css selector", ".said")
        return [
            [b.text for b in column.find_elements("css selector", "[data-testid=user], [data-testid=bot]")]
            for column in columns
        ]

    def until(self, condition, seconds=30):
        end = time.time() + seconds
        while True:
            try:
                if value := condition():
                    return value
            except Exception:  # the page redraws while we look
                if time.time() > end:
                    raise
            assert time.time() < end, f"waited {seconds} s; the page shows {self.said()}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def users(served, tmp_path_factory):
    two = [User(served[1], tmp_path_factory.mktemp("downloads")) for _ in range(2)]
    yield two
    for user in two:
        user.driver.quit()


@pytest.fixture
def user(users):
    users[0].open()
    return users[0]


def test_it_streams_and_stops(user, served):
    user.ask("你好")
    first = user.until(lambda: "3，" in user.said()[0][1] and user.said()[0][1])
    user.until(lambda: len(user.said()[0][1]) > len(first))  # it grows: it streams
    after, before = user.said()
    assert after[0] == before[0] == "你好"
    assert after[1].startswith("后答「你好」：0，1，")
    assert before[1].startswith("前答「你好」：0，1，")
    user.press("Stop")
    time.sleep(1)
    kept = user.said()
    time.sleep(1)
    assert user.said() == kept
    assert "99，" not in kept[0][1]
    user.ask("再见")  # what was said until the stop is remembered, and the model is free again
    user.until(lambda: len(user.said()[0]) == 4 and "1，" in user.said()[0][3])
    turns, decoding = served[0][0].asked[-1]
    assert turns[:2] == ["你是老师。", "你好"]
    assert turns[2].startswith("后答「你好」：0，1，")
    assert turns[3] == "再见"
    assert decoding == DECODING
    user.press("Stop")


def test_a_reload_begins_anew_and_frees_the_model(user, served):
    for engine in served[0]:
        engine.length = 10_000  # to its end this would take a quarter of an hour
    user.ask("讲个很长的故事")
    user.until(lambda: "1，" in user.said()[0][1])
    user.open()
    assert user.said() == [[], []]
    user.ask("在吗")
    user.until(lambda: "2，" in user.said()[0][1], seconds=20)
    assert "故事" not in str(user.said())
    user.press("Stop")
    for engine in served[0]:
        engine.length = 100


def test_undo_retry_reset_and_download(user, served):
    for engine in served[0]:
        engine.length = 3
    user.ask("一")
    user.until(lambda: user.said()[0][1].endswith("2，"))
    user.ask("二")
    user.until(lambda: user.said()[0][3].endswith("2，"))
    user.press("Retry")
    user.until(lambda: served[0][0].asked[-1][1].seed == 1)
    assert served[0][0].asked[-1][0][-1] == "二"
    user.until(lambda: [len(column) for column in user.said()] == [4, 4] and user.said()[1][3].endswith("2，"))
    user.press("Download")
    file = user.until(lambda: next(iter(user.downloads.glob("*.jsonl")), None))
    rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert [turn["content"] for turn in rows[0]][:3] == ["你是老师。", "一", "后答「一」：0，1，2，"]
    assert [turn["role"] for turn in rows[1]] == ["system", *("user", "assistant") * 2]
    user.press("Undo")
    user.until(lambda: [len(column) for column in user.said()] == [2, 2])
    assert user.box.get_attribute("value") == "二"
    user.press("Reset")
    user.until(lambda: user.said() == [[], []])
    for engine in served[0]:
        engine.length = 100


def test_chinese_is_drawn_in_a_chinese_font(user):
    """Without one by name, a browser set to English draws 直 and 骨 in their Japanese forms."""
    for place in (".said", "#ask"):
        family = "return getComputedStyle(document.querySelector(arguments[0])).fontFamily"
        assert "Noto Sans CJK SC" in user.driver.execute_script(family, place)


def test_dead_ends(user):
    user.ask("")
    user.driver.execute_script("arguments[0].value = '很'.repeat(100000)", user.box)
    user.ask("！")
    status = user.until(lambda: user.driver.find_element("css selector", "#status").text)
    assert "the message takes 100006 tokens and 3980 are free" in status
    assert user.said() == [[], []]


def test_two_users_do_not_see_each_other_and_take_turns(users, served):
    for user in users:
        user.open()
    for engine in served[0]:
        engine.length, engine.overlapped = 8, False
    users[0].ask("甲的秘密")
    users[1].ask("乙的秘密")
    for user, secret in zip(users, "甲乙", strict=True):
        user.until(lambda user=user: user.said()[1][1].endswith("7，"), seconds=60)
        assert user.said()[0][0] == f"{secret}的秘密"
        assert {"甲": "乙", "乙": "甲"}[secret] not in str(user.said())
    assert not any(engine.overlapped for engine in served[0])
    assert all(len(turns) == 2 for turns, _ in served[0][0].asked[-2:])  # each question came without the other's


def test_nothing_was_asked_of_the_network(users):
    urls = set()
    for user in users:
        for entry in user.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                urls.add(message["params"]["request"]["url"])
    assert urls
    assert [
        url for url in urls if not url.startswith(("http://127.0.0.1:", "data:", "blob:", "chrome:", "about:"))
    ] == []


def test_ctrl_c_ends_serving(monkeypatch, capsys):
    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Event, "wait", interrupted)
    monkeypatch.setattr(web, "launch", lambda built: (None, "http://127.0.0.1:1/", None))
    web.serve({"model": Echo()}, DECODING)
    assert "the chat page: http://127.0.0.1:1/ (for this machine only" in capsys.readouterr().out
