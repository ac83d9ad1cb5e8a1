"""The demo page: its parts as arrays, and in a real Chromium."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import wave
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from io import BytesIO
from itertools import combinations
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from videos import write_video

from avfuse import create_encoder
from avfuse.data.clips import read_clip
from avfuse.data.decode import ClipReader
from avfuse.demo import MAKERS, OFFERED, SIDE, cli, find_models, hears, looks, offered, page, says, serve
from avfuse.options import DemoConfig
from avfuse.presets import SMALL_INPUTS
from avfuse.tasks.classifier import Classifier
from avfuse.tasks.separator import Separator

NAMES = ["red", "green", "blue", "grey"]
ROUNDING = 2 / 32767  # of a sound on its way to the page


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """As training leaves them: a classifier of clips of several frames, a separator, a damaged model, and
    a run that goes on."""
    torch.manual_seed(0)
    runs = tmp_path_factory.mktemp("runs")
    moving = create_encoder("micro", pair_bias="time", frames=4)
    Classifier(moving, 4, class_names=NAMES).save_pretrained(runs / "classify/model")
    separator = Separator(create_encoder("tiny", inputs=SMALL_INPUTS), decoder_dim=16)
    separator.save_pretrained(runs / "separate/model")
    (runs / "damaged/model").mkdir(parents=True)
    (runs / "damaged/model/config.json").write_text("{")
    (runs / "training/checkpoints").mkdir(parents=True)
    return runs


@pytest.fixture(scope="module")
def models(runs):
    models, faults = find_models(runs)
    assert models.keys() == {"classify", "separate"} and faults.keys() == {"damaged", "training"}
    assert "a run that has not ended" in faults["training"]
    return models


def test_clips_to_train_on_are_not_offered_wherever_the_folder_lies(tmp_path):
    folder = tmp_path / "train" / "mine"
    for path in "a.mp4", "train/b.mp4", *(f"test/{n}.mp4" for n in range(20)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    clips = [str(path.relative_to(folder)) for path in offered(folder)]
    assert len(clips) == OFFERED and "a.mp4" in clips and "train/b.mp4" not in clips


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """4 s of a picture of two objects, a bright one on the left and a dark one on the right."""
    pictures = np.full((40, 96, 96, 3), 120, np.uint8)
    pictures[:, 36:60, 12:36], pictures[:, 36:60, 60:84] = 255, 0
    return write_video(tmp_path_factory.mktemp("clips") / "two.mp4", 4, video=pictures)


@pytest.mark.parametrize("name", ["classify", "separate"])
@pytest.mark.parametrize("seconds", [1.0, 4.0, 13.0])
def test_looks_last_as_long_as_the_clip(models, tmp_path, name, seconds):
    path = write_video(tmp_path / "a.mp4", seconds)
    looks(models[name].encoder, path, None, tmp_path / "looks.mp4")
    with ClipReader(tmp_path / "looks.mp4") as reader:
        assert reader.streams.video and reader.streams.audio
        assert reader.picture_end == pytest.approx(min(seconds, 10), abs=0.1)
        assert reader.frame(0.5).shape == (SIDE + SIDE // 2, 2 * SIDE, 3)


def test_says(models, clip, tmp_path):
    other = write_video(tmp_path / "other.mp4", 4, audio=np.float32(np.sin(np.arange(64_000)))[None])
    sound = read_clip(other, models["classify"].encoder.inputs).audio
    table = {title: cells for title, *cells in says(models["classify"], clip, None, sound)}
    image, audio, both = zip(*table.values(), strict=True)
    assert list(table)[0] == "its own" and len(table) == 6
    assert len(set(image[:-1])) == 1 and image[-1] != image[0]  # the last: a grey picture
    assert audio[-2] == both[-2] == "" and audio[-1] == audio[0]  # told that there is no sound
    own = models["classify"].predict(clip)["both"]
    assert both[0].split(", ")[0] == "{} {:.2f}".format(*next(iter(own.items())))
    assert len(says(models["classify"], clip, None, None)) == 5
    dark = write_video(tmp_path / "dark.mp4", 4, video=False)
    assert [row[0] for row in says(models["classify"], dark, None, None)][-1] != "a grey picture"


def test_hears_what_is_clicked_on(models, clip):
    """Calls at once neither mix nor change the model."""
    separator, places = models["separate"], [(n / 10, 0.5) for n in range(10)]
    before = {name: weight.clone() for name, weight in separator.state_dict().items()}
    alone = [hears(separator, clip, None, *place) for place in places]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda place: hears(separator, clip, None, *place), places))
    for (sound, picture), (again, shown) in zip(alone, together, strict=True):
        np.testing.assert_allclose(sound, again, atol=1e-6)
        assert torch.equal(picture, shown)
    (left, bright), (right, dark) = alone[2], alone[8]
    assert len(left) == SMALL_INPUTS.samples and abs(left - right).max() > 1e-6
    assert bright.max() > 0.9 and bright.min() > 0.3 and dark.max() < 0.6 and dark.min() < 0.1
    assert all(torch.equal(weight, before[name]) for name, weight in separator.state_dict().items())


def test_what_a_clip_lacks_is_named(models, tmp_path):
    silent = write_video(tmp_path / "silent.mp4", audio=False)
    for call in (
        lambda: looks(models["classify"].encoder, silent, None, tmp_path / "x.mp4"),
        lambda: hears(models["separate"], silent, None, 0.5, 0.5),
    ):
        with pytest.raises(ValueError, match="it has no sound, and both are needed"):
            call()


# --- as a command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_serves_until_it_is_told_to_end(tmp_path, number):
    """With no run at all the page says how to make some; at the end nothing of visitors is left."""
    pytest.importorskip("gradio", reason="needs the extra: pip install 'avfuse[demo]'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen at .*--port {port}: Address already in use"):
            cli(DemoConfig(port=port))
    folder = tmp_path / "temporary"
    folder.mkdir()
    command = [sys.executable, "-m", "avfuse", "demo", "--port", str(port)]
    environment = dict(os.environ, TMPDIR=str(folder), PYTHONPATH=os.pathsep.join(sys.path))
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}/"
    assert process.stdout.readline() == f"{address} (Ctrl-C ends it)\n"
    shown = urlopen(address, timeout=60).read().decode()
    assert all(f"no run has a model for it; `{command}` makes one" in shown for command in MAKERS.values())
    process.send_signal(number)
    assert process.wait(60) == 0 and list(folder.iterdir()) == []


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(models, tmp_path_factory):
    pytest.importorskip("gradio", reason="needs the extra: pip install 'avfuse[demo]'")
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
    blocks = page(models, {"damaged": "no model"}, [])
    yield serve(blocks, "127.0.0.1", prevent_thread_lock=True, quiet=True)[1]
    blocks.close(verbose=False)
    patch.undo()


@pytest.fixture
def browser(address, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (
        "headless no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync "
        f"no-first-run window-size=1400,1200 user-data-dir={tmp_path}/profile"
    ).split():
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.implicitly_wait(60)
    yield driver
    driver.quit()


@pytest.mark.parametrize("name, status", [("localhost", 200), ("127.0.0.1", 200), ("evil.example", 400)])
def test_page_answers_to_the_names_of_this_machine_alone(address, name, status):
    """A site whose name leads here is refused: browsers would let it read what the page says."""
    connection = HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("GET", "/config", headers={"Host": f"{name}:80"})
    assert connection.getresponse().status == status


def drop(browser, path):
    """As from a folder beside the browser, which hands a file over only by an input, here one of our own."""
    ours = browser.execute_script("""
        const ours = document.createElement("input");
        ours.type = "file";
        return document.body.appendChild(ours)""")
    ours.send_keys(str(path))
    zone = browser.find_element("css selector", "[aria-dropeffect=copy]")
    browser.execute_script(
        """const [ours, zone] = arguments, dataTransfer = new DataTransfer();
        dataTransfer.items.add(ours.files[0]);
        ours.remove();
        zone.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }))""",
        ours,
        zone,
    )


def click(browser, x, y):
    from selenium.webdriver import ActionChains

    frame = until(browser, lambda: browser.find_element("css selector", "#frame img"))
    size = frame.size
    place = int((x - 0.5) * size["width"]), int((y - 0.5) * size["height"])
    ActionChains(browser).move_to_element_with_offset(frame, *place).click().perform()


def until(browser, condition):
    from selenium.common import WebDriverException
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 90, ignored_exceptions=[WebDriverException]).until(lambda _: condition())


def heard(browser, before=""):
    """The sound on the page once it is another one than before: its address, and its samples."""
    find = "const a = document.querySelector('#sound a[download]'); return a ? a.href : ''"
    source = until(browser, lambda: (s := browser.execute_script(find)) != before and s)
    with wave.open(BytesIO(urlopen(source, timeout=60).read())) as file:
        return source, np.frombuffer(file.readframes(file.getnframes()), np.int16)


def test_page(browser, address, models, clip, tmp_path):
    browser.get(address)
    drop(browser, clip)
    click(browser, 0.25, 0.5)
    source, left = heard(browser)
    click(browser, 0.75, 0.5)
    _, right = heard(browser, source)
    assert abs(left.astype(int) - right).max() > 0
    for sound, x in ((left, 0.25), (right, 0.75)):
        truth, _ = hears(models["separate"], clip, None, x, 0.5)
        assert abs(sound / 32767 - truth).max() < 2e-3  # of a pixel by which a click may miss
    assert "its own" in browser.page_source and "cannot be loaded" in browser.page_source
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    loaded = {u for u in urls if urlsplit(u).scheme in ("http", "https", "ws", "wss")}
    assert {urlsplit(u).hostname for u in loaded} == {"127.0.0.1"}
    # nor does the policy refuse what the page needs
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


CLICKS = """return Array.from({ length: 10 }, (_, n) => {
  const page = pages[n % pages.length], frame = page.document.querySelector("#frame img");
  const box = frame.getBoundingClientRect(), clientY = Math.round(box.y + box.height / 2);
  const clientX = Math.round(box.x + box.width * (2 * n + 1) / 20);
  frame.dispatchEvent(new page.MouseEvent("click", { bubbles: true, clientX, clientY }));
  return [(clientX - box.x) / box.width, (clientY - box.y) / box.height];
})"""


@pytest.mark.parametrize("number", [10, 1])
def test_ten_clicks_at_once_do_not_mix(browser, address, models, tmp_path, number):
    """In ten pages each gets the sound of its own click; in one page that of the last click stays."""
    clip = write_video(tmp_path / "short.mp4", 1.0)
    browser.get(address)
    browser.execute_script(f"pages = [window]; while (pages.length < {number}) pages.push(open(location))")
    browser.execute_script("pages.forEach((page, n) => page.name = n - pages.length)")
    opener = browser.current_window_handle
    for window in browser.window_handles:
        browser.switch_to.window(window)
        drop(browser, clip)
        until(browser, lambda: browser.find_element("css selector", "#frame img").size["width"])
    browser.switch_to.window(opener)
    places = browser.execute_script(CLICKS)  # none is answered before the last is made
    places = np.round(np.array(places) * SIDE) / SIDE  # to pixels
    sounds = [hears(models["separate"], clip, None, *place)[0] for place in places]
    assert min(abs(a - b).max() for a, b in combinations(sounds, 2)) > 2 * ROUNDING
    for window in browser.window_handles:
        browser.switch_to.window(window)
        sound = sounds[int(browser.execute_script("return name"))]
        until(browser, lambda sound=sound: abs(heard(browser)[1] / 32767 - sound).max() < ROUNDING)


def test_page_names_what_is_broken(browser, address, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video\n" * 500)
    browser.get(address)
    drop(browser, broken)
    toast = until(browser, lambda: browser.find_element("css selector", ".toast-body").text)
    assert "broken.mp4 cannot be" in toast and "Traceback" not in browser.page_source
