"""The dynamic symbols of a library: what it takes from others, and gives."""

import mmap
import struct
from pathlib import Path

_SECTION = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr
_DYNAMIC_SYMBOLS = 11  # SHT_DYNSYM


def dynamic_names(path: Path) -> set[str]:
    """Return the names in a 64-bit library's dynamic string table.

    They are those of its symbols, and few others. Empty for what is no such library.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with content:
        try:
            return _names(content)
        except (struct.error, IndexError):  # torn
            return set()


def _names(content: mmap.mmap) -> set[str]:
    if content[:5] == b"\x7fELF\x02":
        (offset,) = struct.unpack_from("<Q", content, 0x28)
        size, count = struct.unpack_from("<HH", content, 0x3A)
        sections = [
            _SECTION.unpack_from(content, offset + size * index)
            for index in range(count)
        ]
        for section in sections:
            if section[1] == _DYNAMIC_SYMBOLS:
                names = sections[section[6]]
                table = content[names[4] : names[4] + names[5]]
                return {name.decode(errors="replace") for name in table.split(b"\0")}
    return set()
