"""Files of rare kinds that FFmpeg reads otherwise after a seek than from the start, or says little about."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.audio.layout import AudioLayout
from videos import chirp, lag, number_of, numbered_frames, probe, read_audio, read_frame, write_video

from avfuse.data.container import ClipError
from avfuse.data.decode import ClipReader
from avfuse.data.sound import mix_of


def numbers(path: Path, times: list[float]) -> list[int]:
    """The numbers of the frames shown at rising times, read one by one and all together."""
    with ClipReader(path) as clip:
        alone = [number_of(clip.frame(seconds)) for seconds in times]
        assert [number_of(frame) for frame in clip.frames(times)] == alone
    return alone


def copy(source: Path, path: Path, late: float = 0.0, **options: str) -> Path:
    """The packets of a file in another, all of them later by so many seconds."""
    with av.open(str(source)) as read, av.open(str(path), "w", options=options) as written:
        streams = [written.add_stream_from_template(stream) for stream in read.streams]
        for packet in read.demux():
            if packet.size:
                step = round(late / packet.time_base)
                packet.pts = packet.pts + step
                packet.dts = None if packet.dts is None else packet.dts + step
                packet.stream = streams[packet.stream_index]
                written.mux(packet)
    return path


# --- pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "codec", "kind"), [("avi", "rawvideo", "pal8"), ("mov", "qtrle", "gray")])
def test_a_palette_that_only_the_first_packet_has(tmp_path, suffix, codec, kind):
    path, colours = tmp_path / f"a.{suffix}", np.zeros((256, 4), np.uint8)
    colours[:, 0], colours[:, 1:] = 255, np.arange(256)[:, None]
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, kind
        for number, picture in enumerate(numbered_frames(20)[..., 0]):
            frame = av.VideoFrame.from_ndarray(picture if kind == "gray" else (picture, colours), format=kind)
            frame.pts, frame.time_base = number, Fraction(1, 10)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert numbers(path, [0.05, 1.05, 1.95]) == [0, 10, 19]
    with ClipReader(path) as clip:
        assert clip.survey()["motion"] == pytest.approx(7 * 16, abs=2)  # from frame 0 to frame 16


@pytest.mark.parametrize("suffix", ["ts", "m2ts"])
def test_broadcasts_whose_first_pictures_last_for_seconds(tmp_path, suffix):
    """They are decoded long before they are shown, and MPEG-TS is searched by times of decoding."""
    times = [0, 2, 4, *(4.04 + 0.04 * n for n in range(60))]
    video = numbered_frames(63).astype(int) + np.random.default_rng(0).integers(-9, 10, (63, 48, 64, 1))
    video = video.clip(0, 255).astype(np.uint8)
    path = write_video(tmp_path / f"a.{suffix}", fps=25, video=video, audio=False, times=times, g="12")
    assert numbers(path, [1, 3, 4.02, 4.3, 5]) == [0, 1, 2, 9, 27]


def test_fragments_that_begin_late(tmp_path):
    source = write_video(tmp_path / "a.mkv", 6, g="10")
    options = dict(movflags="frag_keyframe", avoid_negative_ts="disabled")
    path = copy(source, tmp_path / "a.mp4", late=7, **options)
    with av.open(str(path)) as container:
        start = container.start_time / av.time_base
        shown = {
            frame.time - start: number_of(frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        }
    times = [0.0, 1.5, 2.5, 4.0]
    wanted = [
        shown[max(time for time in [min(shown), *shown] if time <= max(seconds, min(shown)))]
        for seconds in times
    ]
    assert numbers(path, times) == wanted and len(set(wanted)) == 4
    assert np.abs(read_audio(path, 1, 1, 16_000)).max() > 0.4


def test_slow_pictures_in_matroska(tmp_path):
    """It does not say when they are decoded, and FFmpeg's guess is far off."""
    times = [2.0 * n for n in range(10)]
    path = write_video(tmp_path / "a.mkv", 20, fps=1, video=numbered_frames(10), times=times)
    assert numbers(path, [1, 3, 5, 7, 9, 19]) == [0, 1, 2, 3, 4, 9]


def test_pixels_that_change_their_shape(tmp_path):
    """As where a broadcast goes over from 4:3 to 16:9."""
    path = tmp_path / "a.ts"
    options = dict(codecs=("mpeg2video", ""), audio=False, g="5")
    parts = [write_video(tmp_path / f"{n}.ts", 2, aspect=f"{n}/1", **options) for n in (2, 1)]
    with av.open(str(path), "w") as output:
        stream = None
        for late, part in enumerate(parts):
            with av.open(str(part)) as container:
                stream = stream or output.add_stream_from_template(container.streams.video[0])
                for packet in container.demux(video=0):
                    if packet.size:
                        step = round(2 * late / packet.time_base)
                        packet.pts, packet.dts, packet.stream = packet.pts + step, packet.dts + step, stream
                        output.mux(packet)
    with ClipReader(path) as clip:
        widths = [clip.frame(seconds).shape[1] for seconds in (0.5, 1.5, 2.5, 3.5, 1.5)]
    assert widths[0] > 100 and widths == [widths[0], widths[0], 64, 64, widths[0]]


# --- sound --------------------------------------------------------------------------------------------------


def programme(
    folder: Path, number: int, frequency: float, size: tuple[int, int], rates: tuple[int, int]
) -> list[bytes]:
    """The packets of a broadcast of one programme, with a tone."""
    pids = {"mpegts_start_pid": str(0x100 * number), "mpegts_pmt_start_pid": str(0x1000 + number)}
    path = folder / f"{number}.ts"
    with av.open(str(path), "w", options=pids | {"mpegts_service_id": str(number)}) as output:
        pictures, sound = (
            output.add_stream("libx264", rate=10),
            output.add_stream("mp2", rate=48_000, layout="stereo"),
        )
        (pictures.width, pictures.height), pictures.pix_fmt = size, "yuv420p"
        pictures.bit_rate, sound.bit_rate = rates
        tone = 16_000 * np.sin(2 * np.pi * frequency * np.arange(4 * 48_000) / 48_000)
        for n, picture in enumerate(numbered_frames(40, size)):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = n, Fraction(1, 10)
            output.mux(pictures.encode(frame))
            both = np.repeat(tone[n * 4800 : (n + 1) * 4800].astype(np.int16), 2)[None]
            frame = av.AudioFrame.from_ndarray(both, "s16", "stereo")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, n * 4800, Fraction(1, 48_000)
            output.mux(sound.encode(frame))
        for stream in (pictures, sound):
            output.mux(stream.encode(None))
    content = path.read_bytes()
    return [content[start : start + 188] for start in range(0, len(content), 188)]


def crc32_mpeg(content: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte << 24
        for _ in range(8):
            crc = ((crc << 1) ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1) & 0xFFFFFFFF
    return crc.to_bytes(4, "big")


@pytest.mark.parametrize("rates", [(64_000, 384_000), (384_000, 64_000)], ids=str)
def test_the_sound_of_the_same_programme(tmp_path, rates):
    """Of two in one broadcast, whichever has the better sound."""
    one = programme(tmp_path, 1, 440, (128, 96), (1_000_000, rates[0]))
    two = programme(tmp_path, 2, 1000, (64, 48), (1_000_000, rates[1]))
    table = struct.pack(">2BHBxx4H", 0xB0, 0x11, 1, 0xC1, 1, 0xE000 | 0x1001, 2, 0xE000 | 0x1002)
    table = b"\0" + b"\0" + table + crc32_mpeg(b"\0" + table)
    packets = sorted(
        [(n / len(packets), packet) for packets in (one, two) for n, packet in enumerate(packets)],
        key=lambda x: x[0],
    )
    path, tables = tmp_path / "both.ts", 0
    with open(path, "wb") as output:
        for _, packet in packets:
            pid = (packet[1] & 31) << 8 | packet[2]
            if pid == 0:  # the list of programmes
                packet = bytes((0x47, 0x40, 0, 0x10 | tables % 16)) + table.ljust(184, b"\xff")
                tables += 1
            if pid != 0x11:
                output.write(packet)
    with av.open(str(path)) as container:
        assert len(container.streams) == 4
    tones = {96: 440, 48: 1000}
    tone = np.abs(np.fft.rfft(read_audio(path, 1, 1, 16_000))).argmax()
    assert tone == tones[len(read_frame(path, 1.05))]


@pytest.mark.parametrize("rate", [44_100, 16_000])
def test_packets_of_sound_that_do_not_tell_their_length(tmp_path, rate):
    path = write_video(tmp_path / "a.mkv", 10, sample_rate=rate, codecs=("libx264", "wavpack"))
    for start in (0.0, 1.5, 3.5, 6.4):
        sound = read_audio(path, start, 1, rate)
        assert np.abs(sound - chirp(start + np.arange(rate) / rate)).max() < 0.01


@pytest.mark.parametrize("suffix", ["mp3", "mkv"])
def test_mp3_of_few_bits_builds_on_many_packets(tmp_path, suffix):
    path, rate = tmp_path / f"a.{suffix}", 16_000
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libmp3lame", rate=rate, layout="mono")
        stream.bit_rate = 8_000
        tone = (0.5 * np.sin(2 * np.pi * 500 * np.arange(8 * rate) / rate)).astype(np.float32)
        for begin in range(0, len(tone), 576):
            frame = av.AudioFrame.from_ndarray(tone[None, begin : begin + 576].copy(), "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    for start in np.arange(1, 6, 0.23):
        level = read_audio(path, start, 0.5, rate).reshape(-1, 160).std(1)
        assert level.min() > 0.2, start


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.oga", "flac", {}),
        ("a.oga", "flac", {"page_duration": "5000000"}),
        ("a.wav", "adpcm_ms", {}),
        ("a.wav", "adpcm_yamaha", {}),
    ],
)
def test_sound_with_wrong_times_after_a_seek(tmp_path, name, codec, container):
    """FFmpeg is seconds off in the first page of Ogg that it comes to, 6 ms for each second in the WAV, and
    of Yamaha's ADPCM it does not know how long a packet is.
    """
    path, rate = tmp_path / name, 44_100
    write_video(path, 14, sample_rate=rate, video=False, codecs=("", codec), container=container)
    assert probe(path).seconds == pytest.approx(14.0, abs=0.05)  # the last packet of ADPCM is filled up
    with ClipReader(path) as clip:
        for start in (0.0, 3.3, 5.87, 8.98, 12.9, 1.5):
            truth = chirp((round(start * rate) + np.arange(rate)) / rate)
            assert np.abs(clip.audio(start, 1, rate) - truth).mean() < 0.05, start


@pytest.mark.parametrize("rates", [(44_100, 22_050), (48_000, 44_100), (22_050, 44_100), (24_000, 48_000)])
def test_aac_whose_sample_rate_changes(tmp_path, rates):
    """As where files were joined: FFmpeg counts time as if it did not, and is seconds off. Headers tell a
    rate that doubles from one that SBR has doubled.
    """
    parts = [
        write_video(tmp_path / f"{n}.aac", 5, sample_rate=rate, video=False) for n, rate in enumerate(rates)
    ]
    path = tmp_path / "a.aac"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    reason = f"its sample rate is {rates[0]} and then {rates[1]}"
    with ClipReader(path) as clip:
        assert abs(lag(clip.audio(2, 1, 16_000), chirp(2 + np.arange(16_000) / 16_000))) < 1_000
        for start in (4.7, 6.0):
            with pytest.raises(ClipError, match=reason):
                clip.audio(start, 1, 16_000)
    with ClipReader(path) as clip, pytest.raises(ClipError, match=reason):
        clip.survey()


@pytest.mark.parametrize("per_second", [1, 16_000, 31_000, 64_000])
def test_a_wrong_number_of_bytes_a_second(tmp_path, per_second):
    """By which FFmpeg seeks: of 16 bits at 16 kHz there are 32,000."""
    audio = chirp(np.arange(96_000) / 16_000)[None]
    path = write_video(tmp_path / "a.wav", audio=audio, video=False, codecs=("", "pcm_s16le"))
    data = path.read_bytes()
    at = data.index(b"fmt ") + 16
    assert data[at : at + 4] == struct.pack("<I", 32_000)
    path.write_bytes(data[:at] + struct.pack("<I", per_second) + data[at + 4 :])
    assert probe(path).seconds == 6.0
    for start in (0.0, 1.3, 4.9):
        place = round(16_000 * start)
        assert np.abs(read_audio(path, start, 1, 16_000) - audio[0, place : place + 16_000]).max() < 1e-4


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "aac"), ("mkv", "pcm_s16le")])
def test_a_window_before_the_sound_begins(tmp_path, suffix, codec):
    audio = [(7.0, chirp(np.arange(32_000) / 16_000)[None])]
    path = write_video(tmp_path / f"a.{suffix}", 10, audio=audio, codecs=("libx264", codec))
    for start in (0.0, 3.0):
        assert not read_audio(path, start, 3, 16_000).any()
    sound = read_audio(path, 6, 3, 16_000)
    assert not sound[:14_000].any() and abs(lag(sound[16_000:], chirp(np.arange(32_000) / 16_000))) < 20


@pytest.mark.parametrize(
    ("suffix", "codecs"),
    [("mkv", ("libx264", "pcm_s16le")), ("webm", ("libvpx-vp9", "libopus")), ("mp4", ("libx264", "aac"))],
)
@pytest.mark.parametrize("late", [1.5, 7.0])
def test_sound_before_the_first_picture(tmp_path, suffix, codecs, late):
    """Matroska's index leads to pictures alone, before which there is sound, too."""
    truth = chirp(np.arange(160_000) / 16_000)
    times = [late + 0.1 * number for number in range(round(10 * (10 - late)))]
    video = numbered_frames(len(times))
    path = write_video(tmp_path / f"a.{suffix}", 10, times=times, video=video, codecs=codecs)
    for start in (0.0, 0.6, late - 1, late - 0.3, late + 1):
        sound = read_audio(path, start, 1, 16_000)
        begin = round(16_000 * start)
        assert abs(lag(sound, truth[begin : begin + 16_000])) < 240, start  # Opus moves the start
    assert numbers(path, [0, late + 0.05, late + 1.25]) == [0, 0, 12]


@pytest.mark.parametrize(
    ("suffix", "codecs", "late"),
    [
        ("mkv", ("libx264", "aac"), 0.0),
        ("mkv", ("libx264", "pcm_s16le"), 1.5),
        ("webm", ("libvpx-vp9", "libopus"), 0.0),
    ],
)
def test_the_start_of_the_sound_after_late_pictures(tmp_path, suffix, codecs, late):
    """As windows are read: all pictures first, then the sound of each."""
    times, many = [late + 0.1 * number for number in range(200)], dict(cluster_time_limit="500")
    video = numbered_frames(len(times))
    path = write_video(
        tmp_path / f"a.{suffix}", 21, times=times, video=video, codecs=codecs, g="5", container=many
    )
    for seconds in 3.0, 8.5, 14.0, 19.0:
        for start in 0.0, 0.2, 1.0:
            with ClipReader(path) as clip:
                alone = clip.audio(start, 1, 16_000)
            with ClipReader(path) as clip:
                clip.frame(seconds)
                sound = clip.audio(start, 1, 16_000)
            assert np.abs(sound - alone).max() < 0.01 < np.abs(alone).max(), (seconds, start)


def test_a_window_within_a_gap(tmp_path):
    piece = chirp(np.arange(32_000) / 16_000)[None]
    audio = [(0.0, piece), (8.0, piece)]
    path = write_video(tmp_path / "a.mkv", 10, audio=audio, codecs=("libx264", "pcm_s16le"))
    assert not read_audio(path, 3.5, 3, 16_000).any()
    sound = read_audio(path, 1, 3, 16_000)  # its end is no sound, not a mirrored copy of its begin
    assert np.abs(sound[:16_000] - piece[0, 16_000:]).max() < 0.01 and not sound[16_100:].any()


def test_ambisonics_are_heard_from_all_sides():
    assert mix_of(AudioLayout("ambisonic 1")).tolist() == [1, 0, 0, 0]


# --- lengths ------------------------------------------------------------------------------------------------


def test_matroska_whose_sound_is_shorter_than_its_pictures(tmp_path):
    audio = chirp(np.arange(32_000) / 16_000)[None]
    path = write_video(tmp_path / "a.mkv", 10, audio=audio)
    assert probe(path).seconds == pytest.approx(2.0, abs=0.07)
    with ClipReader(path) as clip:
        assert clip.picture_end == pytest.approx(10.0, abs=0.01)


@pytest.mark.parametrize(("codec", "rate"), [("mp2", 48_000), ("libmp3lame", 44_100), ("libmp3lame", 16_000)])
def test_lengths_of_sound_in_avi(tmp_path, codec, rate):
    """Its header may count for sound how long B-frames are held back, and FFmpeg some packets of it twice."""
    path = write_video(tmp_path / "a.avi", 8, sample_rate=rate, codecs=("libx264", codec))
    late = 0.1 if rate > 16_000 else 0.3
    assert probe(path).seconds == pytest.approx(8.0, abs=late)


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_lengths_of_what_begins_late(tmp_path, suffix):
    source = write_video(tmp_path / "source.mp4", 6)
    options = dict(movflags="frag_keyframe", avoid_negative_ts="disabled") if suffix == "mp4" else {}
    path = copy(source, tmp_path / f"a.{suffix}", late=20, **options)
    assert probe(path).seconds == pytest.approx(6.0, abs=0.15)
    sound = read_audio(path, 2, 1, 16_000)
    assert abs(lag(sound, chirp(2 + np.arange(16_000) / 16_000))) < 0.15 * 16_000


@pytest.mark.parametrize("kinds", [("soun",), ("vide",), ("soun", "vide")], ids="-".join)
def test_lengths_behind_an_empty_edit(tmp_path, kinds):
    """1.5 s of nothing, then 3 s of what there is."""
    source = write_video(tmp_path / "source.mp4", 6, g="10")
    path = tmp_path / "a.mp4"
    path.write_bytes(with_edits(source.read_bytes(), kinds, [(1.5, -1.0), (3.0, 0.0)]))
    late = 0.0 if len(kinds) == 2 else 1.5
    with ClipReader(path) as clip:
        if "soun" in kinds:
            assert clip.streams.seconds == pytest.approx(late + 3.0, abs=0.07)
        if "vide" in kinds:
            assert clip.picture_end == pytest.approx(late + 3.0, abs=0.21)


@pytest.mark.parametrize("first", [0.55, 1.03])
@pytest.mark.parametrize(("b_frames", "late"), [("0", 0.0), ("2", 0.2)])
def test_an_edit_that_begins_between_two_pictures(tmp_path, first, b_frames, late):
    """FFmpeg shows the second of them at once: all pictures would be up to one too early for their sound."""
    source = write_video(tmp_path / "source.mp4", 3, g="10", bf=b_frames, sc_threshold="0")
    path = tmp_path / "a.mp4"  # in which times are later by that of the first picture
    path.write_bytes(with_edits(source.read_bytes(), ("soun", "vide"), [(1.5, first + late)]))
    times = [0.1 * n + part for n in range(1, 15) for part in (0.0101, 0.0601)]
    assert numbers(path, times) == [int(10 * (first + time)) for time in times]


def with_edits(data: bytes, kinds: tuple[str, ...], edits: list[tuple[float, float]]) -> bytes:
    """An mp4 whose index lies at its end, with these edits (seconds, first second of the track or -1) of the
    tracks of these kinds.
    """

    def boxes(content: bytes) -> list[tuple[bytes, bytes]]:
        found = []
        while content:
            size = int.from_bytes(content[:4], "big")
            found.append((content[4:8], content[8:size]))
            content = content[size:]
        return found

    def box(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), name) + content

    *before, (_, moov) = boxes(data)
    tracks = b""
    for name, content in boxes(moov):
        if name == b"mvhd":
            unit = struct.unpack(">I", content[12:16])[0]
        if name == b"trak":
            parts = dict(boxes(content))
            of_media = dict(boxes(parts[b"mdia"]))
            own_unit = struct.unpack(">I", of_media[b"mdhd"][12:16])[0]
            if of_media[b"hdlr"][8:12].decode() in kinds:
                entries = [
                    (round(seconds * unit), -1 if first < 0 else round(first * own_unit), 1 << 16)
                    for seconds, first in edits
                ]
                table = struct.pack(">2I", 0, len(edits)) + b"".join(
                    struct.pack(">IiI", *entry) for entry in entries
                )
                parts[b"edts"] = box(b"elst", table)
            order = [b"tkhd", b"edts", *(part for part in parts if part not in (b"tkhd", b"edts"))]
            content = b"".join(box(part, parts[part]) for part in order if part in parts)
        tracks += box(name, content)
    return b"".join(box(*each) for each in before) + box(b"moov", tracks)
