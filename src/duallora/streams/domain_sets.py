"""DomainNet, CORe50 and Office-Home: the same classes in several domains."""

from __future__ import annotations

import re
from pathlib import Path

from duallora.errors import DualLoRAError
from duallora.streams.collection import UNSURE, Collection, Part, Request, StreamEntry
from duallora.streams.listed import (
    Labelled,
    ListedImages,
    class_folders,
    read_lines,
    require_listed,
    stratified,
)

_DOMAINNET = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")

_CORE50_TRAIN = (1, 2, 4, 5, 6, 8, 9, 11)
_CORE50_TEST = (3, 7, 10)
_CORE50_CATEGORIES = (
    "plug_adapter",
    "mobile_phone",
    "scissor",
    "light_bulb",
    "can",
    "glass",
    "ball",
    "marker",
    "cup",
    "remote_control",
)
_CORE50_OBJECTS = 5  # of each category

_OFFICE_HOME = ("Art", "Clipart", "Product", "Real World")


def load_domainnet(request: Request) -> Collection:
    """Reads the official lists, two a domain; the class is the folder that a path names.

    Raises:
        DualLoRAError: images or lists are missing, or a list is not as in the original.
    """
    root = request.root()
    parts = []
    for domain in _DOMAINNET:
        train, test = (_domainnet_list(root, f"{domain}_{part}.txt") for part in ("train", "test"))
        parts.append(Part(domain, ListedImages(root, train), ListedImages(root, test)))
    return Collection(request.entry.name, tuple(parts))


def _domainnet_list(root: Path, name: str) -> list[Labelled]:
    keys = [re.sub(r"\s+\d+$", "", line) for line in read_lines(root / name)]
    for number, key in enumerate(keys, start=1):
        if key.count("/") != 2:
            raise DualLoRAError(
                f"line {number} of {root / name} is not domain/class/file and a label: fetch the list again"
            )
    require_listed(root, keys, str(root / name))
    return [(key, key.split("/")[1]) for key in keys]


def load_core50(request: Request) -> Collection:
    """Trains on eight sessions, one domain each, and tests on the three that the protocol keeps apart.

    The protocol has one test set for all sessions. So that each task has its own, and all together are that
    set, every eighth frame of each video of the three sessions goes to each task.

    Raises:
        DualLoRAError: sessions are missing.
    """
    root = request.root()
    videos = [_core50_session(root, session) for session in _CORE50_TEST]
    parts = []
    for number, session in enumerate(_CORE50_TRAIN):
        test = [frame for video in videos for frame in _every(video, number, len(_CORE50_TRAIN))]
        train = ListedImages(root, _core50_session(root, session))
        parts.append(Part(f"s{session}", train, ListedImages(root, test)))
    return Collection(request.entry.name, tuple(parts))


def _core50_session(root: Path, session: int) -> list[Labelled]:
    return [(key, _core50_class(folder)) for key, folder in class_folders(root, f"s{session}")]


def _core50_class(folder: str) -> str:
    """``o1`` to ``o50`` by the names of the data set's own list of labels."""
    found = re.fullmatch(r"o(\d+)", folder)
    category, item = divmod(int(found[1]) - 1, _CORE50_OBJECTS) if found else (-1, 0)
    if not 0 <= category < len(_CORE50_CATEGORIES):
        return folder
    return f"{_CORE50_CATEGORIES[category]}{item + 1}"


def _every(session: list[Labelled], first: int, step: int) -> list[Labelled]:
    videos: dict[str, list[Labelled]] = {}
    for frame in session:
        videos.setdefault(frame[1], []).append(frame)
    return [frame for video in videos.values() for frame in sorted(video)[first::step]]


def load_office_home(request: Request) -> Collection:
    """Splits each class of each domain by a seed, as there is no official split.

    Raises:
        DualLoRAError: a domain is missing.
    """
    root = request.root()
    parts = []
    for domain in _OFFICE_HOME:
        train, test = stratified(class_folders(root, _office_home_folder(request, root, domain)), domain)
        parts.append(Part(domain, ListedImages(root, train), ListedImages(root, test)))
    return Collection(f"{request.entry.name} (seeded 80/20 split)", tuple(parts))


def _office_home_folder(request: Request, root: Path, domain: str) -> str:
    def plain(name: str) -> str:
        return re.sub(r"[\s_-]", "", name).casefold()

    for entry in sorted(root.iterdir()):
        if entry.is_dir() and plain(entry.name) == plain(domain):
            return entry.name
    raise request.missing(f"{root} has no folder {domain}/")


DOMAIN_SETS = (
    StreamEntry(
        name="domainnet",
        summary="the same things in six styles, from cliparts to photographs",
        classes="345",
        images="586,575 in all",
        size="17.5 GB",
        licence=UNSURE,
        load=load_domainnet,
        scenario="domain",
        tasks=5,
        page="http://ai.bu.edu/M3SDA/",
        files="the cleaned <domain>.zip, <domain>_train.txt and <domain>_test.txt of six domains",
        folder="domainnet",
        places=("domainnet", "DomainNet", "domain_net"),
        needs=tuple(f"{domain}_{part}.txt" for domain in _DOMAINNET for part in ("train", "test")),
        layout=(
            "<domain>_train.txt, <domain>_test.txt",
            f"<domain>/<class>/<file>, the domains being {', '.join(_DOMAINNET)}",
        ),
        notes=(
            "Six tasks, one a domain, in the order of the list above, which is the paper's.",
            "--scenario class pools the domains; its usual 5 tasks are the published 5 x 69 classes.",
            "One class (t-shirt) has no training image among the paintings: that task has 344 classes, and "
            "the test images of the class stay, as an earlier domain taught it.",
        ),
    ),
    StreamEntry(
        name="core50",
        summary="hand-held objects filmed in eleven sessions with other backgrounds and light",
        classes="50",
        images="164,866 in all",
        size=UNSURE,
        licence=UNSURE,
        load=load_core50,
        scenario="domain",
        tasks=10,
        page="https://vlomonaco.github.io/core50/",
        files="core50_128x128.zip",
        folder="core50",
        places=("core50/core50_128x128", "core50", "core50_128x128"),
        needs=tuple(f"s{session}" for session in range(1, 12)),
        layout=("core50_128x128/s1/o1/C_01_01_000.png, sessions s1 to s11 of objects o1 to o50",),
        notes=(
            "Eight tasks, one a session (s1, s2, s4, s5, s6, s8, s9, s11), each with all 50 objects as "
            "classes: the NI protocol at object level, its sessions in order of their numbers.",
            "Its test set, sessions s3, s7 and s10, is divided among the tasks frame by frame (frame i of a "
            "video, from 0, goes to task i mod 8 + 1), so the final accuracy over all test images is that on "
            "the whole set.",
            "--scenario class pools the sessions; --tasks 9 --first-classes 10 has the sizes of the NC "
            "protocol.",
        ),
    ),
    StreamEntry(
        name="office-home",
        summary="things found in offices and homes, in four styles",
        classes="65",
        images="15,588 in all",
        size=UNSURE,
        licence=UNSURE,
        load=load_office_home,
        scenario="domain",
        tasks=5,
        page="https://www.hemanthdv.org/officeHomeDataset.html",
        files="OfficeHomeDataset_10072016.zip",
        folder="office-home",
        places=(
            "office-home/OfficeHomeDataset_10072016",
            "office-home",
            "OfficeHomeDataset_10072016",
            "office_home",
        ),
        needs=("Art", "Clipart", "Product"),
        layout=(
            "OfficeHomeDataset_10072016/<domain>/<class>/<file>.jpg, the domains being Art, Clipart, Product "
            "and Real World (or RealWorld, Real_World)",
        ),
        notes=(
            "Four tasks, one a domain, in the order of the list above, which is the paper's.",
            "There is no official split: of each class in each domain a seeded fifth is tested on.",
            "--scenario class pools the domains.",
        ),
    ),
)
