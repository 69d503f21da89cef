"""A batch script as the lint rules see it: options, commands, and what is quoted how."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

# Short options of sbatch that rules ask for.
_SHORT = {"N": "nodes", "n": "ntasks", "c": "cpus-per-task", "t": "time", "p": "partition"}


@dataclass(frozen=True, kw_only=True)
class Script:
    """The parts of a script; lines that end in a backslash are joined."""

    text: str
    options: dict[str, str]
    """Of the #SBATCH lines, by long name; '' for those without a value."""
    late_options: tuple[str, ...]
    """#SBATCH lines after the first command."""
    code: str
    """Commands without comments."""
    shell: str
    """The same, single-quoted text that spans lines left out: what this shell itself runs."""
    expanded: str
    """The same without any single-quoted text: what this shell expands."""
    sruns: tuple[str, ...]
    """The srun commands that this shell runs."""

    def option(self, name: str, default: str) -> str:
        return self.options.get(name, default)

    def setting(self, name: str) -> str:
        """Value of the first `NAME=value` line, unquoted; '' without one."""
        found = re.search(rf"^{name}=(\S*)", self.shell, re.MULTILINE)
        if not found:
            return ""
        try:
            words = shlex.split(found[1])
        except ValueError:
            return found[1]
        return words[0] if words else ""


def read_script(text: str) -> Script:
    """Split a script; never fails, whatever the text."""
    options: dict[str, str] = {}
    late: list[str] = []
    started = False
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            if started:
                late.append(line.strip())
            else:
                options |= _options(line.removeprefix("#SBATCH"))
        elif line.strip() and not line.lstrip().startswith("#"):
            started = True
    code, shell, expanded = _views(text)
    starts = re.compile(r"(?:^|[;&|(]\s*|\bthen\s+|\bdo\s+|\bexec\s+)\s*srun\b")
    sruns = tuple(line.strip() for line in shell.splitlines() if starts.search(line))
    return Script(
        text=text, options=options, late_options=tuple(late), code=code, shell=shell,
        expanded=expanded, sruns=sruns,
    )  # fmt: skip


def _options(line: str) -> dict[str, str]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        words = line.split()
    found: dict[str, str] = {}
    while words:
        word = words.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("--"):
            if not equals and words and not words[0].startswith("-"):
                value = words.pop(0)
            found[name] = value
        elif word.startswith("-") and len(word) > 1:
            value = word[2:] or (words.pop(0) if words and not words[0].startswith("-") else "")
            found[_SHORT.get(word[1], word[1])] = value
    return found


def _views(text: str) -> tuple[str, str, str]:
    """(code, shell, expanded) of a script: one pass over its characters."""
    code: list[str] = []
    expanded: list[str] = []
    quoted: list[tuple[int, int]] = []
    quote, begin, i = "", 0, 0
    while i < len(text):
        char, before = text[i], text[i - 1] if i else "\n"
        if quote == "'" and char == "'":
            quote = ""
            quoted.append((begin, len(code)))
        elif quote == "" and char == "'":
            quote, begin = "'", len(code)
        elif char == "\\" and quote != "'" and i + 1 < len(text):
            pair = " " if text[i + 1] == "\n" else text[i : i + 2]
            code.append(pair)
            expanded.append(" " if pair == " " or text[i + 1] == "$" else pair)
            i += 2
            continue
        elif char == '"' and quote != "'":
            quote = "" if quote == '"' else '"'
        elif char == "#" and quote == "" and before in " \t\n;(":
            end = text.find("\n", i)
            i = len(text) if end < 0 else end
            continue
        code.append(char)
        if quote != "'" or char == "\n":
            expanded.append(char)
        i += 1
    whole = "".join(code)
    return whole, _without_long_quotes(code, quoted), "".join(expanded)


def _without_long_quotes(code: list[str], quoted: list[tuple[int, int]]) -> str:
    """The code with single-quoted texts of several lines emptied: other shells run those."""
    kept = list(code)
    for begin, end in quoted:
        if "\n" in "".join(code[begin:end]):
            kept[begin + 1 : end] = [""] * (end - begin - 1)
    return "".join(kept)
