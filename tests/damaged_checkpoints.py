"""Checkpoints as disks, kills and strangers leave them, from one that is whole."""

import io
import pathlib
import pickle
import random
import zipfile

import torch


def truncated(whole, draw):
    return whole[: draw.randrange(len(whole))]


def zeroed(whole, draw):
    length = draw.choice([16, 512, 4096])
    start = draw.randrange(len(whole))
    end = min(start + length, len(whole))
    return whole[:start] + bytes(end - start) + whole[end:]


def flipped(whole, draw):
    content = bytearray(whole)
    for _ in range(draw.choice([1, 1, 8])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def scribbled(whole, draw):
    start = draw.randrange(len(whole))
    end = min(start + draw.choice([1, 64, 4096]), len(whole))
    return whole[:start] + draw.randbytes(end - start) + whole[end:]


def moved(whole, draw):
    """Let bytes be missing, or doubled, amid the file."""
    start = draw.randrange(len(whole))
    length = draw.choice([1, 512, 4096])
    if draw.random() < 0.5:
        return whole[:start] + whole[start + length :]
    return whole[: start + length] + whole[start:]


def with_a_tail(whole, draw):
    return whole + draw.choice([b"\0" * 100, b"PK\x05\x06", whole])


def _rebuilt(parts):
    """Write an archive whose every checksum is right."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts:
            archive.writestr(name, content)
    return file.getvalue()


def _parts(whole):
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return [[part.filename, archive.read(part)] for part in archive.infolist()]


def exchanged(whole, draw):
    """Exchange the contents of two parts, of equal size where there are such ones."""
    parts = _parts(whole)
    sizes = [len(content) for _, content in parts]
    equal = [p for p in parts if sizes.count(len(p[1])) > 1 and "/data/" in p[0]]
    one, other = draw.sample(draw.choice([parts, equal]), 2)
    one[1], other[1] = other[1], one[1]
    return _rebuilt(parts)


def renamed(whole, draw):
    """Exchange the names of two parts in the archive's directory alone."""
    parts = [name for name, _ in _parts(whole) if "/data/" in name]
    start = whole.rindex(b"PK\x01\x02", 0, whole.index(b"PK\x01\x02") + 4)
    body, directory = whole[:start], whole[start:]
    equal = [p for p in parts if len(p) == len(parts[0])]
    one, other = (name.encode() for name in draw.sample(equal, 2))
    mark = b"\1" * len(one)
    for old, new in ((one, mark), (other, one), (mark, other)):
        directory = directory.replace(old, new, 1)
    return body + directory


def without_a_part(whole, draw):
    parts = _parts(whole)
    del parts[draw.randrange(len(parts))]
    return _rebuilt(parts)


def with_a_changed_part(whole, draw):
    parts = _parts(whole)
    part = draw.choice([p for p in parts if "serialization_id" not in p[0]])
    part[1] = flipped(part[1], draw)
    return _rebuilt(parts)


def compressed(whole, draw):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in _parts(whole):
            archive.writestr(name, content)
    return file.getvalue()


class Command:
    def __reduce__(self):
        import os

        return os.system, ("touch ran",)


def _saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def something_else(whole, draw):
    state = {"state_dict": {"a": torch.ones(3)}}
    return draw.choice(
        [
            b"",
            b"hello",
            draw.randbytes(2000),
            pickle.dumps({"state_dict": {}}),
            _saved(state, _use_new_zipfile_serialization=False),
            _rebuilt([["a.txt", b"no checkpoint"]]),
            _rebuilt([["archive/data.pkl", b"garbage"], ["archive/version", b"3\n"]]),
            _saved([1, 2]),
            _saved({"weights": {}}),
            _saved({"state_dict": 5}),
            _saved({"state_dict": {}, "x": pathlib.Path("x")}),
            _saved({"state_dict": {}, "x": Command()}),
        ]
    )


KINDS = (
    truncated,
    zeroed,
    flipped,
    scribbled,
    moved,
    with_a_tail,
    exchanged,
    renamed,
    without_a_part,
    with_a_changed_part,
    compressed,
    something_else,
)


def damaged(whole, number, seed=0):
    """Yield name and content of so many damaged checkpoints, the kinds in turn."""
    for place in range(number):
        kind = KINDS[place % len(KINDS)]
        draw = random.Random(f"{seed}/{place}")
        yield f"{kind.__name__}-{place}", kind(whole, draw)
