"""SHA-256 of files on a device, by the programs that it has; as pieces of shell scripts.

``sha256sum`` is in toybox, busybox and coreutils. Where ``openssl`` is there too, it reads large files: coreutils' own code
has no use for a processor's SHA instructions (100 MiB in 0.35 s instead of 0.09 s, x86-64). Both write a line for each
file: digest, two characters, name. A name with a newline or a backslash is escaped, with a backslash in front of the
line (coreutils), or not (toybox); since we know the names, both can be told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from pytest_qnn.adb.shell import quote
from pytest_qnn.errors import DeviceFileError

LONGEST_SCRIPT = 45_000  # bytes, quoted: it is one word of a command
FAST_BYTES = 8 << 20  # from which a faster program is worth its start
MISMATCH = 65  # exit code of a script that found another digest

FIND_FAST = "printf abc | openssl dgst -sha256 -r 2>/dev/null"
FAST_FOUND = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


def compute(paths: Sequence[str], *, fast: bool) -> Iterator[tuple[str, list[str]]]:
    """Scripts that write the digests of ``paths``, each with those that it is about; :func:`parse` reads what it writes."""
    for batch in _batches(paths, lambda path: len(quote(quote(path)).encode()) + 1):
        yield f"{_command(batch, fast)}\n", batch


def publish(wanted: Mapping[str, str], hidden: str, folder: str, *, fast: bool) -> Iterator[str]:
    """Scripts that compare digests of files in the folder ``hidden`` and move them to ``folder``, some by some; the last removes
    ``hidden``. A script ends with :data:`MISMATCH`, and the digests that it found, where one differs.

    Args:
        wanted: SHA-256 by name in ``hidden``.
    """
    batches = list(_batches(list(wanted), lambda name: 3 * len(quote(quote(f"./{name}")).encode()) + 70))
    for number, batch in enumerate(batches, 1):
        names = [f"./{name}" for name in batch]  # one may begin with a dash
        patterns = "|".join(quote(text) for text in _possible(names, [wanted[name] for name in batch], fast))
        script = (
            f"cd {quote(hidden)} || exit 1\n"
            f"o=$({_command(names, fast)}) || exit 1\n"
            f"case $o in {patterns}) ;; *) printf '%s\\n' \"$o\"; exit {MISMATCH};; esac\n"
            f"mv -f {' '.join(map(quote, names))} {quote(folder.rstrip('/') + '/')} || exit 1\n"
        )
        yield script + (f"cd / && rmdir {quote(hidden)}\n" if number == len(batches) else "")


def differing(output: bytes, wanted: Mapping[str, str]) -> list[str]:
    """The names whose digests differ, out of what :func:`publish` wrote."""
    text = output.decode("utf-8", "surrogateescape")
    told = [name for name in wanted if f"./{name}" in text or f"./{_escaped(name)}" in text]
    return [name for name in told if wanted[name] not in text]


def parse(output: bytes, paths: Sequence[str]) -> list[str]:
    """SHA-256 of ``paths``, in their order, out of what :func:`compute` wrote.

    Raises:
        DeviceFileError: it wrote something else.
    """
    text = output.decode("utf-8", "surrogateescape")
    digests, position = [], 0
    for path in paths:
        names = "|".join(re.escape(name) for name in dict.fromkeys((path, _escaped(path))))
        match = re.compile(rf"\\?([0-9a-f]{{64}}) [ *][^\n]*?(?:{names})\n").match(text, position)
        if not match:
            raise DeviceFileError(f"the device's sha256sum wrote {text[position : position + 200]!r} about {path!r}")
        position = match.end()
        digests.append(match[1])
    if position != len(text):
        raise DeviceFileError(f"the device's sha256sum wrote {text[position : position + 200]!r} at its end")
    return digests


def _batches(names: Sequence[str], cost: Callable[[str], int]) -> Iterator[list[str]]:
    """``names`` in lists of which one script each can take: at most LONGEST_SCRIPT bytes, ``cost`` of each added up."""
    batch: list[str] = []
    size = 0
    for name in names:
        if batch and size + cost(name) > LONGEST_SCRIPT:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += cost(name)
    if batch:
        yield batch


def _command(paths: Sequence[str], fast: bool) -> str:
    return f"{_program(paths, fast)} {' '.join(map(quote, paths))}"


def _program(paths: Sequence[str], fast: bool) -> str:
    return "openssl dgst -sha256 -r" if fast and all(_escaped(path) == path for path in paths) else "sha256sum"


def _possible(names: Sequence[str], digests: Sequence[str], fast: bool) -> list[str]:
    """What the program may write, without newlines at the end, as ``$(...)`` has it."""
    files = list(zip(names, digests, strict=True))
    if _program(names, fast) != "sha256sum":
        return ["\n".join(f"{digest} *{name}" for name, digest in files)]
    plain = "\n".join(f"{digest}  {name}" for name, digest in files).rstrip("\n")
    escaped = "\n".join(
        f"\\{digest}  {_escaped(name)}" if _escaped(name) != name else f"{digest}  {name}" for name, digest in files
    )
    return list(dict.fromkeys((plain, escaped)))


def _escaped(path: str) -> str:
    return path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
