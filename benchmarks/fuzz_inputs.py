"""Malformed inputs for `fuzz.py`: sound ones of every kind, and what damage and malice make of them."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

EDGES = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]
STRANGE: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1e308,
        float("nan"),
        float("inf"),
        10**30,
        "",
        " ",
        "\x00",
        "../x",
        "\ud800",
        [],
        {},
    ),
    *([[]], {"a": {"b": []}}, "x" * 5000, "é", "-1", "1e9", [1] * 50),
]


def sound_images() -> list[bytes]:
    """A small image in every format and encoding that is decoded, and some that are not."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    wanted: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("JPEG", image, {"exif": exif}),
        ("JPEG", image, {"progressive": True}),
        ("JPEG", image.convert("CMYK"), {}),
        ("PNG", image, {"exif": exif}),
        ("PNG", image.convert("RGBA"), {}),
        ("PNG", image.quantize(16), {"transparency": 3}),
        ("GIF", image, {"save_all": True, "append_images": [image.rotate(90)]}),
        ("WEBP", image, {}),
        ("WEBP", image, {"lossless": True}),
        ("BMP", image, {}),
        ("BMP", image.quantize(16), {}),
        *(
            ("TIFF", image, {"compression": name})
            for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg")
        ),
        ("TIFF", image.convert("1"), {"compression": "group4"}),
        ("PPM", image, {}),
        ("JPEG2000", image, {}),
        ("TGA", image, {"compression": "tga_rle"}),
        ("AVIF", image, {}),
        ("ICO", image, {}),
    ]
    found = []
    for kind, each, options in wanted:
        file = io.BytesIO()
        try:
            each.save(file, kind, **options)
        except (KeyError, OSError):  # a format that this Pillow does not write
            continue
        found.append(file.getvalue())
    return found


def damaged(data: bytes, rng: random.Random, head: int = 120) -> bytes:
    """The same with bits turned, numbers at their edges, parts cut, doubled or taken from elsewhere."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 1, 2, 3, 8])):
        if not out:
            break
        place = rng.randrange(min(len(out), head if rng.random() < 0.4 else len(out)))
        action = rng.randrange(7)
        if action == 0:
            out[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            out[place] = rng.randrange(256)
        elif action == 2:
            form = rng.choice(["<H", ">H", "<I", ">I"])
            number = rng.choice(EDGES) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF)
            out[place : place + struct.calcsize(form)] = struct.pack(form, number)
        elif action == 3:
            del out[place:]
        elif action == 4:
            part = out[place : place + rng.randrange(1, 200)]
            out[place:place] = part * rng.choice([1, 2, 50])
        elif action == 5:
            del out[place : place + rng.randrange(1, 40)]
        else:
            other = rng.randrange(len(out))
            out[place : place + 16] = out[other : other + 16]
    return bytes(out)


def with_sound_sums(data: bytes) -> bytes:
    """A damaged PNG whose chunks have the right sums, so that damage gets past them."""
    if not data.startswith(b"\x89PNG"):
        return data
    out, place = bytearray(data[:8]), 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if place + 12 + size > len(data):
            break
        body = data[place + 4 : place + 8 + size]
        out += data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + size
    return bytes(out + data[place:])


def image(sound: list[bytes], rng: random.Random) -> bytes:
    """A damaged image."""
    data = damaged(rng.choice(sound), rng)
    return with_sound_sums(data) if rng.random() < 0.7 else data


def changed_tree(value: Any, rng: random.Random) -> Any:
    """The same JSON with one value anywhere in it replaced, left out or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: changed_tree(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        return [*value[:place], changed_tree(value[place], rng), *value[place + rng.choice([0, 1, 1, 1]) :]]
    return rng.choice(STRANGE)


def changed_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """The same with some tensors of other shapes, kinds, numbers or names."""
    out = dict(tensors)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(sorted(out))
        tensor = out[name].clone()
        action = rng.randrange(7)
        if action == 0 and tensor.ndim:
            tensor = tensor[: rng.randrange(len(tensor) + 1)]
        elif action == 1 and tensor.ndim:
            tensor = torch.cat([tensor, tensor], rng.randrange(tensor.ndim))
        elif action == 2:
            tensor = tensor.reshape(-1) if rng.random() < 0.5 else tensor[None]
        elif action == 3 and tensor.numel():
            number = rng.choice([0.0, -1.0, 7.0, 1e30, 1e-30, float("nan"), float("inf")])
            if not tensor.is_floating_point():
                number = rng.choice([-1, 0, 1, 99, 10**9, 2**62])
            tensor.view(-1)[rng.randrange(tensor.numel())] = number
        elif action == 4:
            tensor = tensor.to(
                rng.choice([torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.float64])
            )
        elif action == 5:
            del out[name]
            name = name.replace("0", rng.choice(["1", "-1", "999999999999", "x", ""]), 1)
        else:
            tensor = tensor * rng.choice([0, -1, 1e20])
        out[name] = tensor.contiguous()
    return out


def rewrite(model: Path, manifest: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a model whose hashes fit what it holds."""
    data = safetensors.torch.save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    weights = f"model-{digest[:12]}.safetensors"
    (model / weights).write_bytes(data)
    if isinstance(manifest, dict):
        manifest = manifest | {"weights": weights, "files": {weights: digest}}
    (model / "model.json").write_text(json.dumps(manifest))


YAML = "stream: digits\nseed: 1\nmethod: {name: duallora, rank: 4}\nbackbone: embedded\ntasks: 5\n"
_YAML_PARTS = [
    "&a",
    "*a",
    "[",
    "]",
    "{",
    "}",
    "!!python/object:os.system",
    "? ",
    ": ",
    "- ",
    "\t",
    "|",
    "---\n",
]
TABLE = "path,label,split\nant/0.png,ant,train\nbee/0.png,bee,test\nant/1.png,ant,test\nbee/1.png,bee,train\n"
_TABLE_PARTS = [",", '"', "\n", "\r", ";", "../", "\\", "/dev/zero", "train", "val", "\x00", "é", "path", "'"]


def text(sound: str, parts: list[str], rng: random.Random) -> bytes:
    """A damaged text."""
    words = sound
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(words) + 1)
        if rng.random() < 0.7:
            words = words[:place] + rng.choice(parts) * rng.choice([1, 1, 3]) + words[place:]
        else:
            words = words[:place] + words[place + rng.randrange(1, 8) :]
    data = words.encode()
    return damaged(data, rng, len(data)) if rng.random() < 0.3 else data


def yaml(rng: random.Random) -> bytes:
    """A damaged configuration."""
    return text(YAML, _YAML_PARTS, rng)


def table(rng: random.Random) -> bytes:
    """A damaged table."""
    return text(TABLE, _TABLE_PARTS, rng)


def archive(sound: list[bytes], rng: random.Random) -> bytes:
    """A zip, damaged or with strange names, kinds and ways to pack."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for number in range(rng.randint(0, 4)):
            name = rng.choice(
                ["ant/{}.png", "../{}.png", "/etc/{}", "a\\b{}.png", "é{}.png", "{}", "a/" * 50 + "{}"]
            )
            entry = zipfile.ZipInfo(name.format(number))
            entry.compress_type = rng.choice([0, 8, 8, 12, 14])
            entry.external_attr = rng.choice([0, 0o120777 << 16, 0o010644 << 16, 0o100644 << 16])
            made.writestr(entry, rng.choice([rng.choice(sound), bytes(100_000), b""]))
    data = file.getvalue()
    return damaged(data, rng, len(data)) if rng.random() < 0.6 else data


def request(sound: list[bytes], rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    """Method, path and the rest of a request, as a client of httpx takes it."""
    method = rng.choice(["POST", "POST", "POST", "POST", "GET", "PUT", "DELETE", "OPTIONS"])
    path = rng.choice(
        ["/predict", "/predict", "/predict", "/health", "/model", "/metrics", "/docs", "//", "/%00"]
    )
    path += rng.choice(
        ["", "", "?top=3", "?top=0", "?top=x", "?top=99999999999", "?unknown_below=nan", "?a=%ff&&="]
    )
    body = image(sound, rng) if rng.random() < 0.7 else rng.randbytes(rng.randrange(300))
    if rng.random() < 0.5:
        kind = rng.choice(
            ["image/png", "", "multipart/form-data", "multipart/form-data; boundary=", "a;b;c=\x01"]
        )
        return method, path, {"content": body, "headers": {"Content-Type": kind.replace("\x01", "")}}
    files = [
        ("image", (rng.choice(["a.png", "", '"\r\n', "é" * 99, "/x"]), body))
        for _ in range(rng.randint(0, 3))
    ]
    return method, path, {"files": files}


def shrunk(build: Callable[[], bytes], most: int = 4 << 20) -> bytes:
    """What ``build`` gives, cut to ``most`` bytes: damage doubles parts."""
    return build()[:most]
