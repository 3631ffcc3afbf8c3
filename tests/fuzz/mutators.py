"""What is done to a valid file to damage it. Each mutator takes the bytes and a seeded generator."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from typing import Any

Mutator = Callable[[bytes, random.Random], bytes]

NUMBERS = (0, -1, 1, 2, 3, 255, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64, 10**9, 10**400)
VALUES: tuple[Any, ...] = (
    None, True, False, *NUMBERS, 0.5, -1.5, 1e308, 1e-308, "", "x", "../../x", "/dev/null", "x" * 5000, "\ud800",
    "a\nb\x1b[31m\x00", "1e999", [], {}, [[]], [None], {"": None}, ["x"] * 50, {"a": {"b": [1, {"c": "d"}]}},
)  # fmt: skip
NAMES = ("", ".", "../../up", "/absolute", "a\nb", "tab\tname", "ünïcode", "a" * 300, "x\x00y", "-o", "\udcff", "a\\b")
DEEP = 100_000


def damage(data: bytes, rng: random.Random) -> bytes:
    """One to four of: bits turned, bytes set, cut, deleted, doubled, spliced; or something else entirely."""
    if rng.random() < 0.04:
        return rng.choice([b"", b"\x00", rng.randbytes(rng.randrange(1, 4000)), data * 3, data[::-1]])
    held = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        rng.choice(EDITS)(held, rng)
    return bytes(held)


def _place(held: bytearray, rng: random.Random) -> int:
    """Headers are at the beginning: two of three edits go there."""
    return rng.randrange(min(len(held), 160) if rng.random() < 0.67 else len(held)) if held else 0


def _flip(held: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 3, 30])):
        if held:
            held[_place(held, rng)] ^= 1 << rng.randrange(8)


def _extreme(held: bytearray, rng: random.Random) -> None:
    """A field set to an extreme number, in either order of bytes."""
    width, order = rng.choice("BHIQ"), rng.choice("<>")
    number = rng.choice(NUMBERS[:-1]) % 2 ** (8 * struct.calcsize(width))
    part = struct.pack(order + width, number)
    place = _place(held, rng)
    place -= place % rng.choice([1, 2, 4])
    held[place : place + len(part)] = part


def _cut(held: bytearray, rng: random.Random) -> None:
    del held[_place(held, rng) :]


def _delete(held: bytearray, rng: random.Random) -> None:
    place = _place(held, rng)
    del held[place : place + rng.choice([1, 2, 4, 100, 2000])]


def _double(held: bytearray, rng: random.Random) -> None:
    place = _place(held, rng)
    part = bytes(held[place : place + rng.choice([1, 8, 100, 4000])])
    held[place:place] = part * rng.choice([1, 1, 20])


def _splice(held: bytearray, rng: random.Random) -> None:
    first, second = _place(held, rng), _place(held, rng)
    size = rng.choice([4, 16, 512])
    held[first : first + size] = held[second : second + size]


def _insert(held: bytearray, rng: random.Random) -> None:
    place = _place(held, rng)
    held[place:place] = rng.choice([b"\x00", b"\xff\xfe", b"\r\n", rng.randbytes(16), b"\xef\xbb\xbf", b"{", b'"'])


EDITS = (_flip, _flip, _extreme, _extreme, _cut, _delete, _double, _splice, _insert)


# ---------------------------------------------------------------------- JSON


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """An entry changed, removed, added or doubled; nesting, numbers and characters that JSON readers fall over."""
    if rng.random() < 0.15:
        return damage(data, rng)
    if rng.random() < 0.1:
        return _hostile_json(data, rng)
    try:
        held = json.loads(data)
    except ValueError:
        return damage(data, rng)
    for _ in range(rng.choice([1, 1, 1, 3])):
        held = edit(held, rng)
    text = json.dumps(held, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
    if rng.random() < 0.05:
        text = text.replace("0", rng.choice(["NaN", "-Infinity", "1e999", "00"]), 1)
    return text.encode("utf-8", "surrogatepass")


def _hostile_json(data: bytes, rng: random.Random) -> bytes:
    deep = rng.choice([b"[" * DEEP, b'{"a":' * DEEP, b"[" * DEEP + b"]" * DEEP])
    inside = data.replace(b":", b":" + b"[" * DEEP + b"]" * DEEP + b",", 1)
    constants = rng.choice([b"NaN", b"1e999", b"-Infinity", b"9" * 5000, b'"\\ud800"', b"null", b"[]", b"3", b'""'])
    valued = data.replace(b": ", b": " + constants + b', "x": ', 1)
    return rng.choice(
        [deep, inside, constants, valued, b"\xef\xbb\xbf" + data, data.decode("latin-1").encode("utf-16")]
    )


def edit(held: Any, rng: random.Random, depth: int = 0) -> Any:
    """One change somewhere inside a value that JSON holds."""
    if isinstance(held, dict) and held and (depth == 0 or rng.random() < 0.8):
        key = rng.choice(list(held))
        choice = rng.random()
        if choice < 0.1:
            return {other: value for other, value in held.items() if other != key}
        if choice < 0.15:
            return {**held, rng.choice([*NAMES, "auto_map", "trust_remote_code", "_name_or_path"]): rng.choice(VALUES)}
        if choice < 0.2:
            return {**held, key: rng.choice(list(held.values()))}
        return {**held, key: edit(held[key], rng, depth + 1)}
    if isinstance(held, list) and held and rng.random() < 0.8:
        place = rng.randrange(len(held))
        choice = rng.random()
        if choice < 0.15:
            return held[:place] + held[place + 1 :]
        if choice < 0.3:
            return held[: place + 1] + held[place:]
        return [*held[:place], edit(held[place], rng, depth + 1), *held[place + 1 :]]
    if isinstance(held, (int, float)) and not isinstance(held, bool) and rng.random() < 0.4:
        return rng.choice([held + 1, held - 1, held * 1000, -held, held // 2, str(held)])
    return rng.choice(VALUES)


def damage_lines(data: bytes, rng: random.Random) -> bytes:
    """Files of one JSON object a line."""
    lines = data.split(b"\n")
    if rng.random() < 0.2:
        return damage(data, rng)
    place = rng.randrange(len(lines))
    lines[place] = damage_json(lines[place], rng).replace(b"\n", b" ")
    if rng.random() < 0.2:
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return b"\n".join(lines)


# ---------------------------------------------------------------------- safetensors


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Header entries changed (types, shapes, offsets, metadata), the header's length, or any byte."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length], data[8 + length :]
    choice = rng.random()
    if choice < 0.25:
        return damage(data, rng)
    if choice < 0.35:
        return struct.pack("<Q", rng.choice(NUMBERS[:-1]) % 2**64) + header + body
    if choice < 0.45:
        held = bytearray(body)
        for _ in range(40):  # NaN and huge numbers among the weights
            place = 2 * rng.randrange(max(len(held) // 2, 1))
            held[place : place + 2] = rng.choice([b"\xff\x7f", b"\x00\x7f", b"\x80\x7f", b"\xff\xff"])
        return data[: 8 + length] + bytes(held)
    if choice < 0.65:
        held = json.loads(header)
        part = rng.choice(list(held))
        held[part] = edit(held[part], rng)
        header = json.dumps(held).encode("utf-8", "surrogatepass")
    else:
        header = damage_json(header, rng)
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + body


# ---------------------------------------------------------------------- YAML and plain text


YAML = (
    "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
    ),
    "steps: " + "[" * 5000, "steps: " + "{a: " * 5000, "{" * 5000, "- " * 5000, "steps: " + "- " * 3000 + "x",
    "&a [*a]", "steps: &a [*a]", "data: &d {train: *d}", "model: &m\n  x: *m\n",
    "!!python/object/apply:os.system ['true']", "steps: !!python/name:os.system", "steps: !!binary x",
    "? {a: b}\n: c", "? [a]\n: c", "1: 2", "null: x", "2020-01-01: x", "steps: 2020-13-45", "steps: 0x" + "f" * 4000,
    "<<: 3", "<<: [1]", "<<: {kind: generator}", "steps: !!int x", "steps: !!timestamp x", "steps: .nan", "steps: .inf",
    "steps: 1_000:99", "steps: 190:20:30.15", "%YAML 9.9\n---\na", "a: b: c", "\ta: b", "a\x00b", "---\n---\n", "a: 'b",
    "= : x", "steps: =", "steps: !<x> y", "kind: [generator]", "kind: {}", "kind: 3", "seed: " + "9" * 5000,
    "steps: !!float 1" + "0" * 400, "steps: !!set {a, b}", "steps: !!omap [a: 1]", "model: [a]", "data: 7",
)  # fmt: skip
SCALARS = (
    "-1", "0", "1", "1e400", ".nan", ".inf", "-.inf", "null", "true", "[]", "{}", "''", "[a, 1]", "{a: 1}", "x",
    "'\\0'", "2020-01-01", "10000000000000000000000", "/nonexistent", "[[[]]]", "!!binary aGk=", "~", "1e-320",
    '"a\\nb"', "0.5",
)  # fmt: skip


def damage_yaml(data: bytes, rng: random.Random) -> bytes:
    """A value or key of a line replaced, lines moved, a hostile line added, or any byte."""
    choice = rng.random()
    if choice < 0.15:
        return damage(data, rng)
    hostile = rng.choice(YAML).encode()
    if choice < 0.3:
        return rng.choice([hostile, data + b"\n" + hostile, hostile + b"\n" + data])
    lines = data.decode().split("\n")
    for _ in range(rng.choice([1, 1, 3])):
        place = rng.randrange(len(lines))
        key, colon, _value = lines[place].partition(":")
        choice = rng.random()
        if choice < 0.6 and colon:
            lines[place] = f"{key}: {rng.choice(SCALARS)}"
        elif choice < 0.75:
            lines[place] = rng.choice(["  ", "", "\t"]) + lines[place].strip()
        elif choice < 0.85:
            lines.insert(place, rng.choice(lines))
        elif choice < 0.95:
            del lines[place]
            lines = lines or [""]
        elif key:
            lines[place] = lines[place].replace(key, key + rng.choice(["x", " ", "é", ".y"]), 1)
    return "\n".join(lines).encode()


# ---------------------------------------------------------------------- tar


def damage_tar(data: bytes, rng: random.Random) -> bytes:
    """Headers or any byte; or a new archive with odd names, links, devices, huge sizes, damaged members."""
    choice = rng.random()
    if choice < 0.25:
        return damage(data, rng)
    if choice < 0.5:
        held = bytearray(data)
        block = 512 * rng.randrange(len(held) // 512)
        for _ in range(rng.choice([1, 4])):
            place = block + rng.randrange(512)
            held[place] = rng.choice([0, 0x37, 0xFF, 0x80, 0x20, rng.randrange(256)])
        return bytes(held)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    out = io.BytesIO()
    chosen = rng.randrange(len(members))
    with tarfile.open(fileobj=out, mode="w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as archive:
        for number, (member, content) in enumerate(members):
            if number == chosen:
                content = _odd_member(member, content, rng)
            if member.isreg():
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return damage(out.getvalue(), rng) if rng.random() < 0.1 else out.getvalue()


def _odd_member(member: tarfile.TarInfo, content: bytes, rng: random.Random) -> bytes:
    choice = rng.random()
    if choice < 0.3:
        suffix = "." + member.name.rpartition(".")[2] if rng.random() < 0.7 else ""
        member.name = rng.choice([*NAMES, "a.b.c", ".wav", "__key__.wav", "x.wav.wav", "__url__"]) + suffix
        member.name = member.name.replace("\x00", "?").replace("\udcff", "?")
        return content
    if choice < 0.45:
        kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"S", b"Z"]
        member.type = rng.choice(kinds)
        member.linkname = rng.choice(["/etc/hostname", "../../x", member.name, "nowhere"])
        member.size = 0
        return b""
    return damage_json(content, rng) if member.name.endswith(".json") else damage(content, rng)
