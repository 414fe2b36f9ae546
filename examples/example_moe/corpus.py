"""The training text: files that any machine has, sorted into domains, split by file.

Nothing of the text is kept in the repository, only a manifest: per file its path below a named
root, the bytes used, their SHA-256, the domain and whether it is for training or held out.
"""

import gzip
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

MAX_FILE_BYTES = 48 * 1024
"""Of a longer file only this beginning is used, so that no file dominates its domain (bytes)."""
MIN_FILE_BYTES = 1500
"""Shorter files are left out (bytes)."""
MIN_DOMAIN_BYTES = 60_000
"""A domain with less text than this on the machine is skipped (bytes)."""
MIN_HELD_OUT_BYTES = 20_000
"""Files are added to a domain until at least this much of it is held out (bytes)."""
HELD_OUT_SHARE = 0.12
"""Share of the files kept from training."""

ROOTS = {
    "stdlib": Path(sysconfig.get_path("stdlib")),
    "site-packages": Path(sysconfig.get_path("purelib")),
    "include": Path("/usr/include"),
    "doc": Path("/usr/share/doc"),
    "common-licenses": Path("/usr/share/common-licenses"),
    "perl": Path("/usr/share/perl"),
    "man": Path("/usr/share/man"),
}
"""Where text is looked for; a root that does not exist is passed over."""

DOMAINS: dict[str, list[tuple[str, str]]] = {
    "python": [("stdlib", "**/*.py")],
    "c_header": [("include", "**/*.h"), ("site-packages", "*/include/**/*.h")],
    "perl": [("perl", "**/*.p[lm]")],
    "manual": [("man", "man[1-8]/*.gz")],
    "licence": [
        ("common-licenses", "*"),
        ("doc", "*/copyright"),
        ("site-packages", "*.dist-info/licenses/**/*"),
        ("site-packages", "*.dist-info/LICEN*"),
    ],
    "prose": [
        ("doc", "**/README*"),
        ("doc", "**/*.txt*"),
        ("doc", "**/*.md*"),
        ("doc", "**/*.rst*"),
        ("perl", "**/*.pod"),
        ("site-packages", "*.dist-info/METADATA"),
        ("site-packages", "**/*.md"),
        ("site-packages", "**/*.rst"),
    ],
    "data": [
        (root, f"**/*.{suffix}")
        for root in ("site-packages", "doc", "stdlib")
        for suffix in ("json", "yaml", "yml", "toml")
    ],
}
"""Domain -> (root, glob) pairs."""

_LEFT_OUT = (
    "site-packages/", "unicore/", "lib2to3/tests/", "idlelib/", "pydoc_data/", "__pycache__/",
    "ATen/ops/", "archs/", "gcloud_",
)  # fmt: skip
"""Left out below a root: installed packages, generated tables, hundreds of near copies."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One file of the corpus, as it stands in the manifest."""

    domain: str
    root: str
    """Name of a root in `ROOTS`."""
    path: str
    """Path below the root."""
    bytes: int
    """Length of the text used, in bytes of UTF-8."""
    sha256: str
    """Of the text used."""
    split: str
    """``train`` or ``held_out``."""


def _read(path: Path) -> str | None:
    """Read the beginning of a text file; None if it is not UTF-8 text of a useful length."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                raw = stream.read(MAX_FILE_BYTES)
        else:
            with path.open("rb") as stream:
                raw = stream.read(MAX_FILE_BYTES)
    except (OSError, EOFError):
        return None
    text = raw[: raw.rfind(b"\n") + 1]
    try:
        return text.decode() if len(text) >= MIN_FILE_BYTES and b"\0" not in text else None
    except UnicodeDecodeError:
        return None


def _candidates(domain: str) -> list[tuple[str, str]]:
    """(root, path) of a domain's files, in the order of a hash: the same on every run."""
    found = set()
    for root, pattern in DOMAINS[domain]:
        for path in ROOTS[root].glob(pattern):
            below = path.relative_to(ROOTS[root]).as_posix()
            if path.is_file() and not any(part in below for part in _LEFT_OUT):
                found.add((root, below))
    return sorted(found, key=lambda item: _digest("/".join(item)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _split(root: str, path: str) -> str:
    """By a hash of the path: a file never changes sides, whatever else is in the corpus."""
    share = int(_digest(f"split:{root}/{path}")[:8], 16) / 2**32
    return "held_out" if share < HELD_OUT_SHARE else "train"


def _collect_domain(domain: str, budget: int, seen: set[str]) -> dict[Document, str]:
    """Take a domain's files up to `budget` bytes, beyond it only while little is held out."""
    chosen: dict[Document, str] = {}
    taken = {"train": 0, "held_out": 0}
    for root, path in _candidates(domain):
        text = _read(ROOTS[root] / path)
        if text is None or _digest(text) in seen:
            continue
        seen.add(_digest(text))
        document = Document(
            domain=domain,
            root=root,
            path=path,
            bytes=len(text.encode()),
            sha256=_digest(text),
            split=_split(root, path),
        )
        chosen[document] = text
        taken[document.split] += document.bytes
        if sum(taken.values()) >= budget and taken["held_out"] >= MIN_HELD_OUT_BYTES:
            break
    if sum(taken.values()) < MIN_DOMAIN_BYTES or not taken["held_out"]:
        print(f"domain {domain}: {sum(taken.values())} bytes on this machine -- skipped")
        return {}
    print(f"domain {domain}: {len(chosen)} files, {sum(taken.values()) / 1e6:.2f} MB")
    return chosen


def collect(bytes_per_domain: int) -> dict[Document, str]:
    """Choose the corpus of this machine: per domain up to a budget, no text twice.

    Parameters
    ----------
    bytes_per_domain
        Text to take per domain, in bytes.

    Returns
    -------
    dict
        Each chosen document and its text.

    Raises
    ------
    SystemExit
        When fewer than four domains are found.
    """
    corpus: dict[Document, str] = {}
    seen: set[str] = set()
    for domain in DOMAINS:
        corpus |= _collect_domain(domain, bytes_per_domain, seen)
    domains = {document.domain for document in corpus}
    if len(domains) < 4:
        raise SystemExit(
            f"only {len(domains)} domains found ({', '.join(sorted(domains))}) -- four are needed "
            "-- install documentation or header packages"
        )
    return corpus


def write_manifest(corpus: dict[Document, str], path: Path) -> None:
    """Write the manifest, one document a line."""
    lines = [json.dumps(asdict(document)) for document in corpus]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def read_held_out(manifest: Path) -> dict[Document, str]:
    """Read a manifest's held-out documents back from this machine, checking every hash.

    Raises
    ------
    SystemExit
        When one of them is missing or differs from the manifest.
    """
    corpus = {}
    for fields in json.loads(manifest.read_text()):
        document = Document(**fields)
        if document.split != "held_out":
            continue
        text = _read(ROOTS[document.root] / document.path)
        if text is None or _digest(text) != document.sha256:
            raise SystemExit(
                f"{document.root}/{document.path} is missing or differs from {manifest.name} -- "
                "only the text that was held out can be recorded -- train again"
            )
        corpus[document] = text
    return corpus


def texts(corpus: dict[Document, str], split: str, domain: str | None = None) -> Iterator[str]:
    """Texts of one split, of one domain or of all."""
    for document, text in corpus.items():
        if document.split == split and domain in (None, document.domain):
            yield text
