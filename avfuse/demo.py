"""A page to click: where a model looks and listens, what it says, and the sound of what is clicked on."""

from .command import begin, read
from .options import DemoConfig

if __name__ == "__main__":
    begin("avfuse.demo", read(DemoConfig), "cli")

import os
import signal
import socket
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .data.clips import Clip, ClipDataset, open_window, read_clip
from .data.listing import walk
from .data.sound import encode, frame_of
from .data.workers import share_cores
from .encoder import AVEncoder
from .files import in_html, in_markdown, printable
from .tasks.classifier import Classifier
from .tasks.model import TaskModel
from .tasks.saved import load
from .tasks.separator import Separator, read_mixture
from .training.conditions import CONDITIONS
from .training.pictures import heat_maps, rgb

MAKERS = {  # by what the page does: the command that leaves a model for it
    "where fusion tokens look and listen": "avfuse train",
    "what a classifier says": "avfuse classify",
    "the sound of what is clicked on": "avfuse separate",
}
SECONDS, RATE = 10.0, 10  # of a clip that are shown at most; frames per second
SIDE, SAMPLE_RATE = 320, 44_100  # pixels of a picture on the page; Hz
BATCH = 16  # windows at once
REACH = 0.22  # of the shorter side: what is left of a picture around a click
TOLD = 3  # classes in a cell
OFFERED = 8  # clips to choose from
LARGEST = "2gb"  # file that may be dropped on the page
POLICY = b"default-src 'self' 'unsafe-inline' data: blob:; frame-ancestors 'self'"  # nothing from elsewhere


# --- what the models make of a clip -------------------------------------------------------------------------


def find_models(runs: Path) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """By the names of the runs, the models that training has left, and why others cannot be loaded."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    models, faults = {}, {}
    for run in sorted({path.parent for name in ("model", "checkpoints") for path in runs.glob(f"*/{name}")}):
        try:
            models[run.name] = load(run).to(device)
        except ValueError as error:
            faults[run.name] = str(error)
    return models, faults


def looks(encoder: AVEncoder, path: str | Path, start: float | None, target: Path) -> None:
    """Writes a video: the pictures as the model sees them, beside them where its fusion tokens look, below
    where they listen in the window around each moment, which a line marks; and the sound.

    It shows 10 s at most, those around the window at `start`.

    Raises:
        ValueError: the clip cannot be read or lacks pictures or sound.
    """
    inputs, device = encoder.inputs, encoder.fusion_tokens.device
    with open_window(path, inputs, start) as (reader, start):
        streams, length = reader.streams, inputs.audio_seconds
        TaskModel.check_both(streams.video or None, streams.audio or None)
        begin = max(0.0, min(start + (length - SECONDS) / 2, streams.seconds - SECONDS))
        seconds, last = min(SECONDS, streams.seconds - begin), max(0.0, streams.seconds - length)
        if encoder.frames == 1:  # a window around each frame, as far as there is sound around it
            times = begin + np.arange(0, seconds, 1 / RATE)[:, None]
            starts = np.clip(times[:, 0] - length / 2, 0, last)
        else:
            starts = np.linspace(begin, max(begin, begin + seconds - length), int(np.ceil(seconds / length)))
            times = starts[:, None] + inputs.frame_times
        dataset, order = ClipDataset([Clip(Path(path))], inputs, train=False), times.argsort(axis=None)
        images = torch.stack(dataset.images_at(times.flatten()[order].tolist(), streams, reader, None))
        images = images[order.argsort()].unflatten(0, times.shape)
        items = [
            dataset.window_from(at, streams, reader, None, images=list(own))
            for at, own in zip(starts.tolist(), images, strict=True)
        ]
        sound = reader.audio(begin, seconds, SAMPLE_RATE)
    image, audio = (torch.stack([item[name] for item in items]) for name in ("image", "audio"))
    looked, heard = [], []
    for pixels, spectrogram in zip(image.split(BATCH), audio.split(BATCH), strict=True):
        weights = encoder.fusion_attention(pixels.to(device), spectrogram.to(device))
        looked.append(heat_maps(encoder.image, weights[0].mean((1, 2)), pixels))
        heard.append(heat_maps(encoder.audio, weights[1].mean((1, 2)), spectrogram))
    frames = [rgb(frame, inputs) for frame in images.flatten(0, 1)]
    seen = overlays(torch.stack([frame.mean(-1) for frame in frames]), torch.cat(looked).flatten(0, -3))
    listened = overlays(levels(audio[:, 0]), torch.cat(heard)).flip(1)
    pictures = []
    for now in begin + np.arange(0, seconds, 1 / RATE):
        n = int(abs(times.flatten() - now).argmin())
        window = n // times.shape[1]
        top = torch.cat([enlarged(frames[n], SIDE), enlarged(seen[n], SIDE)], dim=1)
        below = enlarged(listened[window], 2 * SIDE, SIDE // 2)
        line = min(max(int((now - starts[window]) / length * 2 * SIDE), 0), 2 * SIDE - 2)
        below[:, line : line + 2] = 1.0
        pictures.append(torch.cat([top, below]))
    write_video(target, torch.stack(pictures), sound)


def levels(values: Tensor) -> Tensor:
    """Scaled to 0..1."""
    return (values - values.min()) / (values.max() - values.min()).clamp(min=1e-9)


def overlays(grey: Tensor, heat: Tensor) -> Tensor:
    """Grey pictures (N, height, width) in 0..1 under heat maps of one scale -> (N, height, width, 3)"""
    colours = torch.from_numpy(colormaps["inferno"]((heat / heat.max()).numpy())[..., :3]).float()
    return 0.4 * grey[..., None] + 0.6 * colours


def enlarged(picture: Tensor, width: int, height: int | None = None) -> Tensor:
    """(height, width, 3) of another size; its shape stays, up to an even height, where none is given."""
    height = height or round(width * picture.shape[0] / picture.shape[1] / 2) * 2
    return interpolate(picture.movedim(-1, 0)[None], (height, width), mode="bilinear")[0].movedim(0, -1)


def write_video(path: Path, pictures: Tensor, sound: np.ndarray) -> None:
    """(N, height, width, 3) in 0..1 at RATE, and (samples,) at SAMPLE_RATE, as an MP4 that browsers play."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        height, width = pictures.shape[1:3]
        video = container.add_stream("libx264", rate=RATE, width=width, height=height, pix_fmt="yuv420p")
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        frames = (pictures.clamp(0, 1) * 255).byte().numpy()
        encode(container, video, (av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames))
        encode(container, audio, [frame_of(sound, SAMPLE_RATE)])


@torch.no_grad()
def says(
    classifier: Classifier, path: str | Path, start: float | None, other: Tensor | None
) -> list[list[str]]:
    """Rows: what the model hears and sees, then the likeliest classes by image, by sound and by both.

    Args:
        other: another sound to hear, as a spectrogram.

    Raises:
        ValueError: the clip cannot be read.
    """
    inputs, device = classifier.encoder.inputs, classifier.encoder.fusion_tokens.device
    clip = read_clip(path, inputs, start=start)
    own = {name: x.to(device) for name, x in clip._asdict().items() if x is not None}
    batch = dict(audio=clip.audio, audio_present=torch.tensor([True]), index=torch.tensor([0]))
    if other is not None:
        batch["other_audio"] = other
    given = {"its own": own}
    for name, condition in CONDITIONS.items():
        if condition.modality in own and (name != "other_sound" or other is not None):
            given[condition.title] = condition.change(own, batch, inputs)
    rows = []
    for title, changed in given.items():
        audio = None if "audio_present" in changed else changed.get("audio")
        pixels = changed.get("image"), audio
        answers = classifier.predicted(*pixels) if classifier.ways(*pixels) else {}
        rows.append([title, *(told(answers.get(by, {})) for by in ("image", "audio", "both"))])
    return rows


def told(classes: dict[str, float]) -> str:
    return ", ".join(f"{name} {odds:.2f}" for name, odds in list(classes.items())[:TOLD])


@torch.no_grad()
def hears(
    separator: Separator, path: str | Path, start: float | None, x: float, y: float
) -> tuple[np.ndarray, Tensor]:
    """The sound (samples,) of what is seen around a place, in 0..1 from the top left; and the picture that
    the model was shown: all else in it is of the mean colour of pictures.

    Raises:
        ValueError: the clip cannot be read or lacks pictures or sound.
    """
    inputs, device = separator.encoder.inputs, separator.encoder.fusion_tokens.device
    image, audio = read_clip(path, inputs, start=start)
    separator.check_both(image, audio)
    mixture, heard = read_mixture(path, inputs, start)
    height, width = image.shape[-2:]
    rows, columns = torch.arange(height)[:, None] - y * height, torch.arange(width) - x * width
    image = image * (torch.hypot(rows, columns) <= REACH * min(height, width))
    sounds, _ = separator.separate(image[None].to(device), audio.to(device), mixture[None].to(device))
    return sounds[0, 0, :heard].cpu().numpy(), rgb(image[0], inputs)


# --- the page -----------------------------------------------------------------------------------------------


def page(models: dict[str, nn.Module], faults: dict[str, str], clips: list[Path]):
    """The `gradio.Blocks` over these models, see `find_models`, with clips to choose from. What a visitor has
    chosen is passed to each call and kept nowhere else.
    """
    import gradio as gr

    encoders = {name: getattr(model, "encoder", model) for name, model in models.items()}
    kinds = (
        {name: encoder for name, encoder in encoders.items() if encoder.shows_attention},
        {name: model for name, model in models.items() if isinstance(model, Classifier)},
        {name: model for name, model in models.items() if isinstance(model, Separator)},
    )

    def hear(path, text, name, where: gr.SelectData):
        try:
            size = size_of(kinds[2][name])
            x, y = (place / length for place, length in zip(where.index, size, strict=True))
            sound, picture = hears(kinds[2][name], path, seconds_of(text), x, y)
            picture = enlarged(picture, *size)
        except ValueError as error:
            raise gr.Error(in_words(error, path), duration=None, print_exception=False) from None
        rate = kinds[2][name].encoder.inputs.sample_rate
        return (rate, (32767 * sound.clip(-1, 1)).astype(np.int16)), (255 * picture).byte().numpy()

    with gr.Blocks(title="avfuse demo", analytics_enabled=False) as blocks:
        with gr.Row():
            clip = gr.File(label="a video: drop it here" + (", or choose one below" if clips else ""))
            start = gr.Textbox(label="start of the window in seconds; empty: in the middle")
            other = gr.File(
                label="a clip whose sound may replace it", value=str(clips[-1]) if clips else None
            )
        if clips:
            gr.Examples([[str(path)] for path in clips], [clip], label="clips to choose from")
        choices = []
        for (title, command), kind in zip(MAKERS.items(), kinds, strict=True):
            missing = "" if kind else f": no run has a model for it; `{command}` makes one"
            choices.append(gr.Dropdown([*kind], label=title + missing, visible=bool(kind), render=False))
            if not kind:
                gr.Markdown(f"**{title}**{missing}")
        for name, fault in faults.items():
            gr.Markdown(f"{in_markdown(name)} cannot be loaded: {in_markdown(fault)}")
        with gr.Row():
            with gr.Column():
                choices[0].render()
                video = gr.Video(
                    buttons=["download"], autoplay=True, loop=True, show_label=False, visible=bool(kinds[0])
                )
            with gr.Column(visible=bool(kinds[2])):
                choices[2].render()
                with gr.Row():
                    frame = gr.Image(
                        label="click on an object",
                        elem_id="frame",
                        format="png",
                        buttons=[],
                        interactive=False,
                    )
                    shown = gr.Image(label="what the model saw", format="png", buttons=[], interactive=False)
                sound = gr.Audio(
                    label="its sound", buttons=["download"], interactive=False, autoplay=True, elem_id="sound"
                )
        choices[1].render()
        headers = ["heard and seen", "by image", "by sound", "by both"]
        table = gr.Dataframe(headers=headers, interactive=False, wrap=True, visible=bool(kinds[1]))
        asked = [clip, start, other, *choices]
        options = dict(trigger_mode="always_last", api_visibility="private")
        gr.on([part.change for part in asked], partial(show, kinds), asked, [video, table, frame], **options)
        frame.select(hear, [clip, start, choices[2]], [sound, shown], **options)
    return blocks


def in_words(error: ValueError, *paths: str) -> str:
    """Of a file its name alone, not where the server keeps it. Gradio takes messages for HTML."""
    said = printable(error)
    for path in paths:
        said = said.replace(printable(path), printable(Path(path).name))
    return in_html(said)


def seconds_of(text: str) -> float | None:
    try:
        return float(text) if text.strip() else None
    except ValueError:
        raise ValueError(f"start must be a number of seconds, got {text!r}") from None


def show(kinds: tuple[dict[str, nn.Module], ...], path, text: str, other, *names):
    """What the chosen models, one of each kind or none, make of a clip; what cannot be had is a warning."""
    import gradio as gr

    if path is None:
        return None, None, None
    target = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")), "looks.mp4")
    messages, results = {}, []

    def sound_of(clip: str | None, classifier: Classifier) -> Tensor | None:
        """That in the middle of a clip; a warning where there is none."""
        try:
            sound = None if clip is None else read_clip(clip, classifier.encoder.inputs).audio
            if clip is not None and sound is None:
                raise ValueError(f"{clip} has no sound that could replace the clip's")
            return sound
        except ValueError as error:
            messages[in_words(error, clip)] = None

    parts = (
        lambda encoder: (looks(encoder, path, seconds_of(text), target), str(target))[1],
        lambda classifier: says(classifier, path, seconds_of(text), sound_of(other, classifier)),
        lambda separator: to_click(separator, path, seconds_of(text)),
    )
    for part, kind, name in zip(parts, kinds, names, strict=True):
        try:
            results.append(part(kind[name]) if name else None)
        except ValueError as error:
            results.append(None)
            messages[in_words(error, path)] = None  # what all parts say is said once
    for message in messages:
        gr.Warning(message, duration=None)
    return results


def to_click(separator: Separator, path: str | Path, start: float | None) -> np.ndarray:
    """The picture of the window, (height, width, 3) uint8, enlarged to `size_of`."""
    image, audio = read_clip(path, separator.encoder.inputs, start=start)
    separator.check_both(image, audio)
    picture = enlarged(rgb(image[0], separator.encoder.inputs), *size_of(separator))
    return (255 * picture).byte().numpy()


def size_of(separator: Separator) -> tuple[int, int]:
    """Width and height of the picture to click on."""
    height, width = separator.encoder.inputs.image_shape
    return SIDE, round(SIDE * height / width)


class Sealed:
    """ASGI middleware: browsers are told to load nothing from elsewhere, whatever the page asks for, and
    pages of other sites can post nothing to it.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def sealed(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            await send(message)

        headers = dict(scope.get("headers", ()))
        origin = headers.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await sealed({"type": "http.response.start", "status": 403})
            await send({"type": "http.response.body", "body": b"this page answers to itself alone"})
            return
        await self.app(scope, receive, sealed)


def serve(blocks, host: str, **options):
    """Starts the page's server, see `gradio.Blocks.launch`, without any address outside this machine.

    Where only this machine can reach it, it answers to no other name: a site that has its own name lead here
    would read the page through the visitor's browser.
    """
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    is_local = socket.gethostbyname(host).startswith("127.")
    names = [host, "localhost", "127.0.0.1"] if is_local else ["*"]
    return blocks.launch(
        server_name=host,
        share=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=LARGEST,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        app_kwargs=dict(
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(Sealed)]
        ),
        **options,
    )


def offered(folder: Path) -> list[Path]:
    """A few of its clips, but none of its folder "train", from which models may know them."""
    clips = [path for path in walk(folder)[0] if "train" not in path.relative_to(folder).parts]
    return clips[:: max(1, len(clips) // OFFERED)][:OFFERED]


def cli(config: DemoConfig) -> int:
    """The work of a command line, until Ctrl-C.

    Raises:
        ValueError: Gradio is missing, or the address cannot be listened at.
    """
    if not find_spec("gradio"):
        raise ValueError("avfuse demo needs Gradio: pip install 'avfuse[demo]'")
    try:
        socket.create_server((config.host, config.port)).close()
    except OSError as error:
        place = f"--host {config.host} --port {config.port}"
        raise ValueError(f"cannot listen at {place}: {error.strerror}") from None
    for number in (signal.SIGTERM, signal.SIGHUP):  # also end it in order
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    share_cores(config.threads, workers=0)
    models, faults = find_models(config.runs)
    for name, model in models.items():
        print(f"{printable(config.runs / name)}: {type(model).__name__}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="avfuse-") as folder:  # what visitors drop is gone at the end
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = page(models, faults, offered(config.clips))
        options = dict(prevent_thread_lock=True, quiet=True)
        address = serve(blocks, config.host, server_port=config.port, **options)[1]
        print(f"{address} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()
    return 0
