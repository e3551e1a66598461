"""Run directories that are damaged, or made to harm: 200 of them from one script."""

import json
import os
import socket
import struct
import zlib

import yaml
from handmade_runs import losses, make_run

DEEP = 100_000


def run(path, *, history=None, config=None, summary=None):
    """Write a run directory, whole but for the files that are given."""
    make_run(path, losses(3.0, 2.0))
    for name, content in {
        "history.jsonl": history,
        "config.yaml": config,
        "summary.json": summary,
    }.items():
        if content is not None:
            file = path / name
            file.unlink(missing_ok=True)
            data = content if isinstance(content, bytes) else content.encode()
            file.write_bytes(data)


def csv(path, metrics="step,loss\n0,1.0\n", hparams=None):
    """Write the folder of a CSVLogger."""
    path.mkdir()
    data = metrics if isinstance(metrics, bytes) else metrics.encode()
    (path / "metrics.csv").write_bytes(data)
    if hparams is not None:
        (path / "hparams.yaml").write_text(hparams)


def chunks(records, kind=1):
    """Return a W&B file of records, with sound checksums."""
    content = bytearray(b":W&B\0\0\0")
    for record in records:
        rest, first = record, True
        while rest or first:
            left = 32768 - len(content) % 32768
            if left < 7:
                content += bytes(left)
                continue
            data, rest = rest[: left - 7], rest[left - 7 :]
            kind = {(1, 1): 1, (1, 0): 2, (0, 0): 3, (0, 1): 4}[(first, not rest)]
            total = zlib.crc32(data, zlib.crc32(bytes([kind])))
            content += struct.pack("<IHB", total, len(data), kind) + data
            first = False
    return bytes(content)


def record(kind, *items):
    """Return a record of W&B's: `items` are paths and JSON texts."""
    from wandb.proto import wandb_internal_pb2 as pb

    made = pb.Record()
    part = getattr(made, kind)
    made_items = {"history": "item", "config": "update", "summary": "update"}
    for key, text in items:
        item = getattr(part, made_items[kind]).add()
        item.value_json = text
        if isinstance(key, str):
            item.key = key
        else:
            item.nested_key.extend(key)
    return made.SerializeToString()


def row(*items, step=0):
    return record("history", ("loss", "1.0"), ("_step", str(step)), *items)


def wandb(path, content):
    """Write the directory of an offline run, alone in a folder."""
    name = path.name.replace(" ", "_")
    folder = path / f"offline-run-20260101_000000-{name}"
    folder.mkdir(parents=True)
    data = content if isinstance(content, bytes) else chunks(content)
    (folder / f"run-{name}.wandb").write_bytes(data)


def aliases(levels=40, width=9):
    """Return YAML that is small, and holds width to the levels once aliases are in."""
    lines = ["a0: &a0 [x, x, x]"]
    for level in range(levels):
        many = ", ".join([f"*a{level}"] * width)
        lines.append(f"a{level + 1}: &a{level + 1} [{many}]")
    return "\n".join(lines)


def merges(levels=40):
    lines = ["a0: &a0 {x: 1, y: 2}"]
    for level in range(levels):
        one = f"*a{level}"
        lines.append(f"a{level + 1}: &a{level + 1} {{<<: [{one}, {one}], k{level}: 1}}")
    return "\n".join(lines)


def line(**values):
    return json.dumps({"step": 0, "epoch": 0, **values}) + "\n"


LONG = "9" * 5000
HUGE = "9" * 400

JSON_LINES = {
    "deep list": '{"step": 0, "a": ' + "[" * DEEP + "]" * DEEP + "}\n",
    "deep object": '{"step": 0, "a": ' + '{"a":' * DEEP + "1" + "}" * DEEP + "}\n",
    "open lists": "[" * DEEP + "\n",
    "long number": f'{{"step": 0, "a": {LONG}}}\n',
    "value beyond float": f'{{"step": 0, "a": {HUGE}}}\n',
    "negative beyond float": f'{{"step": 0, "a": -{HUGE}}}\n',
    "step beyond int64": '{"step": 9223372036854775808, "a": 1}\n',
    "step beyond float": f'{{"step": {HUGE}, "a": 1}}\n',
    "step of text": '{"step": "0", "a": 1}\n',
    "step of truth": '{"step": true, "a": 1}\n',
    "broken step": '{"step": 0.5, "a": 1}\n',
    "step that is not finite": '{"step": NaN, "a": 1}\n',
    "no step": '{"a": 1}\n',
    "list": "[1]\n",
    "scalar": "5\n",
    "null": "null\n",
    "no JSON": "hello\n",
    "NUL": "\0\n",
    "bytes": b"\xff\xfe\x00\n",
    "surrogates in UTF-8": b'{"step": 0, "\xed\xa0\x80": 1}\n',
    "UTF-16": line(a=1).encode("utf-16"),
    "no values": line(a="text"),
    "nested values alone": line(a={"b": 1}),
    "one long line": '{"step": 0, "a": "' + "x" * (5 << 20) + '"}\n',
    "long line without an end": "x" * (9 << 20),
    "two objects in a line": '{"step": 0}{"step": 1}\n',
    "comma": '{"step": 0, "a": 1},{"step": 1, "a": 1}\n\n',
    "empty line": line(a=1) + "\n" + line(a=1),
    "cut short": '{"step": 0, "a": 1',
    "nothing": "",
    "many names": "".join(
        line(**{f"{start}.{n}": 1 for n in range(1000)}) for start in range(25)
    ),
}

SUMMARY_TEXTS = {
    "deep": '{"a": ' + "[" * DEEP + "]" * DEEP + "}",
    "deep verdict": '{"verdicts": {"a": ' + "[" * 500 + "]" * 500 + "}}",
    "list": "[]",
    "number": "5",
    "null": "null",
    "nothing": "",
    "blank": "   ",
    "cut short": '{"status": "fini',
    "NUL": "\0",
    "bytes": b"\xff\xff",
    "status null": '{"status": null}',
    "status list": '{"status": ["finished"]}',
    "status number": '{"status": 3}',
    "verdicts list": '{"verdicts": []}',
    "verdicts text": '{"verdicts": "x"}',
    "verdict number": '{"verdicts": {"moments/pathology": 1}}',
    "verdict null": '{"verdicts": {"moments/pathology": null}}',
    "verdict object": '{"verdicts": {"moments/pathology": {"a": 1}}}',
    "seconds text": '{"seconds": "x"}',
    "seconds list": '{"seconds": []}',
    "seconds NaN": '{"seconds": NaN}',
    "seconds infinite": '{"seconds": Infinity}',
    "seconds beyond float": '{"seconds": 1e999}',
    "seconds a whole number beyond float": f'{{"seconds": {HUGE}}}',
    "long number": f'{{"seconds": {LONG}}}',
    "many values": json.dumps({"values": list(range(300_000))}),
    "long": json.dumps({"a": "x" * (5 << 20)}),
}

YAML_TEXTS = {
    "deep flow": "a: " + "[" * DEEP,
    "deep flow closed": "a: " + "[" * 500 + "]" * 500,
    "deep mappings": "a: " + "{a: " * 500 + "1" + "}" * 500,
    "deep block": "\n".join(" " * i + "a:" for i in range(500)) + " 1",
    "self-reference": "a: &a [*a]",
    "self-reference in a mapping": "a: &a {b: *a}",
    "self-reference at the top": "&a {b: *a}",
    "self-reference below": "a: &a [[[{x: [*a]}]]]",
    "aliases": aliases(),
    "merged aliases": merges(),
    "aliases of text": "a: &a " + "x" * 50_000 + "\nb: [" + "*a, " * 5000 + "]",
    "unknown alias": "a: *b",
    "cut short": "a: [",
    "tab": "a:\n\t- b",
    "NUL": "a: \0",
    "escapes": "a: \x1b[31m",
    "bytes": b"a: \xff",
    "two documents": "a: 1\n---\nb: 2\n",
    "list as a key": "? [a, b]\n: 1",
    "mapping as a key": "? {a: b}\n: 1",
    "int of a list": "a: !!str [1]",
    "mapping of a list": "a: !!map [1]",
    "list of a mapping": "a: !!seq {b: 1}",
    "many": "\n".join(f"a{n}: 1" for n in range(30_000)),
    "many lists": "a: [" + "[]," * 200_000 + "]",
    "long": "a: " + "x" * (5 << 20),
    "percent": "%YAML 9.9\n---\na: 1",
}
CONFIG_TEXTS = YAML_TEXTS | {
    "list": "- a\n",
    "scalar": "hello",
    "nothing": "",
    "python at the top": "!!python/object/apply:os.system ['touch ran']",
}
MANY_SETTINGS = {"many settings": "\n".join(f"a{n}: 1" for n in range(9_000))}

METRICS_TEXTS = {
    "long field": "step,loss\n0," + "1" * 200_000 + "\n",
    "long quoted field": 'step,loss\n0,"' + "x\n" * 200_000,
    "open quote": 'step,loss\n0,"1\n' + "1,2\n" * 100_000,
    "NUL": "step,loss\n0,\0\n" if os.name == "nt" else b"step,loss\n\0,1\n",
    "no header": "0,1\n1,2\n",
    "nothing": "",
    "header alone": "step,loss\n",
    "few cells": "step,loss\n0\n",
    "many cells": "step,loss\n0,1,2\n",
    "step beyond int64": "step,loss\n99999999999999999999,1\n",
    "step of many digits": f"step,loss\n{LONG},1\n",
    "step of two signs": "step,loss\n--5,1\n",
    "broken step": "step,loss\n0.5,1\n",
    "step of text": "step,loss\nx,1\n",
    "no step": "step,loss\n,1\n",
    "superscript step": "step,loss\n²,1\n",
    "bytes": b"step,loss\n0,\xff\n",
    "UTF-16": "step,loss\n0,1\n".encode("utf-16"),
    "return amid a line": "step,loss\n0,1\r2,3\n",
    "many names": "step,"
    + ",".join(map(str, range(25_000)))
    + "\n0"
    + ",1" * 25_000
    + "\n",
    "no number": "step,loss\n0,text\n",
    "long line": "step,loss\n" + "1" * (9 << 20),
}


def wandb_texts():
    """Return files of W&B's by name."""
    good = row()
    exchanged = bytearray(chunks([good, good]))
    exchanged[8] ^= 1
    deep_key = ["a"] * 5000
    return {
        "no file of W&B's": b"something else",
        "empty": b"",
        "header alone": b":W&B\0\0\0",
        "zeros": b":W&B\0\0\0" + bytes(1 << 20),
        "wrong checksum": bytes(exchanged),
        "unsound record": [b"\xff\xff\xff\xff"],
        "no JSON": [row(("a", "{"))],
        "empty JSON": [row(("a", ""))],
        "deep JSON": [row(("a", "[" * DEEP))],
        "deep JSON, closed": [row(("a", '{"a":' * 500 + "1" + "}" * 500))],
        "long number": [row(("a", LONG))],
        "value beyond float": [row(("a", HUGE))],
        "clash": [row(("a", "1"), (["a", "b"], "2"))],
        "clash below": [row((["a", "b"], "1"), (["a", "b", "c"], "2"))],
        "clash with text": [row(("a", '"x"'), (["a", "b"], "2"))],
        "clash with a list": [row(("a", "[]"), (["a", "b"], "2"))],
        "deep key": [row((deep_key, "1"))],
        "deep key of a config": [good, record("config", (deep_key, "1"))],
        "clash in a config": [record("config", ("a", "1"), (["a", "b"], "2")), good],
        "deep config": [good, record("config", ("a", "[" * 500 + "]" * 500))],
        "no JSON in a config": [good, record("config", ("a", "nothing"))],
        "step of text": [row(("trainer/global_step", '"x"'))],
        "step of a list": [row(("trainer/global_step", "[1]"))],
        "broken step": [row(("trainer/global_step", "0.5"))],
        "infinite step": [row(("trainer/global_step", "Infinity"))],
        "step NaN": [row(("trainer/global_step", "NaN"))],
        "step beyond int64": [row(("trainer/global_step", "1e30"))],
        "own step of text": [record("history", ("a", "1"), ("_step", '"x"'))],
        "resumed from text": [good, record("config", ("resumed_from_step", '"x"'))],
        "resumed from null": [good, record("config", ("resumed_from_step", "null"))],
        "status list": [good, record("summary", ("status", "[]"))],
        "status no JSON": [good, record("summary", ("status", "finished"))],
        "seconds text": [good, record("summary", ("seconds", '"x"'))],
        "seconds infinite": [good, record("summary", ("seconds", "1e999"))],
        "verdict alone": [record("summary", ("a", "1"))],
        "long record": [b"\x0a" * (5 << 20)],
        "empty items": [b"\x2a" + b"\x80\x80\x80\x02" + b"\x0a\x00" * (1 << 21)],
        "many values": [row(*((str(n), "1") for n in range(25_000)))],
    }


def no_files():
    """Return what makes a directory whose files are no files."""

    def sparse(path, name, size):
        with (path / name).open("wb") as file:
            file.truncate(size)

    def bind(path, name):
        (path / name).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as one:
            folder = os.open(path, os.O_RDONLY)
            try:  # names of sockets are short
                one.bind(f"/proc/self/fd/{folder}/{name}")
            finally:
                os.close(folder)

    kinds = {
        "fifo": lambda path, name: os.mkfifo(path / name),
        "socket": bind,
        "directory": lambda path, name: (path / name).mkdir(),
        "sparse": lambda path, name: sparse(path, name, 1 << 40),
        "zeros": lambda path, name: sparse(path, name, 8 << 20),
        "loop": lambda path, name: (path / name).symlink_to(name),
        "dangling": lambda path, name: (path / name).symlink_to("nowhere"),
        "endless": lambda path, name: (path / name).symlink_to("/dev/zero"),
        "random": lambda path, name: (path / name).symlink_to("/dev/urandom"),
        "terminal": lambda path, name: (path / name).symlink_to("/dev/tty"),
        "own folder": lambda path, name: (path / name).symlink_to("."),
    }
    return {
        f"{name.partition('.')[0]} {kind}": (name, make)
        for kind, make in kinds.items()
        for name in ("history.jsonl", "config.yaml", "summary.json", "metrics.csv")
    }


def folders(root):
    """Make directories that hold no run."""
    (root / "empty").mkdir()
    (root / "config alone").mkdir()
    (root / "config alone" / "config.yaml").write_text("a: 1")
    (root / "summary alone").mkdir()
    (root / "summary alone" / "summary.json").write_text("{}")
    (root / "checkpoints alone" / "checkpoints").mkdir(parents=True)
    (root / "hparams alone").mkdir()
    (root / "hparams alone" / "hparams.yaml").write_text("a: 1")
    (root / "notes").mkdir()
    (root / "notes" / "notes.txt").write_text("nothing")
    (root / "offline").mkdir()
    (root / "offline" / "offline-run-20260101_000000-x").mkdir()
    return [path.name for path in root.iterdir()]


def make_corpus(root):
    """Make hostile directories below `root`, and return their names.

    None of them is a run that can be read.
    """
    root.mkdir()
    names = folders(root)

    def place(name):
        names.append(name)
        return root / name

    for name, text in JSON_LINES.items():
        run(place(f"history {name}"), history=text)
    for name, text in SUMMARY_TEXTS.items():
        run(place(f"summary {name}"), summary=text)
    for name, text in (CONFIG_TEXTS | MANY_SETTINGS).items():
        run(place(f"config {name}"), config=text)
    for name, text in METRICS_TEXTS.items():
        csv(place(f"metrics {name}"), text)
    for name, text in (YAML_TEXTS | MANY_SETTINGS).items():
        if not isinstance(text, bytes):
            csv(place(f"hparams {name}"), hparams=text)
    for name, content in wandb_texts().items():
        wandb(place(f"wandb {name}"), content)
    for name, (file, make) in no_files().items():
        path = place(name)
        if file == "metrics.csv":
            path.mkdir()
        else:
            run(path)
            (path / file).unlink()
        make(path, file)
    return names


def odd_settings():
    """Return configs that are odd, and can be read: YAML texts by name."""
    return {
        "base 60": "a: 190:20:30\nb: 1:2:3.4\nc: " + "1:" * 20_000 + "1",
        "hexadecimal": "a: 0x" + "f" * 300,
        "long hexadecimal": "a: 0x" + "f" * 100_000,
        "long number": f"a: {LONG}\nb: -{HUGE}",
        "no date": "a: 2001-99-99\nb: !!timestamp x",
        "wrong tags": "a: !!int x\nb: !!bool x\nc: !!float x\nd: !!int ''\ne: !!int []",
        "own tags": "a: !own {b: 1}\nb: !<tag:x> [1]\nc: !!set {a, b}\nd: !!binary x",
        "python": "a: !!python/object/apply:os.system ['touch ran']",
        "not finite": "a: .nan\nb: .inf\nlr: .nan",
        "keys": "1: a\nnull: b\n1.5: c\ntrue: d\n2001-01-01: e",
        "types": yaml.safe_dump(
            {"model": {"class_path": 5, "init_args": [1]}, "data": "x", "a": [[1], {}]}
        ),
        "types below": yaml.safe_dump(
            {
                "model": {
                    "class_path": "A",
                    "init_args": {"optimizer": "SGD", "stages": ["a"], "depth": {}},
                },
                "data": {"class_path": {}, "init_args": "x"},
                "trainer": {"callbacks": [{"class_path": "B", "init_args": [1, {}]}]},
            }
        ),
        "classes": "model: {class_path: A, init_args: {num_classes: 0x"
        + "f" * 300
        + "}}",
    }
