"""The soak of ``serve.py``: good and bad requests at once, while generations of the model change."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

from PIL import Image

from http_load import Connection, form, get, load, picture, post


def bad_requests(size: int) -> list[tuple[bytes, int]]:
    """What should not be sent, with the status that it should get."""
    bomb = io.BytesIO()
    Image.new("1", (15_000, 15_000)).save(bomb, "PNG", optimize=True)
    good = picture(0, size)
    return [
        (post("/predict", b"this is no image"), 400),
        (post("/predict", good[: len(good) // 2]), 400),
        (post("/predict", b""), 400),
        (post("/predict", bomb.getvalue()), 413),
        (post("/predict", bytes(40_000_000)), 413),
        (form(*[good] * 65), 413),
        (form(good, b"no image"), 400),
        (post("/predict", b"--b\r\nbroken", "multipart/form-data; boundary=b"), 400),
        (post("/predict?top=0", good), 422),
        (get("/nothing"), 404),
        (get("/predict"), 405),
    ]


async def _spoil(port: int, end: float, bad: list[tuple[bytes, int]], wrong: Counter[str]) -> int:
    """Sends bad requests, and goes away in the middle of good ones, until the end; returns how many."""
    connection, sent = Connection(port), 0
    while time.perf_counter() < end:
        request, status = bad[sent % len(bad)]
        sent += 1
        try:
            found, _ = await connection.ask(request)
            if found != status:
                wrong[f"{found} instead of {status}"] += 1
            if sent % 5 == 0:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(bad[1][0][:200])
                await writer.drain()
                writer.close()
        except (OSError, asyncio.IncompleteReadError) as error:
            wrong[repr(error)] += 1
            connection.close()
        await asyncio.sleep(0.02)
    connection.close()
    return sent


async def _change(port: int, folder: Path, states: list[Path], end: float, seconds: float) -> int:
    """Puts one state after another into the folder, every third time a broken one; returns how many whole.

    Each is waited for, however slow the machine is, so that the server meets all of them.
    """
    connection, put, turn = Connection(port), 0, 0
    while time.perf_counter() + 2 * seconds < end:
        await asyncio.sleep(seconds)
        turn += 1
        broken = turn % 3 == 2
        put += not broken
        name = replace_state(folder, states[put % 2], broken)
        wanted = ("newest", "refused") if broken else ("generation", name)
        while time.perf_counter() < end:
            _, body = await connection.ask(get("/health"))
            if wanted in json.loads(body).items():
                break
            await asyncio.sleep(0.2)
    connection.close()
    return put


def replace_state(folder: Path, state: Path, broken: bool) -> str:
    """Weights first, ``model.json`` last and by a rename, as a save does it; returns the weights' name."""
    manifest = json.loads((state / "model.json").read_text())
    manifest["previous"] = None
    data = (state / manifest["weights"]).read_bytes()
    name = manifest["weights"]
    if broken:
        name = "model-0123456789ab.safetensors"
        manifest["files"] = {name: manifest["files"][manifest["weights"]]}
        manifest["weights"] = name
        data = data[: len(data) // 2]
    (folder / "part.tmp").write_bytes(data)
    (folder / "part.tmp").replace(folder / name)
    (folder / "part.tmp").write_text(json.dumps(manifest))
    (folder / "part.tmp").replace(folder / "model.json")
    return name


async def _figures(connection: Connection) -> dict[str, float]:
    """The server's own figures now."""
    _, body = await connection.ask(get("/metrics"))
    lines = [line.split() for line in body.decode().splitlines() if not line.startswith("#")]
    return {line[0]: float(line[1]) for line in lines if "{" not in line[0]}


async def _observe(port: int, end: float, seconds: float) -> list[float]:
    """The memory of the server in MB, again and again."""
    connection, seen = Connection(port), []
    while time.perf_counter() < end:
        seen.append((await _figures(connection))["duallora_resident_bytes"] / 1e6)
        await asyncio.sleep(seconds)
    connection.close()
    return seen


async def soaked(port: int, folder: Path, states: list[Path], args: argparse.Namespace) -> int:
    """Lets everything loose on a server and prints what came of it.

    Args:
        port: of the server.
        folder: of the model that it serves.
        states: two saved models that take turns in that folder.
        args: of ``serve.py``.

    Returns:
        Exit status.
    """
    wrong: Counter[str] = Counter()
    good = [
        post("/predict", picture(seed, args.size, kind)) for seed in range(16) for kind in ("JPEG", "PNG")
    ]
    good += [form(*(picture(seed + i, args.size) for i in range(5))) for seed in range(8)]
    bad = bad_requests(args.size)
    end = time.perf_counter() + args.soak  # the requests above take their time on a slow machine
    loaded, sent, put, memory = await asyncio.gather(
        load(port, 16, args.soak, good),
        _spoil(port, end, bad, wrong),
        _change(port, folder, states, end, min(10.0, args.soak / 8)),
        _observe(port, end, args.soak / 50),
    )
    figures = await _figures(Connection(port))
    taken, refused = (int(figures[f"duallora_generations_{what}_total"]) for what in ("taken", "refused"))
    fifth = max(1, len(memory) // 5)
    early, late = (statistics.median(part) for part in (memory[fifth : 2 * fifth], memory[-fifth:]))
    print(f"{args.backbone}, 16 clients, {args.size} x {args.size} images, {args.device}, {args.soak:g} s\n")
    print("| what | found |")
    print("| --- | --- |")
    print(f"| good requests | {len(loaded.latencies)}, {len(loaded.lost)} lost |")
    print(f"| their latency | p50 {loaded.quantile(0.5):.0f} ms, p99 {loaded.quantile(0.99):.0f} ms |")
    print(f"| bad requests | {sent}, {wrong.total()} answered otherwise than they should |")
    print(f"| whole generations put into the folder | {put}, {taken} taken |")
    print(f"| broken generations | {refused} refused |")
    print(f"| memory, second fifth of the time and last | {early:.0f} MB, {late:.0f} MB |")
    for text, count in [*wrong.most_common(5), *Counter(loaded.lost).most_common(5)]:
        print(f"{count} x {text}", file=sys.stderr)
    return int(bool(loaded.lost or wrong or taken != put or late > 1.05 * early))
