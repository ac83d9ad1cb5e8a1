"""Reading video files: exact frames, exact sound, and errors that say what is wrong with a file."""

import base64
import os
import pickle
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from videos import chirp, lag, number_of, numbered_frames, probe, read_audio, read_frame, write_video

from avfuse.data import container
from avfuse.data.container import ClipError, Part
from avfuse.data.decode import ClipReader
from avfuse.data.sound import join

OPEN = "open-gop=1:keyint=8:scenecut=0"  # frames before a key frame that need the frames before those
LEADING = "bframes=3:keyint=8:scenecut=0"


@pytest.fixture(autouse=True)
def every_file_is_closed(tmp_path):
    yield
    if Path("/proc/self/fd").exists():
        still_open = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        assert not [path for path in still_open if path.startswith(str(tmp_path))]


# ---------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mp4", "libx264", {"x264-params": LEADING}),
        ("mp4", "libx264", {"x264-params": OPEN}),
        ("mkv", "libx264", {"x264-params": OPEN}),
        ("mov", "libx264", {"g": "250"}),
        ("ts", "libx264", {"x264-params": LEADING}),
        ("flv", "libx264", {"x264-params": LEADING}),
        ("mp4", "libx265", {"x265-params": "keyint=10:log-level=none"}),
        ("mp4", "libsvtav1", {"preset": "12"}),
        ("webm", "libvpx-vp9", {"cpu-used": "8", "g": "10"}),
        ("avi", "mpeg4", {"g": "10", "qmax": "2"}),
    ],
)
def test_the_frame_shown_at_any_time(tmp_path, suffix, codec, options):
    path = write_video(tmp_path / f"a.{suffix}", 3, codecs=(codec, ""), audio=False, **options)
    with ClipReader(path) as clip:
        for number in (*range(30), 29, 3, 17, 16, 0):  # in order and not
            for moment in (0, 0.03, 0.097):
                frame = clip.frame(number / 10 + moment)
                assert frame.shape == (48, 64, 3) and frame.dtype == np.uint8
                assert number_of(frame) == number, (number, moment)
        assert number_of(clip.frame(-1)) == 0
        assert number_of(clip.frame(1e6)) == 29


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("avi", "libx264", {"x264-params": LEADING}),
        ("avi", "libx264", {"x264-params": OPEN}),
        ("avi", "libx264", {"bf": "0"}),
        ("avi", "mpeg4", {"g": "10", "bf": "1", "qmax": "2", "sc_threshold": "1000000000"}),
        ("avi", "mpeg4", {"g": "10", "bf": "2", "qmax": "2", "sc_threshold": "1000000000"}),
        ("avi", "mpeg2video", {"g": "10", "bf": "2", "qmax": "2", "sc_threshold": "1000000000"}),
    ],
)
def test_frames_of_files_that_tell_when_they_are_decoded(tmp_path, suffix, codec, options, packed):
    """AVI has no times of presentation. Some put a frame into the packet before and leave its own empty."""
    path = write_video(tmp_path / f"a.{suffix}", 3, codecs=(codec, ""), audio=False, **options)
    if packed and codec != "mpeg4":
        pytest.skip("a habit of MPEG-4 alone")
    if packed:
        path = pack(path, tmp_path / f"packed.{suffix}")
    with ClipReader(path) as clip:
        for number in (*range(30), 29, 3, 17, 16, 0):
            assert number_of(clip.frame(number / 10 + 0.05)) == number
        assert number_of(clip.frame(1e6)) == 29


def pack(path: Path, packed: Path) -> Path:
    """MPEG-4 with every B-frame in the packet of the frame before it, as DivX 5 writes it."""
    start, empty = b"\0\0\1\xb6", b"\0\0\1\xb6\x50\0\x7f"
    with av.open(str(path)) as source, av.open(str(packed), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        packets = [(bytes(packet), packet.is_keyframe) for packet in source.demux(video=0) if packet.size]
        contents, _ = map(list, zip(*packets, strict=True))
        contents[0] = contents[0].replace(start, b"\0\0\1\xb2DivX503b1393p" + start, 1)
        for n, content in enumerate(contents[1:], start=1):
            if content[content.index(start) + 4] >> 6 == 2 and contents[n - 1] is not empty:
                contents[n - 1], contents[n] = contents[n - 1] + content, empty
        for n, content in enumerate(contents):
            packet = av.Packet(content)
            packet.pts = packet.dts = n
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 10), stream, packets[n][1]
            output.mux(packet)
    return packed


def noisy_frames(count: int) -> np.ndarray:
    """Frames so large that no packet of a stream holds several."""
    noise = np.random.default_rng(0).integers(-14, 15, (count, 96, 128, 1))
    return (numbered_frames(count, (128, 96)) + noise).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["mpg", "vob", "ts"])
def test_frames_of_program_streams(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_video(
        path, codecs=("mpeg2video", ""), audio=False, video=noisy_frames(120), g="12", bf="2", qmax="2"
    )
    with ClipReader(path) as clip:
        assert clip.streams.seconds == pytest.approx(12.0, abs=0.2)
        for number in (*range(0, 120, 7), 119, 60, 3):
            assert number_of(clip.frame(number / 10 + 0.05)) == number % 32


def test_frames_after_a_seek_that_ends_between_key_frames(tmp_path):
    """Of pictures whose key frame was not read, MPEG-4 makes grey ones, and calls them whole."""
    texture = np.random.default_rng(0).integers(-60, 61, (1, 96, 128, 1))  # so that they refer to others
    video = (numbered_frames(30, (128, 96)) // 2 + 64 + texture).astype(np.uint8)
    path = write_video(tmp_path / "a.ts", video=video, audio=False, codecs=("mpeg4", ""), g="12", qmax="2")
    for times in ([n / 10 + 0.05] for n in range(30)), ([0.35, 1.65, 1.75, 2.85],):
        for own in times:
            with ClipReader(path) as clip:
                shown = [frame.mean() for frame in clip.frames(own)]
            assert np.allclose(shown, [video[int(10 * time)].mean() for time in own], atol=1.5), own


@pytest.mark.parametrize("suffix", ["ts", "mpg"])
def test_a_stream_that_begins_between_key_frames(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_video(
        path, video=noisy_frames(30), audio=False, codecs=("mpeg2video", ""), g="10", bf="2", qmax="2"
    )
    data = path.read_bytes()
    piece = {"mpg": 2048, "ts": 188}[suffix]
    path.write_bytes(data[len(data) * 3 // 8 // piece * piece :])
    with ClipReader(path) as clip:
        shown = [number_of(clip.frame(time / 10)) for time in range(20)]
    assert 5 < shown[0] < 25 and shown[-1] == 29
    assert all(step in (0, 1) for step in np.diff(shown))


def test_a_time_of_a_frame_that_floating_point_rounds_down(tmp_path):
    path = write_video(tmp_path / "a.mp4", 1, 30, audio=False)
    for number in range(30):
        assert number_of(read_frame(path, np.nextafter(number / 30, -1))) == number


def test_variable_frame_rate(tmp_path):
    times = [0, 0.1, 0.2, 0.75, 0.8, 2.0, 2.1]
    path = write_video(tmp_path / "a.mp4", times=times, video=numbered_frames(7), audio=False)
    for time, number in ((0.15, 1), (0.5, 2), (0.74, 2), (0.76, 3), (1.9, 4), (2.05, 5), (9, 6)):
        assert number_of(read_frame(path, time)) == number


def test_pictures_that_start_later_than_the_sound(tmp_path):
    times = [0.5 + 0.1 * number for number in range(10)]
    path = write_video(tmp_path / "a.mp4", 2, times=times, video=numbered_frames(10))
    assert [number_of(read_frame(path, time)) for time in (0, 0.49, 0.55, 0.65, 1.45)] == [0, 0, 0, 1, 9]


def test_a_single_frame_is_shown_throughout_the_sound(tmp_path):
    path = write_video(tmp_path / "a.mp4", 3, 25, video=numbered_frames(1))
    assert probe(path) == (True, True, 3.0, 25.0)
    assert {number_of(read_frame(path, time)) for time in (0, 1.5, 3)} == {0}


def test_only_the_group_of_the_frame_is_decoded(tmp_path):
    """What lies outside is overwritten, so decoding any of it would fail or show in the frame."""
    path = write_video(tmp_path / "a.mp4", 30, audio=False, g="20", bf="0", sc_threshold="0")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert len(packets) == 300 and [p.is_keyframe for p in packets[200:221]] == [True] + 19 * [False] + [True]
    for packet in packets[:200] + packets[206:]:
        data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    assert number_of(read_frame(path, 20.55)) == 205 % 32
    with pytest.raises(ClipError):
        read_frame(path, 20.65)


@pytest.mark.parametrize(("cut", "b_frames"), [(0.8, "2"), (0.75, "0")])
def test_frames_that_an_edit_list_hides(tmp_path, cut, b_frames):
    """Cutting without encoding keeps the frames from the key frame to the cut, which are not to be shown."""
    whole = write_video(tmp_path / "whole.mp4", 3, audio=False, g="30", bf=b_frames, sc_threshold="0")
    path, options = tmp_path / "cut.mp4", {"avoid_negative_ts": "disabled"}
    with av.open(str(whole)) as source, av.open(str(path), "w", options=options) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                shift = round(cut / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                output.mux(packet)
    assert [number_of(read_frame(path, time)) for time in (-1, 0, 0.07, 0.17, 1.07, 9)] == [
        8,
        8,
        8,
        9,
        18,
        29,
    ]


def test_frames_are_turned_upright(tmp_path):
    corner = np.zeros((1, 32, 64, 3), np.uint8)
    corner[:, :16, :32] = 255  # top left
    path = write_video(tmp_path / "a.mp4", video=corner, audio=False)
    assert read_frame(path, 0).shape == (32, 64, 3)
    data = path.read_bytes()
    header = data.index(b"tkhd")
    matrix = data.index(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), header)
    # Right becomes down and down becomes left: a quarter turn clockwise, as phones held upright write it.
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:matrix] + turned + data[matrix + len(turned) :])
    frame = read_frame(path, 0)
    assert frame.shape == (64, 32, 3)
    assert frame[:32, 16:].mean() > 240  # top right
    assert frame[32:].mean() < 15 and frame[:32, :16].mean() < 15


@pytest.mark.parametrize("turn", [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_all_ways_to_turn_and_mirror(tmp_path, turn, transposed):
    """A display matrix (a, b, c, d) takes a point (x, y) to (a x + c y, b x + d y)."""
    a, b, c, d = (turn[1], turn[0], turn[3], turn[2]) if transposed else turn
    source = np.array([[230, 160], [90, 20]], np.uint8)
    path = write_video(
        tmp_path / "a.mp4", video=source.repeat(32, 0).repeat(32, 1)[None, ..., None].repeat(3, 3)
    )
    data = path.read_bytes()
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    at = data.index(plain, data.index(b"tkhd"))
    path.write_bytes(data[:at] + turned + data[at + len(turned) :])
    truth = np.zeros((2, 2))
    for x, y in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
        truth[(b * x + d * y + 1) // 2, (a * x + c * y + 1) // 2] = source[(y + 1) // 2, (x + 1) // 2]
    assert np.abs(read_frame(path, 0)[16::32, 16::32, 0] - truth).max() < 8


def test_an_orientation_in_the_stream_itself_counts_for_all_its_frames(tmp_path):
    """H.264 has it beside key frames alone."""
    halves = np.zeros((20, 48, 64, 3), np.uint8)
    halves[:, :, :32] = 200
    plain = write_video(tmp_path / "plain.mp4", video=halves, audio=False, g="5", bf="2", sc_threshold="0")
    bits = "0" + "1" + "0" + 16 * "0" + "010" + "0" + "1"  # mirrored left to right
    message = bytes([6, 47, 3]) + int(bits, 2).to_bytes(3, "big").replace(b"\0\0\0", b"\0\0\3\0") + b"\x80"
    path = tmp_path / "a.mp4"
    with av.open(str(plain)) as source, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size and packet.is_keyframe:
                new = av.Packet(len(message).to_bytes(4, "big") + message + bytes(packet))
                new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
                packet, new.is_keyframe = new, True
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    for time in (0, 0.25, 0.45, 1.05, 1.95):
        frame = read_frame(path, time)
        assert frame[:, 40:].mean() > 190 and frame[:, :24].mean() < 10


@pytest.mark.parametrize(
    ("ratio", "width"), [("2/1", 128), ("4/3", 85), ("16/11", 93), ("8/9", 57), ("1/2", 32), ("230/229", 64)]
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_pixels_are_square(tmp_path, ratio, width, suffix):
    path = write_video(tmp_path / f"a.{suffix}", audio=False, aspect=ratio)
    assert read_frame(path, 0.55).shape == (48, width, 3) and number_of(read_frame(path, 0.55)) == 5


def test_pixels_whose_shape_the_pictures_alone_tell(tmp_path):
    path = write_video(tmp_path / "a.mp4", audio=False, aspect="4/3")
    path.write_bytes(path.read_bytes().replace(b"pasp", b"free"))
    assert read_frame(path, 0.55).shape == (48, 85, 3)


def test_pixels_that_no_picture_has(tmp_path):
    path = write_video(tmp_path / "a.mp4", audio=False, aspect="2/1")
    data = path.read_bytes()
    at = data.index(b"pasp") + 4
    path.write_bytes(data[:at] + struct.pack(">2I", 10**9, 1) + data[at + 8 :])
    with pytest.raises(ClipError, match="its pictures cannot be decoded: .* times as wide as high"):
        read_frame(path, 0)


# Shares of red and blue in luma: ITU-R BT.709 (high definition), BT.601 (what files without a tag are taken
# for), and BT.2020.
LUMA = {"ITU709": (0.2126, 0.0722), "ITU601": (0.299, 0.114), "BT2020": (0.2627, 0.0593)}
BANDS = (255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40)  # red, green and blue


@pytest.mark.parametrize(
    ("matrix", "pixels", "is_full", "is_told"),
    [
        ("ITU709", "yuv420p", False, True), ("ITU709", "yuv420p10le", False, True),
        ("ITU709", "yuv420p", True, True), ("ITU709", "yuv444p", False, True),
        ("ITU601", "yuv420p", True, True), ("ITU601", "yuv420p", False, False),
        ("BT2020", "yuv420p10le", False, True),
    ],
)  # fmt: skip
def test_colours(tmp_path, matrix, pixels, is_full, is_told):
    """Bands of one colour each, as the standards turn it into luma and chroma."""
    path, bits = tmp_path / "a.mp4", 10 if pixels.endswith("10le") else 8
    (red, blue), unit = LUMA[matrix], 2 ** (bits - 8)
    rgb = np.array(BANDS).repeat(32, 0).T / 255
    y = np.array([red, 1 - red - blue, blue]) @ rgb
    chroma = (rgb[2] - y) / (2 * (1 - blue)), (rgb[0] - y) / (2 * (1 - red))
    low, luma, width = (0, 255, 255) if is_full else (16, 219, 224)
    rows = [low + luma * y, *(128 + width * c for c in chroma)]
    frame = av.VideoFrame(128, 64, pixels)
    for plane, row in zip(frame.planes, rows, strict=True):
        row = np.clip(row[:: 128 // plane.width] * unit, 0, 2**bits - 1).round()
        lines = np.tile(row.astype(np.uint16 if bits > 8 else np.uint8), (plane.height, 1))
        plane.update(np.pad(lines, ((0, 0), (0, plane.line_size // lines.itemsize - plane.width))))
    if is_told:
        frame.colorspace = Colorspace[matrix]
        frame.color_range = ColorRange.JPEG if is_full else ColorRange.MPEG
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, pixels
        if is_told:
            stream.codec_context.colorspace = frame.colorspace
            stream.codec_context.color_range = frame.color_range
        container.mux([*stream.encode(frame), *stream.encode()])
    np.testing.assert_allclose(read_frame(path, 0)[32, 16::32].astype(int), BANDS, atol=3)


def test_a_frame_that_the_decoder_would_make_up_in_part(tmp_path):
    tiles = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8).repeat(32, 0).repeat(32, 1)
    video = np.stack([np.roll(tiles, 3 * number, axis=1) for number in range(20)])
    path = write_video(tmp_path / "a.mp4", video=video, audio=False, g="20", bf="0", slices="4")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][10]
    last, end = packet.pos, packet.pos + packet.size
    while (behind := last + 4 + int.from_bytes(data[last : last + 4], "big")) < end:
        last = behind  # slice
    data[last + 12 : end] = np.random.default_rng(1).bytes(end - last - 12)
    path.write_bytes(data)
    assert read_frame(path, 0.95).shape == (256, 256, 3)
    for time in (1.05, 1.15):
        with pytest.raises(ClipError, match="its pictures are damaged before"):
            read_frame(path, time)


def test_frames_too_large_to_be_meant(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", audio=False)
    monkeypatch.setattr(container, "MAX_PIXELS", 64 * 48 // 2)
    with pytest.raises(ClipError, match="its pictures cannot be decoded"):
        read_frame(path, 0)
    with ClipReader(path) as reader, pytest.raises(ClipError, match="cannot be decoded to its end"):
        reader.survey()  # which shows none of them


# ----------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000])
def test_sound_starts_at_the_sample(tmp_path, rate):
    """AAC begins with a packet that only primes the decoder: off by one would be 1024 samples."""
    path = write_video(tmp_path / "a.mp4", 6, sample_rate=rate)
    for start in (0, 0.01, 0.29, 0.31, 1.23456, 2.5):
        sound = read_audio(path, start, 3, 16_000)
        truth = chirp((round(start * 16_000) + np.arange(48_000)) / 16_000)
        assert sound.shape == (48_000,) and sound.dtype == np.float32
        assert lag(sound, truth) == 0
        assert np.abs(sound - truth).mean() < 0.01, start


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000, 96_000])
def test_resampling_neither_shifts_nor_distorts(tmp_path, rate):
    tones = [(0.3, 440.0, 0.1), (0.2, 3_000.0, 2.0)]

    def play(times):
        return sum(height * np.sin(2 * np.pi * pitch * times + phase) for height, pitch, phase in tones)

    samples = play(np.arange(4 * rate) / rate)[None]
    path = tmp_path / "a.flac"
    write_video(path, sample_rate=rate, audio=samples, video=False, codecs=("", "flac"))
    for start in (0.2, 1.23456):
        sound = read_audio(path, start, 2, 16_000)
        truth = play((round(start * 16_000) + np.arange(32_000)) / 16_000)
        assert np.abs(sound - truth).max() < 1e-3, start


def test_the_last_samples_are_not_lost_in_the_filter(tmp_path):
    samples = 0.3 * np.sin(2 * np.pi * 440 * np.arange(88_200) / 44_100)[None]
    path = write_video(
        tmp_path / "a.flac", sample_rate=44_100, audio=samples, video=False, codecs=("", "flac")
    )
    sound = read_audio(path, 1, 1, 16_000)
    truth = 0.3 * np.sin(2 * np.pi * 440 * (1 + np.arange(16_000) / 16_000))
    assert np.abs(sound - truth).max() < 0.005


@pytest.mark.parametrize("start", [0, 1.3, 2.5])
def test_rounded_time_stamps_leave_no_clicks(tmp_path, start):
    path = write_video(tmp_path / "a.mkv", 6, sample_rate=44_100, codecs=("libx264", "flac"))
    sound = read_audio(path, start, 3, 44_100)
    late = lag(sound, chirp(start + np.arange(3 * 44_100) / 44_100))
    assert abs(late) <= 23  # Matroska rounds to 1 ms
    truth = chirp((round(start * 44_100) - late + np.arange(3 * 44_100)) / 44_100)
    assert np.abs(sound - truth).max() < 1e-4


def test_mp3_of_which_every_packet_builds_on_those_before(tmp_path):
    path = write_video(tmp_path / "a.mp4", 6, sample_rate=44_100, codecs=("libx264", "libmp3lame"))
    sound = read_audio(path, 2.5, 3, 16_000)
    assert lag(sound, chirp(2.5 + np.arange(48_000) / 16_000)) == 0


def test_resampling_removes_what_the_new_rate_cannot_hold(tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 11_000 * np.arange(96_000) / 48_000)[None]  # would alias to 5 kHz
    path = tmp_path / "a.wav"
    write_video(path, sample_rate=48_000, audio=tone, video=False, codecs=("", "pcm_s16le"))
    assert np.abs(read_audio(path, 0.2, 1, 16_000)).max() < 1e-3


SIDE, BACK = 0.5**0.5, 0.5  # -3 dB and -6 dB


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("mono", [1]),
        ("stereo", [1 / 2, 1 / 2]),
        ("quad", [SIDE, SIDE, BACK, BACK]),
        ("5.0", [SIDE, SIDE, 1, BACK, BACK]),
        ("5.1", [SIDE, SIDE, 1, 0, BACK, BACK]),
        ("5.1(side)", [SIDE, SIDE, 1, 0, BACK, BACK]),
        ("7.1", [SIDE, SIDE, 1, 0, BACK, BACK, BACK, BACK]),
    ],
)
@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s32le", "pcm_f64le", "flac"])
def test_channels_are_mixed_by_their_places(tmp_path, layout, weights, codec):
    """Two of them alike, more as FFmpeg does: the one in the centre in full, the one for bass not at all."""
    audio = np.random.default_rng(0).uniform(-1, 1, (len(weights), 16_000)).astype(np.float32)
    path = tmp_path / ("a.flac" if codec == "flac" else "a.wav")
    write_video(path, audio=audio, layout=layout, video=False, codecs=("", codec))
    sound = read_audio(path, 0, 1, 16_000)
    assert np.abs(sound - weights @ audio).max() < sum(weights) * (1 / 64 if codec == "pcm_u8" else 1e-4)


@pytest.mark.parametrize("channels", [4, 6, 8])
def test_channels_without_places_are_taken_for_the_usual_ones(tmp_path, channels):
    audio = np.random.default_rng(0).uniform(-1, 1, (channels, 16_000)).astype(np.float32)
    path = write_video(tmp_path / "a.wav", audio=audio, video=False, codecs=("", "pcm_s16le"))
    data = bytearray(path.read_bytes())
    mask = data.index(b"fmt ") + 28
    assert int.from_bytes(data[mask : mask + 4], "little").bit_count() == channels
    data[mask : mask + 4] = bytes(4)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.audio[0].layout.name == f"{channels} channels"
    weights = {4: [SIDE, SIDE, 1, BACK], 6: [SIDE, SIDE, 1, 0, BACK, BACK]}
    truth = weights.get(channels, [SIDE, SIDE, 1, 0, BACK, BACK, BACK, BACK]) @ audio
    assert np.abs(read_audio(path, 0, 1, 16_000) - truth).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.wav", "adpcm_ms"),
        ("a.wav", "adpcm_ima_wav"),
        ("a.mov", "adpcm_ima_qt"),
        ("a.mp3", "libmp3lame"),
        ("a.opus", "libopus"),
        ("a.mpg", "mp2"),
        ("a.ts", "ac3"),
    ],
)
def test_every_piece_of_sound_continues_the_one_before(tmp_path, name, codec):
    """Although only the first of a packet has a time, or times are estimates."""
    rate = 48_000
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(12 * rate) / rate)[None]
    path = write_video(tmp_path / name, audio=tone, sample_rate=rate, video=False, codecs=("", codec))
    for start in (0.1, 1.7):
        sound = read_audio(path, start, 9, rate)
        spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)))) ** 2
        assert spectrum[440 * 9 - 3 : 440 * 9 + 4].sum() > 0.997 * spectrum.sum()


def test_sound_to_its_last_packet_where_the_length_is_an_estimate(tmp_path):
    """As in MPEG-TS, in which it is read off a few packets at the end."""
    samples = np.zeros((1, 5 * 48_000), np.float32)
    samples[:, 5 * 48_000 - 9_600 :] = 0.5 * np.sin(0.2 * np.arange(9_600))
    path = write_video(tmp_path / "a.ts", 5, 25, sample_rate=48_000, audio=samples, codecs=("libx264", "mp2"))
    seconds = probe(path).seconds
    assert seconds == pytest.approx(5.0, abs=0.03)
    sound = read_audio(path, seconds - 0.4, 0.4, 16_000)
    assert np.abs(sound[:2_000]).max() < 0.01 and np.abs(sound[4_000:6_000]).max() > 0.4


def test_eight_planar_channels(tmp_path):
    """PyAV's own conversion to an array reads past the eighth."""
    times = np.arange(96_000) / 48_000
    audio = np.stack([chirp(times) * (0.2 if channel in (2, 4, 6) else 0) for channel in range(8)])
    path = write_video(tmp_path / "a.mp4", 2, audio=audio, sample_rate=48_000)
    sound = read_audio(path, 0.5, 1, 16_000)
    truth = chirp(0.5 + np.arange(16_000) / 16_000) * 0.2 * (1 + BACK + BACK)
    assert np.abs(sound - truth).mean() < 0.01


def test_short_sound_is_extended_by_mirrored_copies(tmp_path):
    audio = np.random.default_rng(0).uniform(-1, 1, (1, 16_000)).astype(np.float32)
    path = write_video(tmp_path / "a.flac", audio=audio, video=False, codecs=("", "flac"))
    there = audio[0]
    sound = read_audio(path, 0, 3.5, 16_000)
    assert np.allclose(sound, np.concatenate([there, there[::-1], there, there[:-8_001:-1]]), atol=1e-4)
    sound = read_audio(path, 0.75, 1, 16_000)
    end = there[12_000:]
    assert np.allclose(sound, np.concatenate([end, end[::-1], end, end[::-1]]), atol=1e-4)


def test_the_padding_of_the_last_packet_is_no_sound(tmp_path):
    path = write_video(tmp_path / "a.mp4", 1.3)  # 20,800 samples: not a whole number of packets of 1024
    sound = read_audio(path, 0, 2, 16_000)
    assert np.abs(sound[20_800:26_000] - sound[20_799:15_599:-1]).max() < 1e-6


def test_silence_before_the_sound_and_in_its_gaps(tmp_path):
    first, second = np.full((1, 8_000), 0.5, np.float32), np.full((1, 16_000), -0.25, np.float32)
    audio = [(0.5, first), (1.5, second)]
    path = write_video(tmp_path / "a.mkv", 3, audio=audio, codecs=("libx264", "pcm_s16le"))
    truth = np.concatenate([np.zeros(8_000), first[0], np.zeros(8_000), second[0]])
    assert np.allclose(read_audio(path, 0, 2.5, 16_000), truth, atol=1e-4)
    for start in (0.52, 1.1):
        place = round(16_000 * start)
        assert np.allclose(read_audio(path, start, 1, 16_000), truth[place : place + 16_000], atol=1e-4)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "ts", "flv"])
def test_pictures_and_sound_share_a_clock(tmp_path, suffix):
    """A flash and a click at 2 s: formats that keep the start of AAC shift both alike."""
    video = numbered_frames(1).repeat(80, 0)
    video[40:] = 235
    audio = np.zeros((1, 4 * 44_100), np.float32)
    audio[:, 2 * 44_100 : 2 * 44_100 + 200] = 0.8 * np.sin(0.3 * np.arange(200))
    path = write_video(tmp_path / f"a.{suffix}", 4, 20, video=video, audio=audio, sample_rate=44_100)
    for start in (0.0, 1.5):
        sound = read_audio(path, start, 2.5, 16_000)
        click = start + np.flatnonzero(np.abs(sound) > 0.3)[0] / 16_000
        assert read_frame(path, click - 0.002).mean() < 30
        assert read_frame(path, click + 0.002).mean() > 220


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what the system reads")
@pytest.mark.parametrize("order", [("frame", "audio"), ("audio", "frame")])
def test_a_window_is_read_without_what_lies_before_it(tmp_path, order):
    """In Matroska, whose index is of pictures alone."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        pictures = output.add_stream("libx264", rate=5, options={"g": "10"})
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        sound = output.add_stream("pcm_s16le", rate=48_000, layout="mono")
        for number, picture in enumerate(numbered_frames(450)):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = number, Fraction(1, 5)
            output.mux(pictures.encode(frame))
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 9_600), np.int16), "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, number * 9_600, Fraction(1, 48_000)
            output.mux(sound.encode(frame))
        output.mux(pictures.encode(None))

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    with ClipReader(path) as clip:
        before = bytes_read()
        for what in order:
            clip.frame(80) if what == "frame" else clip.audio(80, 3, 16_000)
        assert bytes_read() - before < path.stat().st_size / 4


def test_no_sound_from_there_on(tmp_path):
    path = write_video(tmp_path / "a.mp4", 2)
    with pytest.raises(ClipError, match="has no sound from 2.5 s on"):
        read_audio(path, 2.5, 1, 16_000)
    assert read_audio(path, 1.9, 1, 16_000).shape == (16_000,)


def test_sound_that_is_not_finite(tmp_path):
    audio = np.zeros((1, 16_000), np.float32)
    audio[0, 9_000] = np.nan
    path = write_video(tmp_path / "a.wav", audio=audio, video=False, codecs=("", "pcm_f32le"))
    with pytest.raises(ClipError, match="not finite"):
        read_audio(path, 0.5, 0.4, 16_000)


# --------------------------------------------------------------------------------------------------- probing


def test_probe(tmp_path):
    assert probe(write_video(tmp_path / "both.mp4", 2, 25)) == (True, True, 2.0, 25.0)
    assert probe(write_video(tmp_path / "silent.mp4", 2, audio=False)) == (True, False, 2.0, 10.0)
    assert probe(write_video(tmp_path / "dark.mp4", 2, video=False)) == (False, True, 2.0, 0.0)
    audio = chirp(np.arange(48_000) / 16_000)[None]
    assert probe(write_video(tmp_path / "longer.mp4", 1, audio=audio)).seconds == 3.0


def test_a_length_that_the_header_does_not_tell(tmp_path):
    path = write_video(tmp_path / "live.webm", 2, container={"live": "1"}, codecs=("libvpx", "libopus"))
    with av.open(str(path)) as container:
        assert not container.duration
    assert probe(path) == (True, True, pytest.approx(2.0, abs=0.03), pytest.approx(10.0))


def test_a_stream_with_nothing_in_it(tmp_path):
    path = write_video(tmp_path / "a.mkv", video=np.empty((0, 48, 64, 3), np.uint8))
    assert probe(path)[:2] == (False, True)
    with pytest.raises(ClipError):
        read_frame(path, 0)
    path = write_video(tmp_path / "b.mkv", audio=np.empty((1, 0), np.float32), codecs=("libx264", "flac"))
    assert probe(path)[:2] == (True, False)


DEFAULT, COVER = Disposition.default, Disposition.attached_pic


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "ts"])
@pytest.mark.parametrize(
    ("pictures", "sounds"),
    [
        (["still", "film"], [(0.5, None)]),
        (["cover", "film"], [(0.5, None)]),
        (["film"], [(0.1, Disposition(0)), (0.5, DEFAULT)]),
    ],
)
def test_the_stream_that_is_read(tmp_path, suffix, pictures, sounds):
    """A film, not a picture beside it, and the sound that is marked as default."""
    if suffix == "ts" and len(sounds) > 1:
        pytest.skip("MPEG-TS has no mark of that kind")
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as output:
        tracks = []
        for what in pictures:
            codec = "mjpeg" if what == "cover" else "libx264"
            stream = output.add_stream(codec, rate=10)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "yuvj420p" if what == "cover" else "yuv420p"
            if what == "cover":
                stream.disposition = COVER
            content = numbered_frames(20) if what == "film" else np.full((1, 48, 64, 3), 250, np.uint8)
            tracks.append(
                (stream, [av.VideoFrame.from_ndarray(frame) for frame in content], Fraction(1, 10), 1)
            )
        for peak, disposition in sounds:
            stream = output.add_stream("aac", rate=16_000, layout="mono")
            if disposition is not None:
                stream.disposition = disposition
            tone = np.float32(peak * np.sin(0.2 * np.arange(32_768)))[None]
            frames = [
                av.AudioFrame.from_ndarray(tone[:, n : n + 1024], "flt", "mono")
                for n in range(0, 32_768, 1024)
            ]
            tracks.append((stream, frames, Fraction(1, 16_000), 1024))
        for stream, frames, unit, length in tracks:
            for number, frame in enumerate(frames):
                frame.pts, frame.time_base = number * length, unit
                if stream.type == "audio":
                    frame.sample_rate = 16_000
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
    assert number_of(read_frame(path, 1.28)) == 12
    assert np.abs(read_audio(path, 0.5, 1, 16_000)).max() == pytest.approx(0.5, abs=0.1)


def test_cover_art_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as output:
        art = output.add_stream("mjpeg", rate=1)
        art.width, art.height, art.pix_fmt, art.disposition = 64, 48, "yuvj420p", Disposition.attached_pic
        sound = output.add_stream("aac", rate=16_000, layout="mono")
        output.mux(art.encode(av.VideoFrame.from_ndarray(numbered_frames(1)[0], format="rgb24")))
        output.mux(art.encode(None))
        samples = chirp(np.arange(16_000) / 16_000)
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = 16_000
        output.mux(sound.encode(frame))
        output.mux(sound.encode(None))
    with av.open(str(path)) as container:
        assert container.streams.video[0].disposition & Disposition.attached_pic
    assert probe(path)[:2] == (False, True)
    with pytest.raises(ClipError, match="has no pictures"):
        read_frame(path, 0)


# --------------------------------------------------------------------------------------------------- hostile


def hostile(folder: Path) -> dict[str, Path]:
    """Files that no part of can be read, by what is wrong with them."""
    good = write_video(folder / "good.mp4", 3)
    whole = good.read_bytes()
    quick = write_video(folder / "quick.mp4", 3, container={"movflags": "faststart"}).read_bytes()
    media = quick.index(b"mdat") + 4
    noise = np.random.default_rng(0)
    contents = {
        "empty": b"",
        "garbage": noise.bytes(50_000),
        "text": b"not a video\n" * 1000,
        "cut before its header": whole[: len(whole) * 3 // 4],
        "cut after its header": quick[: media + (len(quick) - media) // 2],
        "no media": quick[:media] + bytes(len(quick) - media),
        "noise for media": quick[:media] + noise.bytes(len(quick) - media),
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n%s\n#EXT-X-ENDLIST\n" % bytes(good),
        "script": b"ffconcat version 1.0\nfile good.mp4\n",
    }
    paths = {"missing": folder / "missing.mp4", "folder": folder / "folder.mp4"}
    paths["folder"].mkdir()
    for what, content in contents.items():
        paths[what] = folder / f"{what}.mp4"
        paths[what].write_bytes(content)
    return paths


@pytest.mark.parametrize("share", [0.4, 0.75, 0.95])
@pytest.mark.parametrize(
    ("name", "codecs"),
    [
        ("a.mp4", ("libx264", "aac")),
        ("a.mkv", ("libx264", "aac")),
        ("a.webm", ("libvpx-vp9", "libopus")),
        ("a.avi", ("mpeg4", "libmp3lame")),
        ("a.ts", ("libx264", "aac")),
        ("a.m2ts", ("libx264", "ac3")),
        ("a.flv", ("libx264", "aac")),
        ("a.wmv", ("wmv2", "mp2")),
        ("a.opus", ("", "libopus")),
        ("a.flac", ("", "flac")),
        ("a.mp3", ("", "libmp3lame")),
        ("a.wav", ("", "pcm_s16le")),
    ],
)
def test_files_that_are_cut_off(tmp_path, name, codecs, share):
    path = write_video(tmp_path / name, 3, sample_rate=48_000, video=bool(codecs[0]), codecs=codecs)
    assert probe(path).audio
    data = path.read_bytes()
    size = int(len(data) * share)
    path.write_bytes(data[: size + (size % 188 == 0) + (size % 192 == 0)])
    with pytest.raises(ClipError, match="is cut off"):
        probe(path)


def test_a_survey_tells_damage_from_an_end_that_is_missing(tmp_path):
    def reason(content: bytes) -> str:
        path.write_bytes(content)
        with ClipReader(path) as reader:
            try:
                reader.survey()
            except ClipError as error:
                return error.reason
        return "none"

    path = write_video(tmp_path / "a.flv", 2)
    data, half = path.read_bytes(), path.stat().st_size // 2
    assert "the data are damaged" in reason(data[:half] + bytes(500) + data[half + 500 :])
    path = write_video(tmp_path / "a.ts", 2)
    data = path.read_bytes()
    packets = len(data) // 188  # cut between two, the file looks whole, but its last picture or sound may not
    reasons = {reason(data[: 188 * (packets - n)]) for n in range(20, 60, 5)}
    assert reasons == {"none", "is cut off: fetch it again"}


@pytest.mark.parametrize("noise", [bytes(500), np.random.default_rng(0).bytes(500)], ids=["zeros", "noise"])
@pytest.mark.parametrize(("name", "codec"), [("a.flac", "flac"), ("a.oga", "flac"), ("a.opus", "libopus")])
def test_a_survey_hears_what_the_decoder_leaves_out(tmp_path, name, codec, noise):
    """Of frames and pages with a wrong sum, without a word."""
    rate = 48_000
    path = write_video(tmp_path / name, 10, sample_rate=rate, video=False, codecs=("", codec))
    with ClipReader(path) as reader:
        assert reader.survey()["sound_end"] == pytest.approx(10.0, abs=0.05)
    data, half = path.read_bytes(), path.stat().st_size // 2
    path.write_bytes(data[:half] + noise + data[half + 500 :])
    with ClipReader(path) as reader, pytest.raises(ClipError, match="to its end: the data are damaged"):
        reader.survey()
    if name == "a.flac":  # what follows is at the right time
        with pytest.raises(ClipError, match="its sound cannot be decoded: the data are damaged"):
            read_audio(path, 4.5, 1, rate)
        assert np.abs(read_audio(path, 7, 1, rate) - chirp(7 + np.arange(rate) / rate)).max() < 1e-4


def test_a_hole_in_ogg_is_no_damage(tmp_path):
    """Opus sends nothing where it is silent: one page less, here in the middle of a tar archive."""
    path = write_video(tmp_path / "a.opus", 10, sample_rate=48_000, video=False, codecs=("", "libopus"))
    pages = [b"OggS" + page for page in path.read_bytes().split(b"OggS")[1:]]
    data = b"".join(pages[:5] + pages[6:]) + b"TAG" + bytes(125)
    path.write_bytes(b"OggS" * 128 + data + b"OggS" * 128)
    with ClipReader(Path("a.opus"), Part(path, 512, len(data))) as reader:
        assert reader.survey()["sound_end"] == pytest.approx(10.0, abs=0.05)
    assert len(pages) > 7


def test_sizes_that_say_nothing_are_no_reason(tmp_path):
    """Those of files that were written to a pipe, and of one to which something was added."""
    path = write_video(tmp_path / "a.wav", 1, video=False, codecs=("", "pcm_s16le"))
    data = bytearray(path.read_bytes())
    for size in (0, 0xFFFFFFFF, 0x7FFFF024, 1_000):
        data[4:8] = size.to_bytes(4, "little")
        path.write_bytes(data)
        assert probe(path).seconds == pytest.approx(1.0)
    path = write_video(tmp_path / "a.mp3", 1, video=False, codecs=("", "libmp3lame"))
    data = bytearray(path.read_bytes())
    at = max(data.find(b"Xing"), data.find(b"Info"))
    data[at + 4 : at + 8], data[at + 12 : at + 16] = b"\0\0\0\1", b"\xff" * 4  # frames alone, and no size
    path.write_bytes(data)
    assert probe(path).audio
    path = write_video(tmp_path / "a.mkv", 1, container={"live": "1"})
    assert probe(path).video
    path.write_bytes(path.read_bytes() + b"more")
    assert probe(path).video


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n",
            "it is a web page, not video .'<!DOCTYPE html>",
        ),
        (b"\n  <?xml version='1.0'?><Error/>", "it is a web page, not video"),
        (b'{"error": "quota exceeded"}', "it is text, not video .*quota exceeded.*fetch it again"),
        ("caf\u00e9 ".encode() * 2_000, "it is text, not video"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "it is a Git LFS pointer, not the file itself: git lfs pull",
        ),
        (b"", "it is empty"),
        (bytes(3_000), "it is of no kind that is read here, or damaged"),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mp3"])
def test_files_that_are_no_video(tmp_path, content, reason, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ClipError, match=f"cannot be opened: {reason}"):
        probe(path)


def test_pipes_and_devices_are_not_opened(tmp_path):
    """Opening a pipe would wait for somebody to write to it."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    for name in ("pipe", "link", "zero"):
        with pytest.raises(ClipError, match="cannot be opened: it is not a file"):
            probe(tmp_path / f"{name}.mp4")


def test_a_file_that_names_others_opens_none_of_them(tmp_path, monkeypatch):
    """Were the formats that do so let in, each by itself would open what is in this one."""
    clip = write_video(tmp_path / "a.ts", 1)
    content = base64.b64encode(clip.read_bytes()).decode()
    path = tmp_path / "list.m3u8"
    path.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ndata:video/mp2t;base64,{content}\n#EXT-X-ENDLIST\n"
    )
    formats = dict(container.OPTIONS, format_whitelist="hls,mpegts")
    options = {"extension_picky": "0", "allowed_extensions": "ALL", "allowed_segment_extensions": "ALL"}
    monkeypatch.setattr(
        container, "OPTIONS", {name: formats[name] for name in ("format_whitelist",)} | options
    )
    assert number_of(read_frame(path, 0.5)) in (4, 5)  # without a whitelist of protocols
    monkeypatch.setattr(container, "OPTIONS", formats | options)
    with pytest.raises(ClipError):
        read_frame(path, 0.5)


def test_hostile_files_are_errors_that_say_what(tmp_path):
    for what, path in hostile(tmp_path).items():
        for read in (lambda path: read_frame(path, 2.5), lambda path: read_audio(path, 0, 3, 16_000)):
            with pytest.raises(ClipError) as caught:
                read(path)
            assert caught.value.path == path and caught.value.reason, what
            assert str(caught.value) == f"{path}: {caught.value.reason}"


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("missing", "there is no such file"),
        ("folder", "it is a folder"),
        ("empty", "it is empty"),
        ("cut after its header", "is cut off"),
    ],
)
def test_reasons(tmp_path, what, reason):
    with pytest.raises(ClipError, match=reason):
        probe(hostile(tmp_path)[what])


def test_names_and_titles_that_are_no_text(tmp_path):
    path = write_video(tmp_path / "%d, concat: \u00fc.mkv", 1, title="a plain title")
    data = path.read_bytes()
    assert data.count(b"a plain title") == 1
    path.write_bytes(data.replace(b"a plain title", b"\xff plain title"))
    assert probe(path).video and number_of(read_frame(path, 0.55)) == 5


def test_a_lying_duration(tmp_path):
    path = write_video(tmp_path / "a.mkv", 2)
    data = path.read_bytes()
    duration = data.index(b"\x44\x89\x88") + 3  # float64 milliseconds
    path.write_bytes(data[:duration] + struct.pack(">d", 1e9) + data[duration + 8 :])
    assert probe(path).seconds == pytest.approx(2.0, abs=0.07)  # by its packets
    assert number_of(read_frame(path, 5e5)) == 19
    with pytest.raises(ClipError, match="has no sound from 500000 s on"):
        read_audio(path, 5e5, 3, 16_000)


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(ClipError(Path("a.mp4"), "is empty")))
    assert (error.path, error.reason, str(error)) == (Path("a.mp4"), "is empty", "a.mp4: is empty")


def test_arguments(tmp_path):
    path = write_video(tmp_path / "a.mp4", 1)
    for name, call in {
        "seconds .* got nan": lambda: read_frame(path, float("nan")),
        "start .* got inf": lambda: read_audio(path, float("inf"), 1, 16_000),
        "seconds .* above 0, got 0": lambda: read_audio(path, 0, 0, 16_000),
        "sample_rate .* got -1": lambda: read_audio(path, 0, 1, -1),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.parametrize("start", [2.0, 2.1, 2.3, 5.0])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_a_window_behind_the_end_of_the_sound_is_named(tmp_path, start, rate):
    path = write_video(tmp_path / "a.mp4", 2.0, sample_rate=rate)
    with pytest.raises(ClipError, match=f"has no sound from {start:g} s on"):
        read_audio(path, start, 0.5, 16_000)


def test_gaps_of_less_than_40_ms_are_closed():
    def gap(seconds):
        ones = np.ones(1000, np.float32)
        sound = join([(0.0, 1000, ones), (1.0 + seconds, 1000, ones)], 1000, 0, 3000)
        return len(sound) - 2000, int((sound == 0).sum())

    assert gap(0.039) == (0, 0) and gap(0.041) == (41, 41) and gap(-0.039) == (0, 0)
