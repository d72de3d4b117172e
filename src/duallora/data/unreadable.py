"""What a file is that cannot be read as an image here, and what to do about it."""

from __future__ import annotations

from pathlib import Path

_HEAD = 512  # bytes that are looked at

_CONVERT = "convert it to JPEG or PNG"

_BRANDS = {
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"heim": "HEIC",
    b"heis": "HEIC",
    b"hevc": "HEIC",
    b"hevx": "HEIC",
    b"mif1": "HEIF",
    b"msf1": "HEIF",
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"crx ": "a raw file of a camera (CR3)",
    b"qt  ": "a video",
    b"isom": "a video",
    b"mp41": "a video",
    b"mp42": "a video",
    b"M4V ": "a video",
}
_GENERIC = (b"mif1", b"msf1")  # say only that it is HEIF; a compatible brand says which

_STARTS = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"8BPS", "a Photoshop document"),
    (b"gimp xcf", "a GIMP document"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "PostScript"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"FUJIFILMCCD-RAW", "a raw file of a camera (RAF)"),
    (b"SIMPLE  =", "FITS"),
    (b"\x89HDF", "HDF5"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"PK\x03\x04", "a zip archive"),
    (b"<svg", "SVG"),
)
_ENDINGS = {
    ".heic": "HEIC",
    ".heif": "HEIF",
    ".hif": "HEIF",
    ".avif": "AVIF",
    ".jxl": "JPEG XL",
    ".svg": "SVG",
    ".psd": "a Photoshop document",
    ".pdf": "a PDF document",
    ".dcm": "DICOM",
    ".mov": "a video",
    ".mp4": "a video",
    ".cr2": "a raw file of a camera (CR2)",
    ".cr3": "a raw file of a camera (CR3)",
    ".nef": "a raw file of a camera (NEF)",
    ".arw": "a raw file of a camera (ARW)",
    ".dng": "a raw file of a camera (DNG)",
}


def foreign_kind(head: bytes) -> str | None:
    """What a file is by its first bytes, if it is of a kind that is known but not read here.

    Args:
        head: the beginning of the file.
    """
    if head[4:8] == b"ftyp":
        end = min(max(int.from_bytes(head[:4], "big"), 16), len(head))
        brands = [head[8:12], *(head[i : i + 4] for i in range(16, end - 3, 4))]
        for brand in [b for b in brands if b not in _GENERIC] + brands:
            if brand in _BRANDS:
                return _BRANDS[brand]
        return "a video or a picture in a container of MPEG"
    if head[128:132] == b"DICM":
        return "DICOM"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"<?xml") and b"<svg" in text:
        return "SVG"
    return next((kind for start, kind in _STARTS if head.startswith(start) or text.startswith(start)), None)


def kind_of_file(path: Path) -> str | None:
    """As :func:`foreign_kind`; what the first bytes do not tell, the ending of the name does."""
    found = None
    if path.is_file():
        try:
            with path.open("rb") as file:
                found = foreign_kind(file.read(_HEAD))
        except OSError:
            pass
    return found or _ENDINGS.get(path.suffix.lower())


def remedy(kind: str) -> str:
    """What to do about a file of a kind that is not read here."""
    more = " (on an iPhone: Settings, Camera, Formats, Most Compatible)" if kind.startswith("HEI") else ""
    return f"{_CONVERT}{more}"


def no_image(path: Path) -> str:
    """The sentence about a file that is no image by its name."""
    kind = kind_of_file(path)
    if kind is None:
        return f"{path} is not an image: remove it"
    return f"{path} is {kind}, which is not read here: {remedy(kind)}, or remove it"


def left_out(paths: list[Path]) -> str:
    """The sentence that counts files which are no images by their names, with what they are."""
    count = "1 file is" if len(paths) == 1 else f"{len(paths):,} files are"
    kinds: dict[str, int] = {}
    for path in paths:
        kind = kind_of_file(path)
        if kind is not None:
            kinds[kind] = kinds.get(kind, 0) + 1
    told = "".join(f"; {number:,} of them {kind}: {remedy(kind)}" for kind, number in kinds.items())
    return f"{count} left out as no image by the name, the first is {paths[0].name}{told}"
